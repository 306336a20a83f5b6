"""Forecasts of one series by exponential smoothing (statsmodels), and the series of a stream.

The library is imported with the first forecast: it takes more than a second and 120 MB, which a
controller without forecasts does not pay. Not for deciding anything: see ``policies.predictive``.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence

MOST_GROWTH = 2.0
"""A forecast above this multiple of all that was ever seen is taken for a fault of the fit."""


class Series:
    """Means of a value over periods of equal length, from samples at any times.

    Args:
        period: length of a period, > 0.
        keep: most periods that are kept.
        gap: a pause of more periods than this is the start of another series; shorter ones are
            filled with the last mean.
    """

    def __init__(self, period: float, keep: int, gap: int = 10):
        self.period = period
        self._gap = gap
        self._closed: deque[float] = deque(maxlen=keep)
        self._index: int | None = None
        self._sum = 0.0
        self._count = 0

    @property
    def values(self) -> Sequence[float]:
        """Means of the periods that are over, the oldest first."""
        return self._closed

    def add(self, now: float, value: float) -> bool:
        """Takes in a sample; what is not finite is left out.

        Returns:
            whether a period ended with this.
        """
        if not math.isfinite(value) or not math.isfinite(now):
            return False
        index = math.floor(now / self.period)
        passed = 0 if self._index is None else index - self._index
        if passed < 0 or passed > self._gap:
            self._closed.clear()
            self._sum, self._count = 0.0, 0
        elif passed:
            self._closed.extend([self._sum / self._count] * passed)
            self._sum, self._count = 0.0, 0
        self._index = index
        self._sum += value
        self._count += 1
        return passed > 0


def forecast(values: Sequence[float], steps: int, season: int = 0, quantile: float = 0.5) -> float:
    """The highest of the next periods, at a quantile of what the fit thinks possible.

    Exponential smoothing with additive errors, a damped trend and, with two seasons of history or
    more, an additive season: ETS(A, Ad, A) of Hyndman and Athanasopoulos, Forecasting: Principles
    and Practice, 3rd edition, section 8.

    Args:
        values: one per period, >= 0, the oldest first.
        steps: how many periods ahead, >= 1.
        season: periods of a season; 0 or 1 is none.
        quantile: of the predicted distribution, 0.5 up to 1, exclusive.

    Returns:
        a value >= 0; nan where there is no fit: fewer than 8 values, or a fit that failed.
    """
    import numpy as np

    if len(values) < 8:
        return math.nan
    seen = np.asarray(values, dtype=float)
    top = float(seen.max())
    if seen.min() == top:
        return top  # nothing to fit
    import pandas as pd
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    seasonal = season > 1 and len(values) >= max(2 * season, 10)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a fit that did not converge: it is capped below
            model = ETSModel(
                # of about 1, which the optimiser's steps are made for
                pd.Series(seen / top),
                error="add",
                trend="add",
                damped_trend=True,
                seasonal="add" if seasonal else None,
                seasonal_periods=season if seasonal else None,
                initialization_method="heuristic",
            )
            fit = model.fit(disp=False, maxiter=200)
            ahead = fit.get_prediction(start=len(seen), end=len(seen) + steps - 1)
            upper = ahead.summary_frame(alpha=2 * (1 - quantile))["pi_upper"]
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):
        return math.nan
    highest = top * float(upper.max())
    if not math.isfinite(highest):
        return math.nan
    return min(max(0.0, highest), MOST_GROWTH * top)
