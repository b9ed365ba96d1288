"""Write the tables of docs/models.md anew: `python docs/write_models.py`.

Which checkpoints are served comes from the tests of their twins. What fits where is the arithmetic of `doctor` and of
the start of the engine, with the published configs in tests/checkpoints/published.json. Each table stands between two
marks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from moe_serve.cli.doctor import command_line  # noqa: E402
from moe_serve.config import EngineConfig  # noqa: E402
from moe_serve.doctor.fit import Sizes, fit  # noqa: E402
from moe_serve.doctor.from_config import sizes_from_config  # noqa: E402
from moe_serve.doctor.rates import Rates  # noqa: E402
from moe_serve.execution.step_memory import divide, step_bytes  # noqa: E402
from moe_serve.hf.config_file import read_config  # noqa: E402
from moe_serve.hf.families import MISSING  # noqa: E402
from moe_serve.hf.loading import shapes_of  # noqa: E402
from moe_serve.resolve import step_shape  # noqa: E402
from moe_serve.spec import ModelSpec  # noqa: E402
from tests.checkpoints.rows import MORE, ROWS  # noqa: E402
from tests.checkpoints.twin import Row  # noqa: E402

PAGE = ROOT / "docs/models.md"
PUBLISHED: Mapping[str, Any] = json.loads((ROOT / "tests/checkpoints/published.json").read_text())
GB = 10**9
GPU_GB = (24, 80, 141)
CPU_GB = 64
BECOME_FLOATS = ("mxfp4", "fp8")
"""Published codes that a GPU's slots hold as bf16 (docs/kernels.md, Layout)."""
UNMEASURED = Rates(1.0, None, None, None, 1.0, 1.0)
"""What fits is the same for all rates."""


def mark(name: str) -> tuple[str, str]:
    """What stands before and after a table."""
    return f"<!-- {name}: written by docs/write_models.py -->\n", f"<!-- end of {name} -->\n"


def served() -> str:
    """The 25 checkpoints, and whether their twins are served."""
    count = sum(row.twin is not None for row in ROWS)
    lines = [f"{count} of {len(ROWS)} are served.\n", "| Checkpoint | `model_type` | Stored as | Served |"]
    lines += ["|---|---|---|---|", *(_line(row) for row in ROWS), "", "Further models and forms:\n"]
    lines += ["| Checkpoint | `model_type` | Stored as | Served |", "|---|---|---|---|", *(_line(row) for row in MORE)]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    if row.twin is not None:
        return f"| {row.name} | {row.model_type} | {row.twin.stored} | yes |"
    why = f"needs {MISSING[row.model_type]}" if row.model_type in MISSING else "not in transformers 5.23"
    why = row.lacks or why
    return f"| {row.name} | {row.model_type} | | no: {why} |"


def fits() -> str:
    """Per published checkpoint, its size and what each kind of machine holds."""
    machines = [f"GPU, {gb} GB" for gb in GPU_GB] + [f"CPU, {CPU_GB} GB"]
    lines = [f"| Checkpoint | GB | Dense, GB | {' | '.join(machines)} |", "|---|---|---|" + "---|" * len(machines)]
    return "\n".join([*lines, *(fit_line(name) for name in PUBLISHED)]) + "\n"


def fit_line(name: str) -> str:
    """The row of one checkpoint."""
    fields = PUBLISHED[name]["config"]
    with _folder(fields) as stored, _folder(_as_on_gpu(fields)) as on_gpu:
        in_ram = sizes_from_config(stored, torch.bfloat16)
        cells = [_gpu_cell(on_gpu, in_ram if fields == _as_on_gpu(fields) else None)]
    total, dense = PUBLISHED[name]["total_size"] / GB, in_ram.dense_bytes / GB
    return f"| {name} | {total:.0f} | {dense:.1f} | {' | '.join([*cells, _cpu_cell(name, in_ram)])} |"


@contextmanager
def _folder(fields: Mapping[str, Any]) -> Iterator[str]:
    """A folder with this config.json alone."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(fields))
        yield folder


def _as_on_gpu(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same config without codes, where a GPU keeps none of them."""
    method = fields.get("quantization_config", {}).get("quant_method")
    assert method is None or method in BECOME_FLOATS, f"say whether a GPU keeps {method}'s codes"
    return {name: value for name, value in fields.items() if name != "quantization_config"}


def _gpu_cell(folder: str, known: Sizes | None) -> str:
    """What a GPU's memory is divided into at the start, with default settings."""
    sizes = known or sizes_from_config(folder, torch.bfloat16)
    hf_config, config = read_config(folder), EngineConfig()
    shape = step_shape(config, ModelSpec.from_hf(hf_config), shapes_of(hf_config)[0], sizes.context, torch.bfloat16)
    pages = config.max_num_seqs * sizes.context * sizes.kv_bytes_per_token
    shares = (divide(gb * GB - sizes.dense_bytes, step_bytes(shape), sizes.all_experts_bytes, pages) for gb in GPU_GB)
    return " | ".join(_held(each.experts, sizes) for each in shares)


def _held(experts_bytes: int, sizes: Sizes) -> str:
    if experts_bytes < sizes.expert_bytes:
        return "no"
    share = experts_bytes / sizes.all_experts_bytes
    return "all" if share >= 1 else f"{100 * share:.0f} %"


def _cpu_cell(name: str, sizes: Sizes) -> str:
    """What RAM holds, and the flags that `doctor` prints."""
    found = fit(sizes, UNMEASURED, CPU_GB * GB, is_cpu=True)
    if not found.dense_fits:
        return "no"
    flags = command_line(name, found).removeprefix(f"moe-serve serve {name}").strip()
    return "all" if found.all_experts_fit else f"{100 * found.cached_frac:.0f} %: `{flags}`"


TABLES: Mapping[str, Callable[[], str]] = {"checkpoints": served, "sizes": fits}


def renewed(text: str, name: str) -> str:
    """The page with one table of today."""
    begin, end = mark(name)
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}{TABLES[name]()}{end}{tail}"


if __name__ == "__main__":
    page = PAGE.read_text()
    for table in TABLES:
        page = renewed(page, table)
    PAGE.write_text(page)
