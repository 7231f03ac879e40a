"""A plan is its seed's."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from tests.chaos.plan import KINDS, ROLES, Fault, make_plan, select


def test_the_same_seed_makes_the_same_plan() -> None:
    assert make_plan(1, 60, 2.0) == make_plan(1, 60, 2.0)
    assert make_plan(1, 60, 2.0) != make_plan(2, 60, 2.0)


def test_twenty_minutes_have_two_thousand_faults_of_every_kind() -> None:
    plan = make_plan(3, 1200, 2.0)
    assert len(plan) >= 2_000
    assert set(Counter(fault.kind.name for fault in plan)) == {kind.name for kind in KINDS}
    assert [fault.number for fault in plan] == list(range(1, len(plan) + 1))
    assert all(a.at <= b.at < 1200 for a, b in itertools.pairwise(plan))
    assert all(fault.kind.seconds[0] <= fault.seconds <= fault.kind.seconds[1] for fault in plan)


def test_victims_are_roles() -> None:
    assert {role for kind in KINDS for role in kind.victims} <= set(ROLES)


def test_kinds_are_chosen_by_name_or_by_first_word() -> None:
    assert [kind.name for kind in select(["full-disk", "stop-gateway"])] == ["full-disk", "stop-gateway"]
    assert {kind.action for kind in select(["kill"])} == {"kill"}
    with pytest.raises(ValueError, match="no fault is called 'kil'"):
        select(["kil"])


def test_the_rank_picks_a_victim() -> None:
    faults = [Fault(1, 0.0, KINDS[0], 0.0, rank) for rank in (0.0, 0.5, 0.999)]
    assert [fault.pick([30, 10, 20]) for fault in faults] == [10, 20, 30]
    assert faults[0].pick([]) is None
