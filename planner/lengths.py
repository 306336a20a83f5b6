"""Distributions of one length, in tokens: fixed, geometric, lognormal or given values.

They describe either the prompts or the outputs of a workload; planner/pairs.py puts two of them
together. Each can be drawn from and knows its first three raw moments exactly, because the load on
an attention worker depends on the third moment of the output length. Nothing here knows about
requests, slots or time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from planner.errors import PlannerError

Lengths: TypeAlias = NDArray[np.int64]
"""Token counts, one per request."""

RawMoments: TypeAlias = tuple[float, float, float]
"""E[X], E[X^2], E[X^3]."""

MAX_LENGTH = 10**9
"""Largest length or mean accepted, in tokens: a draw must fit 64 bits, and nobody serves more."""

MAX_SIGMA = 3.0
"""Largest sigma of a lognormal: the mean is then 90 medians, and a draw still fits 64 bits."""

FORMS = "fixed:100, geometric:500, lognormal:1155:1.2 (mean, sigma) or empirical:100@3/200@1"


class Marginal(Protocol):
    """A distribution of whole numbers of tokens."""

    @property
    def mean(self) -> float:
        """Mean length in tokens."""

    @property
    def spec(self) -> str:
        """The text ``parse_lengths`` reads back into an equal distribution."""

    @property
    def smallest(self) -> int:
        """The smallest length that can be drawn."""

    def sample(self, rng: np.random.Generator, n: int) -> Lengths:
        """Draw ``n`` lengths."""

    def raw_moments(self) -> RawMoments:
        """E[X], E[X^2], E[X^3] of what ``sample`` draws."""


@dataclass(frozen=True)
class Fixed:
    """Always ``value`` tokens.

    Raises:
        PlannerError: a value below 0 or above ``MAX_LENGTH``.
    """

    value: int

    def __post_init__(self) -> None:
        _check("the length of fixed", self.value, low=0)

    @property
    def mean(self) -> float:
        return float(self.value)

    @property
    def spec(self) -> str:
        return f"fixed:{self.value}"

    @property
    def smallest(self) -> int:
        return self.value

    def sample(self, rng: np.random.Generator, n: int) -> Lengths:
        return np.full(n, self.value, dtype=np.int64)

    def raw_moments(self) -> RawMoments:
        x = float(self.value)
        return x, x**2, x**3


@dataclass(frozen=True)
class Geometric:
    """Geometric on 1, 2, 3, ...: after every token the request ends with probability 1/``mean``.

    The output lengths of arXiv 2601.21351. Its v1 counts the tokens *before* the last one, so that
    its mu_D = (1-p)/p is ``mean - 1`` here.

    Raises:
        PlannerError: a mean below 1 or above ``MAX_LENGTH``.
    """

    mean: float

    def __post_init__(self) -> None:
        _check("the mean of geometric", self.mean, low=1)

    @property
    def spec(self) -> str:
        return f"geometric:{_text(self.mean)}"

    @property
    def smallest(self) -> int:
        return 1

    def sample(self, rng: np.random.Generator, n: int) -> Lengths:
        return rng.geometric(1.0 / self.mean, n)

    def raw_moments(self) -> RawMoments:
        m = float(self.mean)
        return m, m * (2 * m - 1), m * (6 * m * m - 6 * m + 1)


@dataclass(frozen=True)
class LogNormal:
    """Lognormal, rounded to whole tokens, at least 1.

    Args:
        mean: mean before rounding, in tokens. What is drawn has ``raw_moments()[0]``, which is
            larger only where lengths under half a token would be common.
        sigma: standard deviation of the logarithm (natural).

    Raises:
        PlannerError: a mean below 1 or above ``MAX_LENGTH``, a sigma outside (0, ``MAX_SIGMA``].
    """

    mean: float
    sigma: float

    def __post_init__(self) -> None:
        _check("the mean of lognormal", self.mean, low=1)
        if not 0 < self.sigma <= MAX_SIGMA:
            raise PlannerError(
                f"sigma of lognormal is {self.sigma}: give the standard deviation of the log of "
                f"the length, above 0 and at most {MAX_SIGMA:g} (fixed:N has none)"
            )

    @property
    def mu(self) -> float:
        """Mean of the logarithm."""
        return math.log(self.mean) - self.sigma**2 / 2

    @property
    def spec(self) -> str:
        return f"lognormal:{_text(self.mean)}:{_text(self.sigma)}"

    @property
    def smallest(self) -> int:
        return 1

    def sample(self, rng: np.random.Generator, n: int) -> Lengths:
        return round_lengths(rng.lognormal(self.mu, self.sigma, n))

    def raw_moments(self) -> RawMoments:
        return rounded_lognormal_moments(self.mu, self.sigma)


@dataclass(frozen=True)
class Empirical:
    """One of ``values``, with probability proportional to ``weights`` (equal when None).

    Raises:
        PlannerError: no values, a value below 0 or above ``MAX_LENGTH``, or weights that are not
            one non-negative number per value with a positive sum.
    """

    values: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(int(value) for value in self.values))
        if not self.values:
            raise PlannerError("empirical lengths without a value: give one at least")
        for value in self.values:
            _check("a length of empirical", value, low=0)
        if self.weights is None:
            return
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))
        if len(self.weights) != len(self.values):
            raise PlannerError(
                f"{len(self.weights)} weights for {len(self.values)} empirical lengths: "
                "give one weight per length, or none"
            )
        total = math.fsum(self.weights)
        if min(self.weights) < 0 or not math.isfinite(total) or total <= 0:
            raise PlannerError(
                f"weights of empirical lengths from {min(self.weights)} to {max(self.weights)}: "
                "give finite numbers, none negative, not all zero"
            )

    @property
    def mean(self) -> float:
        return self.raw_moments()[0]

    @property
    def spec(self) -> str:
        if self.weights is None:
            return "empirical:" + "/".join(map(str, self.values))
        pairs = zip(self.values, self.weights, strict=True)
        return "empirical:" + "/".join(f"{value}@{_text(weight)}" for value, weight in pairs)

    @property
    def smallest(self) -> int:
        return int(self._values[self._probabilities > 0].min())

    def sample(self, rng: np.random.Generator, n: int) -> Lengths:
        if self.weights is None:
            return self._values[rng.integers(len(self._values), size=n)]
        return rng.choice(self._values, size=n, p=self._probabilities)

    def raw_moments(self) -> RawMoments:
        x, p = self._values.astype(float), self._probabilities
        return float(p @ x), float(p @ x**2), float(p @ x**3)

    @cached_property
    def _values(self) -> Lengths:
        return np.array(self.values, dtype=np.int64)

    @cached_property
    def _probabilities(self) -> NDArray[np.float64]:
        weights = np.ones(len(self.values)) if self.weights is None else np.array(self.weights)
        return weights / weights.sum()


def parse_lengths(text: str) -> Marginal:
    """The distribution a text describes.

    Args:
        text: ``fixed:100``, ``geometric:500`` (mean), ``lognormal:1155:1.2`` (mean, sigma of the
            log), ``empirical:100/200`` (equally likely) or ``empirical:100@3/200@1`` (weights).

    Raises:
        PlannerError: another kind, a number that is missing, extra or no number, or a value the
            distribution refuses.
    """
    kind, *arguments = text.strip().split(":")
    if kind not in _KINDS:
        raise PlannerError(f"unknown lengths {text!r}: expected {FORMS}")
    read, usage = _KINDS[kind]
    try:
        return read(*arguments)
    except PlannerError:
        raise
    except (TypeError, ValueError):  # too many or few, or not numbers
        raise PlannerError(f"lengths {text!r}: expected {usage}") from None


def round_lengths(x: NDArray[np.float64]) -> Lengths:
    """Whole tokens, at least 1."""
    return np.maximum(np.rint(x), 1).astype(np.int64)


@lru_cache(maxsize=256)
def rounded_lognormal_moments(mu: float, sigma: float) -> RawMoments:
    """E[X], E[X^2], E[X^3] of X = max(1, round(Y)) where log Y is normal(mu, sigma).

    E[X^k] is the sum of (x^k - (x-1)^k) P(X >= x). It is summed term by term up to ``_EXACT``;
    above that, rounding changes the moments of Y by no more than Sheppard's corrections (1/12 on
    the second, E[Y]/4 on the third), and the partial moments of a lognormal are known.
    """
    logs, steps = _grid()
    survival = ndtr((mu - logs) / sigma)
    survival[0] = 1.0  # whatever rounds to 0 is drawn as 1
    tail = [
        math.exp(k * mu + (k * sigma) ** 2 / 2)
        * float(ndtr((mu + k * sigma**2 - math.log(_EXACT + 0.5)) / sigma))
        for k in range(4)
    ]
    rounded = (tail[1], tail[2] + tail[0] / 12, tail[3] + tail[1] / 4)
    first, second, third = (
        float(survival @ steps[k - 1]) + rounded[k - 1] - _EXACT**k * tail[0] for k in (1, 2, 3)
    )
    return first, second, third


_EXACT = 2**14


@cache
def _grid() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log(x - 1/2) and x^k - (x-1)^k for k = 1, 2, 3 in rows; x from 1 to ``_EXACT``."""
    x = np.arange(1, _EXACT + 1, dtype=float)
    return np.log(x - 0.5), np.stack([x**k - (x - 1) ** k for k in (1, 2, 3)])


