"""What the planner needs from one attention and one FFN worker: stage times, and runs to replay.

Lanes are fixed and nothing is chosen while it measures, so that every figure says of which batch,
context and number of lanes it is. ``stages`` is what latencies are fitted to; ``runs`` are what the
simulator is then held against (``benchmarks.replay``).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.offline import Run
from benchmarks.processes import Remote

LANES = (1, 2, 3)
CONTEXTS = (32, 160)
MOST_CONTEXT = 9_000
"""Context tokens of a step; computing the prompts of more takes minutes on one core."""
TURNS = 3
OUTPUTS = (40, 8)
"""Longest and shortest answer of a run to replay, evenly spread over its requests; one alone gets
the longest."""


def prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    """Different prompts of one length, token ids from 10 to 4009."""
    return [
        [(i * 37 + j * 11 + seed * 101) % 4000 + 10 for j in range(length)] for i in range(batch)
    ]


def in_turns(
    engine: Remote, layers: int, batches: Sequence[int], lanes: dict[int, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``stages`` and ``runs`` by turns, so that both see the same machine: its speed drifts.

    Long prompts, which take most of the time, have one turn only.
    """
    samples: list[dict[str, Any]] = []
    replayed: list[dict[str, Any]] = []
    for turn in range(TURNS):
        samples += stages(engine, layers, batches, CONTEXTS if turn == 1 else CONTEXTS[:1])
        replayed += runs(engine, batches, lanes)
    return samples, replayed


def stages(
    engine: Remote,
    layers: int,
    batches: Sequence[int],
    contexts: Sequence[int] = CONTEXTS,
    *,
    tokens: int = 10,
) -> list[dict[str, Any]]:
    """Rows as ``planner.fitting.latencies_from_telemetry`` reads them, times of one layer.

    Args:
        engine: a ``SplitEngine`` with one FFN worker.
        layers: MoE layers of the model.
        contexts: tokens of the prompts.
        tokens: decode steps per setting; what counts is their median.
    """
    rows: list[dict[str, Any]] = []
    for context in contexts:
        for batch in batches:
            if batch * context > MOST_CONTEXT:
                continue
            for lanes in (lanes for lanes in LANES if lanes <= batch):
                engine.set_lanes(lanes)
                engine.record()
                run = engine.generate(prompts(batch, context, lanes), tokens)
                kept = engine.recorded()
                tokens_each = context + tokens / 2
                rows += _stage_rows(kept, batch, lanes, tokens_each, layers)
                rows.append(
                    {
                        "stage": "step",
                        "seconds": full_step_seconds(run, batch),
                        "load": batch * tokens_each,
                        "requests": batch,
                        "lanes": lanes,
                    }
                )
    engine.set_lanes(None)
    return rows


def runs(
    engine: Remote, batches: Sequence[int], lanes: dict[int, int], *, repeats: int = 2
) -> list[dict[str, Any]]:
    """Whole runs: ``batch`` requests at once, answers of different lengths, prefill included.

    Args:
        lanes: batch -> lanes of its steps.

    Returns:
        Per batch and repetition: what was asked for, seconds in all, and TPOT percentiles in
        seconds over its requests.
    """
    found = []
    for batch in batches:
        outputs = [int(length) for length in np.linspace(*OUTPUTS, batch).round()]
        engine.set_lanes(lanes[batch])
        for repeat in range(repeats):
            run = engine.generate(prompts(batch, CONTEXTS[0], repeat), outputs)
            tpot = [
                (last - first) / (length - 1)
                for first, last, length in zip(run.first, run.last, outputs, strict=True)
            ]
            p50, p90 = np.percentile(tpot, (50, 90))
            found.append(
                {
                    "batch": batch,
                    "lanes": lanes[batch],
                    "prompt": CONTEXTS[0],
                    "outputs": outputs,
                    "seconds": run.seconds,
                    "tpot_p50_s": float(p50),
                    "tpot_p90_s": float(p90),
                }
            )
    engine.set_lanes(None)
    return found


def full_step_seconds(run: Run, batch: int) -> float:
    """Median step in seconds over the steps in which the whole batch decoded."""
    steps = [
        seconds
        for seconds, tokens in zip(run.step_seconds, run.step_tokens, strict=True)
        if tokens == batch
    ]
    return statistics.median(steps[1:])


def _stage_rows(
    kept: dict[str, list[tuple[float, float]]],
    batch: int,
    lanes: int,
    tokens_each: float,
    layers: int,
) -> Iterator[dict[str, Any]]:
    for stage, points in kept.items():
        sizes: dict[float, list[float]] = defaultdict(list)
        for size, seconds in points:
            sizes[size].append(seconds)
        for size, times in sizes.items():
            row = {"stage": stage, "seconds": statistics.median(times), "layers": layers}
            if size > batch:  # prompts, whose attention is another
                if stage == "attention":
                    yield {**row, "stage": "prefill", "load": size}
            elif stage == "attention":
                yield {**row, "load": size * tokens_each, "requests": size}
            elif stage == "ffn" or lanes == 1:
                yield {**row, "load": size}
