"""A plan as one self-contained HTML page: tables, traffic between devices and load per layer, before and after."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from placement.cost import device_traffic
from placement.plan import PlacementPlan
from placement.problem import PlacementProblem
from placement.report import busy, table_rows
from placement.topology import Floats

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
:root { color-scheme: light dark; } .table { overflow-x: auto; } dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8886; }
td:first-child, th:first-child { text-align: left; } .maps { display: flex; flex-wrap: wrap; gap: 2rem; }
figure { margin: 0; } figcaption { margin-bottom: .3rem; } svg { display: block; max-width: 100%; height: auto; }
"""
WORDS = {
    "traffic": "mean hop cost of a step from an expert to an expert of the next layer",
    "cut %": "steps that leave the GPU",
    "node %": "steps that leave the node",
    "balance, worst": "a layer's busiest GPU over its fair share, mean and worst layer; 1 is even",
    "gap %": "what a plan could still gain at most: its distance from the proven lower bound",
}


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
        _settings(after),
        _table(table_rows(problem, plans, unseen)),
        "<dl>" + "".join(f"<dt>{word}</dt><dd>{text}</dd>" for word, text in WORDS.items()) + "</dl>",
        "<h2>Traffic from GPU (row) to GPU (column), share of all transitions</h2>",
        _pair(before, after, [device_traffic(problem, plan.layout) for plan in (before, after)], "GPU"),
        "<h2>Load over fair share, layer (row) by GPU (column)</h2>",
        _pair(before, after, [busy(problem, plan) for plan in (before, after)], "layer"),
    ]
    body = "\n".join(parts)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>Placement</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en">{head}\n{body}</html>\n'


def _settings(plan: PlacementPlan) -> str:
    """What the plan was made under, as far as it was asked for."""
    asked = {name: value for name, value in plan.objective.items() if value not in (None, 0, 0.0, [])}
    return "<p>Settings: " + html.escape(", ".join(f"{name} {value}" for name, value in asked.items())) + "</p>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows[1:]]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="table"><table><tr>{head}</tr>{body}</table></div>'


def _pair(before: PlacementPlan, after: PlacementPlan, values: list[Floats], row: str) -> str:
    """Two maps with one scale of colour, a GPU in each column."""
    top = max(float(v.max()) for v in values) or 1.0
    figures = [
        f"<figure><figcaption>{html.escape(plan.solver)}: {_axes(v, row)}; white is 0, dark blue {top:.3g}"
        f"</figcaption>{heat_map(v, top, row)}</figure>"
        for plan, v in zip((before, after), values, strict=True)
    ]
    return f'<div class="maps">{"".join(figures)}</div>'


def _axes(values: Floats, row: str) -> str:
    rows, columns = values.shape
    return f"{row} 0 to {rows - 1} down, GPU 0 to {columns - 1} across"


def heat_map(values: Floats, top: float, row: str) -> str:
    """[R, C] as SVG; darker is more, `top` the darkest; each cell says its value when pointed at."""
    rows, columns = values.shape
    size = int(np.clip(480 // max(rows, columns), 4, 28))
    cells = [
        f'<rect x="{c * size}" y="{r * size}" width="{size}" height="{size}" fill="{_colour(values[r, c] / top)}">'
        f"<title>{row} {r}, GPU {c}: {values[r, c]:.4g}</title></rect>"
        for r in range(rows)
        for c in range(columns)
    ]
    wide, high = columns * size, rows * size
    return f'<svg width="{wide}" height="{high}" viewBox="0 0 {wide} {high}" role="img">{"".join(cells)}</svg>'


def _colour(share: float) -> str:
    """White to dark blue."""
    light = np.array([247, 250, 255])
    dark = np.array([8, 48, 107])
    red, green, blue = (light + (dark - light) * float(np.clip(share, 0, 1))).round().astype(int).tolist()
    return f"#{red:02x}{green:02x}{blue:02x}"
