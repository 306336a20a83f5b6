"""Reacts to what is measured: more workers where targets are missed, fewer where they'd be held.

Needs no latency model, but asks it before it takes something away. One thought per method: what
each side is asked for (``_grow``), what could go (``_less``), what could change sides
(``_shift``). Not for finding the best ratio: ``optimal_ratio`` does that.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from autoscaler import policy
from autoscaler.limits import Counts, nearest
from autoscaler.policies.ahead import Ahead
from autoscaler.policies.saturation import Saturation, idle, measure, slots_used, speaks
from autoscaler.policy import Proposal, View
from autoscaler.reasons import Reason

Role = Literal["attention", "ffn"]
ROLES: tuple[Role, Role] = ("attention", "ffn")

SETTLED = 0.5
"""Share of the requests that were there at a change that must have been answered before the next
shift: what it does shows in the latencies of those that come after it."""
LONGEST = 3.0
"""Windows after which it is waited no longer: long answers, or hardly any, must not hold it up."""


class SLOFeedbackParameters(policy.Parameters):
    """When it reacts, and how strongly."""

    high: float = Field(default=0.8, gt=0, le=1)
    """Saturation (the worst of P90 over target) above which more is asked for. Lower: earlier and
    more actors, fewer missed targets."""

    low: float = Field(default=0.6, gt=0, lt=1)
    """A worker goes when saturation is predicted to stay below this without it. Higher: fewer
    actors, and a smaller distance to high."""

    up_ticks: int = Field(default=2, ge=1)
    """Ticks in a row that must want more before more is asked for. Higher: calmer, later."""

    down_ticks: int = Field(default=5, ge=1)
    """Ticks in a row that must want less before less is asked for. Higher: fewer changes, more
    actor-seconds."""

    growth: float = Field(default=0.5, gt=0)
    """The most that a side grows at once, as a share of what serves; one worker at least."""

    margin: float = Field(default=0.15, ge=0, lt=1)
    """Difference of busy shares above which one side counts as the busier. Higher: fewer shifts of
    a fixed budget, further from balance."""

    shift: int = Field(default=2, ge=1)
    """The most workers that change sides at once when the budget allows no more."""

    full: float = Field(default=0.9, gt=0, le=1)
    """Share of the KV room, of the slots, or of a side's time that counts as full."""

    samples: int = Field(default=5, ge=1)
    """Percentiles over fewer requests than this are taken at the median, which one slow request
    does not move."""

    @model_validator(mode="after")
    def _ordered(self) -> SLOFeedbackParameters:
        if not self.low < self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; expected low < high")
        return self


