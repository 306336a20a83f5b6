"""The stationary token load of a slot: its mean (theta) and variance (nu^2).

A slot of an attention worker holds one request after another. In the step that makes its k-th
token (k = 0, 1, ...) a request with prompt P loads the worker with P + k tokens of context, so long
requests are seen in more steps than short ones, and the load is *not* the mean prompt plus the mean
output. Renewal-reward (arXiv 2601.21351 v3, "stationary token load"):

    theta = E[D P + D(D-1)/2] / E[D]
    m2    = E[D P^2 + P D(D-1) + D(D-1)(2D-1)/6] / E[D],     nu^2 = m2 - theta^2

That is all this module computes, from moments or from observed requests. What it means for the size
of a cluster is planner/sizing.py's business.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from planner.errors import PlannerError
from planner.lengths import MAX_LENGTH, Lengths, RawMoments

GROUPS = 128
"""Most runs of neighbouring requests that the bootstrap draws from."""

RESAMPLES = 999


@dataclass(frozen=True)
class Moments:
    """What sizing needs to know about a workload. All lengths are in tokens.

    Attributes:
        theta: mean token load of a slot in a step.
        nu2: variance of that load, tokens squared.
        prompt_mean: mean prompt length per request, mu_P.
        output_mean: mean output length per request, mu_D.
        samples: requests it was estimated from; 0 when it is exact.
        theta_low, theta_high, nu2_low, nu2_high: confidence interval; None when exact, and when
            there are too few requests to say (one).
        confidence: coverage the interval aims for.

    Raises:
        PlannerError: theta, nu2, a mean or an end of an interval is negative or not finite.
    """

    theta: float
    nu2: float
    prompt_mean: float
    output_mean: float
    samples: int = 0
    theta_low: float | None = None
    theta_high: float | None = None
    nu2_low: float | None = None
    nu2_high: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for name in (
            "theta", "nu2", "prompt_mean", "output_mean",
            "theta_low", "theta_high", "nu2_low", "nu2_high",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise PlannerError(f"{name} of a workload is {value}: expected a number, 0 or more")

    @property
    def nu(self) -> float:
        """Standard deviation of a slot's load, in tokens."""
        return self.nu2**0.5

    @property
    def naive(self) -> float:
        """mu_P + mu_D: the load by the rule of arXiv 2601.21351 v1, which real traces break."""
        return self.prompt_mean + self.output_mean

    @property
    def exact(self) -> bool:
        """Whether it comes from a distribution rather than from observed requests."""
        return self.samples == 0


def independent_moments(prompt: RawMoments, output: RawMoments) -> Moments:
    """Exact moments where prompt and output lengths are independent.

    Args:
        prompt: E[P], E[P^2], E[P^3] in tokens (the third is not used).
        output: E[D], E[D^2], E[D^3].

    Raises:
        PlannerError: E[D] is 0.
    """
    p1, p2, _ = prompt
    return moments_from(output, (output[0] * p1, output[0] * p2, output[1] * p1), p1)


def moments_from(
    output: RawMoments, mixed: tuple[float, float, float], prompt_mean: float
) -> Moments:
    """Exact moments of any joint distribution of prompt and output lengths.

    Args:
        output: E[D], E[D^2], E[D^3] in tokens.
        mixed: E[D P], E[D P^2], E[D^2 P].
        prompt_mean: E[P].

    Raises:
        PlannerError: E[D] is 0.
    """
    d1, d2, d3 = output
    dp, dp2, d2p = mixed
    if not d1 > 0:
        raise PlannerError(f"mean output length is {d1}: requests must make a token at least")
    theta = (dp + (d2 - d1) / 2) / d1
    # D(D-1)(2D-1)/6 = D^3/3 - D^2/2 + D/6
    second = (dp2 + d2p - dp + d3 / 3 - d2 / 2 + d1 / 6) / d1
    return Moments(theta, max(0.0, second - theta**2), prompt_mean, d1)


