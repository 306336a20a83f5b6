"""How many attention workers per FFN worker are best, by every form of the theory.

v1's closed form, the mean field of v3 and later, and its barrier-aware form, from arXiv 2601.21351.
Stationary averages of a system that is always full; what happens over time is the ``simulator``,
what fits a budget is ``budget``, what an error in an input does is ``sensitivity``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from planner.errors import PlannerError
from planner.latency import Latencies, Linear
from planner.points import FORMS, STAGES, Form, Point, Points, point, points
from planner.setting import (
    Array,
    Setting,
    attention_time,
    check_least,
    ffn_time,
    transfer_time,
    with_moments,
)

__all__ = [
    "FORMS",
    "STAGES",
    "Form",
    "Neighbour",
    "Optimum",
    "Point",
    "Points",
    "Setting",
    "Sizing",
    "V1Ratio",
    "candidates",
    "finite_horizon_output",
    "optimum",
    "point",
    "points",
    "size",
    "v1_ratio",
    "with_moments",
]

LEAST_RATIO, MOST_RATIO = 1e-3, 1e5


@dataclass(frozen=True)
class Optimum:
    """The best ratio as a real number.

    Attributes:
        ratio: r* = A / F.
        point: what it yields.
        form: by which theory.
        candidates: ratios that the closed form compares, by name; empty where none applies.
    """

    ratio: float
    point: Point
    form: Form
    candidates: Mapping[str, float]


@dataclass(frozen=True)
class V1Ratio:
    """Theorem 4.4 of arXiv 2601.21351 v1: r* = max(r_A, r_C, r_peak).

    Attributes:
        ratio: r*.
        attention, transfer, peak: r_A, r_C, r_peak; the first two may be negative.
        regime: which one is largest: "attention", "transfer" or "ffn".
    """

    ratio: float
    attention: float
    transfer: float
    peak: float
    regime: str


@dataclass(frozen=True)
class Neighbour:
    """A whole number of workers near the best one.

    Attributes:
        point: what it yields.
        loss: share of the best whole choice's throughput per price that it loses, 0..1.
    """

    point: Point
    loss: float


@dataclass(frozen=True)
class Sizing:
    """The answer for one setting.

    Attributes:
        setting: what it answers.
        v1: closed form with mu_P + mu_D, the naive load; None without linear latencies.
        mean_field, barrier: best real ratios.
        whole: best whole number of attention workers for the FFN workers asked for, barrier aware.
        neighbours: other whole numbers, ascending in A, ``whole`` among them.
    """

    setting: Setting
    v1: V1Ratio | None
    mean_field: Optimum
    barrier: Optimum
    whole: Point
    neighbours: tuple[Neighbour, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; of the setting, only its numbers and the moments."""
        setting = self.setting
        given = {
            name: getattr(setting, name)
            for name in setting.__dataclass_fields__
            if name not in ("moments", "latencies")
        }
        return {
            "given": given
            | {"unit": setting.latencies.unit, "latencies": setting.latencies.source}
            | {"moments": asdict(setting.moments)},
            "v1": None if self.v1 is None else asdict(self.v1),
            "mean_field": _optimum_data(self.mean_field),
            "barrier": _optimum_data(self.barrier),
            "whole": asdict(self.whole),
            "neighbours": [asdict(n.point) | {"loss": n.loss} for n in self.neighbours],
        }


def optimum(setting: Setting, form: Form = "barrier", ffn: float = 1.0) -> Optimum:
    """The ratio with the highest throughput per price (per instance at equal prices).

    Mean field with linear latencies: the candidates of arXiv 2601.21351 v3 (``candidates``).
    Otherwise searched on a logarithmic grid and refined, as the barrier-aware form asks for.

    Args:
        form: which theory.
        ffn: F. It matters to the barrier, which r*F workers meet at, and to the traffic.

    Raises:
        PlannerError: neither the FFN side nor the transfer takes longer with more attention
            workers, so that no ratio is the best.
    """
    closed = candidates(setting, ffn) if form == "mean-field" else {}
    if closed:
        ratios = np.array(list(closed.values()))
        best = float(ratios[np.argmax(points(setting, ratios * ffn, ffn, form).per_cost)])
    else:
        best = _search(setting, form, ffn)
    return Optimum(best, point(setting, best * ffn, ffn, form), form, closed)