class SLOFeedback:
    """Saturation with hysteresis, credit for starting workers, and a look ahead before it shrinks.

    Keeps how many ticks in a row wanted the same thing, per thing, and how many requests from
    before the last change have still to be answered before the next shift, and until when.
    """

    name: ClassVar[str] = "slo_feedback"
    Parameters: ClassVar[type[policy.Parameters]] = SLOFeedbackParameters

    def __init__(self, parameters: SLOFeedbackParameters):
        self.parameters = parameters
        self._streaks: dict[str, int] = {}
        self._seen: Counts | None = None
        self._unsettled = 0.0
        self._until = -math.inf
        self._before = math.inf

    def propose(self, view: View) -> Proposal:
        """More of a side, less of one, or a shift; what has been wanted for long enough."""
        self._settle(view)
        p = self.parameters
        now = measure(view, p.samples, p.full)
        if now.worst > p.high:
            return self._more(view, now)
        if self._lopsided(view, now):
            return self._shift(view, now)
        if not speaks(view.snapshot):
            self._streaks = {}
            return Proposal(detail="no latencies were measured")
        if idle(view.snapshot):
            return self._rest(view)
        return self._less(view, now)

    def _settle(self, view: View) -> None:
        """After a change, forget what was wanted before; else count what has been answered since.

        What was wanted of other numbers of workers says little about these.
        """
        s = view.snapshot
        if view.there != self._seen:
            first, self._seen, self._streaks = self._seen is None, view.there, {}
            self._unsettled = 0.0 if first else SETTLED * (s.running + s.waiting)
            self._until = s.now + LONGEST * s.window
        elif s.window > 0:
            self._unsettled -= s.completed / s.window * max(0.0, s.now - self._before)
        self._before = s.now

    # -- what to do --------------------------------------------------------------------------------

    def _more(self, view: View, now: Saturation) -> Proposal:
        there = view.there
        grown = self._grow(view, now)
        room = view.limits.total[1] - there.total
        if room <= 0 and grown != there:
            return self._shift(view, now)
        wishes = [role for role in ROLES if getattr(grown, role) > getattr(there, role)]
        ready = self._persist([f"grow {role}" for role in wishes], self.parameters.up_ticks)
        for role in wishes:
            if f"grow {role}" not in ready:
                grown = grown._replace(**{role: getattr(there, role)})
        if grown == there:
            waits = "not for long enough yet" if wishes else "enough is being started"
            return Proposal(detail=f"{now}; {waits}")
        short = max(now.queue, now.refused, now.kv) > max(now.ttft, now.tpot)
        return Proposal(*grown, Reason.QUEUE if short else Reason.SLO_MISSED, str(now))

    def _less(self, view: View, now: Saturation) -> Proposal:
        p, limits, there = self.parameters, view.limits, view.there
        s = view.snapshot
        preparing = s.attention_preparing or s.ffn_preparing
        if preparing or there.total <= limits.total[0] or now.worst >= p.low:
            self._streaks = {}
            return Proposal(detail=str(now))
        ahead = Ahead(view)
        after = {role: self._without(view, now, role, ahead) for role in ROLES}
        free = [r for r in ROLES if after[r] < p.low and getattr(there, r) > getattr(limits, r)[0]]
        ready = self._persist([f"shrink {role}" for role in free], p.down_ticks)
        may = [role for role in free if f"shrink {role}" in ready]
        then = ", ".join(f"{after[role]:.2f} with one {role} less" for role in ROLES)
        if not may:
            return Proposal(detail=f"{now}; {then}")
        gone = min(may, key=lambda role: _part(view, role, -1))
        fewer = there._replace(**{gone: getattr(there, gone) - 1})
        return Proposal(*fewer, Reason.SLO_SLACK, f"{now}; {then}")

    def _rest(self, view: View) -> Proposal:
        limits = view.limits
        least = nearest(Counts(limits.attention[0], limits.ffn[0]), limits)
        wishes = ["rest"] if limits.fixed is None and least != view.there else []
        if self._persist(wishes, self.parameters.down_ticks):
            return Proposal(*least, Reason.IDLE, "nothing runs and nothing comes")
        return Proposal(detail="nothing runs and nothing comes")

    def _shift(self, view: View, now: Saturation) -> Proposal:
        """One side's workers to the other, where the budget has no room for more."""
        s, p = view.snapshot, self.parameters
        best = view.there
        if s.attention_preparing or s.ffn_preparing:
            pass  # what is under way comes first
        elif self._unsettled > 0 and s.now < self._until:
            self._streaks = {}
            return Proposal(
                detail=f"{now}; {self._unsettled:.0f} requests from before the last change to come"
            )
        elif max(now.kv, now.refused) > p.high:
            best = self._roomier(view, now)
        elif abs(s.attention_busy - s.ffn_busy) > p.margin:
            best = self._balanced(view)
        if best == view.there:
            self._streaks = {}
            return Proposal(detail=f"{now}; no budget for more, and no better split of it")
        to = "attention" if best.attention > view.there.attention else "ffn"
        if not self._persist([f"shift to {to}"], p.up_ticks):
            return Proposal(detail=f"{now}; {best} not wanted for long enough yet")
        busy = f"attention {s.attention_busy:.2f} busy, FFN {s.ffn_busy:.2f}"
        return Proposal(*best, Reason.RATIO, f"{now}; {busy}")

    # -- how much ----------------------------------------------------------------------------------

    def _grow(self, view: View, now: Saturation) -> Counts:
        """What every symptom asks of the side that it is blamed on; never less than there is."""
        p, grown = self.parameters, view.there
        for symptom in ("ttft", "tpot", "queue", "refused", "kv"):
            share = getattr(now, symptom)
            if share <= p.high:
                continue
            role = self._blamed(view, symptom)
            serving = getattr(view.snapshot, role)
            # Workers being started are credited: the wish is for so many in all, not for more.
            needed = math.ceil(serving * min(share / p.high, 1 + p.growth) - 1e-9)
            needed = max(needed, serving + 1)
            grown = grown._replace(**{role: max(getattr(grown, role), needed)})
        return grown

    def _blamed(self, view: View, symptom: str) -> Role:
        s, p = view.snapshot, self.parameters
        if symptom in ("kv", "refused"):
            return "attention"
        difference = s.ffn_busy - s.attention_busy
        if symptom == "tpot":
            if abs(difference) > p.margin:
                return "ffn" if difference > 0 else "attention"
            # In balance: where one more takes the most off a step, for its weight.
            return max(ROLES, key=lambda role: _part(view, role, 1))
        # A queue is for want of slots, or of steps that end sooner; experts may be what is slow.
        slow = difference > p.margin and slots_used(view) < p.full
        return "ffn" if slow else "attention"

    def _without(self, view: View, now: Saturation, role: Role, ahead: Ahead) -> float:
        """Saturation predicted with one worker of a role less; inf where that can't be."""
        serving = Counts(view.snapshot.attention, view.snapshot.ffn)
        count = getattr(serving, role)
        if count <= 1:
            return math.inf
        fewer = serving._replace(**{role: count - 1})
        slower, more = ahead.slower(fewer), count / (count - 1)
        expected, most = ahead.expected(fewer), self.parameters.high
        # What arrives now shows in latencies only later.
        if expected.tpot > most * view.slo.tpot or expected.ttft > most * view.slo.ttft:
            return math.inf
        latencies = max(now.ttft * slower.ttft, now.tpot * slower.tpot, now.queue * more)
        if role == "ffn":
            return latencies
        return max(latencies, now.kv * more, slots_used(view) * more / self.parameters.full)

    def _roomier(self, view: View, now: Saturation) -> Counts:
        """One worker more for contexts, where TPOT can afford one FFN worker less."""
        s = view.snapshot
        split = Counts(view.there.attention + 1, view.there.ffn - 1)
        if s.ffn <= 1 or not view.limits.allow(split):
            return view.there
        slower = Ahead(view).slower(Counts(s.attention, s.ffn - 1)).tpot
        return split if now.tpot * slower < self.parameters.low else view.there

    def _lopsided(self, view: View, now: Saturation) -> bool:
        """Whether one side of a fixed budget is full and the other not: latencies will follow."""
        s, p = view.snapshot, self.parameters
        busier, other = max(s.attention_busy, s.ffn_busy), min(s.attention_busy, s.ffn_busy)
        tight = view.limits.fixed is not None and now.worst > p.low
        return tight and busier > p.full and busier - other > 2 * p.margin

    def _balanced(self, view: View) -> Counts:
        """The split within reach whose busier side is the least busy, for what each move brings.

        A side's work is its busy share times its workers; of the busier side as much more as more
        is asked for than done. A move that is not clearly better than the one before is not taken,
        so shifts end near balance and don't go back and forth.
        """
        s, limits, here, p = view.snapshot, view.limits, view.there, self.parameters
        to_attention = s.attention_busy > s.ffn_busy
        asked = s.arrival_rate * s.output_mean
        more = asked / s.tokens_rate if s.tokens_rate > 0 and asked > s.tokens_rate else 1.0
        attention = s.attention_busy * here.attention * (more if to_attention else 1.0)
        ffn = s.ffn_busy * here.ffn * (1.0 if to_attention else more)
        best, least = here, max(attention / here.attention, ffn / here.ffn)
        sign = 1 if to_attention else -1
        for moved in range(1, min(p.shift, limits.max_step) + 1):
            split = Counts(here.attention + sign * moved, here.ffn - sign * moved)
            if not limits.allow(split):
                break
            busiest = max(attention / split.attention, ffn / split.ffn)
            if busiest >= least - p.margin / 2:
                break
            best, least = split, busiest
        return best

    def _persist(self, wishes: list[str], ticks: int) -> list[str]:
        """Those wished for at so many ticks in a row; forgets what is not wished for any more."""
        self._streaks = {wish: self._streaks.get(wish, 0) + 1 for wish in wishes}
        return [wish for wish, count in self._streaks.items() if count >= ticks]


def _part(view: View, role: Role, change: Literal[1, -1]) -> float:
    """What one worker more takes off a step, or one less adds to it, for its weight.

    By the role's busy share; where none was measured, one like the other.
    """
    busy = getattr(view.snapshot, f"{role}_busy")
    workers = getattr(view.snapshot, role) + change
    share = busy if math.isfinite(busy) else 1.0
    return share / max(1, workers) / getattr(view.limits, f"weight_{role}")
