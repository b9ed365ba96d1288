"""What the doctor says of a checkpoint from its config alone, against what loading it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as T

from moe_serve.doctor.fit import sizes_of
from moe_serve.hf.dense import StoredEmbedding, StoredLinear
from moe_serve.hub.find import find_model
from moe_serve_kernels.quantized import BlockRows

from .gguf_checkpoints import Types, write_pair
from .serving import load, runner_of
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES

Checkpoint = Callable[[str], Path]


@pytest.mark.spanning
@pytest.mark.parametrize("case", CASES)
def test_a_token_takes_as_much_of_the_kv_cache_as_the_doctor_says(case: str, checkpoint: Checkpoint) -> None:
    said = sizes_of(str(checkpoint(case)), torch.float32).kv_bytes_per_token
    llm = load(checkpoint(case))
    num_tokens = (llm.engine.num_pages + 1) * llm.engine.page_size  # one page takes what is padding
    assert said == runner_of(llm).kv_cache.num_bytes / num_tokens


@pytest.mark.parametrize("case", ["mixtral", "qwen3_vl_moe"])
def test_what_is_not_read_takes_no_memory(case: str, checkpoint: Checkpoint) -> None:
    """Experts are counted apart, and the tower of a composite is left in its file."""
    dense = runner_of(load(checkpoint(case))).model.parameters()
    assert sizes_of(str(checkpoint(case)), torch.float32).dense_bytes == sum(p.nbytes for p in dense)


def test_codes_are_counted_as_they_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GGUF file: the linear layers' blocks as they are, norms and routers as float32."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_checkpoint(CASES["mixtral"], tmp_path / "source")
    file, _ = write_pair(source, tmp_path / "pair", Types(T.Q8_0, T.Q8_0, T.Q8_0, T.Q8_0))
    folder = find_model(str(file))
    said = sizes_of(folder, torch.float32).dense_bytes
    loaded = runner_of(load(Path(folder))).loaded
    model, num_layers = loaded.model, loaded.hf_config.num_hidden_layers
    layers = [layer for layer in model.modules() if isinstance(layer, StoredLinear | StoredEmbedding)]
    blocks = [layer.matrix for layer in layers if isinstance(layer.matrix, BlockRows)]
    assert len(blocks) == 2 + 4 * num_layers
    assert said == sum(each.blocks.nbytes for each in blocks) + sum(p.nbytes for p in model.parameters())
    assert sizes_of(folder, torch.float32, torch.device("cuda")).dense_bytes > 3 * said
