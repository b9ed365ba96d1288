"""RoutingTrace: what it refuses, one field at a time, and what it keeps on the way to a file and back."""

from __future__ import annotations

import io
import json
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from predictors.trace import RoutingTrace, TraceError, load, merge

BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "ids of two dimensions": ("ids", {"ids": np.zeros((5, 2), dtype=np.uint8)}),
    "ids without tokens": ("ids", {"ids": np.zeros((0, 2, 2), dtype=np.uint8), "seq_offsets": np.array([0])}),
    "ids that are floats": ("ids", {"ids": np.zeros((5, 2, 2))}),
    "an expert beyond the last": ("ids", {"num_experts": 3}),
    "padding": ("ids", {"ids": np.full((5, 2, 2), -1)}),
    "an expert twice in one token": ("ids", {"ids": np.zeros((5, 2, 2), dtype=np.uint8)}),
    "fewer experts than top-k": ("n_experts", {"num_experts": 1}),
    "more experts than an id can name": ("n_experts", {"num_experts": 1 << 15}),
    "offsets that start late": ("seq_offsets", {"seq_offsets": np.array([1, 5])}),
    "offsets that end early": ("seq_offsets", {"seq_offsets": np.array([0, 4])}),
    "an empty sequence": ("seq_offsets", {"seq_offsets": np.array([0, 3, 3, 5])}),
    "offsets that are floats": ("seq_offsets", {"seq_offsets": np.array([0.0, 5.0])}),
    "no offsets": ("seq_offsets", {"seq_offsets": np.array([], dtype=np.int64)}),
    "one layer id for two layers": ("layer_ids", {"layer_ids": np.array([1])}),
    "layers out of order": ("layer_ids", {"layer_ids": np.array([3, 1])}),
    "a negative layer": ("layer_ids", {"layer_ids": np.array([-1, 1])}),
    "weights of another shape": ("probs", {"weights": np.zeros((5, 2, 3), dtype=np.float32)}),
    "weights that are text": ("probs", {"weights": np.full((5, 2, 2), "x")}),
    "a weight that is nan": ("probs", {"weights": np.full((5, 2, 2), np.nan, dtype=np.float32)}),
    "a negative weight": ("probs", {"weights": np.full((5, 2, 2), -0.5, dtype=np.float32)}),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_field_is_named_with_the_file(small_trace: RoutingTrace, what: str) -> None:
    field, change = BAD[what]
    with pytest.raises(TraceError, match=rf"^small\.npz: {field}: ") as caught:
        replace(small_trace, **change)
    assert caught.value.field == field


def same(one: RoutingTrace, two: RoutingTrace) -> bool:
    weights = (one.weights is None) == (two.weights is None)
    if one.weights is not None and two.weights is not None:
        weights = np.array_equal(one.weights, two.weights)
    arrays = all(np.array_equal(getattr(one, n), getattr(two, n)) for n in ("ids", "seq_offsets", "layer_ids"))
    return weights and arrays and one.num_experts == two.num_experts


@pytest.mark.parametrize("with_weights", [True, False])
def test_save_and_load(small_trace: RoutingTrace, tmp_path: Path, with_weights: bool) -> None:
    trace = small_trace if with_weights else replace(small_trace, weights=None)
    trace.save(tmp_path / "t.npz")
    again = load(tmp_path / "t.npz")
    assert same(again, trace)
    assert again.meta == {"model": "tiny"}
    assert again.ids.dtype == np.uint8


def test_many_experts_need_wider_ids(small_trace: RoutingTrace) -> None:
    assert replace(small_trace, num_experts=256).ids.dtype == np.uint8
    assert replace(small_trace, num_experts=257).ids.dtype == np.int16


def fields(trace: RoutingTrace, **changes: Any) -> dict[str, Any]:
    arrays = {
        "ids": trace.ids,
        "seq_offsets": trace.seq_offsets,
        "layer_ids": trace.layer_ids,
        "n_experts": np.int32(4),
        "meta": np.frombuffer(b"{}", dtype=np.uint8),
    }
    return {name: value for name, value in (arrays | changes).items() if value is not None}


