"""What the planner needs from one attention and one FFN worker: stage times, and runs to replay.

Lanes are fixed and nothing is chosen while it measures, so that every figure says of which batch,
context and number of lanes it is. ``stages`` is what latencies are fitted to; what ``run``
returns is what the simulator is then held against (``benchmarks.replay``).
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
TURNS, LONG_TURN = 6, 1
"""How often all is measured, and the turn in which long prompts are too."""
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
    """``stages`` and ``run`` by turns and batches, so that both see the same machine.

    Its speed drifts by a third within a minute: what is compared is measured within seconds, and
    often. Long prompts, which take most of the time, have one turn only.
    """
    samples: list[dict[str, Any]] = []
    replayed: list[dict[str, Any]] = []
    for turn in range(TURNS):
        contexts = CONTEXTS if turn == LONG_TURN else CONTEXTS[:1]
        for batch in batches:
            samples += stages(engine, layers, [batch], contexts)
            replayed.append(run(engine, batch, lanes[batch], seed=turn))
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
                done = engine.generate(prompts(batch, context, lanes), tokens)
                kept = engine.recorded()
                tokens_each = context + tokens / 2
                rows += _stage_rows(kept, batch, lanes, tokens_each, layers)
                rows.append(
                    {
                        "stage": "step",
                        "seconds": full_step_seconds(done, batch),
                        "load": batch * tokens_each,
                        "requests": batch,
                        "lanes": lanes,
                    }
                )
    engine.set_lanes(None)
    return rows


def run(engine: Remote, batch: int, lanes: int, seed: int) -> dict[str, Any]:
    """A whole run: ``batch`` requests at once, answers of different lengths, prefill included.

    Args:
        lanes: of its steps.
        seed: of the prompts.

    Returns:
        What was asked for, seconds in all, and TPOT percentiles in seconds over its requests.
    """
    outputs = [int(length) for length in np.linspace(*OUTPUTS, batch).round()]
    engine.set_lanes(lanes)
    done = engine.generate(prompts(batch, CONTEXTS[0], seed), outputs)
    engine.set_lanes(None)
    tpot = [
        (last - first) / (length - 1)
        for first, last, length in zip(done.first, done.last, outputs, strict=True)
    ]
    p50, p90 = np.percentile(tpot, (50, 90))
    return {
        "batch": batch,
        "lanes": lanes,
        "prompt": CONTEXTS[0],
        "outputs": outputs,
        "seconds": done.seconds,
        "tpot_p50_s": float(p50),
        "tpot_p90_s": float(p90),
    }


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
            prompts_too = size > batch
            if stage == "attention" and prompts_too:  # whose attention is another
                yield {**row, "stage": "prefill", "load": size}
            elif stage == "attention":
                yield {**row, "load": size * tokens_each, "requests": size}
            # To experts a token is a token; frames of prompts share the wire with the next ones.
            elif stage == "ffn" or (lanes == 1 and not prompts_too):
                yield {**row, "load": size}
