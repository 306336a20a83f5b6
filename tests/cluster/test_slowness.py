"""Who is slow to reach, from reports of the wire."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.slowness import REPORTS, STALE_S, WireTimes, ratios, slow

FAST, SLOW = 0.0004, 0.0045


def test_a_slow_ffn_actor() -> None:
    wires = {("attention-0", "ffn-0"): FAST, ("attention-0", "ffn-1"): SLOW}
    assert slow(wires) == {"ffn-1": SLOW / FAST}
    assert ratios(wires) == {("ffn", "ffn-0"): 1.0, ("ffn", "ffn-1"): SLOW / FAST}


def test_the_link_of_an_attention_actor_is_no_fault_of_the_others() -> None:
    wires = {
        (a, f): SLOW if a == "attention-1" else FAST
        for a in ("attention-0", "attention-1")
        for f in ("ffn-0", "ffn-1")
    }
    assert set(slow(wires)) == {"attention-1"}


def test_far_from_one_is_not_slow() -> None:
    near = {("attention-0", "ffn-0"), ("attention-1", "ffn-1")}
    pairs = [(a, f) for a in ("attention-0", "attention-1") for f in ("ffn-0", "ffn-1")]
    assert slow({pair: FAST if pair in near else SLOW for pair in pairs}) == {}


def test_nobody_to_compare_with() -> None:
    assert slow({("attention-0", "ffn-0"): 1.0}) == {}
    assert slow({}) == {}


def test_many_times_nothing_is_not_slow() -> None:
    assert slow({("attention-0", "ffn-0"): 5e-6, ("attention-0", "ffn-1"): 9e-4}) == {}


def test_one_bad_moment_is_not_slow() -> None:
    wires = WireTimes()
    for moment in range(REPORTS + 2):
        bad = moment == REPORTS
        wires.hear("attention-0", {"ffn-0": FAST, "ffn-1": SLOW if bad else FAST}, moment)
    assert slow(wires.pairs(REPORTS + 2.0)) == {}


def test_it_takes_some_reports_and_they_go_stale() -> None:
    wires = WireTimes()
    for moment in range(REPORTS):
        assert wires.pairs(moment) == {}
        wires.hear("attention-0", {"ffn-0": FAST, "ffn-1": SLOW}, moment)
    last = REPORTS - 1
    assert set(slow(wires.pairs(last + STALE_S))) == {"ffn-1"}
    assert wires.pairs(last + STALE_S + 1) == {}


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")),
        st.floats(1e-6, 10.0),
        min_size=1,
    )
)
def test_the_fastest_of_a_role_is_never_slow(wires: dict[tuple[str, str], float]) -> None:
    found = ratios(wires)
    for role, side in (("attention", 0), ("ffn", 1)):
        mine = [ratio for (of, _), ratio in found.items() if of == role]
        assert not mine or min(mine) == 1.0
        assert not mine or len({pair[side] for pair in wires}) == len(mine)
    assert slow(wires).keys() <= {name for _, name in found}
