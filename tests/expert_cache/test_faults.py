"""Bad disks and changed files: the error names tensor and file, others go on, nothing comes from bad bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from expert_cache.running.local_experts import RegroupedExperts
from expert_cache.simulation.capacity import Capacity
from expert_cache.storage import expert_file
from expert_cache.storage.direct_io import DirectFile
from expert_cache.storage.errors import ExpertReadError
from expert_cache.storage.fetch import Fetcher
from expert_cache.storage.store import ExpertStore

from .caches import cached_layers, mapped_layers
from .stores import FIRST, SILU, E, routing, split_store


def run_all(layers: RegroupedExperts[object]) -> tuple[torch.Tensor, Mapping[int, ExpertReadError]]:
    """Token t uses expert t alone."""
    hidden, _, weights = routing(E, choices=1)
    out = layers.run(FIRST, hidden, torch.arange(E)[:, None], weights)
    layers.check_integrity()
    return out, layers.take_failures()


def packed(folder: Path) -> tuple[ExpertStore, Path]:
    path = folder / "experts.bin"
    expert_file.write(split_store(folder), path, "source", lambda: None)
    return expert_file.read(path)[0], path


def flip_byte(path: Path, store: ExpertStore, expert: int) -> None:
    read = store.reads(FIRST, expert)[0]
    with path.open("r+b") as stream:
        stream.seek(read.offset + read.num_bytes // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 0x10]))


def test_a_flipped_byte_fails_its_expert_and_no_other(tmp_path: Path) -> None:
    store, path = packed(tmp_path)
    want, _ = run_all(mapped_layers(store, SILU))
    want = want.clone()
    flip_byte(path, store, 2)
    store = expert_file.read(path)[0]  # a start after the damage, so that the file itself is unchanged
    with cached_layers(store, SILU, Capacity.shared(10)) as layers:
        out, failures = run_all(layers)
        assert list(failures) == [2]
        message = failures[2].message
        assert "checksum" in message
        assert str(path) in message
        assert "layers.3.experts.2.gate" in message
        assert torch.equal(out[[0, 1, 3, 4]], want[[0, 1, 3, 4]])
        assert not out[2].any()
        again, failures = run_all(layers)  # bad bytes were not kept
        assert list(failures) == [2]
        assert torch.equal(again, out)
        assert layers.counters.read_errors.sum() == 2


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    file = tmp_path / "layer3.safetensors"
    os.truncate(file, store.reads(FIRST, 4)[0].offset + 100)
    with cached_layers(store, SILU, Capacity.shared(10)) as layers:
        _, failures = run_all(layers)
        assert 4 in failures
        assert "truncated" in failures[4].message
        assert str(file) in failures[4].message
        assert "layer 3 expert 4" in failures[4].message
        assert "4.gate" in failures[4].message


def test_a_file_written_to_while_serving_is_refused(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    with cached_layers(store, SILU, Capacity.shared(1)) as layers:
        assert run_all(layers)[1] == {}
        with (tmp_path / "layer3.safetensors").open("r+b") as stream:
            stream.seek(4000)
            stream.write(b"other weights")
        _, failures = run_all(layers)
        assert failures
        assert all("changed while it was in use" in f.message for f in failures.values())


def test_a_file_replaced_while_serving_does_not_matter(tmp_path: Path) -> None:
    """A new file under the old name: what was opened lives on."""
    store = split_store(tmp_path)
    with cached_layers(store, SILU, Capacity.shared(1)) as layers:
        want, _ = run_all(layers)
        other = tmp_path / "other"
        other.write_bytes(os.urandom((tmp_path / "layer3.safetensors").stat().st_size))
        other.rename(tmp_path / "layer3.safetensors")
        out, failures = run_all(layers)
        assert failures == {}
        assert torch.equal(out, want)


class BadSector(DirectFile):
    """One stretch of the file cannot be read."""

    bad = (0, 0)

    def read(self, memory: memoryview, offset: int, needed: int) -> None:
        if offset < self.bad[1] and offset + needed > self.bad[0]:
            raise ExpertReadError(f"{self.path}: read error at byte {offset} (Input/output error)")
        super().read(memory, offset, needed)


def test_a_read_error_leaves_the_other_experts_running(tmp_path: Path) -> None:
    store, _ = packed(tmp_path)
    want, _ = run_all(mapped_layers(store, SILU))
    read = store.reads(FIRST, 1)[0]
    BadSector.bad = (read.offset, read.offset + 1)
    with cached_layers(store, SILU, Capacity.shared(2), fetcher=Fetcher(2, BadSector)) as layers:
        out, failures = run_all(layers)
        assert list(failures) == [1]
        assert "Input/output error" in failures[1].message
        assert torch.equal(out[[0, 2, 3, 4]], want[[0, 2, 3, 4]])
        BadSector.bad = (0, 0)
        out, failures = run_all(layers)
        assert failures == {}
        assert torch.equal(out, want)


def test_a_missing_file_is_an_error_of_the_request(tmp_path: Path) -> None:
    store = split_store(tmp_path)
    (tmp_path / "layer3.safetensors").unlink()
    with cached_layers(store, SILU, Capacity.shared(10)) as layers:
        _, failures = run_all(layers)
        assert len(failures) == E
        assert "cannot be opened" in failures[0].message


def test_a_bug_in_the_computation_leaves_the_cache_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = split_store(tmp_path)
    with cached_layers(store, SILU, Capacity.shared(2)) as layers:

        def explode(*args: object) -> None:
            raise RuntimeError("boom")

        with monkeypatch.context() as patch:
            patch.setattr(layers.compute, "run", explode)
            with pytest.raises(RuntimeError, match="boom"):
                run_all(layers)
        layers.check_integrity()
        assert run_all(layers)[1] == {}
