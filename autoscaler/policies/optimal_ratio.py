"""The numbers of workers that the calibrated model expects to carry the load, or most of it.

Sizing by r* (arXiv 2601.21351) at live coefficients, as steps are taken here (``stepping``). What
is compared is capacity: the tokens per second that numbers of workers put out while the targets
hold. It depends on what requests are like (contexts, prompts, answers) and not on how many there
are, so that it stays where it is while only the load goes up and down. Of a fixed budget the split
with the greatest capacity is wanted: it holds the targets at whatever load any split does. (The
split with the least TPOT at the present load may hold less: it flatters light loads.) Without one,
the cheapest numbers whose capacity covers the load.

Not for loads to come: see ``predictive``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import Field

from autoscaler import policy
from autoscaler.limits import Counts
from autoscaler.model import Model
from autoscaler.policy import Proposal, View
from autoscaler.predict import capacity, carries, context_of, predict_step, room
from autoscaler.reasons import Reason
from autoscaler.stepping import prompt_time
from planner.errors import PlannerError

FILL = 0.9
"""Share of the slots in use at which requests begin to wait for one."""
STEPS_TO_FIRST = 1.5
"""Steps until the first token: half of one that is under way, and the one with the prompt."""
GRAIN = 0.02
"""Moments that differ by less count as equal, so that noise doesn't ask for new tables."""
Table = dict[Counts, float]


class OptimalRatioParameters(policy.Parameters):
    """When another ratio, or more or fewer actors, is wanted."""

    form: Literal["mean-field", "barrier"] = "mean-field"
    """Whose step has to hold the target: that of the mean attention worker, or that of the one with
    the longest contexts of all, which wants somewhat more attention."""

    headroom: float = Field(default=0.85, gt=0, le=1)
    """Share of the targets that is aimed at. Targets are met by a percentile of requests and the
    model predicts means: lower is safer and costs more actors."""

    gain: float = Field(default=0.08, ge=0, le=1)
    """With a fixed budget, a split is left only for one with so much more capacity; without, actors
    are given back only where the others could carry so much more than the load. Higher changes less
    and stays longer at numbers that have become worse."""

    least_load: float = Field(default=0.2, ge=0, le=1)
    """With a fixed budget, a load below this share of what the present split can carry changes
    nothing: few requests say little of what the next ones will be like. 0 always looks for the best
    split."""

    ticks: int = Field(default=1, ge=1)
    """With a fixed budget: ticks in a row that must want the same split. While the kind of requests
    changes, so does the best split; higher makes one change of what would be several, later. The
    model is fitted anew every 5 s: to have two fits agree takes more than 5 s of ticks."""

    reserve: float = Field(default=1.0, ge=0, le=5)
    """Without a fixed budget: room for the ups and downs of arrivals, in standard deviations of a
    Poisson number of running requests. It costs small deployments much and large ones little."""

    stabilization: float = Field(default=300.0, ge=0)
    """Without a fixed budget: actors are given back when nothing dearer than what is then left was
    wanted for so many seconds (Kubernetes' autoscaler calls it the stabilization window). A minute
    of few or short requests says little of the next one; lower saves more and misses more."""

    drain: float = Field(default=30.0, gt=0)
    """Seconds in which requests that wait shall be served; adds to the load that has to be carried.
    Lower asks for more actors sooner when a queue builds up."""


@dataclass(frozen=True)
class _Load:
    """What has to be carried: the model with the moments of now, and how much of it there is."""

    model: Model
    running: float
    tokens: float  # per unit of time


