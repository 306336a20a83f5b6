"""Why a mode holds no configuration within the targets: which limit fails, by how much."""

from __future__ import annotations

import math

from planner.explore.found import Reach
from planner.explore.points import Mode
from planner.explore.question import Question, Refusal

GIB = 1024**3


def refusal_of(question: Question, mode: Mode, reach: Reach) -> Refusal:
    """The reason.

    Of two targets that are both out of reach, the one that is missed by the larger factor counts.

    Args:
        mode: that has no best.
        reach: how near its configurations came.
    """
    targets = question.targets
    if not math.isfinite(reach.tpot) and not math.isfinite(reach.ttft):
        return _nothing_timed(question, mode, reach)
    misses = {"ttft": reach.ttft / targets.ttft, "tpot": reach.tpot / targets.tpot}
    failed = [name for name, ratio in misses.items() if ratio > 1]
    if not failed:
        text = (
            f"{mode}: TTFT of {_ms(reach.ttft)} and TPOT of {_ms(reach.tpot)} can be reached, but "
            f"no configuration holds {_ms(targets.ttft)} and {_ms(targets.tpot)} at once"
        )
        return Refusal("ttft and tpot", math.nan, math.nan, text)
    worst = max(failed, key=lambda name: misses[name])
    needed, allowed = getattr(reach, worst), getattr(targets, worst)
    text = (
        f"{mode}: the best {worst.upper()} of any configuration is {_ms(needed)}, "
        f"{needed / allowed:.3g} times the {_ms(allowed)} allowed"
    )
    other = "tpot" if worst == "ttft" else "ttft"
    if other in failed:
        text += f"; {other.upper()} is out of reach too, at best {_ms(getattr(reach, other))}"
    return Refusal(worst, needed, allowed, text)


def _nothing_timed(question: Question, mode: Mode, reach: Reach) -> Refusal:
    if reach.uncovered:
        text = (
            f"{mode}: no kernel times for any of {reach.uncovered} configurations that fit memory "
            f"({reach.missing}); --allow-extrapolation goes beyond what was measured"
        )
        return Refusal("kernels", math.nan, math.nan, text)
    if math.isfinite(reach.memory):
        text = (
            f"{mode}: the configuration that needs least takes {reach.memory / GIB:.1f} GiB on its "
            f"fullest GPU, which has room for {reach.room / GIB:.1f} GiB"
        )
        return Refusal("memory", reach.memory, reach.room, text)
    text = f"{mode}: {question.gpus} GPUs can't be divided for {question.model.name}"
    return Refusal("gpus", math.nan, float(question.gpus), text)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
