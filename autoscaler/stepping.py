"""One step of an attention worker beside others, from a calibrated model.

A mean-value theory of how afflux steps: attention workers step on their own, their lanes end a step
together, and FFN workers take what has arrived. The planner's formulas have a barrier instead, and
its simulator, which has all of this, takes seconds where a policy has microseconds. What follows
for loads and rates is ``predict``.

Symbols: A attention and F FFN workers, R requests that run, n = R/A of them on a worker, M lanes,
x = n/M requests in a lane, L layers. a, c, f: attention, transfer (both ways) and FFN time of a
lane's step through all layers; o: time of a worker's step outside of its layers.

A lane alone takes its round trip, Z + f with Z = a + c + o. What else bounds a step of a worker
(arXiv 2601.21351, per worker instead of per barrier): its own device, M*a + o, and the FFN workers,
which serve K rides in that time, K*S, where S is the time of a ride of N/K frames and N = A*M. Near
that bound a frame finds a ride under way, or others before it. With K rides of equal length in a
closed loop that waits for W = (K-1)*(S/R)*(W + S/2) (arrival theorem with the wait of those
before it by Little's law, residual S/2), which with R = Z + S + W is a square equation.

Frames of one layer that wait together ride together, which saves S what it has whatever the load.
Were all that wait let in, rides would grow until they just keep the FFN workers busy:
(N/m)*S(m) = R(m). Frames of other layers have to stay behind; how many still ride, and how long the
residual is where rides keep step, are the two constants below, set by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

from autoscaler.model import Model
from autoscaler.policy import System
from planner.barrier import distinct_holders
from planner.errors import PlannerError

Form = Literal["mean-field", "barrier"]

RIDERS = 0.35
"""Of the frames that would ride along if they were of the same layer, the share that does."""
RESIDUAL = 0.75
"""Wait for the ride under way, over half its length that unrelated arrivals would have."""
LEAST_PER_LANE = 4
"""Requests that a lane has at least where lanes are chosen per step (``actors.lanes``)."""


@dataclass(frozen=True)
class Step:
    """A step of an attention worker, in the model's unit.

    Args:
        seconds: its mean length, and so TPOT.
        attention: time that the worker's device is busy in it, prompts included.
        ffn: time that the busiest FFN worker is busy in it, for all workers.
        lanes: it runs in.
        bound_by: "attention", "ffn" or "round trip": what it takes that long for.
    """

    seconds: float
    attention: float
    ffn: float
    lanes: float
    bound_by: str


def step_of(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    running: float,
    form: Form = "mean-field",
) -> Step:
    """The step in which ``running`` requests get their next token.

    Prompts ride in the steps: where the model knows lengths, each of n requests brings one every D
    steps (D: mean output), and its time at both sides is spread over them.

    Args:
        model: contexts come from ``theta``, else from mean lengths.
        system: more requests than slots or room for contexts do not run.
        attention, ffn: workers.
        running: requests, evenly spread.
        form: "mean-field": of the mean worker; "barrier": of the one with the longest contexts of
            all, as the barrier-aware theory has it, for targets that the last request has to meet.

    Raises:
        PlannerError: no workers, or a load that a latency table does not cover.
    """
    if attention < 1 or ffn < 1:
        raise PlannerError(f"{attention} attention and {ffn} FFN workers serve nobody")
    running = min(running, room(model, system, attention))
    context = context_of(model)
    if form == "barrier" and math.isfinite(model.nu2):
        each = max(1.0, running / attention)
        context += _slowest_of(attention) * math.sqrt(model.nu2 / each)
    steps = (
        _step(model, system, attention, ffn, running, context, lanes)
        for lanes in _lanes(model, system, running / attention)
    )
    return min(steps, key=lambda step: step.seconds)


def context_of(model: Model) -> float:
    """Context tokens of a running request: observed, else from mean lengths, else 0."""
    if math.isfinite(model.theta):
        return model.theta
    if math.isfinite(model.prompt_mean):
        output = model.output_mean if math.isfinite(model.output_mean) else 0.0
        return model.prompt_mean + output / 2
    return 0.0


def room(model: Model, system: System, attention: int) -> float:
    """Most requests that so many attention workers run at a time: by slots and contexts."""
    each = float(system.slots)
    if system.kv_tokens is not None:
        each = min(each, system.kv_tokens / max(1.0, context_of(model)))
    return attention * max(1.0, each)


def _step(
    model: Model,
    system: System,
    attention: int,
    ffn: int,
    running: float,
    context: float,
    lanes: float,
) -> Step:
    latencies = model.latencies
    # fewer requests than workers leave some idle
    workers = max(1.0, min(attention, running))
    each = max(1.0, running / attention)
    lanes = min(lanes, each)
    x = each / lanes
    a = latencies.t_attention(context * x, x)
    c = latencies.t_transfer(x * _fan_out(system, ffn))
    o = latencies.outside(each)
    frames = workers * lanes
    alone = _ffn_time(model, ffn, x)
    rise = (_ffn_time(model, ffn, frames * x) - alone) / (frames - 1) if frames > 1 else alone
    once = max(0.0, alone - rise)
    trip, device = a + c + o, lanes * a + o
    riders = 1 + RIDERS * (_riders(trip, device, rise, once, frames) - 1)
    rides = frames / riders
    ride = _ffn_time(model, ffn, riders * x)
    served = rides * ride
    waited = _with_wait(trip + ride, ride, rides)
    cycle = max(device, served, waited)
    # the lanes end together, so that the last layer is not overlapped with the next step
    last = waited + (lanes - 1) * max(a, alone)
    seconds = max(cycle, cycle + (last - cycle) / max(1, model.layers))
    prompts = _prompts(model, ffn, each, seconds, workers, cycle - waited)
    bound = "attention" if cycle == device else "ffn" if cycle == served else "round trip"
    at_ffn = served + workers * prompts.ffn
    total = max(seconds + prompts.seconds, at_ffn)
    return Step(total, device + prompts.attention, at_ffn, lanes, bound)


def _riders(trip: float, device: float, rise: float, once: float, frames: float) -> float:
    """m of (frames/m) * (once + rise*m) = max(device, trip + once + rise*m), within 1..frames."""
    p = trip + once - frames * rise
    if rise > 0:
        by_trip = (math.sqrt(p * p + 4 * rise * frames * once) - p) / (2 * rise)
    else:
        by_trip = frames * once / p if p > 0 else frames
    slack = device - frames * rise
    by_device = frames * once / slack if slack > 0 else math.inf
    return min(max(min(by_trip, by_device), 1.0), max(frames, 1.0))


def _with_wait(alone: float, ride: float, rides: float) -> float:
    """R of R = alone + W, W = (rides - 1) * ride * (W + RESIDUAL*ride/2) / R, solved for R."""
    others = max(0.0, rides - 1) * ride
    gap = others - alone
    return (others + alone + math.sqrt(gap * gap + 2 * RESIDUAL * others * ride)) / 2


class _Prompts(NamedTuple):
    """What prompts add to a step: to its length, and of their own to attention and FFN workers."""

    seconds: float
    attention: float
    ffn: float


def _prompts(
    model: Model, ffn: int, each: float, seconds: float, workers: float, slack: float
) -> _Prompts:
    """What prompts add to a step.

    Args:
        slack: time for which a lane waits for the others in a step without prompts.
    """
    alone, at_ffn = prompt_time(model, ffn)
    if not alone or not model.output_mean >= 1:
        return _Prompts(0.0, 0.0, 0.0)
    share = each / model.output_mean
    device = model.latencies.t_prefill(model.prompt_mean * (1.0 - model.prefix_hit))
    # Each layer of another worker's prompt is met at most once, in the middle of its service.
    met = (workers - 1) * share * min(1.0, at_ffn / seconds) if seconds > 0 else 0.0
    seconds = share * max(device, alone - slack) + met * at_ffn / 2
    return _Prompts(seconds, share * device, share * at_ffn)


def prompt_time(model: Model, ffn: int) -> tuple[float, float]:
    """Time of a mean prompt through all layers, and of that at the FFN workers; 0 if unknown."""
    tokens = model.prompt_mean * (1.0 - model.prefix_hit)
    if not math.isfinite(tokens) or tokens <= 0:
        return 0.0, 0.0
    latencies = model.latencies
    # it rides with the decoding requests: only what it adds counts
    at_ffn = _ffn_time(model, ffn, tokens) - _ffn_time(model, ffn, 0.0)
    wire = latencies.t_transfer(tokens) - latencies.t_transfer(0.0)
    return latencies.t_prefill(tokens) + at_ffn + wire, at_ffn


def _ffn_time(model: Model, ffn: int, requests: float) -> float:
    """t_F of the busiest of the FFN workers; one alone has nobody to be out of balance with."""
    imbalance = model.imbalance if ffn > 1 and model.imbalance >= 1 else 1.0
    return model.latencies.t_ffn(requests * imbalance / ffn, 1.0 / ffn)


def _fan_out(system: System, ffn: int) -> float:
    """Share of a lane's tokens that one FFN worker gets."""
    if system.top_k is None or ffn < 2:
        return 1.0
    experts = system.experts
    if experts is not None and experts < max(ffn, system.top_k):
        return 1.0
    return distinct_holders(ffn, system.top_k, experts) / ffn


def _lanes(model: Model, system: System, each: float) -> Iterator[float]:
    """Numbers of lanes that a step may have: a fixed one, or what the actors choose from."""
    if system.lanes == model.lanes or system.lanes == 1:
        yield float(system.lanes)
        return
    yield 1.0
    for lanes in range(2, system.lanes + 1):
        if each >= LEAST_PER_LANE * lanes:
            yield float(lanes)


def _slowest_of(workers: int) -> float:
    """Mean of the largest of so many standard normals (Blom, 1958): Phi^-1((n-a)/(n-2a+1))."""
    if workers < 2:
        return 0.0
    return NormalDist().inv_cdf((workers - 0.375) / (workers + 0.25))