class OptimalRatio:
    """Proposes by capacity; see the module. Keeps what was wanted last, and for how many ticks."""

    name: ClassVar[str] = "optimal_ratio"
    Parameters: ClassVar[type[policy.Parameters]] = OptimalRatioParameters

    def __init__(self, parameters: OptimalRatioParameters | None = None):
        self.parameters = parameters or OptimalRatioParameters()
        self._table: Table = {}
        self._table_of: object = None
        self._wish: tuple[Counts, int] | None = None
        self._before: tuple[Counts, int] | None = None
        self._began: float | None = None
        self._wanted: deque[tuple[float, Counts]] = deque()

    def propose(self, view: View) -> Proposal:
        """See ``policy.Policy``."""
        self._before, self._wish = self._wish, None
        model, s = view.model, view.snapshot
        if model is None or not model.reliable:
            self._began = None  # what was wanted before is no longer all that was wanted
            why = "there is no latency model yet" if model is None else model.why
            return Proposal(reason=Reason.MODEL_UNRELIABLE, detail=why)
        if not s.running and not s.waiting and not s.arrival_rate > 0:
            return self._idle(view)
        load = _load(view, model, self.parameters.drain)
        if load is None:
            return Proposal(detail="nothing is known of the requests' lengths yet")
        try:
            if view.limits.fixed is not None:
                return self._split(view, load)
            return self._fewest(view, load)
        except PlannerError as error:
            return Proposal(reason=Reason.MODEL_UNRELIABLE, detail=str(error))

    def _idle(self, view: View) -> Proposal:
        if view.limits.fixed is not None:
            return Proposal(reason=Reason.IDLE)
        least = min(_options(view), key=lambda counts: (_price(view, counts), counts))
        return Proposal(least.attention, least.ffn, Reason.IDLE)

    # -- a fixed budget --------------------------------------------------------------------------

    def _split(self, view: View, load: _Load) -> Proposal:
        there = view.there
        known = {counts: self._capacity(view, load, counts) for counts in _kept(view, load)}
        now = self._capacity(view, load, there) if min(there) >= 1 else 0.0
        if not known:
            return Proposal(detail="no split of the budget has room for what runs")
        if not any(known.values()):
            return self._least_bad(view, load, list(known))
        best = max(known, key=lambda counts: (known[counts], -_moves(there, counts)))
        share = load.tokens / now if now else math.inf
        if view.limits.allow(there):
            if share < self.parameters.least_load:
                return Proposal(detail=f"the load is {share:.0%} of what {there} can carry")
            if not known[best] > now * (1.0 + self.parameters.gain):
                return Proposal(detail=self._words(view, load, best))
        return self._want(view, best, self._words(view, load, best))

    def _want(self, view: View, split: Counts, detail: str) -> Proposal:
        """A split, once it has been wanted for long enough, or what is there can't stay."""
        wished, ticks = self._before or (split, 0)
        ticks = ticks + 1 if wished == split else 1
        self._wish = (split, ticks)
        if ticks < self.parameters.ticks and view.limits.allow(view.there):
            return Proposal(detail=f"{detail}; not wanted for long enough yet")
        return Proposal(*split, Reason.RATIO, detail)

    def _least_bad(self, view: View, load: _Load, options: list[Counts]) -> Proposal:
        """Where no split holds the target for one request: the least TPOT."""
        there = view.there
        times = {counts: self._tpot(view, load, counts) for counts in options}
        best = min(times, key=lambda counts: (times[counts], _moves(there, counts)))
        now = self._tpot(view, load, there) if min(there) >= 1 else math.inf
        detail = f"{there} -> {best}: TPOT {now:.3g} -> {times[best]:.3g} predicted, above target"
        keep = view.limits.allow(there) and not now > times[best] * (1.0 + self.parameters.gain)
        return Proposal(detail=detail) if keep else self._want(view, best, detail)

    # -- no fixed budget -------------------------------------------------------------------------

    def _fewest(self, view: View, load: _Load) -> Proposal:
        there = view.there
        options = sorted(_kept(view, load), key=lambda counts: (_price(view, counts), counts))
        if not options:
            return Proposal(detail="no numbers within the limits have room for what runs")
        best = self._cheapest(view, load, options)
        enough = best is not None
        if best is None:
            best = min(
                options,
                key=lambda counts: (
                    _price(view, counts) < _price(view, there),
                    -self._capacity(view, load, counts),
                    _price(view, counts),
                ),
            )
        wanted = best
        self._remember(view, wanted)
        if _price(view, best) < _price(view, there) and self._carries(view, load, there, False):
            best, why = self._settled(view)
            if best == there:
                return Proposal(detail=f"{self._words(view, load, wanted)}; {why}")
        if best == there:
            now = self._capacity(view, load, there)
            short = "" if enough else "; nothing within the limits carries more"
            return Proposal(
                detail=f"{load.tokens:.3g} tokens/s of {now:.3g} that {there} can carry{short}"
            )
        reason = Reason.RATIO
        if best.total < there.total:
            reason = Reason.SLO_SLACK
        elif best.total > there.total:
            reason = Reason.QUEUE if view.snapshot.waiting else Reason.SLO_MISSED
        return Proposal(*best, reason, self._words(view, load, best))

    def _remember(self, view: View, wanted: Counts) -> None:
        """Takes note of what is wanted now; forgets what is older than the stabilization window."""
        now = view.snapshot.now
        if self._began is None or now < self._began:
            self._began = now
            self._wanted.clear()
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - self.parameters.stabilization:
            self._wanted.popleft()

    def _settled(self, view: View) -> tuple[Counts, str]:
        """The dearest that was wanted in the stabilization window, or what is there, and why."""
        now, there = view.snapshot.now, view.there
        assert self._began is not None  # what is wanted was remembered
        if now - self._began < self.parameters.stabilization:
            return there, f"watched for {now - self._began:.0f} s only"
        at, dearest = max(self._wanted, key=lambda one: _price(view, one[1]))
        if _price(view, dearest) >= _price(view, there):
            return there, f"{dearest} was wanted {now - at:.0f} s ago"
        return dearest, ""

    def _cheapest(self, view: View, load: _Load, options: list[Counts]) -> Counts | None:
        """Of those that carry the load the cheapest: what is there, or the least TPOT of equals."""
        there = view.there
        fitting: list[Counts] = []
        for counts in options:
            if fitting and _price(view, counts) > _price(view, fitting[0]):
                break
            if self._carries(view, load, counts, _price(view, counts) < _price(view, there)):
                fitting.append(counts)
        if there in fitting or not fitting:
            return there if fitting else None
        return min(fitting, key=lambda counts: self._tpot(view, load, counts))

    def _carries(self, view: View, load: _Load, counts: Counts, cheaper: bool) -> bool:
        # What is given back is missed at once by those who run now.
        if cheaper and not self._tpot(view, load, counts) <= view.slo.tpot:
            return False
        tpot, form = self._most_tpot(view, load, counts), self.parameters.form
        tokens = load.tokens * (1.0 + self.parameters.gain) if cheaper else load.tokens
        if tpot > 0:
            # n + reserve * sqrt(n) instead of n requests (Halfin and Whitt, Oper. Res. 29, 1981)
            tokens += self.parameters.reserve * math.sqrt(tokens / tpot)
        return carries(load.model, view.system, *counts, tokens, tpot, form, FILL)

    def _words(self, view: View, load: _Load, best: Counts) -> str:
        """The numbers that decided, for people."""
        there = view.there
        columns = [
            (self._capacity(view, load, counts), self._tpot(view, load, counts))
            if min(counts) >= 1
            else (0.0, math.inf)
            for counts in (there, best)
        ]
        (now, slow), (then, fast) = columns
        return (
            f"{there} -> {best}: {now:.4g} -> {then:.4g} tokens/s within the targets, "
            f"{load.tokens:.4g} asked for; TPOT {slow:.3g} -> {fast:.3g} predicted for "
            f"{load.running:.0f} requests of {load.model.theta:.0f} tokens"
        )

    # -- predictions -----------------------------------------------------------------------------

    def _tpot(self, view: View, load: _Load, counts: Counts) -> float:
        return predict_step(
            load.model, view.system, *counts, max(1.0, load.running), self.parameters.form
        )

    def _capacity(self, view: View, load: _Load, counts: Counts) -> float:
        """Tokens per unit of time within the targets; remembered while the load is of one kind."""
        table_of = (load.model, view.system, view.slo)
        if table_of != self._table_of:
            self._table, self._table_of = {}, table_of
        if counts not in self._table:
            self._table[counts] = self._capacity_of(view, load, counts)
        return self._table[counts]

    def _capacity_of(self, view: View, load: _Load, counts: Counts) -> float:
        tpot, form = self._most_tpot(view, load, counts), self.parameters.form
        return capacity(load.model, view.system, *counts, tpot, form, FILL)

    def _most_tpot(self, view: View, load: _Load, counts: Counts) -> float:
        """TPOT at which both targets are met, with headroom."""
        aim = self.parameters.headroom
        left, most = (
            aim * view.slo.ttft - prompt_time(load.model, ffn)[0]
            for ffn in (counts.ffn, view.limits.ffn[1])
        )
        tpot = aim * view.slo.tpot
        # Where a prompt alone takes longer, whatever the number of workers, only TPOT can be held.
        return tpot if most <= 0 else min(tpot, max(0.0, left / STEPS_TO_FIRST))


