"""What an error in an input does to the best ratio, and what it costs to keep the old one.

Every input is moved by itself, the best ratio of the changed world is compared with the one that
was planned, and the loss is what the plan yields there. The naive rule of arXiv 2601.21351 v1 on
lengths that aren't geometric is one such error, of the load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from planner.errors import PlannerError
from planner.latency import Latencies
from planner.points import Form, point
from planner.setting import Setting, with_moments
from planner.sizing import optimum


@dataclass(frozen=True)
class Effect:
    """One input moved.

    Attributes:
        name: a_A, b_A, a_F, b_F, a_C, b_C, theta, nu2, batch or imbalance.
        change: relative, e.g. 0.1 for 10 % more.
        ratio: best ratio then.
        loss: share of the then best throughput per price that the old ratio loses, 0..1.
    """

    name: str
    change: float
    ratio: float
    loss: float


@dataclass(frozen=True)
class NaiveCost:
    """What the load mu_P + mu_D costs where it isn't the load.

    Attributes:
        theta: stationary load of a slot in tokens.
        naive_load: mu_P + mu_D.
        ratio, naive_ratio: best ratios by either.
        loss: share of the best throughput per price that the naive ratio loses, 0..1.
    """

    theta: float
    naive_load: float
    ratio: float
    naive_ratio: float
    loss: float


def sensitivity(
    setting: Setting, error: float = 0.1, form: Form = "barrier", ffn: float = 1.0
) -> tuple[Effect, ...]:
    """What each input does when it is ``error`` lower and higher than planned with.

    By brute force: the optimum of arXiv 2601.21351 in each changed world. The imbalance is moved
    only with several FFN workers, and never below 1; a batch by at least one slot.

    Raises:
        PlannerError: an error outside of (0, 1), or an optimum that doesn't exist.
    """
    if not 0.0 < error < 1.0:
        raise PlannerError(f"error is {error:g}, expected a share above 0 and below 1")
    old = optimum(setting, form, ffn).ratio
    effects = []
    for change in (-error, error):
        for name, changed in _changed(setting, 1.0 + change, ffn):
            best = optimum(changed, form, ffn)
            kept = point(changed, old * ffn, ffn, form).per_cost
            loss = max(0.0, 1.0 - kept / best.point.per_cost)
            effects.append(Effect(name, change, best.ratio, loss))
    order = {name: i for i, name in enumerate(dict.fromkeys(e.name for e in effects))}
    return tuple(sorted(effects, key=lambda e: (order[e.name], e.change)))


def naive_cost(setting: Setting, form: Form = "barrier", ffn: float = 1.0) -> NaiveCost:
    """Throughput lost by sizing with mu_P + mu_D (v1) where the load is theta (v3).

    The two are equal for geometric outputs that don't depend on the prompts; on recorded traces
    they may differ by a factor of two.
    """
    moments = setting.moments
    best = optimum(setting, form, ffn)
    naive = optimum(with_moments(setting, theta=moments.naive), form, ffn).ratio
    kept = point(setting, naive * ffn, ffn, form).per_cost
    loss = max(0.0, 1.0 - kept / best.point.per_cost)
    return NaiveCost(moments.theta, moments.naive, best.ratio, naive, loss)


def _changed(setting: Setting, factor: float, ffn: float) -> Iterator[tuple[str, Setting]]:
    """The setting with one input multiplied, for every input."""
    curves: dict[str, Callable[[Latencies], Latencies]] = {
        "a_A": lambda lat: replace(lat, attention=lat.attention.scaled(slope=factor)),
        "b_A": lambda lat: replace(
            lat,
            attention=lat.attention.scaled(intercept=factor),
            attention_per_request=lat.attention_per_request * factor,
        ),
        "a_F": lambda lat: replace(lat, ffn=lat.ffn.scaled(slope=factor)),
        "b_F": lambda lat: replace(lat, ffn=lat.ffn.scaled(intercept=factor)),
        "a_C": lambda lat: replace(lat, transfer=lat.transfer.scaled(slope=factor)),
        "b_C": lambda lat: replace(lat, transfer=lat.transfer.scaled(intercept=factor)),
    }
    for name, change in curves.items():
        yield name, replace(setting, latencies=change(setting.latencies))
    yield "theta", with_moments(setting, theta=setting.moments.theta * factor)
    yield "nu2", with_moments(setting, nu2=setting.moments.nu2 * factor)
    moved = max(1, round(setting.batch * factor))
    if moved == setting.batch:
        moved = max(1, setting.batch + (1 if factor > 1.0 else -1))
    yield "batch", replace(setting, batch=moved)
    if ffn > 1.0:
        yield "imbalance", replace(setting, imbalance=max(1.0, setting.imbalance * factor))
