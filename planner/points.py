"""What given numbers of attention and FFN workers yield: step time, throughput, idle shares.

The step of arXiv 2601.21351, mean field and barrier aware, extended to several FFN workers, lanes
that bound a step by their own round trip, and prices. Which numbers to choose is ``sizing``.

Symbols: A attention workers, F FFN workers that share the experts, r = A/F, B slots of one lane on
one attention worker, M lanes, T context tokens of one lane on one worker. tau is the time per step
of one lane while the lanes take turns, so A*B tokens come out per tau.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from planner.barrier import Slowest, Z, expected_step
from planner.errors import PlannerError
from planner.setting import (
    Array,
    Setting,
    attention_time,
    ffn_time,
    mean_attention_time,
    transfer_time,
)

Form = Literal["mean-field", "barrier"]
FORMS: tuple[Form, ...] = ("mean-field", "barrier")
STAGES = ("attention", "ffn", "transfer", "round trip")


@dataclass(frozen=True)
class Point:
    """What one choice of A and F yields.

    Attributes:
        attention, ffn: A and F; real numbers where a curve was asked for.
        ratio: A / F.
        tau: expected time per step of a lane, in the latencies' unit.
        throughput: tokens per unit of time of all workers together.
        per_instance: the same over A + F.
        per_cost: the same over the price of all workers.
        idle_attention, idle_ffn: shares of time, 0..1, in which a worker's device has no work. With
            ``imbalance``, that of the busiest FFN worker.
        tpot: time between two tokens of a request, lanes * tau.
        bound_by: the stage that takes longest on average.
    """

    attention: float
    ffn: float
    ratio: float
    tau: float
    throughput: float
    per_instance: float
    per_cost: float
    idle_attention: float
    idle_ffn: float
    tpot: float
    bound_by: str


@dataclass(frozen=True)
class Points:
    """Many ``Point`` as arrays [k]; ``points[i]`` is one of them."""

    attention: Array
    ffn: Array
    ratio: Array
    tau: Array
    throughput: Array
    per_instance: Array
    per_cost: Array
    idle_attention: Array
    idle_ffn: Array
    tpot: Array
    bound_by: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.bound_by)

    def __getitem__(self, index: int) -> Point:
        values: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)[index]
            values[name] = value if name == "bound_by" else float(value)
        return Point(**values)

    def __iter__(self) -> Iterator[Point]:
        return (self[index] for index in range(len(self)))


def points(
    setting: Setting, attention: ArrayLike, ffn: ArrayLike = 1.0, form: Form = "barrier"
) -> Points:
    """What numbers of workers yield.

    Step time, arXiv 2601.21351 v3: tau = max(t_A, t_C, t_F) of mean loads ("mean-field"), or the
    expectation with t_A of the slowest of the A workers ("barrier"). An FFN worker sees A*B/F
    requests times the imbalance (each of F holds 1/F of the experts). The transfer's load is A*B,
    for every FFN worker receives every token (fewer with ``top_k``), or B where ``transfer_load``
    is "attention".

    Ours, with M lanes given: (t_A + t_C + t_F)/M bounds tau too. A worker's device works off M
    independent lanes in turn, so that what keeps it from being ready spreads by 1/sqrt(M) of a
    lane's; and as lanes can't overtake each other, the slowest of all A*M sets the round trip.

    Args:
        attention: A, real numbers > 0, scalar or [k].
        ffn: F, real numbers > 0, broadcast against A.
        form: which theory.

    Raises:
        PlannerError: no workers, or a load that a latency table doesn't cover.
    """
    a, f = np.broadcast_arrays(np.atleast_1d(attention), np.atleast_1d(ffn))
    a, f = a.astype(np.float64), f.astype(np.float64)
    if not (np.all(np.isfinite(a)) and np.all(a > 0) and np.all(np.isfinite(f)) and np.all(f > 0)):
        raise PlannerError("numbers of workers have to be finite and above 0")
    if form not in FORMS:
        raise PlannerError(f"form is {form!r}, expected one of {', '.join(FORMS)}")
    t_f, t_c = ffn_time(setting, a, f), transfer_time(setting, a, f)
    t_a = attention_time(setting, np.zeros(1))[0]
    trip = np.zeros_like(t_f)
    if setting.lanes is not None:
        trip = (t_a + t_c + t_f) / setting.lanes
    if form == "mean-field":
        tau = np.maximum(np.maximum(t_f, t_c), np.maximum(t_a, trip))
    else:
        tau = _barrier_step(setting, a, t_f, t_c)
    stages = np.stack([np.full_like(tau, t_a), t_f, t_c, trip])
    throughput = a * setting.batch / tau
    return Points(
        attention=a,
        ffn=f,
        ratio=a / f,
        tau=tau,
        throughput=throughput,
        per_instance=throughput / (a + f),
        per_cost=throughput / (a * setting.price_attention + f * setting.price_ffn),
        idle_attention=np.maximum(0.0, 1.0 - mean_attention_time(setting) / tau),
        idle_ffn=np.maximum(0.0, 1.0 - t_f / tau),
        tpot=setting.lanes_or_two * tau,
        bound_by=tuple(STAGES[i] for i in np.argmax(stages, axis=0)),
    )


def point(setting: Setting, attention: float, ffn: float = 1.0, form: Form = "barrier") -> Point:
    """``points`` for one choice."""
    return points(setting, attention, ffn, form)[0]


def _barrier_step(setting: Setting, attention: Array, t_f: Array, t_c: Array) -> Array:
    """E[tau], [k]."""
    lane = attention_time(setting, setting.off_mean(Z))
    lanes = setting.lanes
    floor = np.maximum(t_f, t_c)
    if lanes is None:
        return expected_step(floor, [Slowest(lane, attention)])
    device = attention_time(setting, setting.off_mean(Z, lanes))
    trips = (lane[None, :] + (t_c + t_f)[:, None]) / lanes
    return expected_step(floor, [Slowest(device, attention), Slowest(trips, attention * lanes)])
