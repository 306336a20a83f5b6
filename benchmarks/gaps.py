"""What a load's streams say: token gaps, what an event did to them, and whether tokens are right.

Pure functions over ``load.Stream``. A gap is the time between two messages of a stream that follow
each other; the time to the first token is no gap. A stream that broke off counts up to its end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.load import Stream

NEAR_S = 3.0
"""How far around an event "at that time" reaches."""

AFTER_S = 0.2
"""A commit's window ends this long after it."""

ONSET_S = 1.0
"""A stall that an event caused begins at most this long after it."""


def token_gaps(streams: Sequence[Stream]) -> np.ndarray:
    """Every gap as a row (begin, end) in Unix seconds, shape [gaps, 2], by begin."""
    rows: list[tuple[float, float]] = []
    for stream in streams:
        marks = sorted(set(stream.times))
        if stream.error and marks and stream.ended > marks[-1]:
            marks.append(stream.ended)
        rows.extend(itertools.pairwise(marks))
    rows.sort()
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def longest_between(gaps: np.ndarray, begin: float, end: float) -> float:
    """Longest gap in seconds that overlaps [begin, end]; 0 without one."""
    hit = gaps[(gaps[:, 0] <= end) & (gaps[:, 1] >= begin)]
    return float(np.max(hit[:, 1] - hit[:, 0], initial=0.0))


def gap_after(gaps: np.ndarray, at: float, onset_s: float = ONSET_S) -> float:
    """The gap in seconds that an event at ``at`` caused: the longest of any stream that ended after
    the event and began before ``at + onset_s``. What happens later (a replacement that starts, say)
    is not in it."""
    return longest_between(gaps, at, at + onset_s)


def typical_gap(gaps: np.ndarray, begin: float, end: float) -> float:
    """Median gap in seconds within ``NEAR_S`` before and after [begin, end]; 0 without any."""
    before = (gaps[:, 1] > begin - NEAR_S) & (gaps[:, 1] < begin)
    after = (gaps[:, 0] > end) & (gaps[:, 0] < end + NEAR_S)
    near = gaps[before | after]
    return float(np.median(near[:, 1] - near[:, 0])) if len(near) else 0.0


def commit_pause(gaps: np.ndarray, begin: float, end: float) -> float:
    """Seconds that a commit held streams up: the longest gap of any stream that overlaps
    [begin, end + ``AFTER_S``], less the median gap of all streams around that window."""
    end += AFTER_S
    return max(0.0, longest_between(gaps, begin, end) - typical_gap(gaps, begin, end))


def wrong_tokens(streams: Sequence[Stream], reference: Sequence[Stream]) -> list[int]:
    """Indexes of streams that differ from the undisturbed run in any token: another, a missing or a
    repeated one. A stream that failed is wrong only when what it got is no beginning of the truth.

    Raises:
        ValueError: the undisturbed run lacks a request, or failed in one.
    """
    truth: dict[int, list[int]] = {}
    for stream in reference:
        if stream.error:
            raise ValueError(
                f"the undisturbed run failed in request {stream.asked}: {stream.error}"
            )
        if truth.setdefault(stream.asked, stream.tokens) != stream.tokens:
            raise ValueError(f"the undisturbed run contradicts itself in request {stream.asked}")
    wrong = []
    for index, stream in enumerate(streams):
        if stream.asked not in truth:
            raise ValueError(f"the undisturbed run has no request {stream.asked}")
        expected = truth[stream.asked]
        if stream.error:
            expected = expected[: len(stream.tokens)]
        if stream.tokens != expected:
            wrong.append(index)
    return wrong


def token_rate(streams: Sequence[Stream], step_s: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Tokens per second of all streams in steps: (middles in Unix seconds, rates), both [steps]."""
    times = np.array(sorted(t for stream in streams for t in stream.times))
    if not len(times):
        return np.zeros(0), np.zeros(0)
    steps = int(np.ceil((times[-1] - times[0]) / step_s)) or 1
    edges = times[0] + step_s * np.arange(steps + 1)
    counts, _ = np.histogram(times, np.append(edges[:-1], max(edges[-1], times[-1])))
    return edges[:-1] + step_s / 2, counts / step_s


def until(streams: Sequence[Stream], end: float) -> list[Stream]:
    """The streams as they were at ``end`` (Unix seconds); what came later is cut off."""
    cut = []
    for stream in streams:
        if stream.sent <= end:
            count = sum(time <= end for time in stream.times)
            cut.append(replace(stream, times=stream.times[:count], tokens=stream.tokens[:count]))
    return cut


def failures(streams: Sequence[Stream]) -> list[dict[str, Any]]:
    """A row per stream that failed: when it was sent and ended, how far it came, and why."""
    return [
        {"sent": s.sent, "ended": s.ended, "tokens": len(s.tokens), "reason": s.error}
        for s in streams
        if s.error
    ]


def figures(streams: Sequence[Stream], reference: Sequence[Stream]) -> dict[str, Any]:
    """The flat figures of a run: counts, wrong streams, gaps and latencies in seconds."""
    gaps = token_gaps(streams)
    lengths = gaps[:, 1] - gaps[:, 0]
    first = [s.times[0] - s.sent for s in streams if s.times]
    rest = [(s.times[-1] - s.times[0]) / (len(s.times) - 1) for s in streams if len(s.times) > 1]
    failed = sum(bool(stream.error) for stream in streams)
    return {
        "sent": len(streams),
        "completed": len(streams) - failed,
        "failed": failed,
        "wrong_tokens": len(wrong_tokens(streams, reference)),
        "gap_max_s": _rank(lengths, 100),
        "gap_p99_s": _rank(lengths, 99),
        "gap_p50_s": _rank(lengths, 50),
        "ttft_p50_s": _rank(first, 50),
        "ttft_p99_s": _rank(first, 99),
        "tpot_p50_s": _rank(rest, 50),
        "tpot_p99_s": _rank(rest, 99),
    }


def _rank(values: Any, percent: float) -> float:
    return round(float(np.percentile(values, percent)), 4) if len(values) else 0.0
