"""A small system and short traces for replays: seconds of simulated time, tenths of real ones."""

import numpy as np

from autoscaler.core import Timing
from autoscaler.limits import Limits
from autoscaler.policy import SLO, Parameters, Proposal
from autoscaler.reasons import Reason
from autoscaler.replay import Scenario
from planner.curves import Linear
from planner.events import ChangeTimes
from planner.latency import Latencies
from planner.simulator import Cluster
from planner.traces import Trace

LATENCIES = Latencies(
    attention=Linear(2e-5, 0.01),
    ffn=Linear(1e-4, 0.01),
    transfer=Linear(1e-5, 0.002),
    prefill=Linear(5e-5, 0.0),
    weights_share=0.9,
)
TIMING = Timing(interval=1.0, cooldown=2.0, shrink_cooldown=5.0, stale=10.0, least_window=2.0)


def trace(rates: list[float], seconds: float = 20.0, seed: int = 0) -> Trace:
    """Poisson arrivals at each rate for so many seconds; prompts of 200, outputs of 30 tokens."""
    rng = np.random.default_rng(seed)
    times: list[float] = []
    for index, rate in enumerate(rates):
        count = rng.poisson(rate * seconds)
        times += sorted(index * seconds + rng.uniform(0, seconds, count))
    size = len(times)
    arrival = np.array(times)
    return Trace(arrival - arrival[0], np.full(size, 200), rng.integers(20, 40, size))


def scenario(rates: list[float], seconds: float = 20.0, **cluster: int) -> Scenario:
    """Two slots are enough for little, so that load takes workers."""
    system = Cluster(
        LATENCIES,
        cluster.get("attention", 1),
        cluster.get("ffn", 1),
        batch=cluster.get("batch", 16),
        lanes=1,
        boarding="asynchronous",
        steps="joint",
        kv_tokens=20_000,
        max_queue=200,
        prefill="colocated",
        changes=ChangeTimes(1.0, 1.0, 0.01, 2.0),
    )
    return Scenario(
        system, trace(rates, seconds), SLO(0.5, 0.08), Limits((1, 6), (1, 4)), TIMING, 4.0, grace=30
    )


class Scripted:
    """Proposes what it was given, one after the other, the last for good."""

    name = "scripted"
    Parameters = Parameters

    def __init__(self, *counts: tuple[int, int]):
        self.counts = list(counts)
        self.seen: list = []

    def propose(self, view):
        self.seen.append(view)
        attention, ffn = self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]
        return Proposal(attention, ffn, Reason.FIXED)
