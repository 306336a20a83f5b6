"""Traces: rates, prefix caches, and the figures of the public ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.traces import BLOCK_TOKENS, Trace, prefix_reuse, read_trace

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def public(name: str) -> Path:
    """A public trace; not in the repository."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"public trace {name} is not in ../shared/data")
    return path


def of_blocks(*blocks: tuple[int, ...], short: int = 0) -> Trace:
    """A trace of requests with these blocks, the last block ``short`` tokens from full."""
    n = len(blocks)
    prompt = np.array([max(0, len(ids) * BLOCK_TOKENS - short) for ids in blocks])
    return Trace(np.arange(n, dtype=float), prompt, np.ones(n, dtype=np.int64), blocks)


@st.composite
def chained(draw: st.DrawFn) -> Trace:
    """Conversations: every request is a path in a tree, so that an id says what came before."""
    paths: list[tuple[int, ...]] = [()]
    requests = []
    for _ in range(draw(st.integers(1, 30))):
        base = draw(st.sampled_from(paths))
        path = base[: draw(st.integers(0, len(base)))]
        fresh = sum(map(len, paths))
        path += tuple(range(1000 + fresh, 1000 + fresh + draw(st.integers(0, 4))))
        paths.append(path)
        requests.append(path)
    return of_blocks(*requests, short=draw(st.sampled_from([0, 1, 511])))


def found_by_scanning(trace: Trace, capacity: int | None) -> list[int]:
    """The same cache with the time of last use written at every block, and scans of all of it."""
    used: dict[int, tuple[int, int]] = {}  # block -> (request, how near to the front)
    assert trace.blocks is not None
    found = []
    for index, blocks in enumerate(trace.blocks):
        hits = 0
        while hits < len(blocks) and blocks[hits] in used:
            hits += 1
        found.append(max(0, min(hits * BLOCK_TOKENS, int(trace.prompt[index]) - 1)))
        for depth, block in enumerate(blocks):
            used[block] = (index, -depth)
        while capacity is not None and len(used) > capacity:
            del used[min(used, key=lambda block: used[block])]
    return found


@given(chained(), st.none() | st.integers(0, 20))
def test_prefix_reuse_is_that_of_a_naive_cache(trace: Trace, capacity: int | None) -> None:
    assert prefix_reuse(trace, capacity).tolist() == found_by_scanning(trace, capacity)


@given(chained(), st.integers(0, 20), st.integers(0, 20))
def test_a_larger_cache_never_finds_less(trace: Trace, one: int, other: int) -> None:
    """Least recently used is a stack algorithm; the prefix order keeps it one here."""
    small, large = (prefix_reuse(trace, size) for size in sorted((one, other)))
    assert (small <= large).all()
    assert (large <= prefix_reuse(trace)).all()
    assert (prefix_reuse(trace) <= np.maximum(0, trace.prompt - 1)).all()


def test_prefixes_outlive_what_hangs_on_them() -> None:
    trace = of_blocks((1, 2, 3), (1, 4, 5), (1, 2, 3))
    assert prefix_reuse(trace).tolist() == [0, 512, 3 * 512 - 1]
    assert prefix_reuse(trace, 5).tolist() == [0, 512, 3 * 512 - 1]
    assert prefix_reuse(trace, 4).tolist() == [0, 512, 2 * 512]  # 3 was evicted first
    assert prefix_reuse(trace, 1).tolist() == [0, 512, 512]
    assert prefix_reuse(trace, 0).tolist() == [0, 0, 0]


def test_the_last_token_is_always_computed() -> None:
    trace = of_blocks((1,), (1,), short=511)  # prompts of one token
    assert prefix_reuse(trace).tolist() == [0, 0]
    assert prefix_reuse(of_blocks((), ())).tolist() == [0, 0]


def test_prefix_reuse_refuses() -> None:
    bare = Trace(np.zeros(1), np.array([5]), np.array([5]), source="x.csv")
    with pytest.raises(PlannerError, match=r"x\.csv: no block ids"):
        prefix_reuse(bare)
    with pytest.raises(PlannerError, match="capacity is -1 blocks"):
        prefix_reuse(of_blocks((1,)), -1)


