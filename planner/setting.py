"""What a sizing is given, and how long each stage takes for given numbers of workers.

Shared by everything that evaluates or searches ratios (``points``, ``sizing``, ``budget``,
``sensitivity``). Mean stage times only: the step that they make together is in ``points``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.barrier import Slowest, Z, distinct_holders, expected_step
from planner.errors import PlannerError
from planner.latency import Latencies, Linear, Tabulated
from planner.moments import Moments

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Setting:
    """What is given: everything but the numbers of workers.

    Args:
        moments: of the workload: theta and nu^2 of one slot's context in tokens.
        latencies: stage times per step of one lane.
        batch: B, slots of one lane on one attention worker.
        lanes: M, micro-batches in flight per worker. Then a step takes at least 1/M of a lane's
            own round trip, t_A + t_C + t_F. None leaves that bound out, as the papers do, which
            speak of two lanes.
        imbalance: load of the busiest FFN worker over the mean, >= 1. Matters with F > 1 only.
        top_k: experts per token. With F > 1 a token then travels to those workers that hold one
            of its experts, and where ``transfer_load`` is "attention" its sender sends as many
            copies; None: every FFN worker receives every token, and a sender counts it once.
        experts: routed experts per layer, for the exact number of such workers; None: many.
        skewness: third standardised moment of one slot's context (``skewness.load_skewness``). 0
            takes a lane's context as normal, as the papers do; that is too few long contexts
            where batches are small and outputs long-tailed.
        price_attention, price_ffn: of a worker, in any unit; ratios maximise throughput per price.

    Raises:
        PlannerError: a number out of range; names the field, what was given and expected.
    """

    moments: Moments
    latencies: Latencies
    batch: int
    lanes: int | None = None
    imbalance: float = 1.0
    top_k: int | None = None
    experts: int | None = None
    skewness: float = 0.0
    price_attention: float = 1.0
    price_ffn: float = 1.0

    def __post_init__(self) -> None:
        check_least("batch", self.batch, 1.0)
        if self.lanes is not None:
            check_least("lanes", self.lanes, 1.0)
        check_least("imbalance", self.imbalance, 1.0)
        if self.top_k is not None:
            check_least("top_k", self.top_k, 1.0)
        check_least("theta", self.moments.theta, 0.0)
        check_least("nu2", self.moments.nu2, 0.0)
        if not math.isfinite(self.skewness):
            raise PlannerError(f"skewness is {self.skewness!r}, expected a finite number")
        for name in ("price_attention", "price_ffn"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise PlannerError(f"{name} is {value!r}, expected a number above 0")

    @property
    def tokens(self) -> float:
        """Mean context tokens of one lane on one worker, B * theta."""
        return self.batch * self.moments.theta

    @property
    def tokens_spread(self) -> float:
        """Standard deviation of the same, sqrt(B * nu^2): slots are independent."""
        return math.sqrt(self.batch * self.moments.nu2)

    def off_mean(self, z: Array, lanes: int = 1) -> Array:
        """Tokens over the mean of ``lanes`` lanes, per lane, that a standard normal z stands for.

        With skewness g of that mean: (2/g)*((1 + g*z/6 - g^2/36)^3 - 1) standard deviations, the
        Wilson-Hilferty form of a shifted gamma. It rises with z, so that the largest of several z
        stands for the largest of several contexts.
        """
        spread = self.tokens_spread / math.sqrt(lanes)
        g = self.skewness / math.sqrt(self.batch * lanes)
        if abs(g) < 1e-6:
            return spread * z
        root = np.maximum(0.0, 1.0 + g * z / 6.0 - g * g / 36.0)
        return spread * 2.0 / g * (root**3 - 1.0)

    @property
    def lanes_or_two(self) -> int:
        """Lanes in flight; the papers, which name none, have two."""
        return 2 if self.lanes is None else self.lanes


def with_moments(setting: Setting, theta: float | None = None, nu2: float | None = None) -> Setting:
    """The setting with another mean or variance of a slot's load."""
    old = setting.moments
    moments = replace(
        old, theta=old.theta if theta is None else theta, nu2=old.nu2 if nu2 is None else nu2
    )
    return replace(setting, moments=moments)


def attention_time(setting: Setting, off_mean: Array) -> Array:
    """t_A of one worker whose lane holds B*theta + off_mean tokens."""
    lat = setting.latencies
    tokens = np.maximum(setting.tokens + off_mean, 0.0)
    curve = lat.attention
    if isinstance(curve, Tabulated) and not curve.extrapolate and len(off_mean) > 1:
        # the mean has to be covered (the caller asks first), the far tails of a normal need not
        tokens = np.clip(tokens, *curve.covered)
    return np.asarray(lat.t_attention(tokens, float(setting.batch)), dtype=np.float64)


def mean_attention_time(setting: Setting) -> float:
    """E[t_A] of one worker; that of the mean where the curve is a line."""
    at_mean = float(attention_time(setting, np.zeros(1))[0])
    if isinstance(setting.latencies.attention, Linear) or setting.tokens_spread == 0.0:
        return at_mean
    one = Slowest(attention_time(setting, setting.off_mean(Z)), np.ones(1))
    return float(expected_step(np.zeros(1), [one])[0])


def ffn_time(setting: Setting, attention: Array, ffn: Array) -> Array:
    """t_F of the busiest FFN worker."""
    # one worker holds everything: there is nobody to be out of balance with
    imbalance = np.where(ffn > 1.0, setting.imbalance, 1.0)
    load = attention * setting.batch * imbalance / ffn
    lat = setting.latencies
    if lat.weights_share == 0.0:
        return np.asarray(lat.t_ffn(load), dtype=np.float64)
    shares = np.minimum(1.0, 1.0 / ffn)
    times = np.empty_like(load)
    for share in np.unique(shares):
        here = shares == share
        times[here] = lat.t_ffn(load[here], float(share))
    return times


def transfer_time(setting: Setting, attention: Array, ffn: Array) -> Array:
    """t_C of the busiest link."""
    lat = setting.latencies
    holders = ffn if lat.transfer_load == "ffn" else np.ones_like(ffn)
    if setting.top_k is not None:
        holders = np.array(
            [distinct_holders(max(f, 1.0), setting.top_k, setting.experts) for f in ffn]
        )
    if lat.transfer_load == "attention":
        return np.asarray(lat.t_transfer(setting.batch * holders), dtype=np.float64)
    return np.asarray(lat.t_transfer(attention * setting.batch * holders / ffn), dtype=np.float64)


def check_least(name: str, value: float, least: float) -> None:
    if not (isinstance(value, (int, float, np.number)) and math.isfinite(value) and value >= least):
        raise PlannerError(f"{name} is {value!r}, expected a number of at least {least:g}")
