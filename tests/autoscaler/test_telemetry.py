"""Windows over what was told: by example, and whatever comes late, twice or never."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy import SLO
from autoscaler.telemetry import Telemetry
from cluster.request_log import Done, First
from planner.control import Snapshot
from tests.autoscaler.told import AHEAD, attention, ffn, frontend, row

MEMBERS = [("attention-0", "attention", "ready"), ("ffn-0", "ffn", "ready")]


def telemetry(**options) -> Telemetry:
    made = Telemetry(20.0, SLO(ttft=1.0, tpot=0.1), **options)
    made.members(MEMBERS, 0.0)
    return made


def idle(made: Telemetry, until: float, since: float = 0.0) -> None:
    """Everybody reports every second that nothing happens."""
    for second in np.arange(since, until + 1e-9):
        made.take("attention-0", attention(second, running=0, waiting=0, kv_usage=0.0), second)
        made.take("ffn-0", ffn(second), second)
        made.take("frontend-0", frontend(second), second)


def first(number: int, at: float, ttft: float, prompt: int = 10, cached: int = 0) -> First:
    return First(number, at + AHEAD, ttft, prompt, cached)


def done(number: int, at: float, tpot: float, output: int = 11, ttft: float = 0.1) -> Done:
    arrival = at - ttft - tpot * (output - 1) + AHEAD
    return Done(number, at + AHEAD, arrival, ttft, tpot, 1.0, 10, output, 0, "stop", 0)


def test_nothing_was_told():
    seen = telemetry().snapshot(5.0)
    assert seen.window == 0.0 and seen.age == math.inf
    assert (seen.attention, seen.ffn, seen.running, seen.ttft.count) == (1, 1, 0, 0)
    assert Telemetry().snapshot(5.0).age == math.inf
    assert telemetry().facts() == {"slots": None, "kv_tokens": None, "layers": None}


def test_an_idle_system_is_neither_stale_nor_nan():
    made = telemetry()
    idle(made, 30.0)
    seen = made.snapshot(30.5)
    assert seen.age == pytest.approx(0.5) and seen.window == 20.0
    assert seen.attention_busy == seen.ffn_busy == seen.arrival_rate == seen.tokens_rate == 0.0
    assert seen.batch == seen.kv_tokens == seen.kv_usage == 0.0
    assert seen.ttft.count == seen.tpot.count == seen.itl.count == seen.completed == 0
    assert seen.running == seen.waiting == seen.rejected == 0


def test_who_is_silent_makes_it_stale():
    made = telemetry()
    idle(made, 10.0)
    for name, batch in (("attention-0", attention(20.0)), ("frontend-0", frontend(20.0))):
        made.take(name, batch, 20.0)
    assert made.snapshot(20.0).age == 10.0, "of the FFN actors nothing is known"
    made.members([("attention-0", "attention", "ready")], 20.0)
    assert made.snapshot(20.0).age == 0.0, "there is none that could say anything"


def test_steps():
    made = telemetry()
    idle(made, 30.0)
    rows = [row(30.0 + 0.1 * i, context=800.0, requests=8.0) for i in range(1, 101)]
    made.take("attention-0", attention(40.0, rows), 40.0)
    seen = made.snapshot(40.0)
    assert seen.attention_busy == pytest.approx(6.0 / 20.0)
    assert (seen.batch, seen.kv_tokens) == (4.0, 400.0), "of one lane"
    assert (seen.running, seen.waiting, seen.kv_usage) == (4, 1, 0.5)
    assert len(made.steps(40.0)["attention-0"]) == 100
    assert made.facts() == {"slots": 32, "kv_tokens": 4096, "layers": 3}


def test_a_step_that_began_before_the_window_counts_by_its_part_inside():
    made = telemetry()
    idle(made, 10.0)
    rows = [row(32.0, step=24.0, compute=24.0)]  # the window begins at 20
    made.take("attention-0", attention(40.0, rows), 40.0)
    assert made.snapshot(40.0).attention_busy == pytest.approx(12.0 / 20.0)


def test_a_new_actors_first_steps_count_for_nothing():
    made = telemetry()
    idle(made, 20.0)
    slow = [row(21.0 + i, step=1.0, compute=1.0, requests=99.0) for i in range(3)]
    quick = [row(24.0 + 0.1 * i) for i in range(1, 61)]
    made.take("attention-1", attention(30.0, slow + quick, 63, began=AHEAD + 20.0), 30.0)
    made.members([*MEMBERS, ("attention-1", "attention", "ready")], 30.0)
    seen = made.snapshot(30.0)
    assert seen.batch == 4.0
    # it is known from 22 on, 2 s after its first step; the third slow step is its third
    assert seen.attention_busy == pytest.approx((60 * 0.06 / 8.0 + 0.0) / 2)
    assert len(made.steps(30.0)["attention-1"]) == 60


def test_rides():
    made = telemetry()
    for second in range(31):
        made.take("ffn-0", ffn(second, 10 * second, 0.3 * second), second)
        made.take("ffn-1", ffn(second, 30 * second, 0.9 * second), second)
    made.take("frontend-0", frontend(0.0), 0.0)
    made.members([*MEMBERS, ("ffn-1", "ffn", "ready")], 30.0)
    seen = made.snapshot(30.0)
    assert seen.ffn_busy == pytest.approx(0.6)
    assert seen.imbalance == pytest.approx(1.5)
    ride = made.rides(30.0)["ffn-0"]
    assert ride["seconds"] == 20.0 and ride["rides"] == 200 and ride["pairs"] == 20_000
    assert ride["bins"][0].tolist() == pytest.approx([26, 200, 2e4, 2e6, 6.0, 6.0, 600.0, 200])


def test_wire():
    def wire(n: int) -> dict:
        seconds = {"wire_out": 0.001 * n, "wire_back": 0.002 * n, "total": 0.01 * n}
        counts = dict.fromkeys(("frames", "hops"), n)
        return {**counts, "tokens": 8 * n, "bytes_out": n, "bytes_back": n, "seconds": seconds}

    made = telemetry()
    made.take("frontend-0", frontend(0.0), 0.0)
    made.take("attention-0", attention(0.0), 0.0)  # before its engine is built
    for second in range(1, 11):
        made.take("attention-0", attention(second, wire=wire(100 * second)), second)
    made.changed(0.5 - 2.0)
    found = made.wire(10.0)["attention-0"]
    assert found["frames"] == 900 and found["tokens"] == 7200
    assert found["seconds"]["wire_out"] == pytest.approx(0.9)


def test_the_front_door():
    made = telemetry()
    for second in range(31):
        made.take(
            "frontend-0",
            frontend(second, arrived=3 * second, tokens=50 * second, rejected=second // 10),
            second,
        )
    events = [first(1, 25.0, 0.2, 100, 60), first(2, 26.0, 0.4, 100, 20), done(3, 28.0, 0.05)]
    made.take("frontend-0", frontend(30.5, events, arrived=92, tokens=1525, rejected=4), 30.5)
    seen = made.snapshot(30.5)
    assert seen.arrival_rate == pytest.approx((92 - 30) / 20.5)
    assert seen.tokens_rate == pytest.approx(50.0)
    assert seen.rejected == 3 and seen.completed == 1
    assert seen.ttft.count == 2 and seen.ttft.most == 0.4
    assert seen.tpot.count == 1 and seen.tpot.mean == pytest.approx(0.05)
    assert seen.prefix_hit == 0.4
    assert (seen.prompt_mean, seen.output_mean) == (10.0, 11.0)
    assert seen.theta == pytest.approx((11 * 10 + 11 * 10 / 2) / 11)


def test_gaps_between_tokens():
    made = telemetry()
    made.take("frontend-0", frontend(0.0, gaps={-80: 100}), 0.0)
    made.take("frontend-0", frontend(10.0, gaps={-80: 150, -60: 50}), 10.0)
    itl = made.snapshot(10.0).itl
    assert itl.count == 100
    assert itl.p99 == pytest.approx(math.exp(-59.5 * 0.04), rel=0.02)


def test_who_waits_too_long_counts_before_a_first_token_comes():
    made = telemetry()
    made.take("frontend-0", frontend(0.0), 0.0)
    late = frontend(10.0, [first(1, 9.0, 0.5)], waits=[8.0, 3.0, 0.6, 0.1], paces=[0.3, 0.05])
    made.take("frontend-0", late, 10.0)
    assert made.snapshot(11.0).ttft.most == 9.0, "it has waited on since"
    seen = made.snapshot(10.0)
    assert seen.ttft.count == 4 and seen.ttft.most == 8.0, "0.1 s is not late"
    assert seen.tpot.count == 1 and seen.tpot.most == 0.3
    assert made.snapshot(26.0).ttft.count == 1, "of a frontend that is gone nobody waits"


def test_a_window_does_not_reach_back_before_a_change():
    made = telemetry()
    idle(made, 18.0)
    made.take("frontend-0", frontend(20.0, arrived=1000), 20.0)
    made.changed(20.0)
    # both of them suffered from what is over
    events = [first(1, 23.0, 15.0), done(2, 24.0, 1.0, output=21, ttft=0.1), first(3, 25.0, 0.2)]
    made.take("frontend-0", frontend(23.0, arrived=1010), 23.0)
    made.take("frontend-0", frontend(26.0, events, arrived=1040), 26.0)
    seen = made.snapshot(26.0)
    assert seen.window == 4.0, "less what an actor needs to warm up"
    assert seen.ttft.count == 1 and seen.ttft.most == 0.2
    assert seen.tpot.count == 0 and seen.completed == 1
    assert seen.arrival_rate == pytest.approx(10.0)
    assert made.snapshot(21.0).window == 0.0


def test_members():
    made = telemetry()
    idle(made, 5.0)
    made.take("attention-9", attention(5.0), 5.0)
    made.members(
        [
            *MEMBERS,
            ("attention-1", "attention", "starting"),
            ("attention-2", "attention", "draining"),
            ("ffn-1", "ffn", "draining"),
            ("ffn-2", "ffn", "starting"),
            ("ffn-3", "ffn", "starting"),
        ],
        5.0,
    )
    seen = made.snapshot(5.0)
    assert (seen.attention, seen.attention_preparing, seen.attention_draining) == (1, 1, 1)
    assert (seen.ffn, seen.ffn_preparing) == (2, 1), "the draining one still serves"
    assert seen.running == 0, "of attention-9 nobody knows"


def test_a_frontend_that_was_started_again_counts_on():
    made = telemetry()
    for second in range(11):
        made.take("frontend-0", frontend(second, arrived=100 * second), second)
    for second in range(11, 21):
        fresh = frontend(second, arrived=second - 11, incarnation="e")
        made.take("frontend-0", fresh, second)
    assert made.snapshot(20.0).arrival_rate == pytest.approx((1000 + 9) / 20)
    assert made.snapshot(30.5).arrival_rate == pytest.approx(1.0)


def test_a_stranger_is_refused():
    with pytest.raises(ValueError, match="attention-0 told of the role 'warm'"):
        telemetry().take("attention-0", attention(0.0, role="warm"), 0.0)


# -- whatever comes late, twice or never -----------------------------------------------------------

times = st.integers(0, 30)
batches = st.lists(
    st.one_of(
        st.builds(
            lambda at, n, steps: (
                f"attention-{n}",
                # numbered by time, so that overlapping answers tell of the same steps
                attention(
                    at,
                    [row(at - 0.1 * (steps - i - 1)) for i in range(steps)],
                    number=10 * at + 100,
                ),
            ),
            times,
            st.integers(0, 1),
            st.integers(0, 30),
        ),
        st.builds(lambda at, n: (f"ffn-{n}", ffn(at, 10 * at, 0.5 * at)), times, st.integers(0, 1)),
        st.builds(
            lambda at, waits: (
                "frontend-0",
                frontend(
                    at,
                    [
                        first(at + 1, at - 0.1, 0.5 + at / 10),
                        done(at + 101, at - 0.1, at / 100 + 1e-3),
                    ],
                    arrived=5 * at,
                    tokens=7 * at,
                    gaps={-50: at},
                    waits=waits,
                ),
            ),
            times,
            st.lists(st.floats(0, 30), max_size=3),
        ),
    ),
    max_size=25,
    unique_by=lambda told: (told[0], told[1]["clock"]),
)


def flat(seen: Snapshot) -> list[float]:
    """All numbers of a snapshot."""
    numbers: list[float] = []
    for value in vars(seen).values():
        numbers += vars(value).values() if hasattr(value, "p50") else [value]
    return [float(number) for number in numbers]


def told(found, delay: float = 0.0) -> Telemetry:
    made = telemetry()
    made.members([*MEMBERS, ("attention-1", "attention", "ready")], 0.0)
    made.changed(1.0)
    for name, batch in found:
        made.take(name, copy.deepcopy(batch), batch["unix"] + delay)
    return made


@settings(max_examples=60, deadline=None)
@given(batches, st.integers(0, 2**32), st.integers(0, 8))
def test_order_and_repetitions_do_not_matter(found, seed, repeated):
    shuffled = [*found, *found[:repeated]]
    random.Random(seed).shuffle(shuffled)
    one, other = told(found), told(shuffled)
    for now in (10.0, 31.0, 45.0):
        np.testing.assert_allclose(
            flat(one.snapshot(now)), flat(other.snapshot(now)), rtol=1e-9, equal_nan=True
        )
        assert one.steps(now).keys() == other.steps(now).keys()
        assert one.rides(now).keys() == other.rides(now).keys()


@settings(max_examples=60, deadline=None)
@given(batches, st.floats(0, 60))
def test_shares_and_counts_are_what_they_can_be(found, now):
    seen = told(found).snapshot(now)
    assert 0 <= seen.window <= 20.0 and seen.age >= 0
    for share in (seen.attention_busy, seen.ffn_busy, seen.kv_usage, seen.prefix_hit):
        assert math.isnan(share) or 0 <= share <= 1
    for count in (seen.running, seen.waiting, seen.rejected, seen.completed, seen.ttft.count):
        assert count >= 0
    assert seen.arrival_rate >= 0 and seen.tokens_rate >= 0
    assert math.isnan(seen.imbalance) or seen.imbalance >= 1 - 1e-9


@settings(max_examples=40, deadline=None)
@given(batches, st.sets(st.sampled_from(["attention-0", "ffn-0", "frontend-0"])))
def test_missing_actors_break_nothing(found, missing):
    heard = [(name, batch) for name, batch in found if name not in missing]
    seen = told(heard).snapshot(31.0)
    if {"attention-0", "attention-1", "frontend-0", "ffn-0"} - {name for name, _ in heard} == {
        "frontend-0"
    }:
        assert seen.age == math.inf


@settings(max_examples=40, deadline=None)
@given(batches, st.floats(0, 5))
def test_a_network_that_is_slow_moves_everything_alike(found, delay):
    slow = told(found, delay).snapshot(31.0 + delay)
    prompt = told(found).snapshot(31.0)
    # The change at 1.0 was ours and not theirs: compare what does not depend on it.
    assert slow.running == prompt.running and slow.waiting == prompt.waiting
    np.testing.assert_allclose(slow.age, prompt.age, rtol=1e-9)
