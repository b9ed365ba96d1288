"""A rank's GPU is the process's current one before anything touches a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_serve.parallel.ranks import rank_model
from moe_serve.parallel.wire.environment import RankAddress


@pytest.mark.parametrize(
    ("device", "has_gpus", "expected"),
    [
        ("auto", True, [torch.device("cuda", 1), "nccl", torch.device("cuda", 1)]),
        ("cuda", True, [torch.device("cuda", 1), "nccl", torch.device("cuda", 1)]),
        ("cpu", True, ["gloo", None]),
        ("auto", False, ["gloo", None]),
    ],
)
def test_a_rank_joins_on_its_own_gpu(
    device: str, has_gpus: bool, expected: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []

    def join(backend: str, **options: Any) -> None:
        done.extend([backend, options["device_id"]])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpus)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setattr(rank_model, "bind_narrowly", lambda place: None)
    monkeypatch.setattr(rank_model, "open_store", lambda place, timeout: None)
    rank_model.join_group(RankAddress(5, 8, 1, "localhost", 29500), device, 10.0)
    assert done == expected