gaps = st.lists(st.floats(0, 100), min_size=1, max_size=20).filter(lambda x: sum(x) > 1e-3)


@given(gaps, st.floats(1e-3, 1e3))
def test_scaling_changes_the_rate_and_nothing_else(gaps: list[float], rate: float) -> None:
    arrival = np.concatenate([[0], np.cumsum(gaps)])
    n = len(arrival)
    trace = Trace(arrival, np.arange(n), np.arange(1, n + 1), source="x", skipped=2)
    scaled = trace.scaled(rate)
    assert scaled.rate == pytest.approx(rate)
    assert scaled.duration == pytest.approx((n - 1) / rate)
    assert (scaled.prompt == trace.prompt).all() and (scaled.output == trace.output).all()
    assert (scaled.source, scaled.skipped, len(scaled)) == ("x", 2, n)
    assert scaled.scaled(trace.rate).arrival == pytest.approx(arrival)


def test_rates_that_cannot_be() -> None:
    trace = Trace(np.zeros(2), np.array([5, 5]), np.array([5, 5]), source="x.csv")
    with pytest.raises(PlannerError, match=r"x\.csv: 2 request\(s\) at one time have no rate"):
        _ = trace.rate
    for rate in (0, -1, float("inf"), float("nan")):
        with pytest.raises(PlannerError, match="rate is"):
            trace.scaled(rate)


@settings(max_examples=30)
@given(chained())
def test_workload_of_a_trace(trace: Trace) -> None:
    joint = trace.workload()
    assert list(joint.replay()) == list(zip(trace.prompt, trace.output, strict=True))
    total = trace.prompt.sum()
    assert joint.reuse == pytest.approx(prefix_reuse(trace).sum() / total if total else 0)
    assert 0 <= joint.reuse < 1


@pytest.mark.parametrize(
    ("arrival", "blocks", "says"),
    [
        ([0.0], None, r"\(1,\) arrivals of \(2,\) requests"),
        ([1.0, 0.0], None, "non-decreasing"),
        ([0.0, float("nan")], None, "finite seconds"),
        ([0.0, 1.0], ((1,),), "blocks of 1 requests in a trace of 2"),
    ],
)
def test_refused_traces(arrival: list[float], blocks: tuple | None, says: str) -> None:
    with pytest.raises(PlannerError, match=says):
        Trace(np.array(arrival), np.array([1, 1]), np.array([1, 1]), blocks)


def test_azure_conversations() -> None:
    trace = read_trace(public("azure23_conv.csv"))
    assert len(trace) == 19_366 and trace.skipped == 0 and trace.blocks is None
    assert (trace.prompt[0], trace.output[0]) == (374, 44)
    assert trace.arrival[1] == pytest.approx(50.995169 - 46.68059)
    assert trace.rate == pytest.approx(5.53, abs=0.01)
    moments = trace.workload().moments()
    assert round(moments.theta) == 1226
    assert moments.theta_low is not None and moments.theta_high is not None
    assert moments.theta_low < moments.theta < moments.theta_high < moments.naive


def test_mooncake_conversations() -> None:
    trace = read_trace(public("mooncake_conv.jsonl"))
    assert len(trace) == 12_031 and trace.skipped == 0
    assert trace.blocks is not None and trace.blocks[1][:3] == (0, 14, 15)
    assert trace.duration == pytest.approx(3537, abs=1)
    joint = trace.workload()
    assert round(joint.moments().theta) == 13_125
    assert joint.reuse == pytest.approx(0.3736, abs=1e-4)
    shares = [prefix_reuse(trace, size).sum() / trace.prompt.sum() for size in (1000, 10_000)]
    assert shares == pytest.approx([0.0454, 0.2157], abs=1e-4)


def test_the_walk_through_a_public_trace() -> None:
    """theta against walking through every step of every request, 100 of them."""
    trace = read_trace(public("azure23_conv.csv"), limit=100)
    pairs = zip(trace.prompt, trace.output, strict=True)
    loads = np.concatenate([prompt + np.arange(output) for prompt, output in pairs])
    moments = trace.workload().moments()
    assert moments.theta == pytest.approx(loads.mean())
    assert moments.nu2 == pytest.approx(loads.var())
