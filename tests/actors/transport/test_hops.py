"""Hop stages are right although the two clocks disagree."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.transport.hops import (
    STAGES,
    Histogram,
    HopHistograms,
    HopStamps,
    HopTotals,
    hop_times,
)

SKEWS = (-7_000_000_000, -30_000, 0, 30_000, 7_000_000_000)


def simulate(random_, skew_ns, *, out_ns=20_000, back_ns=20_000, jitter_ns=100_000, at=10**12):
    """One hop as two clocks stamp it: 5 us queue, 8 boarding, 300 compute, 4 reply."""
    out = out_ns + random_.randrange(jitter_ns) * random_.randrange(2)
    back = back_ns + random_.randrange(jitter_ns) * random_.randrange(2)
    sent = at + 5_000
    recv = sent + out
    start, end = recv + 8_000, recv + 308_000
    reply = end + 4_000
    far = [stamp + skew_ns for stamp in (recv, start, end, reply)]
    return HopStamps(at, sent, *far, reply + back), out / 1e3, back / 1e3


@pytest.mark.parametrize("skew", SKEWS)
def test_offset_is_found_within_its_own_error_bound(skew):
    random_, hops = random.Random(1), HopHistograms()
    for i in range(1000):
        hops.add(simulate(random_, skew, at=10**12 + i * 10**6)[0])
    hops.snapshot()
    assert abs(hops.offset.offset_ns - skew) <= hops.offset.error_ns
    assert hops.offset.error_ns == pytest.approx(20_000)
    assert abs(hops.offset.offset_ns - skew) < 2_000  # symmetric at best: nearly exact


@pytest.mark.parametrize("skew", SKEWS)
def test_asymmetric_wire_stays_within_the_bound(skew):
    random_, hops = random.Random(2), HopHistograms()
    for i in range(600):
        hops.add(simulate(random_, skew, out_ns=60_000, back_ns=10_000, at=10**12 + i * 10**6)[0])
    hops.snapshot()
    assert abs(hops.offset.offset_ns - skew) <= hops.offset.error_ns == pytest.approx(35_000)


def test_offset_follows_a_drifting_clock():
    random_, hops = random.Random(3), HopHistograms()
    for i in range(20_000):
        hops.add(simulate(random_, i * 50, at=10**12 + i * 10**6)[0])
    hops.snapshot()
    assert abs(hops.offset.offset_ns - 20_000 * 50) < 150_000


@given(st.lists(st.integers(0, 10**9), min_size=7, max_size=7), st.floats(-1e9, 1e9))
def test_stages_add_up_to_total_whatever_the_offset(values, offset):
    times = hop_times(HopStamps(*values), offset)
    assert sum(times[:-1]) == pytest.approx(times.total, abs=1e-3)


def test_stages_of_a_known_hop():
    random_, hops = random.Random(4), HopHistograms()
    for i in range(300):
        hops.add(simulate(random_, 123_456, at=10**12 + i * 10**6)[0])
    stamps, out, back = simulate(random_, 123_456)
    times = hops.times(stamps)
    assert times.queue == 5
    assert times.boarding == 8
    assert times.compute == 300
    assert times.reply == 4
    assert times.wire_out == pytest.approx(out, abs=2)
    assert times.wire_back == pytest.approx(back, abs=2)


def test_snapshot_is_plain_and_complete():
    hops = HopHistograms()
    assert hops.snapshot()["total"]["count"] == 0
    assert hops.snapshot()["clock_offset_us"] is None
    for i in range(10):
        hops.add(simulate(random.Random(i), 0)[0])
    snapshot = hops.snapshot()
    assert set(STAGES) <= set(snapshot)
    for stage in STAGES:
        assert snapshot[stage]["count"] == 10
        assert sum(snapshot[stage]["buckets"].values()) == 10
    assert 300 <= snapshot["compute"]["p50_us"] <= 300 * 2**0.25


@given(st.lists(st.floats(1, 1e7), min_size=1, max_size=50), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantile_is_at_most_one_bucket_high(values, share):
    histogram = Histogram()
    histogram.add(values)  # type: ignore[arg-type]
    ordered = sorted(values)
    exact = next(v for i, v in enumerate(ordered) if i + 1 >= share * len(values))
    assert exact <= histogram.quantile(share) * 1.000001
    assert histogram.quantile(share) <= exact * 2**0.25 * 1.000001


@given(st.lists(st.floats(0.0, 1e9), max_size=50), st.sets(st.integers(0, 104), min_size=1))
def test_coarser_buckets_count_the_same_values(values, places):
    histogram = Histogram()
    histogram.add(np.array(values))
    edges = [float(Histogram.EDGES_US[place]) for place in sorted(places)]
    counts = histogram.counts_below([edge * 1e-6 * 1e6 for edge in edges])
    assert sum(counts) == len(values)
    for number, edge in enumerate(edges):
        assert sum(counts[: number + 1]) == sum(value <= edge for value in values)


def test_edges_of_its_own_only():
    with pytest.raises(ValueError, match=r"edges \[3\.0\] us are not all among"):
        Histogram().counts_below([3.0])
    with pytest.raises(ValueError, match="not all among"):
        Histogram().counts_below([1e12])


def test_totals_are_of_all_peers_and_a_copy_of_them():
    random_, totals = random.Random(5), HopTotals()
    for count in (3, 300):
        hops = HopHistograms()
        for _ in range(count):
            hops.add(simulate(random_, 0)[0])
        totals.add(hops)
    twin = totals.copy()
    totals.add(hops)
    assert {stage: twin.stages[stage].count for stage in STAGES} == dict.fromkeys(STAGES, 303)
    assert totals.stages["queue"].sum_us == pytest.approx(603 * 5.0)


def test_wire_times_are_told_once_and_not_from_few_hops() -> None:
    hops = HopHistograms()
    for number in range(40):
        wire = 9_000_000 if number == 7 else 2_000
        hops.add(HopStamps(0, 100, 10_100, 10_200, 10_300, 10_400, 400 + wire))
    assert hops.take_wire_s() == pytest.approx(2e-6)
    assert hops.take_wire_s() is None
    hops.add(HopStamps(0, 100, 10_100, 10_200, 10_300, 10_400, 2_400))
    assert hops.take_wire_s() is None
