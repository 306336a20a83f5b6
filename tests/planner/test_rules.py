"""Rules of related systems."""

import math

import pytest

from planner.errors import PlannerError
from planner.rules import (
    fastafd_attention,
    janus_batch,
    janus_fewest,
    janus_tpot,
    megascale_lanes,
    megascale_time,
    megascale_transfer_time,
)


@pytest.mark.parametrize(("transfer", "lanes"), [(0.0, 2), (0.4, 3), (0.5, 3), (0.51, 4), (1.0, 4)])
def test_megascale_lanes(transfer: float, lanes: int) -> None:
    assert megascale_lanes(1.0, 0.8, transfer) == lanes


def test_megascale_times() -> None:
    assert megascale_time(1.0, 0.8, 0.3, lanes=3, layers=10) == pytest.approx(2.4 + 29.0)
    assert megascale_transfer_time(100, 10, 300, 20, 0.5) == pytest.approx(30.0)
    with pytest.raises(PlannerError):
        megascale_lanes(0.0, 0.0, 1.0)
    with pytest.raises(PlannerError):
        megascale_time(1.0, 1.0, 1.0, lanes=0, layers=1)
    with pytest.raises(PlannerError):
        megascale_transfer_time(1, 0, 1, 1)


def test_janus_tpot() -> None:
    assert janus_tpot([1.0, 2.0], [3.0, 4.0], [0.5, 0.5]) == pytest.approx(11.0)
    with pytest.raises(PlannerError):
        janus_tpot([1.0], [1.0, 2.0], [1.0])


def test_janus_batch_is_the_fixed_point() -> None:
    batch = janus_batch(2.0, lambda b: 3.0 + 0.1 * b)
    assert batch == pytest.approx(2.0 * 3.0 / (1 - 0.2), rel=1e-4)
    assert janus_batch(11.0, lambda b: 3.0 + 0.1 * b) == math.inf


def test_janus_fewest_is_what_a_search_finds() -> None:
    def tpot(a: int, f: int, b: float) -> float:
        return 2.0 + 0.5 * b / a + 0.3 * b / f

    found = janus_fewest(4.0, tpot, max_tpot=6.0)
    total = sum(found)
    for a in range(1, total):
        for f in range(1, total - a):
            batch = janus_batch(4.0, lambda b, a=a, f=f: tpot(a, f, b))
            assert not (math.isfinite(batch) and tpot(a, f, batch) <= 6.0)
    with pytest.raises(PlannerError, match="keep a TPOT"):
        janus_fewest(4.0, tpot, max_tpot=1.0, most_attention=4, most_ffn=4)


def test_fastafd() -> None:
    assert fastafd_attention(lambda a: 0.5 * a, attention_time=3.2) == 6
    assert fastafd_attention(lambda a: 9.0, attention_time=3.2) == 1
    assert fastafd_attention(lambda a: 0.0, attention_time=3.2, most=50) == 50
