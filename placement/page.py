"""A plan as one self-contained HTML page: tables, traffic between devices and load per layer, before and after."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from placement.cost import device_load, device_traffic
from placement.plan import PlacementPlan
from placement.problem import PlacementProblem
from placement.report import table_rows
from placement.topology import Floats

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; } .maps { display: flex; flex-wrap: wrap; gap: 2rem; }
figure { margin: 0; } figcaption { margin-bottom: .3rem; } svg { display: block; }
"""


def as_page(
    problem: PlacementProblem,
    plans: Sequence[PlacementPlan],
    before: PlacementPlan,
    after: PlacementPlan,
    unseen: PlacementProblem | None = None,
) -> str:
    """The page. Traffic and load are those of `problem`; `unseen` adds columns to the table."""
    sources = html.escape(str(after.provenance.get("source", "unknown trace")))
    bound = (
        f"{after.cost.total:.4f}, at least {after.lower_bound:.4f} ({after.bound_method}): gap {100 * after.gap:.2f} %"
    )
    parts = [
        f"<h1>Placement of {after.num_experts} experts x {after.num_layers} layers on {after.num_devices} GPUs</h1>",
        f"<p>Trace: {sources}</p><p>Best plan: {html.escape(after.solver)}, objective {bound}.</p>",
        _table(table_rows(problem, plans, unseen)),
        "<h2>Traffic from GPU (row) to GPU (column), share of all transitions</h2>",
        _pair(before, after, [device_traffic(problem, plan.layout) for plan in (before, after)], "GPU", "GPU"),
        "<h2>Load over fair share, layer (row) by GPU (column)</h2>",
        _pair(before, after, [_busy(problem, plan) for plan in (before, after)], "layer", "GPU"),
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>Placement</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">{head}\n{body}</html>\n'


def _busy(problem: PlacementProblem, plan: PlacementPlan) -> Floats:
    return device_load(problem, plan.layout) / problem.topology.fair_share


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows[1:]]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _pair(before: PlacementPlan, after: PlacementPlan, values: list[Floats], row: str, column: str) -> str:
    """Two maps with one scale of colour."""
    top = max(float(v.max()) for v in values) or 1.0
    figures = [
        f"<figure><figcaption>{html.escape(plan.solver)}</figcaption>{heat_map(v, top, row, column)}</figure>"
        for plan, v in zip((before, after), values, strict=True)
    ]
    return f'<div class="maps">{"".join(figures)}</div>'


def heat_map(values: Floats, top: float, row: str, column: str) -> str:
    """[R, C] as SVG; darker is more, `top` the darkest; each cell says its value when pointed at."""
    rows, columns = values.shape
    size = int(np.clip(480 // max(rows, columns), 4, 28))
    cells = [
        f'<rect x="{c * size}" y="{r * size}" width="{size}" height="{size}" fill="{_colour(values[r, c] / top)}">'
        f"<title>{row} {r}, {column} {c}: {values[r, c]:.4g}</title></rect>"
        for r in range(rows)
        for c in range(columns)
    ]
    return f'<svg width="{columns * size}" height="{rows * size}" role="img">{"".join(cells)}</svg>'


def _colour(share: float) -> str:
    """White to dark blue."""
    light = np.array([247, 250, 255])
    dark = np.array([8, 48, 107])
    red, green, blue = (light + (dark - light) * float(np.clip(share, 0, 1))).round().astype(int).tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"
