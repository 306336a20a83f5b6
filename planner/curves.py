"""Rising curves of time over load, and their JSON.

What a stage takes under a load is one of three curves here: a line, lines between points, or a
measured table that refuses loads it does not cover. Which stages there are is ``latency``'s
business; fitting curves to measurements is ``fitting``'s.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression

from planner.errors import PlannerError

X = TypeVar("X", float, NDArray[Any])
"""A load or a time: a number, or an array of any shape; what goes in comes out."""


@runtime_checkable
class Curve(Protocol):
    """Time over load, never falling and never below zero."""

    def __call__(self, load: X) -> X:
        """Time at a load (>= 0), a number or an array of any shape."""

    def slope(self, load: float) -> float:
        """Time per unit of load, just above ``load``."""

    @property
    def intercept(self) -> float:
        """Time at no load; where zero is not covered, the first line carried on to it."""

    def scaled(self, slope: float = 1.0, intercept: float = 1.0) -> Self:
        """The curve with its rise and its intercept multiplied; both alike is a slower device."""


@dataclass(frozen=True)
class Linear:
    """``a * load + b``, the form of the papers.

    Args:
        a: time per unit of load.
        b: time at no load.

    Raises:
        PlannerError: a coefficient is negative or not finite; names it.
    """

    a: float
    b: float = 0.0
    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", check_number("a", self.a))
        object.__setattr__(self, "b", check_number("b", self.b))

    def __call__(self, load: X) -> X:
        return self.a * load + self.b

    def slope(self, load: float = 0.0) -> float:
        return self.a

    @property
    def intercept(self) -> float:
        return self.b

    def scaled(self, slope: float = 1.0, intercept: float = 1.0) -> Linear:
        return Linear(self.a * slope, self.b * intercept)


Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class PiecewiseLinear:
    """Straight lines between points; the first and the last line go on beyond them.

    Args:
        points: at least two of (load, time), loads rising, times never falling.

    Raises:
        PlannerError: too few points, loads that don't rise, times that fall, numbers that are
            negative or not finite; says which point.
    """

    points: Points
    kind: ClassVar[str] = "piecewise"

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _checked_points(self.points))

    def __call__(self, load: X) -> X:
        if isinstance(load, np.ndarray):
            return self._at_many(load)
        index = self._index(load)
        return max(0.0, self._times[index] + self._slopes[index] * (load - self._loads[index]))

    def slope(self, load: float) -> float:
        return self._slopes[self._index(load)]

    @property
    def intercept(self) -> float:
        (load, time), slope = self.points[0], self._slopes[0]
        return max(0.0, time - slope * load)

    def scaled(self, slope: float = 1.0, intercept: float = 1.0) -> Self:
        base = self.intercept
        points = tuple((x, intercept * base + slope * (t - base)) for x, t in self.points)
        return replace(self, points=points)

    @property
    def covered(self) -> tuple[float, float]:
        """Least and greatest load of the points."""
        return self.points[0][0], self.points[-1][0]

    def _index(self, load: float) -> int:
        return min(max(bisect_right(self._loads, load) - 1, 0), len(self._slopes) - 1)

    def _at_many(self, load: NDArray[Any]) -> NDArray[Any]:
        loads, times, slopes = (np.asarray(v) for v in (self._loads, self._times, self._slopes))
        index = np.clip(np.searchsorted(loads, load, side="right") - 1, 0, len(slopes) - 1)
        return np.maximum(0.0, times[index] + slopes[index] * (load - loads[index]))

    @cached_property
    def _loads(self) -> list[float]:
        return [load for load, _ in self.points]

    @cached_property
    def _times(self) -> list[float]:
        return [time for _, time in self.points]

    @cached_property
    def _slopes(self) -> list[float]:
        pairs = zip(self.points, self.points[1:], strict=False)
        return [(t1 - t0) / (x1 - x0) for (x0, t0), (x1, t1) in pairs]


@dataclass(frozen=True)
class Tabulated(PiecewiseLinear):
    """A measured table: lines between its points, and no opinion beyond them.

    Args:
        points: as for ``PiecewiseLinear``; ``Tabulated.rising`` takes measurements that dip.
        extrapolate: carry the first and the last line on instead of refusing.

    Raises:
        PlannerError: on construction as ``PiecewiseLinear``; when called with a load outside of
            the table, with the load and the range that is covered.
    """

    extrapolate: bool = False
    kind: ClassVar[str] = "tabulated"

    @classmethod
    def rising(
        cls, points: Iterable[tuple[float, float]], *, extrapolate: bool = False
    ) -> Tabulated:
        """A table of measurements in any order: equal loads are averaged, and dips are levelled
        to the closest never-falling times (least squares, isotonic regression)."""
        by_load: dict[float, list[float]] = {}
        for load, time in points:
            by_load.setdefault(float(load), []).append(float(time))
        loads = sorted(by_load)
        times = np.array([float(np.mean(by_load[load])) for load in loads])
        if len(loads) > 1 and np.all(np.isfinite(times)):  # else the constructor refuses them
            weights = np.array([len(by_load[load]) for load in loads], dtype=float)
            times = isotonic_regression(times, weights=weights).x
            # means of equal numbers may differ in their last bit
            times = np.maximum.accumulate(times)
        return cls(tuple(zip(loads, times.tolist(), strict=True)), extrapolate=extrapolate)

    def __call__(self, load: X) -> X:
        if not self.extrapolate:
            self._refuse_outside(load)
        return super().__call__(load)

    def _refuse_outside(self, load: float | NDArray[Any]) -> None:
        low, high = self.covered
        if isinstance(load, np.ndarray):
            outside = load[~((load >= low) & (load <= high))]
            if outside.size == 0:
                return
            load = float(outside.flat[0])
        elif low <= load <= high:
            return
        raise PlannerError(
            f"load {load:g} is outside of the table, which covers {low:g} to {high:g}: measure "
            "further, or let the table extrapolate"
        )


# -- JSON, and the checks that latency shares ---------------------------------------------------


def check_number(name: str, value: float) -> float:
    """``value`` as a float.

    Raises:
        PlannerError: it is not a finite number of at least 0; names it.
    """
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise PlannerError(f"{name} is {value!r}, expected a finite number of at least 0")
    return float(value)


def check_keys(where: str, given: Iterable[str], known: set[str], needed: set[str]) -> None:
    """Refuse keys that are unknown or missing.

    Raises:
        PlannerError: names ``where`` and the keys.
    """
    keys = set(given)
    if unknown := sorted(keys - known):
        listed = ", ".join(sorted(known))
        raise PlannerError(f"{where}: unknown {', '.join(unknown)}; known are {listed}")
    if missing := sorted(needed - keys):
        raise PlannerError(f"{where}: missing {', '.join(missing)}")


def curve_data(name: str, curve: Curve) -> dict[str, Any]:
    """A curve as plain data, for ``read_curve``.

    Raises:
        PlannerError: it is not one of this module's.
    """
    # by exact type: a subclass from elsewhere may mean something else
    if type(curve) is Linear:
        return {"kind": Linear.kind, "a": curve.a, "b": curve.b}
    if type(curve) in (PiecewiseLinear, Tabulated):
        assert isinstance(curve, PiecewiseLinear)
        data = {"kind": curve.kind, "points": [list(point) for point in curve.points]}
        return data | ({"extrapolate": curve.extrapolate} if isinstance(curve, Tabulated) else {})
    raise PlannerError(
        f"{name}: a {type(curve).__name__} can't be written as JSON; tabulate it (Tabulated)"
    )


def read_curve(name: str, data: Any) -> Curve:
    """The curve of plain data.

    Args:
        name: of the stage, for errors.

    Raises:
        PlannerError: not an object of a known kind, keys unknown or missing, numbers refused.
    """
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise PlannerError(
            f"{name} is {data!r}, expected an object whose kind is one of {', '.join(_KINDS)}"
        )
    curve, known, needed = _KINDS[kind]
    given = {key: value for key, value in data.items() if key != "kind"}
    check_keys(name, given, known, needed)
    try:
        return curve(**given)
    except PlannerError as error:
        raise PlannerError(f"{name}: {error}") from error


_KINDS: Mapping[str, tuple[Callable[..., Curve], set[str], set[str]]] = {
    Linear.kind: (Linear, {"a", "b"}, {"a"}),
    PiecewiseLinear.kind: (PiecewiseLinear, {"points"}, {"points"}),
    Tabulated.kind: (Tabulated, {"points", "extrapolate"}, {"points"}),
}


def _checked_points(points: Iterable[Iterable[float]]) -> Points:
    try:
        pairs = tuple((load, time) for load, time in points)
    except (TypeError, ValueError) as error:
        raise PlannerError(f"points are {points!r}, expected pairs of (load, time)") from error
    if len(pairs) < 2:
        raise PlannerError(f"a curve needs at least two points, got {len(pairs)}")
    checked: list[tuple[float, float]] = []
    for index, (load, time) in enumerate(pairs):
        x = check_number(f"load of point {index}", load)
        t = check_number(f"time of point {index}", time)
        if checked and x <= checked[-1][0]:
            raise PlannerError(
                f"load of point {index} is {x:g}, expected more than the {checked[-1][0]:g} of the "
                "point before"
            )
        if checked and t < checked[-1][1]:
            raise PlannerError(
                f"time of point {index} is {t:g}, expected at least the {checked[-1][1]:g} of the "
                "point before: a slope would be negative"
            )
        checked.append((x, t))
    return tuple(checked)
