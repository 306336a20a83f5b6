"""Views, snapshots and limits for tests of policies: by hand, and drawn."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from autoscaler.limits import Counts, Limits
from autoscaler.policy import SLO, Proposal, System, View
from autoscaler.reasons import Reason
from planner.control import Snapshot
from planner.digest import Percentiles

TARGETS = SLO(ttft=2.0, tpot=0.1)
SYSTEM = System(slots=64)


def latency(p90: float, count: int = 100) -> Percentiles:
    """Percentiles of requests that all took about as long."""
    return Percentiles(count, p90, p90, p90, p90, p90, p90)


def snapshot(now: float = 100.0, ttft: float = 1.0, tpot: float = 0.05, **given: Any) -> Snapshot:
    """A healthy system of four and four under some load, but for what is given."""
    facts: dict[str, Any] = {
        "window": 20.0,
        "attention": 4,
        "ffn": 4,
        "running": 40,
        "arrival_rate": 5.0,
        "tokens_rate": 500.0,
        "completed": 100,
        "ttft": latency(ttft),
        "tpot": latency(tpot),
        "itl": latency(tpot, 10_000),
        "attention_busy": 0.5,
        "ffn_busy": 0.5,
        "prompt_mean": 100.0,
        "output_mean": 100.0,
        "kv_usage": 0.2,
    }
    return Snapshot(now=now, **{**facts, **given})


def view(seen: Snapshot | None = None, limits: Limits | None = None, **given: Any) -> View:
    """A view with the usual targets."""
    return View(seen or snapshot(), TARGETS, limits or Limits(), SYSTEM, **given)


@st.composite
def all_limits(draw: st.DrawFn, fixed: bool | None = None) -> Limits:
    """Limits of every kind that can be met."""
    attention = sorted(draw(st.tuples(st.integers(1, 8), st.integers(1, 8))))
    ffn = sorted(draw(st.tuples(st.integers(1, 8), st.integers(1, 8))))
    least, most = attention[0] + ffn[0], attention[1] + ffn[1]
    low = draw(st.integers(least, most))
    high = draw(st.integers(low, most))
    if fixed if fixed is not None else draw(st.booleans()):
        high = low
    step = draw(st.integers(1, 4))
    return Limits((attention[0], attention[1]), (ffn[0], ffn[1]), low, high, step)


def counts(limits: Limits) -> st.SearchStrategy[Counts]:
    """Numbers of workers within limits."""
    return st.sampled_from(
        [
            Counts(a, f)
            for a in range(limits.attention[0], limits.attention[1] + 1)
            for f in range(limits.ffn[0], limits.ffn[1] + 1)
            if limits.allow(Counts(a, f))
        ]
    )


NUMBERS = st.none() | st.integers(1, 12)

PROPOSALS = st.builds(Proposal, NUMBERS, NUMBERS, st.sampled_from(list(Reason)), st.text())

SHARES = st.just(math.nan) | st.floats(0.0, 1.0)

NONSENSE = st.one_of(
    st.integers(),
    st.text(),
    st.floats(),
    st.booleans(),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.builds(
        Proposal,
        st.one_of(
            st.floats(), st.booleans(), st.text(), st.integers(max_value=0), st.lists(NUMBERS)
        ),
    ),
    st.builds(Proposal, ffn=st.one_of(st.floats(), st.booleans(), st.integers(max_value=0))),
    st.builds(Proposal, NUMBERS, NUMBERS, st.text() | st.none()),
    st.builds(Proposal, NUMBERS, NUMBERS, detail=st.integers() | st.none()),
)
"""Answers that are no proposals, or proposals of no numbers."""


@st.composite
def snapshots(draw: st.DrawFn, there: Counts, now: float = 100.0) -> Snapshot:
    """What telemetry may say, or leave out, of so many workers; some may be starting."""
    starting_a = draw(st.integers(0, there.attention - 1))
    starting_f = draw(st.integers(0, there.ffn - 1))
    latencies = st.builds(Percentiles) | st.builds(
        latency, st.floats(0.0, 10.0), st.integers(1, 100)
    )
    return Snapshot(
        now=now,
        window=20.0,
        attention=there.attention - starting_a,
        ffn=there.ffn - starting_f,
        attention_preparing=starting_a,
        ffn_preparing=starting_f,
        running=draw(st.integers(0, 600)),
        waiting=draw(st.integers(0, 50)),
        arrival_rate=draw(st.floats(0.0, 50.0)),
        rejected=draw(st.integers(0, 3)),
        tokens_rate=draw(st.floats(0.0, 1000.0)),
        ttft=draw(latencies),
        tpot=draw(latencies),
        itl=draw(latencies),
        attention_busy=draw(SHARES),
        ffn_busy=draw(SHARES),
        kv_usage=draw(SHARES),
        prompt_mean=draw(SHARES) * 1000,
        output_mean=draw(SHARES) * 1000,
    )
