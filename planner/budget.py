"""Whole numbers of workers under a budget of GPUs, and the prefill workers in front of them.

Searches all pairs of attention and FFN workers that fit, judged by ``points``. It knows prices,
latency limits and the room for context, not machines or racks: where workers go is ``cluster``'s
business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.latency import Latencies
from planner.points import FORMS, Form, Point, Points, points
from planner.setting import Array, Setting, check_least
from planner.workload import Workload

Objective = Literal["throughput", "cost"]

MOST_PAIRS = 2_000_000
_CHUNK = 2048  # pairs evaluated at a time: 20 MB each for the barrier
_FIRST_LOOK = 0.7  # share of the best mean-field value that is looked at first


@dataclass(frozen=True)
class Budget:
    """What there is to spend, and what has to be held.

    Args:
        gpus: in all.
        gpus_per_attention, gpus_per_ffn: of one worker.
        max_tpot: longest time between two tokens of a request, in the latencies' unit.
        min_throughput: tokens per unit of time that have to come out.
        kv_tokens: context tokens that fit on one attention worker.
        min_ffn: FFN workers that are needed to hold the experts.
        max_ffn: most FFN workers, e.g. the number of experts; None: no limit.
        prefill_gpus: set aside for prefill (see ``prefill_front``).

    Raises:
        PlannerError: a number out of range; names the field.
    """

    gpus: int
    gpus_per_attention: int = 1
    gpus_per_ffn: int = 1
    max_tpot: float | None = None
    min_throughput: float | None = None
    kv_tokens: float | None = None
    min_ffn: int = 1
    max_ffn: int | None = None
    prefill_gpus: int = 0

    def __post_init__(self) -> None:
        for name in ("gpus", "gpus_per_attention", "gpus_per_ffn", "min_ffn"):
            check_least(name, getattr(self, name), 1.0)
        check_least("prefill_gpus", self.prefill_gpus, 0.0)
        for name in ("max_tpot", "min_throughput", "kv_tokens"):
            if (value := getattr(self, name)) is not None:
                check_least(name, value, 0.0)
        if self.max_ffn is not None:
            check_least("max_ffn", self.max_ffn, self.min_ffn)


@dataclass(frozen=True)
class Choice:
    """One pair of numbers that fits.

    Attributes:
        point: what it yields.
        gpus: that it takes, prefill not counted.
        cost: price of its workers, in the setting's unit.
        per_gpu: throughput per GPU.
        loss: share of the best choice's objective that it loses, 0..1.
    """

    point: Point
    gpus: int
    cost: float
    per_gpu: float
    loss: float


@dataclass(frozen=True)
class Plan:
    """The best choice and what else there is.

    Attributes:
        best: highest objective; of equals the one with the fewest GPUs.
        alternatives: best numbers for other numbers of FFN workers, best first.
        considered: pairs that fit the GPUs.
        refused: how many of those broke a limit, by limit.
    """

    best: Choice
    alternatives: tuple[Choice, ...]
    considered: int
    refused: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "best": asdict(self.best),
            "alternatives": [asdict(choice) for choice in self.alternatives],
            "considered": self.considered,
            "refused": dict(self.refused),
        }


@dataclass(frozen=True)
class PrefillFront:
    """Prefill workers that keep a decode side full.

    Attributes:
        workers: whole number of them.
        request_rate: requests per unit of time that the decode side finishes.
        prefill_time: mean time per request on one prefill worker.
        utilisation: share of time that they work.
    """

    workers: int
    request_rate: float
    prefill_time: float
    utilisation: float


def plan_budget(
    setting: Setting,
    budget: Budget,
    form: Form = "barrier",
    objective: Objective = "throughput",
    alternatives: int = 8,
) -> Plan:
    """Numbers of attention and FFN workers that make the most of a budget.

    All pairs with A*g_A + F*g_F <= GPUs. The mean field is above the barrier-aware throughput, so
    pairs are looked at from the highest mean-field value down until none that is left can win.

    Args:
        form: which theory judges.
        objective: "throughput": most tokens per time; "cost": most tokens per time and price, for
            which ``min_throughput`` usually is given.
        alternatives: how many to list.

    Raises:
        PlannerError: nothing fits, or nothing that fits holds the limits; says which limit refused
            how many, or the batch that would fit the memory.
    """
    if form not in FORMS or objective not in ("throughput", "cost"):
        raise PlannerError(
            f"form is {form!r} and objective {objective!r}, expected one of {', '.join(FORMS)} "
            "and one of throughput, cost"
        )
    _check_memory(setting, budget)
    a, f = _pairs(budget)
    rough = points(setting, a, f, "mean-field")
    values = _objective(rough, objective)
    # the barrier only makes steps longer: what breaks a limit here breaks it there
    hopeful = np.flatnonzero(_holds(rough, budget)[0])
    found = np.full(len(a), -np.inf)
    exact: dict[int, Point] = {}
    refused = _holds(rough, budget)[1]
    for share in (_FIRST_LOOK, 0.0):
        if not len(hopeful):
            break
        least = share * values[hopeful].max()
        looked_at = hopeful[values[hopeful] >= least]
        _evaluate(setting, budget, form, objective, a, f, looked_at, found, exact, refused)
        # A curve that bends down may put the barrier slightly above the mean field: hence 1 %.
        if len(looked_at) == len(hopeful) or found.max() > 1.01 * least:
            break
    if not exact:
        limits = ", ".join(f"{name} refused {count}" for name, count in refused.items() if count)
        raise PlannerError(
            f"none of {len(a)} pairs within {budget.gpus} GPUs holds the limits ({limits}): "
            "loosen one, add GPUs or lower the batch"
        )
    return _plan(setting, budget, objective, alternatives, found, exact, len(a), refused)


def prefill_front(
    throughput: float,
    workload: Workload,
    latencies: Latencies,
    utilisation: float = 0.8,
    samples: int = 20_000,
    seed: int = 0,
) -> PrefillFront:
    """Prefill workers for a decode side that makes ``throughput`` tokens per unit of time.

    It finishes throughput / mu_D requests, each of which needs t_P of its uncached prompt tokens on
    one worker: workers = rate * E[t_P] / utilisation, rounded up. A request's first token comes
    from prefill, which the decode side then doesn't make: outputs count one less, if above one.

    Args:
        throughput: of the decode side, e.g. ``Point.throughput``.
        workload: lengths, and ``reuse``, the share of prompt tokens that a prefix cache holds.
        latencies: its ``prefill`` curve.
        utilisation: share of time that prefill workers may work, in (0, 1]; the rest absorbs
            bursts.
        samples, seed: prompts that are drawn for the mean.

    Raises:
        PlannerError: a utilisation out of range, or latencies without a prefill curve.
    """
    check_least("throughput", throughput, 0.0)
    if not 0.0 < utilisation <= 1.0:
        raise PlannerError(f"utilisation is {utilisation:g}, expected above 0 and up to 1")
    prompts, _ = workload.sample(np.random.default_rng(seed), samples)
    uncached = np.asarray(prompts, dtype=np.float64) * (1.0 - workload.reuse)
    time = float(np.mean(latencies.t_prefill(uncached)))
    if time <= 0.0:
        raise PlannerError("these latencies have no prefill curve: give one (prefill: a, b)")
    rate = throughput / max(workload.mean_output - 1.0, 1.0)
    workers = max(1, math.ceil(rate * time / utilisation - 1e-9))
    return PrefillFront(workers, rate, time, rate * time / workers)


# -- the search ----------------------------------------------------------------------------------


def _check_memory(setting: Setting, budget: Budget) -> None:
    if budget.kv_tokens is None:
        return
    per_slot = setting.moments.theta * setting.lanes_or_two
    if setting.batch * per_slot > budget.kv_tokens:
        fits = math.floor(budget.kv_tokens / per_slot)
        raise PlannerError(
            f"{setting.lanes_or_two} lanes of {setting.batch} slots hold "
            f"{setting.batch * per_slot:,.0f} context tokens on average, an attention worker has "
            f"room for {budget.kv_tokens:,.0f}: "
            + (f"a batch of {fits} fits" if fits else "not even a batch of 1 fits")
        )


def _pairs(budget: Budget) -> tuple[Array, Array]:
    """All (A, F) that fit the GPUs."""
    gpus = budget.gpus - budget.prefill_gpus
    most = (gpus - budget.gpus_per_attention) // budget.gpus_per_ffn
    if budget.max_ffn is not None:
        most = min(most, budget.max_ffn)
    if most < budget.min_ffn:
        raise PlannerError(
            f"{gpus} GPUs don't hold one attention worker of {budget.gpus_per_attention} and "
            f"{budget.min_ffn} FFN workers of {budget.gpus_per_ffn}: give more GPUs"
        )
    ffn = np.arange(budget.min_ffn, most + 1)
    counts = (gpus - ffn * budget.gpus_per_ffn) // budget.gpus_per_attention
    if counts.sum() > MOST_PAIRS:
        raise PlannerError(
            f"{counts.sum():,} pairs of numbers fit {gpus} GPUs, more than the {MOST_PAIRS:,} that "
            "are searched: plan in larger units (GPUs per worker), or set max_ffn"
        )
    a = np.concatenate([np.arange(1, count + 1) for count in counts])
    return a.astype(np.float64), np.repeat(ffn, counts).astype(np.float64)


def _objective(table: Points, objective: Objective) -> Array:
    return table.throughput if objective == "throughput" else table.per_cost


def _holds(table: Points, budget: Budget) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Which rows hold every limit, and how many break each."""
    holds = np.ones(len(table), dtype=np.bool_)
    broken: dict[str, int] = {}
    if budget.max_tpot is not None:
        ok = table.tpot <= budget.max_tpot
        broken["max_tpot"] = int(np.sum(~ok))
        holds &= ok
    if budget.min_throughput is not None:
        ok = table.throughput >= budget.min_throughput
        broken["min_throughput"] = int(np.sum(~ok))
        holds &= ok
    return holds, broken