def candidates(setting: Setting, ffn: float = 1.0) -> dict[str, float]:
    """Ratios among which the mean-field optimum is, for linear latencies.

    arXiv 2601.21351 v3, mean field: where the attention time meets those of the transfer and of
    the FFN side, sqrt(b_s / (a_s*B)) for s in {C, F}, and where transfer and FFN side cross. Prices
    p turn the square root into sqrt(b_s*p_F / (a_s*B*p_A)).

    Returns:
        positive ratios by name; {} where the closed form doesn't hold: other curves, or a bound
        by the lanes' round trip.

    Raises:
        PlannerError: as ``optimum``.
    """
    lat = setting.latencies
    if not lat.linear or setting.lanes is not None:
        return {}
    # what one unit of r adds to a stage, and what it costs at none
    f = np.array([ffn])
    lines = {}
    for name, time in (("ffn", ffn_time), ("transfer", transfer_time)):
        at_zero, at_one = (float(time(setting, r * f, f)[0]) for r in (0.0, 1.0))
        lines[name] = (at_one - at_zero, at_zero)
    if all(a <= 0 for a, _ in lines.values()):
        raise PlannerError(_UNBOUNDED)
    t_a = float(attention_time(setting, np.zeros(1))[0])
    price = setting.price_ffn / setting.price_attention
    found = {}
    for name, (a, b) in lines.items():
        if a > 0:
            found[f"attention = {name}"] = (t_a - b) / a
            found[f"{name} peak"] = math.sqrt(b * price / a)
    (a_f, b_f), (a_c, b_c) = lines["ffn"], lines["transfer"]
    if a_f != a_c:
        found["transfer = ffn"] = (b_c - b_f) / (a_f - a_c)
    found = {name: r for name, r in found.items() if r > 0 and math.isfinite(r)}
    return found or {"least": LEAST_RATIO}


def v1_ratio(batch: int, prompt_mean: float, output_mean: float, latencies: Latencies) -> V1Ratio:
    """r* = max(r_A, r_C, r_peak), Theorem 4.4 of arXiv 2601.21351 v1.

    r_A = (a_A*Tbar + b_A - b_F)/(a_F*B) with Tbar = B*(mu_P + mu_D); r_C = (a_C*B + b_C - b_F) /
    (a_F*B); r_peak = sqrt(b_F/(a_F*B)). Holds for geometric outputs; on others mu_P + mu_D is not
    the load, see ``sensitivity.naive_cost``. The transfer is that of B requests, as in v1, whatever
    ``transfer_load`` says.

    Raises:
        PlannerError: latencies that aren't linear, or an FFN time that doesn't grow.
    """
    check_least("batch", batch, 1.0)
    check_least("prompt_mean", prompt_mean, 0.0)
    check_least("output_mean", output_mean, 0.0)
    if not isinstance(latencies.ffn, Linear) or not latencies.linear:
        raise PlannerError(
            "the closed form needs linear latencies (a, b per stage): fit lines, or use optimum()"
        )
    slope, start = latencies.ffn.a * batch, latencies.ffn.b
    if slope <= 0:
        raise PlannerError(_UNBOUNDED)
    t_a = float(latencies.t_attention(batch * (prompt_mean + output_mean), batch))
    ratios = {
        "attention": (t_a - start) / slope,
        "transfer": (float(latencies.t_transfer(float(batch))) - start) / slope,
        "ffn": math.sqrt(start / slope),
    }
    regime = max(ratios, key=lambda name: ratios[name])
    return V1Ratio(ratios[regime], ratios["attention"], ratios["transfer"], ratios["ffn"], regime)


