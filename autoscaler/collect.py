"""Asks every worker of a deployment what it has done lately, all at once, each with a deadline.

Whoever collects keeps its own cursors, so the controller and any number of recordings may do it
side by side. Frontends are not asked: they report by themselves (``cluster.reporting``). Not for
making sense of the answers: see ``telemetry``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.errors import AffluxError

logger = logging.getLogger(__name__)

DEADLINE_S = 1.0

Batch = dict[str, Any]


@dataclass
class Cursors:
    """What a collector remembers between two rounds.

    Args:
        numbers: newest record that was read of each worker.
        workers: those that were there last: name -> (role, Ray handle, state).
        away: the manager did not answer in the last round.
        silent: workers that did not answer in the last round, and why.
    """

    numbers: dict[str, int] = field(default_factory=dict)
    workers: dict[str, tuple[str, Any, str]] = field(default_factory=dict)
    away: bool = False
    silent: dict[str, str] = field(default_factory=dict)


async def collect(
    manager: Any, cursors: Cursors, deadline_s: float = DEADLINE_S
) -> dict[str, Batch]:
    """One round: what every worker that answered has done since the last one.

    While the manager is away, the workers that were there last are asked. Takes two deadlines at
    most.

    Args:
        manager: its Ray handle; None counts as away.
        cursors: moved on by what was read.

    Returns:
        name -> what the worker's ``telemetry`` gave. The dead, the silent and those that measure
        nothing are left out and stand in ``cursors.silent``.
    """
    await _look(manager, cursors, deadline_s)
    cursors.silent = {}
    names = list(cursors.workers)
    answers = await asyncio.gather(*(_ask(name, cursors, deadline_s) for name in names))
    found = {}
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, str):
            cursors.silent[name] = answer
        else:
            found[name] = answer
            cursors.numbers[name] = answer["number"]
    return found


async def _look(manager: Any, cursors: Cursors, deadline_s: float) -> None:
    if manager is None:
        cursors.away = True
        return
    answer = await _within(manager.workers.remote(), deadline_s)
    cursors.away = isinstance(answer, str)
    if isinstance(answer, str):
        logger.debug("the manager does not say who works: %s", answer)
        return
    cursors.workers = dict(answer)
    cursors.numbers = {n: v for n, v in cursors.numbers.items() if n in cursors.workers}


async def _ask(name: str, cursors: Cursors, deadline_s: float) -> Any:
    _, handle, _ = cursors.workers[name]
    since = cursors.numbers.get(name, 0)
    return await _within(handle.telemetry.remote(since), deadline_s)


async def _within(call: Awaitable[Any], deadline_s: float) -> Any:
    """What a call gives, or why it gave nothing, as text."""
    try:
        async with asyncio.timeout(deadline_s):
            return await call
    except TimeoutError:
        return f"no answer within {deadline_s:g} s"
    except (RayError, AffluxError) as error:
        cause = getattr(error, "cause", None) or error
        return (str(cause).strip() or type(cause).__name__).splitlines()[0]