def _evaluate(
    setting: Setting,
    budget: Budget,
    form: Form,
    objective: Objective,
    a: Array,
    f: Array,
    rows: NDArray[np.intp],
    found: Array,
    exact: dict[int, Point],
    refused: dict[str, int],
) -> None:
    """Judges ``rows`` by the form asked for; fills ``found`` and ``exact``, adds to ``refused``."""
    rows = np.array([row for row in rows if row not in exact], dtype=np.intp)
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        table = points(setting, a[chunk], f[chunk], form)
        holds, broken = _holds(table, budget)
        for name, count in broken.items():
            refused[name] += count
        values = _objective(table, objective)
        for i in np.flatnonzero(holds):
            found[chunk[i]] = values[i]
            exact[int(chunk[i])] = table[int(i)]


def _plan(
    setting: Setting,
    budget: Budget,
    objective: Objective,
    alternatives: int,
    found: Array,
    exact: Mapping[int, Point],
    considered: int,
    refused: Mapping[str, int],
) -> Plan:
    def gpus(at: Point) -> int:
        return round(at.attention * budget.gpus_per_attention + at.ffn * budget.gpus_per_ffn)

    order = sorted(exact, key=lambda row: (-found[row], gpus(exact[row])))
    top = found[order[0]]
    by_ffn: dict[float, int] = {}
    for row in order:
        by_ffn.setdefault(exact[row].ffn, row)

    def choice(row: int) -> Choice:
        at = exact[row]
        cost = at.attention * setting.price_attention + at.ffn * setting.price_ffn
        loss = float(max(0.0, 1.0 - found[row] / top))
        return Choice(at, gpus(at), cost, at.throughput / gpus(at), loss)

    others = [row for row in by_ffn.values() if row != order[0]][: max(0, alternatives)]
    return Plan(choice(order[0]), tuple(map(choice, others)), considered, refused)