def finite_horizon_output(output_mean: float, batch: int, requests: int) -> float:
    """mu_D * (1 - B/N): the mean age term of a run of N requests that starts with fresh slots.

    Average over K = N*mu_D/B steps of mu_D*(1 - (1-p)^k), from the proof of Proposition 4.3 in
    arXiv 2601.21351 v1; the published ratios include it.

    Raises:
        PlannerError: fewer requests than slots.
    """
    check_least("output_mean", output_mean, 0.0)
    check_least("batch", batch, 1.0)
    if requests <= batch:
        raise PlannerError(f"{requests} requests don't fill {batch} slots: expected more requests")
    return output_mean * (1.0 - batch / requests)


def size(setting: Setting, ffn: int = 1) -> Sizing:
    """Best ratios by every form, the best whole number of workers, and what its neighbours lose.

    Args:
        ffn: F, whole.

    Raises:
        PlannerError: as ``optimum``.
    """
    check_least("ffn", ffn, 1.0)
    moments = setting.moments
    v1 = None
    if setting.latencies.linear:
        v1 = v1_ratio(setting.batch, moments.prompt_mean, moments.output_mean, setting.latencies)
    mean_field, barrier = optimum(setting, "mean-field", ffn), optimum(setting, "barrier", ffn)
    # the throughput is unimodal but flat: look around both, so that the table shows both
    spots = sorted({mean_field.ratio * ffn, barrier.ratio * ffn})
    low, high = max(1, math.floor(spots[0] * 0.7)), math.ceil(spots[-1] * 1.5) + 1
    whole = np.unique(np.round(np.linspace(low, high, min(high - low + 1, 400))))
    table = points(setting, whole, ffn)
    best = int(np.argmax(table.per_cost))
    losses = 1.0 - table.per_cost / table.per_cost[best]
    shown = _spread_around(best, len(table), 4)
    return Sizing(
        setting,
        v1,
        mean_field,
        barrier,
        table[best],
        tuple(Neighbour(table[i], float(losses[i])) for i in shown),
    )


# -- search --------------------------------------------------------------------------------------

_UNBOUNDED = (
    "neither the FFN side nor the transfer takes longer with more attention workers, so there is "
    "no best ratio: give at least one of them a slope above 0"
)


def _search(setting: Setting, form: Form, ffn: float) -> float:
    """Maximiser of throughput per price over the ratio."""
    logs = np.linspace(math.log(LEAST_RATIO), math.log(MOST_RATIO), 400)
    at = _covered(setting, logs, form, ffn)
    best = int(np.argmax(at))
    if best == len(logs) - 1:
        raise PlannerError(_UNBOUNDED)
    low, high = logs[max(best - 1, 0)], logs[best + 1]

    def loss(log_ratio: float) -> float:
        return -float(points(setting, math.exp(log_ratio) * ffn, ffn, form).per_cost[0])

    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-9})
    # a kink may hide between the search's steps: never return less than the grid had
    return math.exp(found.x if -found.fun >= at[best] else logs[best])


def _covered(setting: Setting, logs: Array, form: Form, ffn: float) -> Array:
    """Throughput per price at each ratio; -inf where a latency table says nothing."""
    ratios = np.exp(logs)
    try:
        return points(setting, ratios * ffn, ffn, form).per_cost
    except PlannerError:
        values = np.full(len(logs), -np.inf)
    refused: PlannerError | None = None
    for i, ratio in enumerate(ratios):
        try:
            values[i] = points(setting, ratio * ffn, ffn, form).per_cost[0]
        except PlannerError as error:
            refused = error
    if refused is not None and not np.any(np.isfinite(values)):
        raise refused
    return values


def _spread_around(best: int, count: int, each_side: int) -> list[int]:
    """Indices near ``best``, further apart with distance."""
    offsets = [0]
    step = 1.0
    for _ in range(each_side):
        offsets += [round(step), -round(step)]
        step *= 1.6
    return sorted({best + o for o in offsets if 0 <= best + o < count})


def _optimum_data(found: Optimum) -> dict[str, Any]:
    return {
        "ratio": found.ratio,
        "point": asdict(found.point),
        "candidates": dict(found.candidates),
    }
