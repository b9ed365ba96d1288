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
:root { color-scheme: light dark; --full: light-dark(#08306b, #9ecae1); --card: light-dark(#ffffff, #191e22); }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  overflow-wrap: anywhere; background: light-dark(#f5f6f6, #111518); color: light-dark(#1b2227, #e4e9ec); }
.table, figure { overflow-x: auto; } dt { font-weight: 600; } dd { margin: 0 0 .4rem; }
table { border-collapse: collapse; white-space: nowrap; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8886; }
td:first-child, th:first-child { text-align: left; } .maps { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; padding: .75rem; background: var(--card); border-radius: .5rem; max-width: 100%;
  box-sizing: border-box; }
figcaption { margin-bottom: .3rem; } svg { display: block; }
rect { fill: var(--full); stroke: #8884; stroke-width: .5; }
text { fill: currentColor; font-size: 11px; } .down { text-anchor: end; dominant-baseline: central; }
.across { text-anchor: middle; }
@media (max-width: 30rem) { body { margin: 1rem auto; padding: 0 .5rem; } h1 { font-size: 1.3rem; }
  h2 { font-size: 1.1rem; } }
"""
LEFT, TOP, TICK_ROOM = 48, 34, 22
"""Pixels left of a map and above it, and for each number on an axis."""
SCALE, SCALE_STEP = 5, 58
"""Squares of the scale below a map, and pixels from one to the next."""
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
        "<h2>Traffic from GPU (down) to GPU (across), as a share of all transitions</h2>",
        _pair(before, after, [device_traffic(problem, plan.layout) for plan in (before, after)], "GPU"),
        "<h2>Load over fair share: layer (down) by GPU (across); 1 is even</h2>",
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
        f"<figure><figcaption>{html.escape(plan.solver)}</figcaption>{heat_map(v, top, row)}{_scale(top)}</figure>"
        for plan, v in zip((before, after), values, strict=True)
    ]
    return f'<div class="maps">{"".join(figures)}</div>'


def heat_map(values: Floats, top: float, row: str) -> str:
    """[R, C] as SVG with numbered axes; fuller is more, `top` the fullest. A cell says its value when pointed at."""
    rows, columns = values.shape
    size = int(np.clip(480 // max(rows, columns), 6, 28))
    cells = [
        _cell(LEFT + c * size, TOP + r * size, size, values[r, c] / top, f"{row} {r}, GPU {c}: {values[r, c]:.4g}")
        for r in range(rows)
        for c in range(columns)
    ]
    wide, high = LEFT + columns * size + 1, TOP + rows * size + 1
    label = f"{row} 0 to {rows - 1} down, GPU 0 to {columns - 1} across; the largest value is {values.max():.4g}"
    body = "".join([*_axes(rows, columns, size, row), *cells])
    return f'<svg width="{wide}" height="{high}" role="img" aria-label="{html.escape(label)}">{body}</svg>'


def _cell(x: int, y: int, size: int, share: float, says: str) -> str:
    opacity = float(np.clip(share, 0, 1))
    place = f'x="{x}" y="{y}" width="{size}" height="{size}"'
    return f'<rect {place} fill-opacity="{opacity:.3f}"><title>{html.escape(says)}</title></rect>'


def _axes(rows: int, columns: int, size: int, row: str) -> list[str]:
    """Names of both axes, and as many numbers as have room."""
    step = -(-TICK_ROOM // size)
    names = [f'<text class="down" x="{LEFT - 6}" y="{TOP - 10}">{row}</text>', f'<text x="{LEFT}" y="12">GPU</text>']
    down = [f'<text class="down" x="{LEFT - 6}" y="{TOP + (r + 0.5) * size}">{r}</text>' for r in range(0, rows, step)]
    across = [
        f'<text class="across" x="{LEFT + (c + 0.5) * size}" y="{TOP - 6}">{c}</text>' for c in range(0, columns, step)
    ]
    return [*names, *down, *across]


def _scale(top: float) -> str:
    """What the fullness of a square means."""
    shares = [step / (SCALE - 1) for step in range(SCALE)]
    cells = "".join(
        _cell(LEFT + i * SCALE_STEP, 4, 14, share, f"{share * top:.3g}")
        + f'<text x="{LEFT + i * SCALE_STEP + 17}" y="15">{share * top:.2g}</text>'
        for i, share in enumerate(shares)
    )
    opening = f'<svg width="{LEFT + SCALE * SCALE_STEP + 4}" height="24" role="img"'
    return f'{opening} aria-label="scale: 0 to {top:.3g}">{cells}</svg>'
