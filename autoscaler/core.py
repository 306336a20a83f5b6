"""The controller's decision as a pure function of what it is shown: guard, ask, constrain, time.

The same object decides live (``controller``), in replays and in the planner's simulator
(``simulated``). It does no I/O and reads no clock: all time comes with the snapshot. Start at
``Core.tick``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autoscaler.limits import Counts, Limits, constrain
from autoscaler.model import Model
from autoscaler.policy import SLO, Decision, Policy, Proposal, System, View
from autoscaler.reasons import Reason
from planner.control import Snapshot

Mode = Literal["advise", "on"]
ROLES = ("attention", "ffn")

LEAP = 10.0
"""A tick that comes later than so many intervals is a clock that leapt, or a process that slept."""

KV_FULL = 0.9
"""Share of the room for contexts that a consolidation may fill."""


@dataclass(frozen=True)
class Timing:
    """When the controller acts; seconds, or the snapshot's unit.

    Args:
        interval: between two ticks.
        cooldown: after a change, nothing is changed for so long.
        shrink_cooldown: after a change nothing shrinks, and no role goes back, for so long.
        stale: measurements older than this decide nothing.
        least_window: a window shorter than this decides nothing, such as just after a change.
    """

    interval: float = 2.0
    cooldown: float = 10.0
    shrink_cooldown: float = 60.0
    stale: float = 10.0
    least_window: float = 2.0


@dataclass(frozen=True)
class Situation:
    """What the membership is about, beside the snapshot.

    Args:
        changing: the change under way, for people; empty: none.
        cannot_place: role -> why Ray found no place for an actor of it lately.
        rebalance_gain: share of a step's time that a new placement of the experts would save;
            0: none, or not known.
    """

    changing: str = ""
    cannot_place: Mapping[str, str] = field(default_factory=dict)
    rebalance_gain: float = 0.0


@dataclass
class _Moves:
    """What was done last, per role."""

    at: float = -math.inf
    up: dict[str, float] = field(default_factory=dict)
    down: dict[str, float] = field(default_factory=dict)
    rebalanced: float = -math.inf

    def copy(self) -> _Moves:
        return replace(self, up=dict(self.up), down=dict(self.down))

    def not_after(self, now: float) -> None:
        """A clock that ran backwards leaves no move in the future, where it would hold for long."""
        self.at, self.rebalanced = min(self.at, now), min(self.rebalanced, now)
        for moves in (self.up, self.down):
            moves.update({role: min(at, now) for role, at in moves.items()})


class Core:
    """Decides at every tick. Everything but what ``tick`` keeps can be replaced while it runs.

    Args:
        policy: what is asked.
        limits, slo, system: see ``View``.
        timing: when it acts.
        mode: "advise" only says what it would do.
        rebalance_over: gain (``Situation.rebalance_gain``) above which the experts are placed anew;
            None never does.
    """

    def __init__(
        self,
        policy: Policy,
        limits: Limits,
        slo: SLO,
        system: System,
        timing: Timing | None = None,
        mode: Mode = "on",
        rebalance_over: float | None = 0.05,
    ):
        self.policy = policy
        self.limits = limits
        self.slo = slo
        self.system = system
        self.timing = timing or Timing()
        self.mode: Mode = mode
        self.paused = False
        self.rebalance_over = rebalance_over
        self._last = -math.inf
        self._moves = self._before = _Moves()

    def tick(
        self,
        snapshot: Snapshot,
        model: Model | None = None,
        situation: Situation | None = None,
        wall: float = 0.0,
    ) -> Decision:
        """The decision for this snapshot; a target that it holds counts as carried out.

        Call ``undone`` when it was not. Never raises, whatever the policy does.
        """
        situation = situation or Situation()
        view = View(snapshot, self.slo, self.limits, self.system, model, wall)
        there = view.there
        before, self._last = self._last, snapshot.now
        self._moves.not_after(snapshot.now)
        blind = self._blind(snapshot, before)
        if blind is not None:
            return Decision(snapshot.now, there, None, there, None, *blind)
        proposal, fault = self._ask(view)
        if proposal is None:
            return Decision(snapshot.now, there, None, there, None, *fault)
        wanted = _filled(proposal, there)
        held = frozenset(situation.cannot_place)
        least = self._least_attention(there, snapshot)
        kept, why = _consolidated(wanted, there, least)
        advised, cut = constrain(there, kept, self.limits, held, least)
        reasons: tuple[Reason, ...] = (proposal.reason, *why, *cut)
        details = [proposal.detail, *(situation.cannot_place[role] for role in sorted(held))]
        target: Counts | None = None
        if advised != there:
            allowed, stop = self._timed(advised, there, snapshot.now, situation)
            reasons = (*stop, *reasons)
            if allowed != there:
                target = allowed
                self._note(there, allowed, snapshot.now)
        return Decision(
            at=snapshot.now,
            there=there,
            proposed=proposal,
            advised=advised,
            target=target,
            reasons=tuple(dict.fromkeys(reasons)),
            detail="; ".join(filter(None, details)),
            rebalance=target is None and self._rebalance(snapshot.now, situation),
        )

    def undone(self, decision: Decision) -> None:
        """The target of a decision was refused or rolled back: its cool-downs don't count."""
        if decision.target is not None and self._moves.at == decision.at:
            self._moves = self._before.copy()

    def rest(self, now: float) -> None:
        """Begin a cool-down now, as after a change."""
        self._moves.at = now

    # -- guards ----------------------------------------------------------------------------------

    def _blind(self, snapshot: Snapshot, before: float) -> tuple[tuple[Reason, ...], str] | None:
        """Why this snapshot says nothing; None when it does."""
        if math.isfinite(before):
            passed = snapshot.now - before
            if not 0 < passed <= LEAP * self.timing.interval:
                return (Reason.CLOCK_JUMPED,), f"{passed:.3g} since the last tick"
        if not snapshot.age <= self.timing.stale:
            return (Reason.STALE_DATA,), f"nothing measured for {snapshot.age:.3g}"
        if not snapshot.window >= self.timing.least_window:
            return (Reason.NO_DATA,), f"measured for {snapshot.window:.3g} since the last change"
        busy = snapshot.running or snapshot.waiting
        silent = busy and not snapshot.tokens_rate and not snapshot.ttft.count
        # With nobody to serve them, or with refusals, that is data enough.
        if silent and snapshot.attention and snapshot.ffn and not snapshot.rejected:
            return (Reason.NO_DATA,), f"{snapshot.running} requests run and no token came"
        return None

    def _ask(self, view: View) -> tuple[Proposal | None, tuple[tuple[Reason, ...], str]]:
        name = getattr(self.policy, "name", type(self.policy).__name__)
        try:
            proposal = self.policy.propose(view)
        except Exception as error:  # a user's code may raise anything
            text = f"policy {name} raised {type(error).__name__}: {error}"
            return None, ((Reason.POLICY_FAILED,), text)
        if proposal is None:
            proposal = Proposal()
        wrong = _wrong(proposal)
        if wrong:
            return None, ((Reason.POLICY_NONSENSE,), f"policy {name}: {wrong}")
        return proposal, ((), "")

    def _least_attention(self, there: Counts, snapshot: Snapshot) -> int:
        """Attention workers that what runs now needs, at most those that are there."""
        least = math.ceil(snapshot.running / self.system.slots)
        if math.isfinite(snapshot.kv_usage):
            used = snapshot.kv_usage * max(1, snapshot.attention)
            least = max(least, math.ceil(used / KV_FULL))
        return min(least, there.attention)

    # -- timing ----------------------------------------------------------------------------------

    def _timed(
        self, advised: Counts, there: Counts, now: float, situation: Situation
    ) -> tuple[Counts, tuple[Reason, ...]]:
        """What of an advised change may be done now."""
        if self.paused:
            return there, (Reason.PAUSED,)
        if self.mode == "advise":
            return there, (Reason.ADVISORY,)
        if situation.changing:
            return there, (Reason.CHANGING,)
        timing, moves = self.timing, self._moves
        if now - moves.at < timing.cooldown:
            return there, (Reason.COOLDOWN,)
        allowed = there
        grows = any(new > old for new, old in zip(advised, there, strict=True))
        for role in ROLES:
            old, new = getattr(there, role), getattr(advised, role)
            back = moves.down if new > old else moves.up
            recent = now - back.get(role, -math.inf) < timing.shrink_cooldown
            # A shift of the ratio is no shrinking: its growing leg is what is wanted.
            lone = new < old and not grows and now - moves.at < timing.shrink_cooldown
            if new != old and not recent and not lone:
                allowed = allowed._replace(**{role: new})
        if allowed == advised:
            return allowed, ()
        # The shrinking leg of a shift, without the other, is a shrinking like any other.
        grows = any(new > old for new, old in zip(allowed, there, strict=True))
        lone = not grows and now - moves.at < timing.shrink_cooldown
        if lone or self.limits.fixed is not None or not self.limits.allow(allowed):
            allowed = there
        return allowed, (Reason.COOLDOWN,)

    def _note(self, there: Counts, target: Counts, now: float) -> None:
        self._before = self._moves.copy()
        self._moves.at = now
        for role in ROLES:
            old, new = getattr(there, role), getattr(target, role)
            if new != old:
                (self._moves.up if new > old else self._moves.down)[role] = now

    def _rebalance(self, now: float, situation: Situation) -> bool:
        if self.paused or self.mode == "advise" or self.rebalance_over is None:
            return False
        if situation.changing or not situation.rebalance_gain > self.rebalance_over:
            return False
        if now - max(self._moves.at, self._moves.rebalanced) < self.timing.shrink_cooldown:
            return False
        self._moves.rebalanced = now
        return True


def _consolidated(wanted: Counts, there: Counts, least: int) -> tuple[Counts, tuple[Reason, ...]]:
    """Never fewer attention workers than what runs there needs."""
    if wanted.attention >= min(least, there.attention):
        return wanted, ()
    return wanted._replace(attention=least), (Reason.CONSOLIDATION,)


def _filled(proposal: Proposal, there: Counts) -> Counts:
    attention, ffn = proposal.attention, proposal.ffn
    return Counts(
        there.attention if attention is None else attention, there.ffn if ffn is None else ffn
    )


def _wrong(proposal: Any) -> str:
    """What makes an answer no proposal; empty if nothing does."""
    if not isinstance(proposal, Proposal):
        return f"answered {proposal!r}, expected a Proposal or None"
    for role in ROLES:
        count = getattr(proposal, role)
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            return f"proposed {role}={count!r}, expected a whole number of at least 1, or None"
    for name, kind in (("reason", Reason), ("detail", str)):
        value = getattr(proposal, name)
        if not isinstance(value, kind):
            return f"gave the {name} {value!r}, expected a {kind.__name__}"
    return ""
