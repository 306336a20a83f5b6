"""Fits to a few samples: robust, and continued by a prior's shape where loads were not seen."""

from __future__ import annotations

import numpy as np
import pytest

from autoscaler.stage_fits import fit_lane, fit_stage
from planner.curves import Linear, PiecewiseLinear
from planner.latency import Latencies

LINE = Linear(2e-3, 6e-3)
PRIOR = Latencies(Linear(1e-4, 1e-3), LINE, Linear(0.0), attention_per_request=1e-3)


def classes(loads: np.ndarray) -> np.ndarray:
    return np.unique(np.round(2 * np.log2(loads)), return_inverse=True)[1].astype(float)


def test_nothing_gives_nothing() -> None:
    none = np.zeros(0)
    assert fit_stage(none, none, none, LINE) is None
    assert fit_lane(none, none, none, none, PRIOR) is None


def test_samples_that_span_enough_need_no_prior() -> None:
    loads = np.repeat([2.0, 8.0, 32.0], 4)
    fit = fit_stage(loads, LINE(loads), classes(loads), Linear(1.0, 1.0))
    assert fit is not None
    assert (fit.curve.slope(8), fit.curve.intercept) == pytest.approx((LINE.a, LINE.b))


def test_one_load_has_the_priors_shape_at_its_own_level() -> None:
    loads = np.full(5, 8.0)
    fit = fit_stage(loads, 1.5 * LINE(loads), classes(loads), LINE)
    assert fit is not None
    for load in (1.0, 8.0, 40.0):
        assert fit.curve(load) == pytest.approx(1.5 * LINE(load), rel=0.01)


def test_one_load_without_a_prior_is_a_constant() -> None:
    loads = np.full(5, 8.0)
    fit = fit_stage(loads, LINE(loads), classes(loads), None)
    assert fit is not None and fit.curve == Linear(0.0, LINE(8.0)) and fit.not_varied == "load"


def test_samples_that_are_far_off_are_left_out() -> None:
    loads = np.repeat([2.0, 4.0, 8.0, 16.0, 32.0], 5)
    times = LINE(loads) * np.random.default_rng(0).lognormal(0.0, 0.02, len(loads))
    times[[3, 17]] *= 20
    fit = fit_stage(loads, times, classes(loads), None)
    assert fit is not None and fit.outliers >= 2 and fit.n == 25
    assert fit.curve(20.0) == pytest.approx(LINE(20.0), rel=0.05)


def test_a_batch_that_wakes_experts_has_a_bend() -> None:
    true = PiecewiseLinear(((0.0, 0.001), (8.0, 0.03), (64.0, 0.06)))
    loads = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0], 3)
    fit = fit_stage(loads, np.asarray(true(loads)), classes(loads), None, curved=True)
    assert fit is not None
    for load in (3.0, 24.0, 64.0):
        assert fit.curve(load) == pytest.approx(true(load), rel=0.1)


def test_attention_tells_context_from_requests() -> None:
    requests = np.repeat([2.0, 8.0, 32.0, 8.0], 4)
    tokens = requests * np.repeat([50.0, 400.0, 100.0, 1500.0], 4)
    times = PRIOR.t_attention(tokens, requests)
    fit = fit_lane(tokens, requests, times, classes(tokens), None)
    assert fit is not None
    assert fit.curve.slope(0) == pytest.approx(1e-4, rel=0.01)
    assert fit.per_request == pytest.approx(1e-3, rel=0.01)


def test_one_context_has_the_priors_slope() -> None:
    requests, tokens = np.full(5, 8.0), np.full(5, 800.0)
    times = 2 * PRIOR.t_attention(tokens, requests)
    fit = fit_lane(tokens, requests, times, classes(tokens), PRIOR)
    assert fit is not None
    predicted = fit.curve(8000.0) + fit.per_request * 8
    assert predicted == pytest.approx(2 * PRIOR.t_attention(8000.0, 8.0), rel=0.05)
