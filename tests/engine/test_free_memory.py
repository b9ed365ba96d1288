"""What a GPU has free: what torch has freed and kept counts, so that one long prompt does not look like a shortage."""

from __future__ import annotations

import pytest
import torch

from moe_serve.memory import free_bytes

MIB = 1 << 20


def test_what_torch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"mem_get_info": (100 * MIB, 1000 * MIB), "memory_reserved": 700 * MIB, "memory_allocated": 600 * MIB}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 200 * MIB
