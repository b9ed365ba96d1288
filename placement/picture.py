"""A plan's maps as PNG. The only file that needs matplotlib, and only when called."""

from __future__ import annotations

from pathlib import Path

from moe_serve_base.whole_files import whole_file
from placement.cost import device_traffic
from placement.errors import PlacementError
from placement.plan import PlacementPlan
from placement.problem import PlacementProblem
from placement.report import busy


def save_picture(problem: PlacementProblem, before: PlacementPlan, after: PlacementPlan, path: Path) -> None:
    """Traffic between devices above, load over fair share per layer below; `before` left, `after` right."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise PlacementError("png", "needs matplotlib; pip install 'moe-serve-engine[plot]'") from None
    figure = Figure(figsize=(10, 9), layout="constrained")
    axes = figure.subplots(2, 2)
    traffic = [device_traffic(problem, plan.layout) for plan in (before, after)]
    loads = [busy(problem, plan) for plan in (before, after)]
    for row, (maps, title, label) in enumerate(
        ((traffic, "traffic, share of transitions", "from GPU"), (loads, "load over fair share", "layer"))
    ):
        top = max(float(values.max()) for values in maps)
        for column, (plan, values) in enumerate(zip((before, after), maps, strict=True)):
            image = axes[row, column].imshow(values, cmap="Blues", vmin=0, vmax=top, aspect="auto")
            axes[row, column].set(title=f"{plan.solver}: {title}", xlabel="GPU", ylabel=label)
        figure.colorbar(image, ax=axes[row, :].tolist())
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
