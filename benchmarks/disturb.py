"""Which process is hit when, and hitting it. The schedule is a pure function of its seed.

``SIGKILL`` ends a process without a word; ``SIGSTOP`` freezes it, and ``SIGCONT`` wakes it up
later, with whatever it knew then. Not for judging what comes of it: see ``gaps.py``.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import psutil

Kind = Literal["attention", "ffn", "manager", "frontend"]
How = Literal["kill", "freeze", "hiccup"]

KINDS: tuple[Kind, ...] = ("attention", "ffn", "manager")
_WEIGHTS: dict[Kind, float] = {"attention": 4, "ffn": 4, "manager": 2, "frontend": 1}
_FREEZES: dict[How, float] = {"kill": 6, "freeze": 3, "hiccup": 1}
HICCUP_S = 0.5


@dataclass(frozen=True)
class Blow:
    """One thing to do to one process.

    Args:
        number: from 0, in order.
        kind: what is hit.
        how: ``kill``: SIGKILL; ``freeze``: SIGSTOP, and SIGCONT once others have taken over;
            ``hiccup``: SIGSTOP for ``HICCUP_S``.
        which: picks the victim among those of its kind, in [0, 1).
        after: share of the run's requests that must be done before, in [0, 1).
    """

    number: int
    kind: Kind
    how: How
    which: float
    after: float

    def pick(self, names: Sequence[str]) -> str:
        """The victim among ``names``, whatever order they come in."""
        if not names:
            raise ValueError(f"there is no {self.kind} to hit")
        return sorted(names)[int(self.which * len(names))]


def schedule(kills: int, seed: int, kinds: Sequence[Kind] = KINDS) -> tuple[Blow, ...]:
    """``kills`` blows spread over the run at random; the same for the same arguments.

    Every kind comes up when there are at least as many blows as kinds, and so does a freeze from
    four blows on. Only attention and FFN actors are frozen: who waits for whom is the question
    there. A manager or a frontend is killed.
    """
    dice = random.Random(f"chaos {seed}")
    weights = [_WEIGHTS[kind] for kind in kinds]
    drawn = [*kinds, *dice.choices(kinds, weights, k=max(0, kills - len(kinds)))][:kills]
    dice.shuffle(drawn)
    hows = list(_FREEZES)
    ways: list[How] = [
        dice.choices(hows, list(_FREEZES.values()))[0] if kind in ("attention", "ffn") else "kill"
        for kind in drawn
    ]
    frozen = [i for i, kind in enumerate(drawn) if kind in ("attention", "ffn")]
    if kills >= 4 and frozen and "freeze" not in ways:
        ways[dice.choice(frozen)] = "freeze"
    moments = sorted((i + dice.random()) / (kills + 1) for i in range(kills))
    return tuple(
        Blow(number, kind, how, dice.random(), moment)
        for number, (kind, how, moment) in enumerate(zip(drawn, ways, moments, strict=True))
    )


def strike(pid: int, how: How) -> float:
    """Do it; returns the Unix time. A ``hiccup`` is over when this returns.

    Raises:
        ProcessLookupError: there is no such process.
    """
    try:
        victim = psutil.Process(pid)
        at = time.time()
        victim.send_signal(signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    except psutil.NoSuchProcess:
        raise ProcessLookupError(f"process {pid} has ended already") from None
    if how == "hiccup":
        time.sleep(HICCUP_S)
        wake(pid)
    return at


def wake(pid: int) -> bool:
    """Let a frozen process go on; False when it has been ended meanwhile."""
    with suppress(psutil.NoSuchProcess):
        frozen = psutil.Process(pid)
        if frozen.status() != psutil.STATUS_ZOMBIE:
            frozen.send_signal(signal.SIGCONT)
            return True
    return False
