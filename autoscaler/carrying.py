"""Turns a decision into orders to the manager, and remembers which roles can't grow for now.

What the controller does to the world, apart from asking for it: ``Orders`` is the only place that
changes a deployment. Not for deciding (``core``) or for watching (``collect``).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscaler.limits import Counts
from autoscaler.policy import Decision

HOLD_S = 60.0
"""How long a role's number does not grow after an actor of it found no place, or did not start."""

Ask = Callable[..., Awaitable[Any]]
"""Calls a method of the manager by name."""


@dataclass(frozen=True)
class Placed:
    """What came of an order.

    Args:
        numbers: of the changes that were ordered.
        error: why nothing was; empty otherwise.
    """

    numbers: tuple[int, ...] = ()
    error: str = ""


class Orders:
    """Carries out targets.

    Args:
        ask: the manager.
    """

    def __init__(self, ask: Ask):
        self._ask = ask
        self._held: dict[str, tuple[float, str]] = {}
        self._under_way: dict[int, Decision] = {}

    def cannot_place(self, now: float) -> dict[str, str]:
        """Role -> why it can't grow at the moment."""
        self._held = {role: held for role, held in self._held.items() if held[0] > now}
        return {role: why for role, (_, why) in self._held.items()}

    async def place(
        self, decision: Decision, members: Sequence[tuple[str, str, str]], now: float
    ) -> Placed:
        """Order what a decision wants.

        A shift of the ratio for which there is room starts the new actors first; without room it
        turns actors over one by one, each leaving its place to its successor.

        Args:
            members: (name, role, state) of the actors.

        Raises:
            AffluxError: the manager refuses.
        """
        target, there = decision.target, decision.there
        assert target is not None
        grows = [
            role for role in ("attention", "ffn") if getattr(target, role) > getattr(there, role)
        ]
        shrinks = [r for r in ("attention", "ffn") if getattr(target, r) < getattr(there, r)]
        lacking = {role: why for role in grows if (why := await self._ask("room", role))}
        if lacking and shrinks:
            (grown,), (shrunk,) = grows, shrinks
            return await self._flip(there, target, grown, shrunk, members, decision)
        if lacking:
            for role, why in lacking.items():
                self._held[role] = (now + HOLD_S, why)
            return Placed(error="; ".join(lacking.values()))
        report = await self._ask("scale", attention=target.attention, ffn=target.ffn)
        self._under_way[report.number] = decision
        return Placed((report.number,))

    async def _flip(
        self,
        there: Counts,
        target: Counts,
        grown: str,
        shrunk: str,
        members: Sequence[tuple[str, str, str]],
        decision: Decision,
    ) -> Placed:
        ready = [name for name, role, state in members if (role, state) == (shrunk, "ready")]
        up = getattr(target, grown) - getattr(there, grown)
        down = getattr(there, shrunk) - getattr(target, shrunk)
        numbers = []
        for name in newest_first(ready)[: min(up, down)]:
            report = await self._ask("flip", name, grown)
            self._under_way[report.number] = decision
            numbers.append(report.number)
        return Placed(
            tuple(numbers), "" if numbers else f"no {shrunk} actor is ready to be flipped"
        )

    def ended(self, reports: Sequence[Any], now: float) -> list[tuple[Decision, Any]]:
        """Take in reports of ended changes; those of ours, each with its decision."""
        ours = []
        for report in reports:
            decision = self._under_way.pop(report.number, None)
            if decision is None:
                continue
            ours.append((decision, report))
            if report.phase == "rolled_back":
                self._hold(decision, f"change {report.number}: {report.error}", now)
        return ours

    def _hold(self, decision: Decision, why: str, now: float) -> None:
        """A role whose actors did not come up is left alone for a while."""
        assert decision.target is not None
        grown: Mapping[str, bool] = {
            role: getattr(decision.target, role) > getattr(decision.there, role)
            for role in ("attention", "ffn")
        }
        for role in grown if not any(grown.values()) else [r for r, up in grown.items() if up]:
            self._held[role] = (now + HOLD_S, why)


def newest_first(names: Sequence[str]) -> list[str]:
    """Actors by falling number."""

    def number(name: str) -> int:
        digits = name.rpartition("-")[2]
        return int(digits) if digits.isdigit() else -1

    return sorted(names, key=number, reverse=True)
