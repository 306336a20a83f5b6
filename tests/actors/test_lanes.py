"""Lanes: cutting batches, taking turns, choosing how many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import lanes
from actors.lanes import LaneChooser, SizeTimes, StageTimes

token_counts = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(token_counts, st.integers(1, 8))
def test_split_covers_all_requests_in_order(tokens, count):
    runs = lanes.split(tokens, count)
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(tokens)))
    assert len(runs) == min(count, len(tokens))


@given(st.integers(1, 100), st.integers(1, 8), st.integers(1, 50))
def test_split_of_equal_requests_is_even(requests, count, each):
    sizes = [run.stop - run.start for run in lanes.split([each] * requests, count)]
    assert max(sizes) - min(sizes) <= 1


def test_split_gives_a_long_prefill_its_own_lane():
    assert lanes.split([1, 1, 1, 1, 400], 2) == [slice(0, 4), slice(4, 5)]


def test_lanes_take_strict_turns():
    trace = []

    def lane(index, turns):
        def work():
            for turn in range(turns):
                trace.append((index, turn))
                lanes.yield_lane()
            return index * 10

        return work

    entered = []
    assert lanes.run([lane(0, 2), lane(1, 3), lane(2, 1)], entered.append) == [0, 10, 20]
    assert trace == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (1, 2)]
    assert entered[:3] == [0, 1, 2]


def test_current_lane_outside_is_zero_and_yield_says_nobody_else():
    assert lanes.current_lane() == 0
    assert lanes.yield_lane() is False


def test_a_single_lane_has_nobody_to_yield_to():
    assert lanes.run([lanes.yield_lane], lambda lane: None) == [False]


def test_a_failing_lane_unwinds_the_others():
    unwound = []

    def waits(index):
        def work():
            try:
                while True:
                    lanes.yield_lane()
            finally:
                unwound.append(index)

        return work

    def fails():
        lanes.yield_lane()
        raise ValueError("expert lost")

    with pytest.raises(ValueError, match="expert lost"):
        lanes.run([waits(0), fails, waits(2)], lambda lane: None)
    assert unwound == [0, 2]


@given(st.floats(1e-6, 1e-2), st.floats(0, 1e-2))
def test_size_times_recover_a_line(slope, intercept):
    times = SizeTimes()
    for n in [8, 64, 32, 128, 16, 64] * 5:
        times.add(n, slope * n + intercept)
    assert times(256) == pytest.approx(slope * 256 + intercept, rel=1e-6)
    assert times(48) == pytest.approx(slope * 48 + intercept, rel=1e-6)


def test_size_times_with_one_size_seen_are_flat():
    times = SizeTimes()
    for _ in range(3):
        times.add(64, 2e-3)
    assert times(8) == times(640) == pytest.approx(2e-3)
    assert times.knows(60)
    assert not times.knows(32)


def test_size_times_remember_a_size_that_is_not_in_use():
    times = SizeTimes()
    times.add(64, 1e-3)
    for _ in range(10_000):
        times.add(128, 2e-3)
    assert times(64) == pytest.approx(1e-3)


@given(
    st.lists(st.tuples(st.integers(1, 4096), st.floats(0, 1)), max_size=40), st.integers(1, 9999)
)
def test_size_times_are_never_negative(measured, n):
    times = SizeTimes()
    for size, seconds in measured:
        times.add(size, seconds)
    assert times(n) >= 0


def stage_times(attention, ffn, transfer) -> StageTimes:
    times = StageTimes()
    for n in (8, 11, 16, 23, 32, 43, 64, 90, 128, 181, 256):
        for fit, (slope, intercept) in (
            (times.attention, attention),
            (times.ffn, ffn),
            (times.transfer, transfer),
        ):
            fit.add(n, slope * n + intercept)
    return times


def choose(times: StageTimes, requests: int) -> int:
    chooser = LaneChooser(None, explore_every=10**9)
    chooser.times = times
    return chooser.choose(requests, requests)


def test_two_lanes_when_both_sides_compute_alike():
    assert choose(stage_times((1e-5, 0), (1e-5, 0), (0, 1e-6)), 128) >= 2


def test_one_lane_when_experts_are_bound_by_reading_weights():
    # each lane would read all expert weights again: t_F does not shrink with the batch
    assert choose(stage_times((1e-7, 0), (0, 5e-3), (0, 1e-6)), 128) == 1


def test_one_lane_for_a_small_batch():
    assert choose(stage_times((1e-5, 0), (1e-5, 0), (0, 1e-6)), 4) == 1


def test_more_lanes_when_the_wire_is_as_long_as_the_compute():
    # M >= 2 (1 + T_c / T_f): with T_c = T_f two lanes can't hide the wire
    slow_wire = stage_times((1e-5, 0), (1e-5, 0), (1e-5, 0))
    assert choose(slow_wire, 128) > 2


@given(st.integers(1, 400), st.integers(1, 8))
def test_a_fixed_number_is_obeyed_as_far_as_there_are_requests(requests, fixed):
    assert LaneChooser(fixed).choose(requests, requests) == min(fixed, requests)


def test_an_impossible_number_is_refused():
    with pytest.raises(ValueError, match=r"1\.\.8, got 9"):
        LaneChooser(9)


def test_unknown_times_mean_one_lane():
    assert LaneChooser(None).choose(256, 256) == 1


def test_a_split_that_was_never_measured_is_tried_once():
    chooser = LaneChooser(None, max_lanes=3)
    times = chooser.times
    times.attention.add(120, 1e-3)
    times.ffn.add(120, 1e-3)
    assert chooser.choose(120, 120) == 2
    times.ffn.add(60, 1e-3)
    assert chooser.choose(120, 120) == 3
    times.ffn.add(40, 1e-3)
    assert chooser.choose(120, 120) == 1  # nothing shrinks with the batch: splitting can't pay