def _fixed(value: str) -> Fixed:
    return Fixed(int(value))


def _geometric(mean: str) -> Geometric:
    return Geometric(float(mean))


def _lognormal(mean: str, sigma: str) -> LogNormal:
    return LogNormal(float(mean), float(sigma))


def _empirical(text: str) -> Empirical:
    items = [item.split("@") for item in text.split("/")]
    if all(len(item) == 1 for item in items):
        return Empirical(tuple(int(value) for (value,) in items))
    return Empirical(  # an item without a weight next to others with one is a ValueError
        tuple(int(value) for value, _ in items), tuple(float(weight) for _, weight in items)
    )


_KINDS: dict[str, tuple[Callable[..., Marginal], str]] = {
    "fixed": (_fixed, "fixed:TOKENS, a whole number as in fixed:100"),
    "geometric": (_geometric, "geometric:MEAN, a number as in geometric:500"),
    "lognormal": (_lognormal, "lognormal:MEAN:SIGMA, two numbers as in lognormal:1155:1.2"),
    "empirical": (
        _empirical,
        "empirical:TOKENS/TOKENS/..., whole numbers as in empirical:100/200, "
        "or all with weights as in empirical:100@3/200@1",
    ),
}


def _check(what: str, value: float, *, low: int) -> None:
    if not low <= value <= MAX_LENGTH:  # false for NaN as well
        raise PlannerError(
            f"{what} is {value}: expected a number of tokens from {low} to {MAX_LENGTH}"
        )


def _text(number: float) -> str:
    """The shortest text that reads back as the same float, ``500`` rather than ``500.0``."""
    return repr(float(number)).removesuffix(".0")
