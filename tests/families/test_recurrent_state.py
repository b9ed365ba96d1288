"""Recurrent layers: what their states take, what is off because of them, and how it is said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_serve import resolve
from moe_serve.config import EngineConfig, ParallelConfig
from moe_serve.doctor.fit import sizes_of
from moe_serve.errors import ConfigError
from moe_serve.execution.state_cache import bytes_per_sequence
from moe_serve.parallel.ranks import rank_model
from moe_serve.parallel.wire.environment import RankAddress

from .references import Reference
from .serving import SMALL_ENGINE, greedy, load, runner_of, tokens

Checkpoint = Callable[[str], Path]
FAMILIES = ("qwen3_next", "granitemoehybrid", "lfm2_moe", "jamba")


@pytest.mark.parametrize("case", FAMILIES)
def test_a_sequence_takes_as_much_state_as_the_doctor_says(case: str, checkpoint: Checkpoint) -> None:
    said = sizes_of(str(checkpoint(case)), torch.float32).state_bytes_per_sequence
    states = runner_of(load(checkpoint(case), num_saved_states=0)).states
    kept = [tensor for layer in states.layers.values() for tensor in layer.values()]
    assert 0 < said == sum(tensor.nbytes for tensor in kept) / SMALL_ENGINE["max_num_seqs"]
    assert states.num_bytes == said * SMALL_ENGINE["max_num_seqs"]


def test_a_delta_net_keeps_a_matrix_per_value_head_and_the_last_inputs_of_its_convolution(
    checkpoint: Checkpoint,
) -> None:
    shapes = runner_of(load(checkpoint("qwen3_next"))).loaded.state_shapes
    assert {layer: {key: s.size for key, s in found.items()} for layer, found in shapes.items()} == {
        layer: {("conv", 0): (2 * 2 * 16 + 4 * 16, 4), ("recurrent", 0): (4, 16, 16)} for layer in (0, 1)
    }
    assert bytes_per_sequence(shapes) == 2 * 4 * (128 * 4 + 4 * 16 * 16)


def test_prefix_caching_is_off_where_a_step_has_no_room_for_a_page_and_the_log_says_so(
    checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "moe_serve"):
        llm = load(checkpoint("lfm2_moe"), max_num_batched_tokens=16)
    assert "prefix caching is off" in caplog.text
    assert not llm.engine.scheduler.limits.enable_prefix_caching


def test_states_that_do_not_fit_are_refused_before_they_are_made(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "free_bytes", lambda device: 1 << 20)
    with pytest.raises(ConfigError, match="lower --max-num-seqs"):
        load(checkpoint("qwen3_next"), max_num_seqs=512)


def test_a_seat_that_another_sequence_left_begins_with_zeros(
    checkpoint: Checkpoint, reference: Callable[[str], Reference]
) -> None:
    """One seat: each prompt takes the row that the one before has written."""
    ref = reference("lfm2_moe")
    llm = load(checkpoint("lfm2_moe"), max_num_seqs=1)
    assert tokens(greedy(llm, ref.prompts)) == ref.outputs


def test_ranks_refuse_a_model_whose_states_they_do_not_carry(checkpoint: Checkpoint) -> None:
    place = RankAddress(0, 2, 0, "127.0.0.1", 1)
    config = EngineConfig.from_dict({"model": str(checkpoint("lfm2_moe")), **SMALL_ENGINE})
    with pytest.raises(ConfigError, match=r"--devices: ranks do not carry the states of lfm2_moe's recurrent layers"):
        rank_model.load(place, config, ParallelConfig.from_dict({"devices": 2}))
