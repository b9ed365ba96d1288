"""GGUF files through the whole engine: the tokens of transformers on the weights that the files stand for."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from expert_cache.storage import expert_file
from moe_serve import LLM
from moe_serve.cli import main
from moe_serve.errors import CheckpointError, UnsupportedModelError
from moe_serve.hf.checkpoint import checkpoint_fingerprint, open_all_experts
from moe_serve.hf.dense import StoredEmbedding, StoredLinear
from moe_serve.hub.find import find_model
from moe_serve.text.tokenizer import Tokenizer
from moe_serve_kernels.cpu.expert_mlp import MLPWeights
from moe_serve_kernels.quantized import BlockRows

from .gguf_checkpoints import Types, write_pair
from .references import compute_reference
from .serving import experts_of, greedy, load, runner_of, tokens
from .tiny_checkpoints import write_checkpoint
from .tiny_configs import CASES

WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 2}
"""Blocks of K-quants hold 256 columns."""
EIGHT_BITS = Types(gate=T.Q8_0, up=T.Q8_0, down=T.Q8_0)
ALL_EIGHT_BITS = Types(T.Q8_0, T.Q8_0, T.Q8_0, T.Q8_0)
Q4_K_M = Types(T.Q8_0, T.Q4_K, T.Q4_K, T.Q4_K, later={"down": T.Q6_K})
FILES: dict[str, tuple[str, dict[str, Any], Types]] = {
    "mixtral-q8_0": ("mixtral", {}, ALL_EIGHT_BITS),
    "gpt_oss-mxfp4": ("gpt_oss", {}, Types(T.F32, T.MXFP4, T.MXFP4, T.MXFP4)),
    "qwen3_5_moe": ("qwen3_5_moe", {}, Types()),
}
MORE: dict[str, tuple[str, dict[str, Any], Types]] = {
    "qwen3_moe-q4_k_m": ("qwen3_moe", {**WIDE, "moe_intermediate_size": 256}, Q4_K_M),
    "deepseek_v3-f16": ("deepseek_v3", {}, Types(T.F32, T.F16, T.F16, T.F16, splits_latents=True)),
    "mixtral-small": ("mixtral", {**WIDE, "intermediate_size": 256}, Types(T.Q5_0, T.Q2_K, T.Q3_K, T.Q5_K)),
    "mixtral-iq4": ("mixtral", {**WIDE, "intermediate_size": 256}, Types(T.Q8_0, T.IQ4_XS, T.IQ4_XS, T.Q5_1)),
    "mixtral-tied": ("mixtral", {"tie_word_embeddings": True}, Types(T.BF16, T.BF16, T.BF16, T.BF16)),
    "mixtral-2023": ("mixtral", {}, Types(T.Q8_0, T.Q4_0, T.Q4_0, T.Q5_0, one_by_one=True)),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 64}, Types(T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_1)),
    "olmoe": ("olmoe", {}, Types(T.Q8_0, T.Q5_0, T.Q5_0, T.Q8_0)),
    "deepseek_v2": ("deepseek_v2", {}, EIGHT_BITS),
    "deepseek_v2_lite": ("deepseek_v2_lite", {"n_group": 1, "topk_group": 1}, EIGHT_BITS),
    "glm4_moe": ("glm4_moe", {}, ALL_EIGHT_BITS),
    "dots1": ("dots1", {"layer_types": ["full_attention"] * 3}, ALL_EIGHT_BITS),
    "minimax_m2": ("minimax_m2", {}, ALL_EIGHT_BITS),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {}, ALL_EIGHT_BITS),
    "ernie4_5_moe": ("ernie4_5_moe", {}, ALL_EIGHT_BITS),
    "granitemoe": ("granitemoe", {}, ALL_EIGHT_BITS),
    "granitemoeshared": ("granitemoeshared", {}, EIGHT_BITS),
    "granitemoehybrid": ("granitemoehybrid", {}, EIGHT_BITS),
    "qwen3_next": ("qwen3_next", {}, EIGHT_BITS),
    "lfm2_moe": ("lfm2_moe", {"tie_word_embeddings": True}, EIGHT_BITS),
    "jamba": ("jamba", {}, EIGHT_BITS),
    "nemotron_h": ("nemotron_h", {}, EIGHT_BITS),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pair_of(name: str, folder: Path, split: int = 0) -> tuple[Path, Path]:
    """(GGUF file, float twin)."""
    case, fields, types = {**FILES, **MORE}[name]
    tiny = dataclasses.replace(CASES[case], fields={**CASES[case].fields, **fields})
    return write_pair(write_checkpoint(tiny, folder / "source"), folder / "pair", types, split)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pair_of("mixtral-q8_0", tmp_path_factory.mktemp("mixtral"))


def check_tokens(file: Path, twin: Path, **settings: Any) -> None:
    reference = compute_reference(twin)
    llm = load(Path(find_model(str(file))), **settings)
    assert tokens(greedy(llm, reference.prompts)) == reference.outputs


@pytest.mark.parametrize("name", FILES)
def test_tokens_are_those_of_the_weights_the_file_stands_for(name: str, tmp_path: Path) -> None:
    check_tokens(*pair_of(name, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_every_architecture_and_type(name: str, tmp_path: Path) -> None:
    check_tokens(*pair_of(name, tmp_path))


def test_the_kernel_reads_blocks_where_they_lie(mixtral: tuple[Path, Path]) -> None:
    experts = experts_of(load(Path(find_model(str(mixtral[0])))))
    weights = experts.compute.prepare(experts.store.weights(experts.store.layers[0], 0))
    assert isinstance(weights, MLPWeights)
    assert isinstance(weights.gate, BlockRows)
    assert not experts.store.is_copied
    assert experts.store.expert_bytes == 3 * 64 * 64 * 34 // 32


def dense_blocks(llm: LLM) -> dict[str, BlockRows]:
    modules = runner_of(llm).model.named_modules()
    stored = ((name, m.matrix) for name, m in modules if isinstance(m, StoredLinear | StoredEmbedding))
    return {name: matrix for name, matrix in stored if isinstance(matrix, BlockRows)}


def test_dense_weights_are_computed_where_they_lie(mixtral: tuple[Path, Path]) -> None:
    """All but queries and keys, whose rows are put in another order; and in bfloat16 as well."""
    size = mixtral[0].stat().st_size
    for dtype in ("float32", "bfloat16"):
        llm = load(Path(find_model(str(mixtral[0]))), dtype=dtype)
        found = dense_blocks(llm)
        mapped = {name for name, each in found.items() if each.blocks.untyped_storage().nbytes() == size}
        assert {name.split(".")[-1] for name in mapped} == {"embed_tokens", "lm_head", "v_proj", "o_proj"}
        assert {name.split(".")[-1] for name in found.keys() - mapped} == {"q_proj", "k_proj"}
        prompts = [[5, 6, 7, 8], [9, 10, 11]]
        assert tokens(greedy(llm, prompts)) == tuple(tokens(greedy(llm, [prompt]))[0] for prompt in prompts)


def test_a_cache_smaller_than_the_model_and_an_expert_file(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    """Blocks of different types and sizes in the layers, in a file of three parts."""
    file, twin = pair_of("qwen3_moe-q4_k_m", tmp_path, split=10)
    assert file.name == "tiny-00001-of-00003.gguf"
    check_tokens(file, twin, moe_cache_mib=1)
    assert main(["pack", str(file), str(tmp_path / "packed")]) == 0
    packed, source = expert_file.read(tmp_path / "packed")
    assert source == checkpoint_fingerprint(find_model(str(file)))
    store = open_all_experts(find_model(str(file)))
    for layer in store.layers:
        found, wanted = packed.weights(layer, 3), store.weights(layer, 3)
        for part in ("gate", "up", "down"):
            assert getattr(found, part).type == getattr(wanted, part).type
            assert torch.equal(getattr(found, part).dequantized(), getattr(wanted, part).dequantized())


def test_a_split_file_and_a_folder_with_one(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    first = Path(shutil.copy(mixtral[0], folder / "m-00001-of-00002.gguf"))
    with pytest.raises(CheckpointError, match=r"m-00002-of-00002.gguf: this part of m-00001-of-00002.gguf is missing"):
        find_model(str(first))
    first.rename(folder / "m.gguf")
    assert Path(find_model(str(folder))).name == "m"
    shutil.copy(mixtral[0], folder / "n.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models; give the path of one of them: m.gguf, n.gguf"):
        find_model(str(folder))


def test_the_tokenizer_and_the_chat_template(mixtral: tuple[Path, Path]) -> None:
    tokenizer = Tokenizer.from_path(find_model(str(mixtral[0])))
    wanted = Tokenizer.from_path(str(mixtral[1]))
    for text in ("Hello, wörld!", "a  b\n", "<|endoftext|>x"):
        assert tokenizer.encode(text) == wanted.encode(text)
    assert tokenizer.eos_token_ids == wanted.eos_token_ids
    assert tokenizer.render_chat([{"role": "user", "content": "hey"}]) == wanted.encode("hey")


def test_what_is_no_file_of_ours_is_refused(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(mixtral[0].read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"cut.gguf: cut off, or not a GGUF file"):
        find_model(str(cut))
    other = tmp_path / "other.gguf"
    other.write_bytes(mixtral[0].read_bytes().replace(b"llama", b"bloom", 1))
    with pytest.raises(UnsupportedModelError, match=r"GGUF architecture 'bloom'; moe-serve reads deepseek2, "):
        find_model(str(other))


@pytest.mark.parametrize("number", [2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1])
@pytest.mark.parametrize("place", ["tensors", "fields", "rows", "offset"])
def test_numbers_that_overflow_are_refused(place: str, number: int, mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    """Readers have taken the product of such sizes for the size of a buffer."""
    content = bytearray(mixtral[0].read_bytes())
    after_name = content.index(b"token_embd.weight") + len(b"token_embd.weight")
    at = {"tensors": 8, "fields": 16, "rows": after_name + 4 + 8, "offset": after_name + 4 + 2 * 8 + 4}[place]
    struct.pack_into("<Q", content, at, number)
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"wrong\.gguf"):
        load(wrong)


def test_factors_of_rotary_frequencies_are_one_or_refused(tmp_path: Path) -> None:
    """Such a table is how llama.cpp's converter writes Llama 3's scaling; old files have one that changes nothing."""
    source = write_checkpoint(CASES["mixtral"], tmp_path / "source")
    factors = np.ones(8, np.float32)
    file, _ = write_pair(source, tmp_path / "ones", Types(), rope_factors=factors)
    load(file).close()
    factors[-1] = 8
    file, _ = write_pair(source, tmp_path / "scaled", Types(), rope_factors=factors)
    with pytest.raises(CheckpointError, match=r"tiny.gguf: rope_freqs.weight scales rotary frequencies one by one"):
        load(file)
