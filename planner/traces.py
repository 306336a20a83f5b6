"""Traces of real requests: when they came, how long they were, which prefixes they shared.

A trace is read by planner/trace_files.py (``read_trace`` is found here as well). It can be turned
into a workload, sped up or slowed down, or asked what a prefix cache would have found. Replaying it
is the simulator's job.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.lengths import Lengths
from planner.moments import check_pairs
from planner.pairs import Joint
from planner.trace_files import BLOCK_TOKENS, read_rows

__all__ = ["BLOCK_TOKENS", "Trace", "prefix_reuse", "read_trace"]


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in order of arrival.

    Attributes:
        arrival: float64[n], seconds after the first, non-decreasing.
        prompt: int64[n], tokens, 0 or more.
        output: int64[n], tokens, 1 or more.
        blocks: for each request the ids of the ``BLOCK_TOKENS``-token blocks of its prompt, the
            last one possibly part filled; equal ids mean equal text up to there. None where the
            trace does not say.
        source: the file it came from.
        skipped: requests left out because they made no token, so that no decode step saw them.

    Raises:
        PlannerError: no requests, arrays that differ in length or hold anything else than above.
    """

    arrival: NDArray[np.float64]
    prompt: Lengths
    output: Lengths
    blocks: tuple[tuple[int, ...], ...] | None = None
    source: str = "trace"
    skipped: int = 0

    def __post_init__(self) -> None:
        prompt, output = check_pairs(self.prompt, self.output)
        arrival = np.asarray(self.arrival, dtype=np.float64)
        if arrival.shape != prompt.shape:
            raise PlannerError(f"{arrival.shape} arrivals of {prompt.shape} requests in a trace")
        if not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any():
            raise PlannerError("arrivals of a trace: expected finite seconds, non-decreasing")
        if self.blocks is not None and len(self.blocks) != len(prompt):
            raise PlannerError(
                f"blocks of {len(self.blocks)} requests in a trace of {len(prompt)}: "
                "give one tuple per request, or None"
            )
        for name, column in (("arrival", arrival), ("prompt", prompt), ("output", output)):
            object.__setattr__(self, name, column)

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def duration(self) -> float:
        """Seconds from the first arrival to the last."""
        return float(self.arrival[-1] - self.arrival[0])

    @property
    def rate(self) -> float:
        """Requests per second, over the gaps between the first arrival and the last.

        Raises:
            PlannerError: all requests came at the same time.
        """
        if self.duration <= 0:
            raise PlannerError(
                f"{self.source}: {len(self)} request(s) at one time have no rate; "
                "give requests at two different times at least"
            )
        return (len(self) - 1) / self.duration

    def scaled(self, rate: float) -> Trace:
        """The same requests at another mean rate: every gap is multiplied by the same factor.

        Args:
            rate: requests per second.

        Raises:
            PlannerError: the rate is not a positive number, or the trace has none to scale.
        """
        if not 0 < rate < float("inf"):
            raise PlannerError(f"rate is {rate}: expected requests per second, more than 0")
        return replace(self, arrival=self.arrival * (self.rate / rate))

    def workload(self) -> Joint:
        """The requests without their times; reuse is what an unbounded prefix cache finds."""
        total = int(self.prompt.sum())
        found = 0 if self.blocks is None else int(prefix_reuse(self).sum())
        return Joint(
            self.prompt, self.output, name=self.source, reuse=found / total if total else 0.0
        )


def read_trace(path: str | PathLike[str], limit: int | None = None) -> Trace:
    """Read a trace in one of two public formats, told apart by content, gzipped or not.

    - Azure LLM inference traces: CSV with a header that names TIMESTAMP, ContextTokens and
      GeneratedTokens (others are ignored). Times are ISO 8601, or numbers of seconds.
    - Mooncake: JSON lines with timestamp (milliseconds), input_length, output_length and,
      for all requests or none, hash_ids (blocks of ``BLOCK_TOKENS`` tokens).

    Rows need not be in order of time. Those with an output of 0 are counted in ``Trace.skipped``.

    Args:
        path: the file.
        limit: read the first so many rows of the file only.

    Raises:
        PlannerError: the file cannot be read, is neither format, holds a malformed row (the error
            names the line, what was found and what was expected) or no request at all.
    """
    if limit is not None and limit < 1:
        raise PlannerError(f"limit is {limit}: expected a number of rows, 1 or more")
    rows = read_rows(path, limit)
    prompt, output = np.array(rows.prompt, dtype=np.int64), np.array(rows.output, dtype=np.int64)
    kept = np.flatnonzero(output > 0)
    if not len(kept):
        raise PlannerError(
            f"{path}: no request that made a token ({len(output)} rows); "
            "expected an Azure CSV or Mooncake JSONL trace"
        )
    arrival = np.array(rows.seconds)
    order = kept[np.argsort(arrival[kept], kind="stable")]
    return Trace(
        arrival=arrival[order] - arrival[order[0]],
        prompt=prompt[order],
        output=output[order],
        blocks=None if rows.blocks is None else tuple(rows.blocks[row] for row in order),
        source=str(path),
        skipped=len(output) - len(kept),
    )


def prefix_reuse(trace: Trace, capacity_blocks: int | None = None) -> NDArray[np.int64]:
    """Prompt tokens of each request that a prefix cache would already hold when it arrives.

    One least-recently-used cache sees the requests in order of arrival. A request finds the longest
    prefix of its blocks that is present; then all its blocks count as used, the first ones last, so
    that a prefix outlives what hangs on it. Its last token is never found: as in vLLM, it must be
    computed to give the first output token. When a request's KV is written, how long it stays
    pinned, and tokens made by the model are left out.

    Args:
        trace: with ``blocks``.
        capacity_blocks: blocks the cache holds; None for no bound, 0 for no cache.

    Returns:
        int64[n], tokens found, below the prompt length (0 for an empty prompt).

    Raises:
        PlannerError: the trace has no blocks, or the capacity is negative.
    """
    if trace.blocks is None:
        raise PlannerError(
            f"{trace.source}: no block ids, so nothing is known of shared prefixes; "
            "Mooncake traces give them as hash_ids"
        )
    if capacity_blocks is not None and capacity_blocks < 0:
        raise PlannerError(f"capacity is {capacity_blocks} blocks: expected 0 or more, or None")
    found = np.zeros(len(trace), dtype=np.int64)
    cache: OrderedDict[int, None] = OrderedDict()  # least recently used first
    for index, blocks in enumerate(trace.blocks):
        for depth, block in enumerate(blocks):
            if block not in cache:
                found[index] = depth
                break
        else:
            found[index] = len(blocks)
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        if capacity_blocks is not None:
            while len(cache) > capacity_blocks:
                cache.popitem(last=False)
    return np.maximum(0, np.minimum(found * BLOCK_TOKENS, trace.prompt - 1))