def _load(view: View, model: Model, drain: float) -> _Load | None:
    """The load of now; None while its contexts are unknown.

    Contexts of requests that run say what is there before the first long one has ended, so they
    come first.
    """
    s = view.snapshot
    theta = _first(s.context, s.theta, model.theta, context_of(model) or math.nan)
    if not theta > 0:
        return None
    known = replace(
        model,
        theta=_rounded(theta),
        nu2=_rounded(_first(s.nu2, model.nu2)),
        prompt_mean=_rounded(_first(model.prompt_mean, s.prompt_mean)),
        output_mean=_rounded(_first(model.output_mean, s.output_mean)),
        prefix_hit=round(_first(model.prefix_hit, s.prefix_hit, 0.0), 2),
        imbalance=max(1.0, round(_first(s.imbalance, model.imbalance, 1.0), 1)),
        # of what it was fitted to, only the times count
        error=math.nan,
        samples={},
        intervals={},
        checks=(),
    )
    each = _first(known.output_mean, 0.0)
    asked = _first(s.arrival_rate, 0.0) * each
    tokens = max(asked, _first(s.tokens_rate, 0.0)) + s.waiting * each / drain
    return _Load(known, float(s.running + s.waiting), tokens)


def _options(view: View) -> Iterator[Counts]:
    """Every numbers of workers that the limits allow."""
    limits = view.limits
    for attention in range(limits.attention[0], limits.attention[1] + 1):
        for ffn in range(limits.ffn[0], limits.ffn[1] + 1):
            counts = Counts(attention, ffn)
            if limits.allow(counts):
                yield counts


def _kept(view: View, load: _Load) -> Iterator[Counts]:
    """Options whose attention workers can hold what runs now, or that have no fewer of them."""
    one = room(load.model, view.system, 1)
    least = min(math.ceil(view.snapshot.running / one), view.there.attention)
    return (counts for counts in _options(view) if counts.attention >= least)


def _price(view: View, counts: Counts) -> float:
    limits = view.limits
    return counts.attention * limits.weight_attention + counts.ffn * limits.weight_ffn


def _moves(there: Counts, counts: Counts) -> int:
    return abs(counts.attention - there.attention) + abs(counts.ffn - there.ffn)


def _first(*values: float) -> float:
    """The first that is a number; nan if none is."""
    return next((value for value in values if math.isfinite(value)), math.nan)


def _rounded(value: float) -> float:
    """To steps of ``GRAIN``."""
    if not math.isfinite(value):
        return math.nan  # the one that is equal to itself in tuples
    if not value > 0:
        return value
    return math.exp(round(math.log(value) / GRAIN) * GRAIN)
