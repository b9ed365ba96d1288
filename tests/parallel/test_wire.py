"""Messages between ranks, over socket pairs: no processes, no process group."""

from __future__ import annotations

import pytest
import torch

from moe_serve.errors import ConfigError
from moe_serve.parallel.modes.exchange import Exchange, pack, unpack
from moe_serve.parallel.wire.addresses import INTERFACE, address_of, check_reachable, own_address
from moe_serve.parallel.wire.environment import RankAddress
from moe_serve.parallel.wire.sockets import RankGoneError

from .conftest import Mesh
from .meshes import at_once


def text(words: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(words.encode()), dtype=torch.uint8)


def read(raw: torch.Tensor) -> str:
    return raw.numpy().tobytes().decode()


def test_only_those_named_take_part(mesh: Mesh) -> None:
    left, middle, right = mesh(3)
    heard = at_once(
        lambda: left.trade({2: text("to the right")}, [2]),
        lambda: middle.trade({}, []),
        lambda: right.trade({0: torch.empty(0, dtype=torch.uint8)}, [0]),
    )
    assert {rank: len(raw) for rank, raw in heard[0].items()} == {2: 0}
    assert heard[1] == {}
    assert read(heard[2][0]) == "to the right"


def test_messages_larger_than_any_buffer_cross(mesh: Mesh) -> None:
    left, right = mesh(2)
    data = torch.arange(1 << 20, dtype=torch.int32).view(torch.uint8)
    heard = at_once(lambda: left.trade({1: data}, [1]), lambda: right.trade({0: data.flip(0)}, [0]))
    assert torch.equal(heard[1][0], data)
    assert torch.equal(heard[0][1], data.flip(0))


def test_a_rank_may_be_a_turn_ahead(mesh: Mesh) -> None:
    left, right = mesh(2)
    left.trade({1: text("one")}, [])
    left.trade({1: text("two")}, [])
    assert [read(right.trade({}, [0])[0]) for _ in range(2)] == ["one", "two"]


def test_a_rank_that_left_or_is_silent_is_named(mesh: Mesh) -> None:
    left, right = mesh(2, timeout_s=0.05)
    with pytest.raises(RankGoneError, match=r"\[1\] said nothing for 0.05 s"):
        left.trade({}, [1])
    right.close()
    with pytest.raises(RankGoneError, match="rank 1"):
        left.trade({}, [1])


def test_exchange_books_waits_and_lengths(mesh: Mesh) -> None:
    wires = mesh(2)
    left, right = (Exchange(rank, 2, 3, wire) for rank, wire in enumerate(wires))
    at_once(lambda: left.trade(1, {1: text("abc")}, []), lambda: right.trade(1, {}, [0]))
    assert [left.traffic.totals()["trips"], right.traffic.totals()["trips"]] == [0, 1]
    assert left.traffic.by_layer() == [0, 8, 0]
    assert right.traffic.by_layer() == [0, 0, 0]


def test_a_group_counts_its_ranks_from_zero(mesh: Mesh) -> None:
    wires = mesh(4)
    second = [Exchange(rank, 2, 1, wires[2 + rank], first_rank=2) for rank in range(2)]
    heard = at_once(lambda: second[0].trade(0, {1: text("hi")}, []), lambda: second[1].trade(0, {}, [0]))
    assert read(heard[1][0]) == "hi"


def test_rows_survive_packing() -> None:
    ids, hidden = torch.arange(6).view(3, 2).short(), torch.randn(3, 5)
    found = unpack(pack(ids, hidden).flatten(), (2, torch.int16), (5, torch.float32))
    assert torch.equal(found[0], ids)
    assert torch.equal(found[1], hidden)
    assert [
        len(part) for part in unpack(pack(ids[:0], hidden[:0]).flatten(), (2, torch.int16), (5, torch.float32))
    ] == [0, 0]


def test_addresses() -> None:
    place = RankAddress(0, 2, 0, "127.0.0.1", 29500)
    assert own_address(place, {}) == "127.0.0.1"
    assert own_address(place, {INTERFACE: "lo"}) == address_of("lo") == "127.0.0.1"
    with pytest.raises(ConfigError, match="no such interface"):
        address_of("none0")
    check_reachable(["127.0.0.1", "127.0.0.1"])
    with pytest.raises(ConfigError, match=r"ranks \[0\] know themselves only as 127.0.1.1"):
        check_reachable(["127.0.1.1", "10.0.0.2"])