def moments_of(
    prompt: ArrayLike, output: ArrayLike, confidence: float = 0.95, seed: int = 0
) -> Moments:
    """Estimate the moments from observed requests, by ratios of sums over them.

    The interval is a BCa bootstrap over pairs (both lengths of a request stay together), from
    ``RESAMPLES`` draws. Requests are first added up in at most ``GROUPS`` runs of neighbours:
    requests that come together are alike (Azure's conversations have an interval twice as wide as
    if they were not), and the cost no longer depends on the length of the trace. Where tails are
    heavy it is narrower than it promises: 5,000 correlated lognormal requests (sigma 1.2 and 0.9)
    cover theta 9 times in 10 and nu^2 not quite 8. And it says how well these requests pin down
    their own workload, not whether tomorrow's is the same.

    Args:
        prompt: prompt lengths in tokens, one per request, 0 or more; in order of arrival where
            there is one.
        output: output lengths in tokens, as many, 1 or more.
        confidence: coverage of the interval, above 0 and below 1.
        seed: of the resampling; the same requests and seed give the same interval.

    Raises:
        PlannerError: no requests, arrays that differ in shape or hold anything but such lengths, or
            a confidence outside (0, 1).
    """
    prompts, outputs = check_pairs(prompt, output)
    if not 0 < confidence < 1:
        raise PlannerError(f"confidence is {confidence}: expected a share above 0 and below 1")
    # The variance is taken around a load near the mean: nothing cancels in m2 - theta^2.
    origin = float(_ratios(*_sums(prompts, outputs, 0.0))[0])
    sums = _sums(prompts, outputs, origin)
    estimate = _ratios(*sums)
    low: tuple[float | None, ...] = (None, None)
    high: tuple[float | None, ...] = (None, None)
    if len(prompts) > 1:
        ends = _interval(sums, estimate, confidence, seed)
        shift = np.array([origin, 0.0])
        low, high = (tuple(np.maximum(0.0, end + shift).tolist()) for end in ends)
    return Moments(
        theta=float(estimate[0]) + origin,
        nu2=float(estimate[1]),
        prompt_mean=float(prompts.mean()),
        output_mean=float(outputs.mean()),
        samples=len(prompts),
        theta_low=low[0],
        theta_high=high[0],
        nu2_low=low[1],
        nu2_high=high[1],
        confidence=confidence,
    )


def check_pairs(prompt: ArrayLike, output: ArrayLike) -> tuple[Lengths, Lengths]:
    """The two lengths of every request, as whole numbers.

    Raises:
        PlannerError: no requests, arrays that differ in shape, or lengths that are not whole
            numbers, prompts of 0 or more and outputs of 1 or more tokens.
    """
    prompts, outputs = np.asarray(prompt), np.asarray(output)
    if prompts.ndim != 1 or prompts.shape != outputs.shape:
        raise PlannerError(
            f"prompt lengths of shape {prompts.shape} and output lengths of shape {outputs.shape}: "
            "expected two flat arrays with one entry per request"
        )
    if not len(prompts):
        raise PlannerError("no requests: a workload needs one at least")
    return _whole("prompt", prompts, low=0), _whole("output", outputs, low=1)


def _whole(name: str, lengths: NDArray[Any], *, low: int) -> Lengths:
    expected = f"expected whole numbers of tokens from {low} to {MAX_LENGTH}"
    if lengths.dtype.kind not in "iuf":
        raise PlannerError(f"{name} lengths are of type {lengths.dtype}: {expected}")
    fits = (lengths >= low) & (lengths <= MAX_LENGTH) & (lengths == np.floor(lengths))
    if not fits.all():
        raise PlannerError(f"{name} lengths hold {lengths[~fits][0]}: {expected}")
    return lengths.astype(np.int64)


Sums = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _sums(prompts: Lengths, outputs: Lengths, origin: float) -> Sums:
    """Per group of requests: steps, sum over steps of (load - origin), and of its square."""
    d = outputs.astype(float)
    p = prompts - origin
    triangle = d * (d - 1) / 2
    load = d * p + triangle
    square = p * (load + triangle) + triangle * (2 * d - 1) / 3
    n = len(d)
    starts = np.arange(min(n, GROUPS)) * n // min(n, GROUPS)
    steps, loads, squares = (np.add.reduceat(column, starts) for column in (d, load, square))
    return steps, loads, squares


def _ratios(
    steps: NDArray[np.float64],
    loads: NDArray[np.float64],
    squares: NDArray[np.float64],
    axis: int = -1,
) -> NDArray[np.float64]:
    """theta (less the origin) and nu^2, stacked in a new first axis."""
    total = steps.sum(axis)
    theta = loads.sum(axis) / total
    return np.stack([theta, np.maximum(0.0, squares.sum(axis) / total - theta**2)])


def _interval(
    sums: Sums, estimate: NDArray[np.float64], confidence: float, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Low and high ends for theta (less the origin) and nu^2."""
    # Imported here: scipy.stats takes a second to load, and exact workloads do without.
    from scipy.stats import DegenerateDataWarning, bootstrap

    # Equal requests leave nothing to draw from: 0/0 on the way, and NaN in the end.
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            sums,
            _ratios,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=confidence,
            method="BCa",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    low, high = (np.where(np.isnan(end), estimate, end) for end in (found.low, found.high))
    return low, high
