"""TPOT at any numbers of workers, and the load that they can carry, from a calibrated model.

What a step takes is ``stepping``; here is what follows for requests that come at a rate. Not for
choosing numbers of workers: that is a policy's job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from autoscaler.model import Model
from autoscaler.policy import System
from autoscaler.stepping import Form, context_of, prompt_time, room, step_of
from planner.control import Snapshot

__all__ = [
    "Form",
    "capacity",
    "carries",
    "context_of",
    "predict_load",
    "predict_step",
    "predict_ttft",
    "rebalance_gain",
    "room",
    "settled",
    "step_of",
]

TOLERANCE = 2e-3
_MOST_STATES = 20_000
_POINTS = 24


def predict_step(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    running: float,
    form: Form = "mean-field",
) -> float:
    """TPOT of ``running`` requests on so many workers; see ``step_of``."""
    return step_of(model, system, attention, ffn, running, form).seconds


def predict_load(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    rate: float,
    form: Form = "mean-field",
) -> tuple[float, float]:
    """Requests that run, and TPOT, when requests come at a rate for long; see ``settled``.

    Returns:
        (inf, inf) where these workers can't follow, (nan, nan) where the mean output or the rate is
        not known.
    """
    load = settled(model, system, attention, ffn, rate, form)
    return load.running, load.tpot


@dataclass(frozen=True)
class Settled:
    """A load that has lasted; means, in the model's unit.

    Args:
        running: requests that have a slot.
        waiting: requests that have none.
        tpot: time per output token.
        step: a step at a random moment, as arrivals find it; the busier ones make more tokens.
    """

    running: float
    waiting: float
    tpot: float
    step: float


def settled(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    rate: float,
    form: Form = "mean-field",
) -> Settled:
    """What it comes to when requests come at a rate for long.

    With k requests running, X(k) = k / TPOT(k) tokens come out per unit of time, shared by all: a
    processor-sharing queue. For Poisson arrivals, whatever the lengths, the chance of k requests is
    proportional to the product of rate * D / X(j) over j = 1..k (Cohen, Acta Informatica 12, 1979),
    D the mean output; those beyond slots and room wait. The fixed point running = rate * D *
    TPOT(running) (Janus, arXiv 2512.13525) is where that would stand still, and too low by what the
    ups and downs cost.

    Args:
        rate: requests per unit of time.

    Returns:
        all inf where these workers can't follow, all nan where output or rate are not known.

    Raises:
        PlannerError: as ``step_of``.
    """
    asked = rate * model.output_mean
    if not math.isfinite(asked):
        return Settled(*[math.nan] * 4)
    most = max(1, int(min(room(model, system, attention), _MOST_STATES)))
    some = np.unique(np.geomspace(1, most, min(most, _POINTS)).round())
    times = np.array([predict_step(model, system, attention, ffn, k, form) for k in some])
    count = np.arange(1.0, most + 1)
    out = np.interp(count, some, some / times)
    if not asked < out[-1]:
        return Settled(*[math.inf] * 4)
    if asked <= 0:
        return Settled(0.0, 0.0, float(times[0]), float(times[0]))  # of a first request
    chance = np.concatenate(([0.0], np.cumsum(np.log(asked / out))))
    chance = np.exp(chance - chance.max())
    # beyond the last slot it is a plain queue: a geometric tail
    fall = asked / float(out[-1])
    queued = chance[-1] * fall / (1 - fall)
    total = chance.sum() + queued
    running = float((chance[1:] @ count + queued * most) / total)
    step = np.append(count / out, most / out[-1])
    return Settled(
        running=running,
        waiting=float(queued / (1 - fall) / total),
        tpot=running / asked,
        step=float((chance @ step + queued * step[-1]) / total),
    )


def capacity(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    most_tpot: float,
    form: Form = "mean-field",
    fill: float = 1.0,
) -> float:
    """Tokens per unit of time that these workers put out while TPOT stays at ``most_tpot``.

    As many requests run as that, slots and room for contexts allow. 0 where one request alone takes
    longer.

    Args:
        fill: share of slots and room that may be in use.

    Raises:
        PlannerError: as ``step_of``.
    """
    most = min(max(1.0, fill * room(model, system, attention)), 1e7)

    def tpot(running: float) -> float:
        return predict_step(model, system, attention, ffn, running, form)

    if tpot(1.0) > most_tpot:
        return 0.0
    low, high = 1.0, 2.0
    while high < most and tpot(high) <= most_tpot:
        low, high = high, 2 * high
    high = min(high, most)
    if tpot(high) <= most_tpot:
        return high / tpot(high)
    while high - low > TOLERANCE * low:
        middle = (low + high) / 2
        if tpot(middle) <= most_tpot:
            low = middle
        else:
            high = middle
    return low / tpot(low)


def carries(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    tokens: float,
    most_tpot: float,
    form: Form = "mean-field",
    fill: float = 1.0,
) -> bool:
    """Whether ``capacity`` is at least ``tokens`` per unit of time; in one step's evaluation.

    More running requests never put out fewer tokens, so it is enough to look at as many as would
    run were TPOT just the most, or as fit.

    Raises:
        PlannerError: as ``step_of``.
    """
    if not tokens > 0:
        return True
    most = max(1.0, fill * room(model, system, attention))
    running = max(1.0, min(tokens * most_tpot, most))
    tpot = predict_step(model, system, attention, ffn, running, form)
    return tpot <= min(most_tpot, running / tokens)


def predict_ttft(model: Model, system: System, attention: int, ffn: int, rate: float) -> float:
    """Mean time to the first token when requests come at a rate for long.

    The wait for a slot, half a step until the next one begins, that step, and the prompt in it.
    Waits of arrivals that bunch more than Poisson's are not in it.

    Returns:
        inf where these workers can't follow, nan where lengths or the rate are not known.

    Raises:
        PlannerError: as ``step_of``.
    """
    load = settled(model, system, attention, ffn, rate)
    if not math.isfinite(load.tpot):
        return load.tpot
    alone, _ = prompt_time(model, ffn)
    return (load.waiting / rate if rate > 0 else 0.0) + 1.5 * load.step + alone


def rebalance_gain(
    model: Model, system: System, snapshot: Snapshot, imbalance: float, after: float
) -> float:
    """Share of a step that the present load would save with another imbalance; 0 where unknown.

    Args:
        imbalance, after: load of the busiest FFN worker over the mean, now and then.
    """
    known = math.isfinite(imbalance) and math.isfinite(after) and after < imbalance
    if not known or snapshot.attention < 1 or snapshot.ffn < 2 or snapshot.running < 1:
        return 0.0
    old, new = (
        predict_step(
            replace(model, imbalance=max(1.0, value)),
            system,
            snapshot.attention,
            snapshot.ffn,
            snapshot.running,
        )
        for value in (imbalance, after)
    )
    return max(0.0, 1.0 - new / old)
