"""Fits of a stage's times to a few samples, with a prior's shape where loads were not seen.

Samples are medians already, so a first fit to the medians of the load classes shows which samples
are far off; the rest are fitted by ``planner.regression`` without its own linear programme, which
takes more time than a controller has. Pure. What the samples mean is ``calibrate``'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autoscaler.samples import Floats
from planner.curves import Curve, Linear
from planner.errors import PlannerError
from planner.latency import Latencies
from planner.regression import Fit, fit_attention, fit_piecewise

WIDE = 4.0
"""Greatest over least load from which on a slope needs no help from a prior."""
_FAR = 3.5  # robust standard deviations (Iglewicz, Hoaglin)
_MAD_TO_SIGMA = 1.4826
_TINY = 1e-12  # seconds
Fitting = Callable[[Floats, Floats], Fit]
_PROBES = (1 / WIDE, WIDE)
_CURVED_FROM = 6
"""Load classes that an FFN curve with a bend needs."""


def fit_stage(
    loads: Floats, times: Floats, classes: Floats, believed: Curve | None, *, curved: bool = False
) -> Fit | None:
    """Time over one load.

    Args:
        loads, times, classes: [n]; ``classes`` says which samples are of about the same load.
        believed: the prior. Its shape, at the level of the samples, continues them to loads that
            are not covered, as long as they span too little for a slope of their own.
        curved: allow one bend, as batches have that still wake more experts.

    Returns:
        None without samples.
    """
    if not len(loads):
        return None
    if believed is not None and _span(loads) < WIDE:
        level = _level(times, np.asarray(believed(loads), dtype=np.float64))
        probes = np.array(_PROBES) * (loads.min(), loads.max())
        loads = np.append(loads, probes)
        times = np.append(times, level * np.asarray(believed(probes), dtype=np.float64))
        classes = np.append(classes, classes.max() + np.array([1.0, 2.0]))
    knots = 1 if curved and len(np.unique(classes)) >= _CURVED_FROM else 0

    def fit(kept: Floats, seconds: Floats) -> Fit:
        return fit_piecewise(kept[:, 0], seconds, knots, robust=False, relative=True)

    return _trimmed(fit, loads[:, None], times, classes)


def fit_lane(
    tokens: Floats,
    requests: Floats,
    times: Floats,
    classes: Floats,
    believed: Latencies | None,
) -> Fit | None:
    """Attention time of a lane over context tokens and requests; see ``fit_stage``."""
    if not len(tokens):
        return None
    loads = np.column_stack((tokens, requests))
    if believed is not None:
        level = _level(times, believed.t_attention(tokens, requests))
        middle = np.median(loads, axis=0)
        probes = [
            np.where(np.arange(2) == place, far * end, middle)
            for place in range(2)
            for far, end in zip(
                _PROBES, (loads[:, place].min(), loads[:, place].max()), strict=True
            )
            if _span(loads[:, place]) < WIDE
        ]
        if probes:
            more = np.array(probes)
            loads = np.vstack((loads, more))
            times = np.append(times, level * believed.t_attention(more[:, 0], more[:, 1]))
            classes = np.append(classes, classes.max() + 1 + np.arange(len(more)))

    def fit(kept: Floats, seconds: Floats) -> Fit:
        return fit_attention(kept[:, 0], kept[:, 1], seconds, robust=False, relative=True)

    return _trimmed(fit, loads, times, classes)


def _trimmed(fit: Fitting, loads: Floats, times: Floats, classes: Floats) -> Fit:
    """The fit to samples that agree with the one to the classes' medians."""
    if np.all(np.ptp(loads, axis=0) == 0):
        return _constant(times)
    kinds = np.unique(classes)
    centres = np.array([np.median(loads[classes == kind], axis=0) for kind in kinds])
    middles = np.array([np.median(times[classes == kind]) for kind in kinds])
    if len(np.unique(centres[:, 0])) < 2 or len(kinds) < 3:
        return _fit_or_constant(fit, loads, times)
    off = np.abs(_predicted(fit(centres, middles), loads) - times) / np.maximum(times, _TINY)
    kept = off <= _FAR * _MAD_TO_SIGMA * float(np.median(off)) + 1e-9
    if len(np.unique(loads[kept, 0])) < 2:
        kept[:] = True
    found = _fit_or_constant(fit, loads[kept], times[kept])
    return replace(found, n=len(times), outliers=int(np.sum(~kept)))


def _fit_or_constant(fit: Fitting, loads: Floats, times: Floats) -> Fit:
    try:
        return fit(loads, times)
    except PlannerError:  # the loads don't differ where they would have to
        return _constant(times)


def _predicted(fit: Fit, loads: Floats) -> Floats:
    each = fit.per_request * loads[:, 1] if loads.shape[1] > 1 else 0.0
    return np.asarray(fit.curve(loads[:, 0]), dtype=np.float64) + each


def _constant(times: Floats) -> Fit:
    """One load tells nothing of a slope."""
    middle = float(np.median(times))
    off = np.abs(times - middle)
    relative = off / max(middle, _TINY)
    return Fit(
        Linear(0.0, middle),
        n=len(times),
        outliers=0,
        r2=1.0,
        rmse=float(np.sqrt(np.mean(off**2))),
        median_relative_error=float(np.median(relative)),
        max_relative_error=float(np.max(relative)),
        not_varied="load",
    )


def _level(times: Floats, believed: Floats) -> float:
    """How much slower the stage is than believed."""
    known = believed > 0
    return float(np.median(times[known] / believed[known])) if known.any() else 1.0


def _span(loads: Floats) -> float:
    """Greatest over least load; 0.0 to 1.0 where they don't differ."""
    least = float(loads.min())
    return float(loads.max()) / least if least > 0 else np.inf if loads.max() > 0 else 1.0
