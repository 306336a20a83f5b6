"""Curves through measured points: robust, never negative, with residuals to judge them by.

Times have coefficients of at least zero and measurements have hiccups, so a fit here is least
absolute deviations (a linear programme, whatever single points do), then least squares over the
points that agree with it, both bounded at zero. What the points mean is ``fitting``'s business.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.optimize import linprog, nnls
from scipy.stats import t as student_t

from planner.curves import Curve, Linear, PiecewiseLinear
from planner.errors import PlannerError

Floats = NDArray[np.float64]

_FAR = 3.5
"""Points further off than so many robust standard deviations are outliers (Iglewicz, Hoaglin)."""
_MAD_TO_SIGMA = 1.4826
_MOST_FOR_LP = 500  # points in the linear programme; more are thinned evenly along the load
_LP_ERROR = 1e-5  # what a solver may be off, generously; nothing that close is an outlier
_KNOT_CANDIDATES = 10
_SEPARABLE = 0.05
"""Context per request has to vary by so much (relative standard deviation) to be told apart."""


@dataclass(frozen=True)
class Fit:
    """A curve, and how well it describes its points.

    Args:
        curve: time over load.
        n: points given.
        outliers: points left out as too far off; the figures below are over the others.
        r2: share of the variance explained; 1.0 where the times don't vary.
        rmse: root of the mean squared residual, in the unit of the times.
        median_relative_error: of |residual| / time.
        max_relative_error: of |residual| / time.
        a_ci: 95 % confidence interval of the slope, cut at 0; None for more than one line, and with
            too few points for one.
        b_ci: the same of the intercept.
        per_request: time per request beside the curve (``fit_attention``).
        not_varied: "context" or "requests" where ``fit_attention`` could not tell its two loads
            apart, because this one was the same in all measurements.
    """

    curve: Curve
    n: int
    outliers: int
    r2: float
    rmse: float
    median_relative_error: float
    max_relative_error: float
    a_ci: tuple[float, float] | None = None
    b_ci: tuple[float, float] | None = None
    per_request: float = 0.0
    not_varied: str = ""


def fit_line(x: ArrayLike, y: ArrayLike, *, robust: bool = True, relative: bool = False) -> Fit:
    """The line ``a * x + b`` with a, b >= 0 that is closest to the points.

    Args:
        x: [n] loads.
        y: [n] times.
        robust: leave out points that are far off the line most points agree on.
        relative: count errors relative to the time, for loads over several magnitudes.

    Raises:
        PlannerError: arrays that don't match, numbers that are negative or not finite, fewer than
            two different loads.
    """
    loads, times = _points(x, y)
    solved = _solve(_hinges(loads, ()), times, loads, robust=robust, relative=relative)
    b, a = solved.coefficients
    return solved.fit(Linear(a, b), a=1, b=0)


def fit_piecewise(
    x: ArrayLike,
    y: ArrayLike,
    knots: Sequence[float] | int = 2,
    *,
    robust: bool = True,
    relative: bool = False,
) -> Fit:
    """Lines joined at knots, no slope and no intercept negative.

    Args:
        x: [n] loads.
        y: [n] times.
        knots: where slopes may change (loads above 0); or how many knots at most, then their
            number and places are chosen by the Bayesian information criterion.
        robust: as for ``fit_line``.
        relative: as for ``fit_line``.

    Returns:
        A ``PiecewiseLinear``, or a ``Linear`` when no knot pays.

    Raises:
        PlannerError: as for ``fit_line``, or knots outside of the loads.
    """
    loads, times = _points(x, y)
    if isinstance(knots, int):
        chosen = _choose_knots(loads, times, knots, robust=robust, relative=relative)
    else:
        chosen = tuple(sorted({float(knot) for knot in knots}))
        if chosen and not 0 < chosen[0] <= chosen[-1] < loads.max():
            raise PlannerError(
                f"knots {list(chosen)} are not all between 0 and the greatest load, {loads.max():g}"
            )
    if not chosen:
        return fit_line(loads, times, robust=robust, relative=relative)
    solved = _solve(_hinges(loads, chosen), times, loads, robust=robust, relative=relative)
    ends = np.array([0.0, *chosen, loads.max()])
    values = np.maximum.accumulate(_hinges(ends, chosen) @ solved.coefficients)
    points = tuple(zip(ends.tolist(), values.tolist(), strict=True))
    return solved.fit(PiecewiseLinear(points))


def fit_attention(
    tokens: ArrayLike,
    requests: ArrayLike,
    y: ArrayLike,
    *,
    robust: bool = True,
    relative: bool = False,
) -> Fit:
    """``a * tokens + c * requests + b`` with a, b, c >= 0: attention over context and batch.

    Where context per request hardly varies, nobody can tell the two apart: then all goes to the
    requests, because at the short contexts of a benchmark that is where the time goes. Where the
    requests don't vary, their part is in the intercept. ``Fit.not_varied`` says so.

    Args:
        tokens: [n] context tokens of the lane.
        requests: [n] requests of the lane.
        y: [n] times.
        robust: as for ``fit_line``.
        relative: as for ``fit_line``.

    Returns:
        The curve over tokens, and c as ``per_request``.

    Raises:
        PlannerError: as for ``fit_line``.
    """
    counts, times = _points(requests, y, least=1)
    loads, _ = _points(tokens, y, least=1)
    if np.ptp(counts) == 0:
        return replace(
            fit_line(loads, times, robust=robust, relative=relative), not_varied="requests"
        )
    each = loads[counts > 0] / counts[counts > 0]
    if np.std(each) <= _SEPARABLE * np.mean(each):
        solved = _solve(_hinges(counts, ()), times, counts, robust=robust, relative=relative)
        b, c = solved.coefficients
        return solved.fit(Linear(0.0, b), b=0, per_request=c, not_varied="context")
    design = np.column_stack([np.ones_like(loads), loads, counts])
    solved = _solve(design, times, loads, robust=robust, relative=relative)
    b, a, c = solved.coefficients
    return solved.fit(Linear(a, b), a=1, b=0, per_request=c)


@dataclass(frozen=True)
class _Solved:
    """Coefficients of a design, and which points count."""

    design: Floats  # [n, p]
    times: Floats  # [n]
    weights: Floats  # [n], of a residual
    kept: NDArray[np.bool_]  # [n]
    vector: Floats  # [p]

    @property
    def coefficients(self) -> list[float]:
        return [float(value) for value in self.vector]

    @property
    def deviations(self) -> Floats:
        """|weighted residuals| of all points."""
        return np.abs(self.weights * (self.design @ self.vector - self.times))

    def fit(
        self,
        curve: Curve,
        *,
        a: int | None = None,
        b: int | None = None,
        per_request: float = 0.0,
        not_varied: str = "",
    ) -> Fit:
        """As a ``Fit``; ``a`` and ``b`` say which coefficients are the slope and the intercept."""
        times = self.times[self.kept]
        residuals = self.design[self.kept] @ self.vector - times
        spread = float(np.sum((times - times.mean()) ** 2))
        least = 1e-9 * float(times.max()) or 1.0  # a time of nothing has no relative error
        errors = np.abs(residuals) / np.maximum(times, least)
        return Fit(
            curve,
            n=len(self.times),
            outliers=int(np.sum(~self.kept)),
            r2=1.0 - float(np.sum(residuals**2)) / spread if spread > 0 else 1.0,
            rmse=float(np.sqrt(np.mean(residuals**2))),
            median_relative_error=float(np.median(errors)),
            max_relative_error=float(np.max(errors)),
            a_ci=self._interval(a),
            b_ci=self._interval(b),
            per_request=per_request,
            not_varied=not_varied,
        )

    def _interval(self, index: int | None) -> tuple[float, float] | None:
        freedom = int(self.kept.sum()) - len(self.vector)
        if index is None or freedom < 1:
            return None
        weighted = self.design[self.kept] * self.weights[self.kept, None]
        # columns of one size, or the inverse loses its digits
        size = np.linalg.norm(weighted, axis=0)
        variance = float(np.sum(self.deviations[self.kept] ** 2)) / freedom
        scaled = weighted / size
        spread = np.linalg.pinv(scaled.T @ scaled)[index, index] * variance / size[index] ** 2
        reach = float(student_t.ppf(0.975, freedom)) * math.sqrt(max(0.0, float(spread)))
        value = float(self.vector[index])
        return max(0.0, value - reach), value + reach


def _points(x: ArrayLike, y: ArrayLike, least: int = 2) -> tuple[Floats, Floats]:
    loads, times = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if loads.ndim != 1 or loads.shape != times.shape:
        raise PlannerError(
            f"expected as many loads as times, got shapes {loads.shape} and {times.shape}"
        )
    for name, values in (("load", loads), ("time", times)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            raise PlannerError(
                f"{name} {values[bad[0]]} at point {bad[0]}, expected a finite number of at least 0"
            )
    if len(np.unique(loads)) < least:
        raise PlannerError(
            f"a fit needs at least {least} different loads, got {sorted(set(loads.tolist()))}: "
            "measure at another load"
        )
    return loads, times


def _hinges(loads: Floats, knots: Sequence[float]) -> Floats:
    """[n, 2 + knots]: ones, then how much of each segment lies below a load; the coefficients of
    the segments are their slopes, so bounding them at zero keeps the curve from falling."""
    edges = [0.0, *knots, math.inf]
    segments = [np.clip(loads, low, high) - low for low, high in itertools.pairwise(edges)]
    return np.column_stack([np.ones_like(loads), *segments])


def _solve(
    design: Floats, times: Floats, loads: Floats, *, robust: bool, relative: bool
) -> _Solved:
    weights = np.ones_like(times)
    if relative:
        positive = times[times > 0]
        floor = float(positive.min()) if positive.size else 1.0
        weights = 1.0 / np.maximum(times, floor)
    weighted, aim = design * weights[:, None], times * weights
    size = np.linalg.norm(weighted, axis=0)
    size = np.where(size > 0, size, 1.0)  # a column may be empty: its coefficient stays 0
    weighted = weighted / size
    kept = np.ones(len(times), dtype=bool)
    if robust:
        thin = _thinned(loads)
        off = np.abs(weighted @ _least_absolute(weighted[thin], aim[thin]) - aim)
        sigma = _MAD_TO_SIGMA * float(np.median(off))
        kept = off <= max(_FAR * sigma, _LP_ERROR * float(np.abs(aim).max()))
        if np.linalg.matrix_rank(weighted[kept]) < np.linalg.matrix_rank(weighted):
            kept[:] = True  # most points sit at one load; the few others are not outliers
    vector, _ = nnls(weighted[kept], aim[kept])
    return _Solved(design, times, weights, kept, vector / size)


def _thinned(loads: Floats) -> NDArray[np.intp]:
    """Indices of points evenly spread along the order of loads, not more than the LP likes."""
    order = np.argsort(loads, kind="stable")
    return order[np.linspace(0, len(order) - 1, min(len(order), _MOST_FOR_LP)).astype(int)]


def _least_absolute(design: Floats, aim: Floats) -> Floats:
    """argmin over c >= 0 of sum |design @ c - aim|, as a linear programme."""
    n, p = design.shape
    scale = float(np.abs(aim).max()) or 1.0
    # design @ c + under - over = aim, with under, over >= 0 and their sum least
    equal = sparse.hstack([sparse.csr_matrix(design), sparse.eye(n), -sparse.eye(n)], format="csr")
    cost = np.concatenate([np.zeros(p), np.ones(2 * n)])
    found: Any = linprog(cost, A_eq=equal, b_eq=aim / scale, bounds=(0, None), method="highs")
    if not found.success:  # always feasible and bounded: only numerics can get here
        raise PlannerError(f"the fit did not converge: {found.message}")
    return np.asarray(found.x[:p]) * scale


def _choose_knots(
    loads: Floats, times: Floats, most: int, *, robust: bool, relative: bool
) -> tuple[float, ...]:
    """Knots among the inner loads with the least BIC, errors taken as Laplace distributed."""
    thin = _thinned(loads)
    loads, times = loads[thin], times[thin]
    inner = np.unique(loads)[1:-1]
    inner = inner[inner > 0]
    if len(inner) > _KNOT_CANDIDATES:
        inner = inner[np.linspace(0, len(inner) - 1, _KNOT_CANDIDATES).astype(int)]
    best: tuple[float, tuple[float, ...]] = (math.inf, ())
    for count in range(most + 1):
        for knots in itertools.combinations(inner.tolist(), count):
            edges = [-math.inf, *knots, math.inf]
            if count and np.histogram(np.unique(loads), edges)[0].min() < 2:
                continue  # a slope of its own needs more than one load
            solved = _solve(_hinges(loads, knots), times, loads, robust=robust, relative=relative)
            aim = float(np.max(solved.weights * times)) or 1.0
            mean = max(float(np.mean(solved.deviations)) / aim, 1e-9)
            score = 2 * len(loads) * math.log(mean) + (2 + 2 * count) * math.log(len(loads))
            if score < best[0] - 1e-6:
                best = (score, knots)
    return best[1]
