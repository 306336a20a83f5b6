"""Limits: what a decision may become, whatever was wanted."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoscaler.limits import BadLimits, Counts, Limits, constrain, nearest
from autoscaler.reasons import Reason
from tests.autoscaler.views import all_limits, counts

ANY = st.builds(Counts, st.integers(1, 20), st.integers(1, 20))
ROLES = st.frozensets(st.sampled_from(["attention", "ffn"]))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attention": (3, 2)}, "attention is bounded by 3..2"),
        ({"ffn": (0, 2)}, "ffn is bounded by 0..2"),
        ({"min_total": 5, "max_total": 4}, "no numbers meet both"),
        ({"max_total": 1}, "no numbers meet both"),
        ({"min_total": 17, "max_total": 20}, "more than 8 attention and 8 FFN"),
        ({"max_step": 0}, "max_step is 0"),
        ({"weight_ffn": 0.0}, "weights"),
    ],
)
def test_limits_that_nothing_meets_are_refused(given: dict[str, object], words: str):
    with pytest.raises(BadLimits, match=words):
        Limits(**given)  # type: ignore[arg-type]


@given(all_limits(), st.data())
def test_what_is_within_the_limits_stays_there(limits: Limits, data: st.DataObject):
    there, wanted, held = data.draw(counts(limits)), data.draw(ANY), data.draw(ROLES)
    got, reasons = constrain(there, wanted, limits, held)
    assert limits.allow(got)
    assert max(abs(new - old) for new, old in zip(got, there, strict=True)) <= limits.max_step
    for role in held:
        assert getattr(got, role) <= getattr(there, role)
    # No role goes where nobody wanted it: a budget without room is no wish for less of the other.
    for new, old, want in zip(got, there, wanted, strict=True):
        assert min(old, want) <= new <= max(old, want)
    assert bool(reasons) == (got != wanted)


@given(all_limits(fixed=True), st.data())
def test_a_fixed_budget_moves_both_legs_or_neither(limits: Limits, data: st.DataObject):
    there, wanted = data.draw(counts(limits)), data.draw(ANY)
    got, reasons = constrain(there, wanted, limits)
    assert got.total == there.total
    if got == there != wanted:
        assert reasons


@given(all_limits(), ANY, ANY, ROLES)
def test_from_outside_it_moves_towards_the_limits(
    limits: Limits, there: Counts, wanted: Counts, held: frozenset[str]
):
    assume(not limits.allow(there))

    def outside(at: Counts) -> int:
        bounds = (limits.attention, limits.ffn, limits.total)
        values = (at.attention, at.ffn, at.total)
        pairs = zip(values, bounds, strict=True)
        return sum(max(low - value, 0, value - high) for value, (low, high) in pairs)

    got, _ = constrain(there, wanted, limits, held)
    assert outside(got) <= outside(there)
    for _ in range(40):
        there, _ = constrain(there, wanted, limits)
    assert limits.allow(there)


@given(all_limits(), ANY, ANY, ROLES, st.integers(1, 20))
def test_attention_stays_at_what_runs_even_outside_of_the_limits(
    limits: Limits, there: Counts, wanted: Counts, held: frozenset[str], least: int
):
    got, _ = constrain(there, wanted, limits, held, least)
    assert got.attention >= min(there.attention, least)


@given(all_limits(), st.integers(0, 2), st.integers(0, 2), ROLES)
def test_roles_may_be_lost_altogether(
    limits: Limits, attention: int, ffn: int, held: frozenset[str]
):
    there = Counts(attention, ffn)
    got, _ = constrain(there, there, limits, held)
    for role in ("attention", "ffn"):
        if role in held:
            assert getattr(got, role) <= getattr(there, role)
        else:
            assert getattr(got, role) >= 1


@given(all_limits(), ANY)
def test_nearest_is_within_and_no_further_than_any_other(limits: Limits, wanted: Counts):
    def off(at: Counts) -> int:
        return abs(at.attention - wanted.attention) + abs(at.ffn - wanted.ffn)

    got = nearest(wanted, limits)
    assert limits.allow(got)
    assert off(got) == min(
        off(Counts(a, f)) for a in range(1, 9) for f in range(1, 9) if limits.allow(Counts(a, f))
    )


@pytest.mark.parametrize(
    ("limits", "wanted", "held", "got", "reason"),
    [
        (Limits(), (9, 4), (), (6, 4), Reason.AT_BOUND),
        (Limits(), (8, 4), (), (6, 4), Reason.STEP_CAPPED),
        (Limits(max_total=9), (6, 4), (), (5, 4), Reason.AT_BUDGET),
        (Limits(max_total=8), (5, 4), (), (4, 4), Reason.AT_BUDGET),
        (Limits(max_total=8), (5, 3), (), (5, 3), None),
        (Limits(min_total=8, max_total=8), (5, 4), (), (4, 4), Reason.ONE_LEG),
        (Limits(min_total=8, max_total=8), (5, 3), ("attention",), (4, 4), Reason.ONE_LEG),
        (Limits(), (5, 5), ("attention",), (4, 5), Reason.CANNOT_PLACE),
        (Limits(), (5, 3), ("attention",), (4, 3), Reason.CANNOT_PLACE),
    ],
)
def test_examples(limits, wanted, held, got, reason):
    counts, reasons = constrain(Counts(4, 4), Counts(*wanted), limits, frozenset(held))
    assert counts == Counts(*got)
    assert (reason in reasons) if reason else reasons == ()
