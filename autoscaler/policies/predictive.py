"""Workers that will be needed by the time that they could be there: a floor under another policy.

Forecasts the rate of arrivals and the lengths of requests; the latency model, or what saturation
shows, says how many workers that takes. Never fewer than the inner policy wants, so a wrong
forecast costs workers and not targets. Not for the forecast itself: see ``autoscaler.forecast``.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from pydantic import Field, model_validator

from autoscaler import policy
from autoscaler.forecast import Series, forecast
from autoscaler.limits import Counts, Limits, nearest
from autoscaler.model import Model
from autoscaler.policies.inner import Inner, counts_of
from autoscaler.policies.saturation import measure
from autoscaler.policy import Proposal, View
from autoscaler.predict import predict_load, predict_ttft
from autoscaler.reasons import Reason
from planner.errors import PlannerError

SEASONS = 3
"""Seasons of history that are kept."""

PERIODS = 360
"""Periods that are kept without seasons."""


class PredictiveParameters(policy.Parameters):
    """How far, from what, and under which policy."""

    inner: Inner = Inner()
    """The policy that reacts: {policy: NAME, parameters: {...}}."""

    horizon: float = Field(default=120.0, gt=0)
    """Seconds ahead. At least as long as a worker takes to start; longer: earlier, and held longer
    before a peak."""

    period: float = Field(default=30.0, gt=0)
    """Seconds that are averaged into one value of the history. Longer: calmer, slower to see a
    trend."""

    season: float | None = Field(default=None, gt=0)
    """Seconds after which the load repeats (86400: daily); null: no season. Takes part once two of
    them were seen."""

    history: int = Field(default=10, ge=8)
    """Periods that must have been seen before there is a floor."""

    quantile: float = Field(default=0.8, ge=0.5, lt=1)
    """Of the forecast rate. Higher: more workers, fewer missed targets when load is hard to
    foresee."""

    high: float = Field(default=0.9, gt=0, le=1)
    """Share of the targets that the forecast load may use. Lower: more workers."""

    @model_validator(mode="after")
    def _whole(self) -> PredictiveParameters:
        if self.season is not None and self.season < 4 * self.period:
            raise ValueError(
                f"season is {self.season:g} and period {self.period:g}; expected at least 4 "
                "periods in a season"
            )
        return self


class Predictive:
    """The inner policy, and a floor under it from a forecast.

    Keeps the history of rate and lengths. With a fixed budget there is nothing to have more of:
    then it is the inner policy.
    """

    name: ClassVar[str] = "predictive"
    Parameters: ClassVar[type[policy.Parameters]] = PredictiveParameters

    def __init__(self, parameters: PredictiveParameters):
        self.parameters = parameters
        self._inner = parameters.inner.make()
        p = parameters
        self._season = round(p.season / p.period) if p.season else 0
        keep = max(SEASONS * self._season, PERIODS)
        self._rate, self._prompt, self._output = (Series(p.period, keep) for _ in range(3))
        self._expected: tuple[float, float, float] | None = None
        self._modelled: tuple[Limits, Counts] | None = None

    def propose(self, view: View) -> Proposal | None:
        """What the inner policy wants, or the floor where that is higher."""
        self._learn(view)
        proposal = self._inner.propose(view)
        wanted = counts_of(proposal, view.there)
        if wanted is None or self._expected is None or view.limits.fixed is not None:
            return proposal
        floor = self._floor(view, *self._expected)
        if floor is None:
            return proposal
        raised = Counts(max(wanted.attention, floor.attention), max(wanted.ffn, floor.ffn))
        if raised == wanted:
            return proposal
        rate = self._expected[0]
        return Proposal(
            *raised,
            Reason.FORECAST,
            f"{rate:.3g} requests a second expected within {self.parameters.horizon:g} s: {floor}; "
            f"{self.parameters.inner.policy} wants {wanted}",
        )

    def _learn(self, view: View) -> None:
        """Takes the snapshot into the history; forecasts anew whenever a period ends."""
        s, p = view.snapshot, self.parameters
        ended = self._rate.add(s.now, s.arrival_rate)
        self._prompt.add(s.now, s.prompt_mean)
        self._output.add(s.now, s.output_mean)
        if len(self._rate.values) < p.history:
            self._expected = None
        elif ended:
            steps = math.ceil(p.horizon / p.period)
            rate = forecast(self._rate.values, steps, self._season, p.quantile)
            prompt = forecast(self._prompt.values, steps, self._season)
            output = forecast(self._output.values, steps, self._season)
            self._expected = (rate, prompt, output) if math.isfinite(rate) else None
            self._modelled = None

    def _floor(self, view: View, rate: float, prompt: float, output: float) -> Counts | None:
        """The fewest workers for a forecast load; None where nothing says so."""
        model = view.model
        if model is not None and model.reliable and math.isfinite(model.output_mean):
            # All numbers of workers are tried, so only once per forecast.
            if self._modelled is None or self._modelled[0] != view.limits:
                expected = _with_lengths(model, prompt, output)
                self._modelled = view.limits, _fewest(view, expected, rate, self.parameters.high)
            return self._modelled[1]
        s = view.snapshot
        if not s.arrival_rate > 0:
            return None
        longer = (prompt + output) / (s.prompt_mean + s.output_mean)
        growth = rate / s.arrival_rate * (longer if math.isfinite(longer) else 1.0)
        # As if latencies grew with load: right enough near the targets, where it matters.
        share = growth * min(1.0, measure(view).worst) / self.parameters.high
        if not math.isfinite(share):
            return None
        needed = (max(1, math.ceil(count * share - 1e-9)) for count in (s.attention, s.ffn))
        return nearest(Counts(*needed), view.limits)


def _with_lengths(model: Model, prompt: float, output: float) -> Model:
    """The model for requests of other mean lengths; contexts grow as prompt + output / 2 does."""
    old = model.prompt_mean + model.output_mean / 2
    new = prompt + output / 2
    if not (math.isfinite(new) and math.isfinite(old) and old > 0):
        return model
    scale = new / old
    return replace(
        model,
        prompt_mean=prompt,
        output_mean=output,
        theta=model.theta * scale,
        nu2=model.nu2 * scale * scale,
    )


def _fewest(view: View, model: Model, rate: float, high: float) -> Counts:
    """The cheapest numbers within the limits that the model expects to hold the targets at a rate.

    The most that the limits allow where none does.
    """
    limits, system, slo = view.limits, view.system, view.slo

    def holds(attention: int, ffn: int) -> bool:
        try:
            _, tpot = predict_load(model, system, attention, ffn, rate)
            if not tpot <= high * slo.tpot:
                return False
            ttft = predict_ttft(model, system, attention, ffn, rate)
        except PlannerError:  # more than was ever measured
            return False
        return not ttft > high * slo.ttft

    def price(counts: Counts) -> float:
        return counts.attention * limits.weight_attention + counts.ffn * limits.weight_ffn

    found = []
    ffn = limits.ffn[1]
    # With more attention workers there need not be more FFN workers: one walk along the edge.
    for attention in range(limits.attention[0], limits.attention[1] + 1):
        ffn = min(ffn, limits.total[1] - attention)
        if ffn < limits.ffn[0]:
            break
        if not holds(attention, ffn):
            continue
        while ffn > limits.ffn[0] and holds(attention, ffn - 1):
            ffn -= 1
        found.append(nearest(Counts(attention, ffn), limits))
    most = Counts(limits.attention[1], limits.ffn[1])
    return min(found, key=price, default=nearest(most, limits))