def test_weights_in_a_byte_are_fractions_of_255(small_trace: RoutingTrace, tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", **fields(small_trace, probs=np.full((5, 2, 2), 51, dtype=np.uint8)))
    weights = load(tmp_path / "t.npz").weights
    assert weights is not None
    np.testing.assert_allclose(weights, 0.2, rtol=1e-6)


BAD_FILES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"no {name}": (name, {name: None}) for name in ("ids", "seq_offsets", "layer_ids", "n_experts")},
    "two numbers of experts": ("n_experts", {"n_experts": np.array([4, 4])}),
    "a fractional number of experts": ("n_experts", {"n_experts": np.float64(4)}),
    "meta that is not JSON": ("meta", {"meta": np.frombuffer(b"{", dtype=np.uint8)}),
    "meta that is no object": ("meta", {"meta": np.frombuffer(json.dumps([1]).encode(), dtype=np.uint8)}),
    "pickled ids": ("file", {"ids": np.array([{}], dtype=object)}),
    "weights that are text": ("probs", {"probs": np.full((5, 2, 2), "x")}),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_named_with_the_field(small_trace: RoutingTrace, tmp_path: Path, what: str) -> None:
    field, changes = BAD_FILES[what]
    np.savez(tmp_path / "bad.npz", **fields(small_trace, **changes))
    with pytest.raises(TraceError, match=rf"bad\.npz: {field}: "):
        load(tmp_path / "bad.npz")


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    """An array of bytes, with a header of its own."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


@pytest.mark.parametrize("rows", [10**11, 1 << 60, 6])
def test_a_header_that_promises_too_much(small_trace: RoutingTrace, tmp_path: Path, rows: int) -> None:
    np.savez(tmp_path / "t.npz", **fields(small_trace, ids=None))
    with zipfile.ZipFile(tmp_path / "t.npz", "a") as file:
        file.writestr("ids.npy", npy((rows, 2, 2), small_trace.ids.tobytes()))
    with pytest.raises(TraceError, match=r"t\.npz: ids: its header says \d+ bytes, but the file holds 20"):
        load(tmp_path / "t.npz")


@pytest.mark.parametrize(("absent", "named"), [("seq_offsets", "missing"), ("", "ends at 5 tokens")])
def test_what_unpacks_to_gigabytes_is_not_unpacked(
    small_trace: RoutingTrace, tmp_path: Path, absent: str, named: str
) -> None:
    """64 MiB here; the peak is that of the arrays that were made."""
    num_bytes = 64 << 20
    np.savez_compressed(tmp_path / "t.npz", **fields(small_trace, ids=None, **({absent: None} if absent else {})))
    with zipfile.ZipFile(tmp_path / "t.npz", "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("ids.npy", npy((num_bytes // 4, 2, 2), bytes(num_bytes)))
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match=f"seq_offsets: {named}"):
            load(tmp_path / "t.npz")
        assert tracemalloc.get_traced_memory()[1] < num_bytes // 8
    finally:
        tracemalloc.stop()


def test_what_is_no_npz_is_said_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and then nothing")
    np.save(tmp_path / "bare.npy", np.zeros(3))
    for name in ("text.npz", "cut.npz", "bare.npy", "absent.npz", "."):
        with pytest.raises(TraceError, match="file: "):
            load(tmp_path / name)


def test_select_takes_sequences_in_the_given_order(small_trace: RoutingTrace) -> None:
    chosen = small_trace.select([1, 0])
    assert chosen.seq_offsets.tolist() == [0, 2, 5]
    np.testing.assert_array_equal(chosen.ids, small_trace.ids[[3, 4, 0, 1, 2]])
    for wrong in ([2], [-1], []):
        with pytest.raises(TraceError, match="seq_offsets"):
            small_trace.select(wrong)


@pytest.mark.parametrize(
    ("tokens", "offsets"), [(1, [0, 1]), (3, [0, 3]), (4, [0, 3, 4]), (5, [0, 3, 5]), (9, [0, 3, 5])]
)
def test_head_cuts_the_last_sequence(small_trace: RoutingTrace, tokens: int, offsets: list[int]) -> None:
    assert small_trace.head(tokens).seq_offsets.tolist() == offsets


def test_head_keeps_something(small_trace: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="at least 1"):
        small_trace.head(0)


def test_merge_puts_files_one_after_another(small_trace: RoutingTrace, tmp_path: Path) -> None:
    small_trace.save(tmp_path / "a.npz")
    small_trace.select([1]).save(tmp_path / "b.npz")
    both = merge([load(tmp_path / "a.npz"), load(tmp_path / "b.npz")])
    assert both.seq_offsets.tolist() == [0, 3, 5, 7]
    np.testing.assert_array_equal(both.ids[5:], small_trace.ids[3:])
    assert both.weights is not None
    assert merge([small_trace, replace(small_trace, weights=None)]).weights is None


def test_merge_refuses_another_model(small_trace: RoutingTrace) -> None:
    with pytest.raises(TraceError, match=r"other\.npz: n_experts: 5, but 4 in small\.npz"):
        merge([small_trace, replace(small_trace, num_experts=5, source="other.npz")])
    with pytest.raises(TraceError, match="layer_ids"):
        merge([small_trace, replace(small_trace, layer_ids=np.array([0, 1]))])
    with pytest.raises(TraceError, match="at least one"):
        merge([])


def test_popularity_is_uses_per_token(small_trace: RoutingTrace) -> None:
    popularity = small_trace.popularity()
    np.testing.assert_allclose(popularity[0], [3 / 5, 2 / 5, 3 / 5, 2 / 5])
    np.testing.assert_allclose(popularity.sum(axis=1), 2)
