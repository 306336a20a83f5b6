"""The papers' closed loop replayed by recursion, for many numbers of workers at once.

Where every slot is refilled at once and the lanes of all attention workers step together, who holds
which request at which step doesn't depend on time. So the loads are drawn first, and the times
follow step by step from max and plus: the same arithmetic as ``simulator`` does for this one case,
some hundred times faster, which a grid of workloads needs. Arrivals, prefill, changes and failures
are the ``simulator``'s; tests compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.latency import Latencies
from planner.workload import Workload

Array = NDArray[np.float64]

_POOL = 1 << 16  # pairs from which the requests of the first step are drawn
_MOST_DRAWS = 1 << 21  # at a time


@dataclass(frozen=True)
class Replay:
    """What the recursion found, one entry per number of attention workers, all [k].

    Attributes:
        attention: A.
        ratio: A / F.
        tau: time per step of a lane while the lanes take turns, in the latencies' unit.
        throughput: tokens per unit of time of all workers.
        per_instance: the same over A + F.
        idle_attention, idle_ffn: shares of time, 0..1.
        steps: steps of each lane that were measured.
    """

    attention: NDArray[np.int64]
    ratio: Array
    tau: Array
    throughput: Array
    per_instance: Array
    idle_attention: Array
    idle_ffn: Array
    steps: int


def replay_closed_loop(
    workload: Workload,
    latencies: Latencies,
    *,
    batch: int,
    attention: Sequence[int] | NDArray[np.int64],
    ffn: int = 1,
    lanes: int = 2,
    imbalance: float = 1.0,
    steps: int = 4000,
    warm_up: int = 50,
    fresh: bool = False,
    replicas: int = 1,
    seed: int = 0,
) -> Replay:
    """Step times of a full, stationary system (arXiv 2601.21351, section "simulation").

    Worker j carries the same requests for every A of a call (common random numbers), so that
    neighbouring A differ by their number and not by their luck.

    Args:
        batch: B, slots per lane and attention worker.
        attention: numbers of attention workers to try, [k], each at least 1.
        ffn: F, FFN workers that share the experts.
        lanes: M.
        imbalance: load of the busiest of several FFN workers over the mean.
        steps: of each lane, measured after ``warm_up`` ones in which the lanes fall into turn.
        fresh: start with new requests in all slots, as the papers do, instead of in the middle.
        replicas: independent runs, averaged: what a few long requests do to one worker for a whole
            run would else show as a kink at its number.
        seed: of the lengths.

    Raises:
        PlannerError: no numbers of workers, or one below 1.
    """
    counts = np.asarray(attention, dtype=np.int64)
    if counts.ndim != 1 or not len(counts) or counts.min() < 1:
        raise PlannerError(f"attention is {attention!r}, expected whole numbers of at least 1")
    if min(batch, ffn, lanes, steps, replicas) < 1 or warm_up < 0:
        raise PlannerError(
            "batch, ffn, lanes, steps and replicas have to be at least 1, warm_up at least 0"
        )
    total = steps + warm_up
    loads = [
        lane_loads(workload, batch, int(counts.max()), lanes, total, seed + (replica << 32), fresh)
        for replica in range(replicas)
    ]
    tokens = np.stack(loads, axis=2)
    del loads
    times = np.asarray(latencies.t_attention(tokens, float(batch)), dtype=np.float64)
    requests = (counts * batch).astype(np.float64)
    share = 1.0 / ffn
    t_f = np.asarray(
        latencies.t_ffn(requests * share * (imbalance if ffn > 1 else 1.0), share), dtype=np.float64
    )
    own = latencies.transfer_load == "attention"
    t_c = np.asarray(
        latencies.t_transfer(np.full(len(counts), float(batch)) if own else requests),
        dtype=np.float64,
    )
    began, ended = _recurse(times, counts, t_f, t_c, warm_up)
    # the mean throughput of the replicas, so the harmonic mean of their step times
    tau = 1.0 / np.mean(steps * lanes / (ended - began), axis=0)
    by_worker = np.cumsum(times[warm_up:].mean(axis=(0, 1, 2)))
    busy = by_worker[counts - 1] / counts
    throughput = requests / tau
    return Replay(
        attention=counts,
        ratio=counts / ffn,
        tau=tau,
        throughput=throughput,
        per_instance=throughput / (counts + ffn),
        idle_attention=np.maximum(0.0, 1.0 - busy / tau),
        idle_ffn=np.maximum(0.0, 1.0 - t_f / tau),
        steps=steps,
    )


def _recurse(
    times: Array, counts: NDArray[np.int64], t_f: Array, t_c: Array, warm_up: int
) -> tuple[Array, Array]:
    """When the measured steps begin and end at the FFN side, both [replicas, k].

    ``times`` is [steps, lanes, replicas, workers]. Lanes keep their order: attention and FFN side
    serve first come first served, and a lane's frame takes as long on the way as another's.
    """
    total, lanes, replicas, workers = times.shape
    # a worker that isn't there is never the last
    absent = np.where(np.arange(workers)[None, :] < counts[:, None], 0.0, -np.inf)
    shape = (replicas, len(counts))
    free = np.broadcast_to(absent, (*shape, workers)).copy()
    ready = np.zeros((lanes, *shape, 1))
    ffn_free, began = np.zeros(shape), np.zeros(shape)
    half = t_c / 2
    for step in range(total):
        if step == warm_up:
            began = ffn_free.copy()
        for lane in range(lanes):
            np.maximum(free, ready[lane], out=free)
            free += times[step, lane][:, None, :]
            free += absent
            np.maximum(ffn_free, free.max(axis=2) + half, out=ffn_free)
            ffn_free += t_f
            np.add(ffn_free, half, out=ready[lane, :, :, 0])
    return began, ffn_free


def lane_loads(
    workload: Workload,
    batch: int,
    workers: int,
    lanes: int,
    steps: int,
    seed: int,
    fresh: bool = False,
) -> Array:
    """Context tokens of each lane of each worker at every step, [steps, lanes, workers].

    Starts as a random moment of a long run finds the slots: lengths drawn in proportion to the
    output, ages uniform; or with new requests (``fresh``).
    """
    rng = np.random.default_rng(seed)
    groups = lanes * workers
    count = groups * batch
    if fresh:
        prompt, output = (np.asarray(v) for v in workload.sample(rng, count))
        age = np.zeros(count, dtype=np.int64)
    else:
        pool_prompt, pool_output = (np.asarray(v) for v in workload.sample(rng, _POOL))
        bound = np.cumsum(pool_output, dtype=np.float64)
        first = np.searchsorted(bound, rng.random(count) * bound[-1], side="right")
        prompt, output = pool_prompt[first], pool_output[first]
        age = (rng.random(count) * output).astype(np.int64)
    # tokens before each step: every request adds one per step, and leaves when it is done
    group = np.repeat(np.arange(groups), batch)
    change = np.full((groups, steps), float(batch))
    change[:, 0] = np.bincount(group, weights=prompt + age, minlength=groups)
    finish = output - age  # the step at which a slot's request is gone
    leaving = prompt + output
    mean = max(1.0, workload.mean_output)
    while True:
        going_on = finish < steps
        group, finish, leaving = group[going_on], finish[going_on], leaving[going_on]
        if not len(group):
            break
        # a few requests ahead for each slot that isn't through yet
        ahead = min((steps - int(finish.min())) / mean * 1.2, _MOST_DRAWS / len(group))
        shape = (len(group), int(ahead) + 1)
        prompts, outputs = (
            np.asarray(v).reshape(shape) for v in workload.sample(rng, shape[0] * shape[1])
        )
        ends = finish[:, None] + np.cumsum(outputs, axis=1)
        begins = np.concatenate([finish[:, None], ends[:, :-1]], axis=1)
        delta = prompts.astype(np.float64)
        delta[:, 0] -= leaving
        delta[:, 1:] -= prompts[:, :-1] + outputs[:, :-1]
        inside = begins < steps
        where = (group[:, None] * steps + begins)[inside]
        change += np.bincount(where, weights=delta[inside], minlength=change.size).reshape(
            change.shape
        )
        finish, leaving = ends[:, -1], prompts[:, -1] + outputs[:, -1]
    return np.cumsum(change, axis=1).T.reshape(steps, lanes, workers)
