"""Prompts go where their prefix is, unless that replica is too busy."""

from __future__ import annotations

from moe_serve.scale.affinity import BLOCK_CHARACTERS, MOST_BLOCKS, Affinity, prefix_hashes

A, B = "a" * BLOCK_CHARACTERS, "b" * BLOCK_CHARACTERS


def test_equal_beginnings_have_equal_hashes() -> None:
    first, second = prefix_hashes(A + B + "x"), prefix_hashes(A + A)
    assert len(first) == len(second) == 2
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_a_block_alone_is_not_that_block_after_another() -> None:
    assert prefix_hashes(B)[0] != prefix_hashes(A + B)[1]


def test_owners_share_no_prefix() -> None:
    assert not set(prefix_hashes(A, "one")) & set(prefix_hashes(A, "two"))


def test_less_than_a_block_has_no_hash_and_a_huge_prompt_has_a_bounded_number() -> None:
    assert prefix_hashes(A[:-1]) == []
    assert len(prefix_hashes(A * (MOST_BLOCKS + 5))) == MOST_BLOCKS


def test_lone_surrogates_are_text_too() -> None:
    assert len(prefix_hashes("\ud800" * BLOCK_CHARACTERS)) == 1


def test_the_longest_prefix_wins() -> None:
    affinity: Affinity[str] = Affinity(max_extra_load=4)
    affinity.note(prefix_hashes(A), "short")
    affinity.note(prefix_hashes(A + B)[1:], "long")
    loads = {"idle": 0, "short": 1, "long": 2}
    assert affinity.rank(prefix_hashes(A + B + B), loads) == ["long", "idle", "short"]
    assert affinity.rank(prefix_hashes(A + A), loads) == ["short", "idle", "long"]
    assert affinity.rank(prefix_hashes(B), loads) == ["idle", "short", "long"]


def test_a_busy_holder_is_passed_over() -> None:
    affinity: Affinity[str] = Affinity(max_extra_load=4)
    affinity.note(prefix_hashes(A), "holder")
    assert affinity.rank(prefix_hashes(A), {"holder": 4, "idle": 0}) == ["holder", "idle"]
    assert affinity.rank(prefix_hashes(A), {"holder": 5, "idle": 0}) == ["idle", "holder"]


def test_an_absent_holder_does_not_hide_a_shorter_prefix() -> None:
    affinity: Affinity[str] = Affinity(max_extra_load=4)
    affinity.note(prefix_hashes(A), "present")
    affinity.note(prefix_hashes(A + B)[1:], "gone")
    assert affinity.holder(prefix_hashes(A + B), {"present": 0}) == "present"
    affinity.forget("present")
    assert affinity.holder(prefix_hashes(A + B), {"present": 0}) is None


def test_memory_is_bounded_and_the_least_recently_used_goes_first() -> None:
    affinity: Affinity[str] = Affinity(max_extra_load=4, capacity=2)
    affinity.note(prefix_hashes(A), "one")
    affinity.note(prefix_hashes(B), "two")
    affinity.note(prefix_hashes(A), "one")
    affinity.note(prefix_hashes("c" * BLOCK_CHARACTERS), "three")
    present = {"one": 0, "two": 0, "three": 0}
    assert affinity.holder(prefix_hashes(A), present) == "one"
    assert affinity.holder(prefix_hashes(B), present) is None
