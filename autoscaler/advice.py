"""The planner's answers for kinds of load, worked out beside the controller and remembered.

A search takes seconds and a tick must not: answers come from a thread of their own, one at a time,
and until one is there nothing is advised. Lengths are rounded to kinds, so that few searches serve
a long time. Not for deciding: see ``policies.planned``.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.errors import PlannerError

if TYPE_CHECKING:
    from planner.explore.points import Mode
    from planner.explore.question import Exploration

KEPT = 64
"""Answers that are remembered."""


@dataclass(frozen=True)
class Load:
    """What is asked about: requests of one kind on some GPUs.

    Args:
        prefix: prompt tokens that are in the cache already.
        prompt: prompt tokens to be computed.
        output: tokens of an answer.
        gpus: of both sides.
        ttft, tpot: targets, seconds.
        lanes: most lanes of a step.
    """

    prefix: int
    prompt: int
    output: int
    gpus: int
    ttft: float
    tpot: float
    lanes: int = 1


@dataclass(frozen=True)
class Advice:
    """What the planner says of a load.

    Args:
        attention_share: GPUs of attention over those of both sides; nan: AFD does not hold the
            targets, or could not be looked at.
        text: for people; where another level would serve more, that too.
        failed: the planner could not answer.
    """

    attention_share: float
    text: str
    failed: bool = False


class Adviser:
    """Answers from a table, filled by ``explore``.

    Args:
        explore: searches for one load; takes its time, may raise ``PlannerError``.
        background: search in a thread; False: in the caller's, for replays and trials.
    """

    def __init__(self, explore: Callable[[Load], Exploration], background: bool = True):
        self._explore = explore
        self._background = background
        self._known: OrderedDict[Load, Advice] = OrderedDict()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def advise(self, load: Load) -> Advice | None:
        """What is known of a load; None while it is being worked out."""
        with self._lock:
            known = self._known.get(load)
            if known is not None:
                self._known.move_to_end(load)
                return known
        if not self._background:
            return self._look(load)
        if self._thread is None or not self._thread.is_alive():
            # A daemon: who ends the controller does not wait for a search
            self._thread = threading.Thread(
                target=self._look, args=(load,), name="planner", daemon=True
            )
            self._thread.start()
        return None

    def wait(self, timeout: float | None = None) -> None:
        """Until the search that is under way has ended."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _look(self, load: Load) -> Advice:
        try:
            advice = read(self._explore(load))
        except PlannerError as error:
            advice = Advice(math.nan, str(error), failed=True)
        except Exception as error:  # a search that fails must not be tried at every tick
            advice = Advice(math.nan, f"{type(error).__name__}: {error}", failed=True)
        with self._lock:
            self._known[load] = advice
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
        return advice


def kind(tokens: float, grain: float, before: int = 0) -> int:
    """Tokens rounded to steps of a share: lengths that differ by less are one kind.

    Args:
        before: the kind until now, which stays for somewhat more than a step either way, so that
            lengths between two kinds do not swing.
    """
    if not tokens >= 1:
        return 0
    if before > 0 and abs(math.log(tokens / before)) <= 0.75 * grain:
        return before
    return max(1, round(math.exp(round(math.log(tokens) / grain) * grain)))


def read(found: Exploration) -> Advice:
    """The advice in an exploration of AFD, perhaps with other levels."""
    from planner.explore.points import Mode
    from planner.explore.single_gpu import best_of_single_gpus, sides
    from planner.explore.verdict import counts, seconds

    point = best_of_single_gpus(found)
    if point is None:
        refusal = found.refusals.get(Mode.AFD)
        why = refusal.text if refusal else "it takes tensor parallelism, which actors do not have"
        return Advice(math.nan, f"AFD does not hold the targets: {why}{_rather(found, 0.0)}")
    attention, ffn = sides(point)
    share = attention.gpus / (attention.gpus + ffn.gpus)
    text = (
        f"{counts(point)} of {found.question.gpus} GPUs: {point.tokens_per_s:,.0f} tokens/s, TTFT "
        f"{seconds(point.ttft)}, TPOT {seconds(point.tpot)}{_rather(found, point.tokens_per_s)}"
    )
    return Advice(share, text)


def _rather(found: Exploration, rate: float) -> str:
    """Another level that would serve more."""
    from planner.explore.points import Mode
    from planner.explore.verdict import NAMES

    winner: Mode | None = found.winner
    best = found.best[winner] if winner is not None else None
    if best is None or winner is Mode.AFD or best.tokens_per_s <= rate:
        return ""
    much = f"{best.tokens_per_s / rate:.1f}x" if rate else f"{best.tokens_per_s:,.0f} tokens/s"
    return f"; {NAMES[best.mode]} would serve {much} here"
