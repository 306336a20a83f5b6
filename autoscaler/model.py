"""The calibrated model of a serving system: stage times, moments, and how far to trust it.

Plain data, made by ``calibrate`` from telemetry, or by hand from a file in replays. Not for
predictions: see ``predict``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from planner.latency import Latencies


@dataclass(frozen=True)
class Check:
    """TPOT of a window beside what was predicted for it before it was used for anything.

    Args:
        at: end of the window.
        attention, ffn: workers.
        running: requests, mean.
        context: tokens of each, mean.
        predicted, observed: TPOT in seconds.
    """

    at: float
    attention: int
    ffn: int
    running: float
    context: float
    predicted: float
    observed: float

    @property
    def error(self) -> float:
        """Relative error, above 0 where the prediction is too slow."""
        return self.predicted / self.observed - 1.0


@dataclass(frozen=True)
class Model:
    """Stage times per step of one lane, in seconds, and what the present load looks like.

    Args:
        latencies: t_A over context tokens and requests, t_F over requests at one FFN worker that
            holds all experts, t_C, prefill and outside, per step of one lane (``planner.latency``).
        theta: context tokens per running request (arXiv 2601.21351 v3); nan: unknown.
        nu2: its variance; nan: unknown.
        prompt_mean, output_mean: tokens per request; nan: unknown.
        prefix_hit: share of prompt tokens that came from the prefix cache, 0 to 1.
        imbalance: load of the busiest FFN worker over the mean, >= 1.
        lanes: lanes of a step that the model was fitted at, mostly.
        layers: rounds to the FFN workers in a step.
        level: factor in all stages of ``latencies`` that brings ``predict`` to what was observed;
            divided by it they are as measured, which is what a simulator wants.
        error: median of |predicted / observed - 1| of TPOT over recent windows; nan: not compared.
        samples: how many measurements each stage's curve rests on.
        intervals: 95 % intervals of coefficients by name ("attention.a"), where known.
        reliable: whether decisions may be derived from it.
        why: why not, for people; empty when reliable.
        checks: recent windows in which a prediction was compared, oldest first.
    """

    latencies: Latencies
    theta: float = math.nan
    nu2: float = math.nan
    prompt_mean: float = math.nan
    output_mean: float = math.nan
    prefix_hit: float = 0.0
    imbalance: float = 1.0
    lanes: int = 1
    layers: int = 1
    level: float = 1.0
    error: float = math.nan
    samples: Mapping[str, int] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    reliable: bool = True
    why: str = ""
    checks: tuple[Check, ...] = ()
