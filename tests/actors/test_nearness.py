"""Who is far: by reports that agree, for a while, and never the nearest."""

from hypothesis import given
from hypothesis import strategies as st

from actors.nearness import AGAIN_S, REPORTS, Nearness

SLOW = {"ffn-0": 0.0002, "ffn-1": 0.0055}


def told(nearness: Nearness, wire_s: dict[str, float], times: int, now: float = 0.0):
    return [nearness.hear(wire_s, now + i) for i in range(times)]


def test_far_after_reports_that_agree_and_asked_again_later() -> None:
    nearness = Nearness()
    assert told(nearness, SLOW, REPORTS) == [frozenset()] * (REPORTS - 1) + [{"ffn-1"}]
    since = REPORTS - 1.0
    assert nearness.hear({"ffn-0": 0.0002}, since + AGAIN_S - 1) == {"ffn-1"}
    assert nearness.hear({"ffn-0": 0.0002}, since + AGAIN_S) == frozenset()
    # still slow: found so again, once that has been seen often enough
    again = told(nearness, SLOW, REPORTS, since + AGAIN_S + 1)
    assert again == [frozenset()] * (REPORTS - 1) + [{"ffn-1"}]


def test_one_hiccup_says_nothing() -> None:
    nearness = Nearness()
    for moment in range(12):
        hiccup = moment % REPORTS == 0
        wire = {"ffn-0": 0.0002, "ffn-1": 0.0055 if hiccup else 0.0002}
        assert nearness.hear(wire, float(moment)) == frozenset()


def test_a_factor_among_microseconds_is_no_distance() -> None:
    assert not any(told(Nearness(), {"ffn-0": 0.0001, "ffn-1": 0.0009}, 10))


def test_alone_nobody_is_far() -> None:
    assert not any(told(Nearness(), {"ffn-1": 0.5}, 10))
    assert not any(told(Nearness(), {}, 10))


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcd"), st.floats(1e-6, 1.0), max_size=4), max_size=40
    )
)
def test_who_becomes_far_leaves_somebody_near(reports) -> None:
    nearness = Nearness()
    before: frozenset[str] = frozenset()
    for moment, wire in enumerate(reports):
        far = nearness.hear(wire, float(moment))
        assert far - before <= wire.keys()
        if far - before:
            assert wire.keys() - far
        before = far
