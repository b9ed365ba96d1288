"""The waiting of idle OpenMP threads is chosen for the user, but not over the user's head."""

from __future__ import annotations

from moe_serve.openmp import SPIN_COUNT, spin_briefly


def test_a_spin_count_is_set_where_nothing_was_chosen() -> None:
    environment: dict[str, str] = {}
    spin_briefly(environment)
    assert environment == {"GOMP_SPINCOUNT": SPIN_COUNT}


def test_the_users_choice_stands() -> None:
    for chosen in ({"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}):
        environment = dict(chosen)
        spin_briefly(environment)
        assert environment == chosen
