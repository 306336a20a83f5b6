"""Increases and percentiles against plain arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.scrape import Scrape
from dashboards.window import Spread, Window, now, now_by, quantile


def labels(**found: str):
    return tuple(sorted(found.items()))


def actor(name: str, **more: str):
    return labels(actor_id=name, role="ffn", **more)


def test_increase_and_rate():
    old = Scrape(10.0, {"x_total": {actor("ffn-0"): 5.0, actor("ffn-1"): 1.0}})
    new = Scrape(12.0, {"x_total": {actor("ffn-0"): 9.0, actor("ffn-1"): 2.0}})
    window = Window(old, new)
    assert window.increase("x_total") == 5.0
    assert window.rate("x_total") == 2.5
    assert window.increase("x_total", actor_id="ffn-1") == 1.0
    assert window.by("x_total", "actor_id") == {"ffn-0": 4.0, "ffn-1": 1.0}
    assert window.increase("y_total") is None and window.rate("y_total") is None


def test_a_counter_that_fell_began_anew():
    old = Scrape(0.0, {"x_total": {actor("ffn-0"): 100.0}})
    new = Scrape(1.0, {"x_total": {actor("ffn-0"): 3.0}})
    assert Window(old, new).increase("x_total") == 3.0


def test_a_process_that_was_not_there_has_no_increase_yet():
    old = Scrape(0.0, {"x_total": {actor("ffn-0"): 1.0}})
    new = Scrape(1.0, {"x_total": {actor("ffn-0"): 1.0, actor("ffn-1"): 1e6}})
    assert Window(old, new).increase("x_total") == 0.0
    assert Window(old, new).increase("x_total", actor_id="ffn-1") is None


def test_a_new_series_of_a_known_process_counts_from_zero():
    old = Scrape(0.0, {"up": {actor("ffn-0"): 1.0}})
    new = Scrape(1.0, {"x_total": {actor("ffn-0", reason="stale"): 2.0}})
    assert Window(old, new).by("x_total", "reason") == {"stale": 2.0}


def test_without_an_older_scrape_everything_counts_and_nothing_has_a_rate():
    window = Window(None, Scrape(1.0, {"x_total": {actor("ffn-0"): 7.0}}))
    assert window.increase("x_total") == 7.0
    assert window.rate("x_total") is None and window.seconds is None


def test_gauges():
    scrape = Scrape(0.0, {"x": {labels(a="1", b="1"): 2.0, labels(a="1", b="2"): 3.0}})
    assert now(scrape, "x") == 5.0 and now(scrape, "x", b="2") == 3.0
    assert now(scrape, "x", b="3") is None and now(scrape, "y") is None
    assert now_by(scrape, "x", "b") == {"1": 2.0, "2": 3.0}


def test_spread_of_a_histogram():
    buckets = {"0.1": 5.0, "0.2": 9.0, "+Inf": 10.0}
    series = {
        "x_bucket": {actor("ffn-0", le=edge): count for edge, count in buckets.items()},
        "x_sum": {actor("ffn-0"): 1.5},
        "x_count": {actor("ffn-0"): 10.0},
    }
    spread = Window(None, Scrape(0.0, series)).spread("x")
    assert spread == Spread(10, 0.15, pytest.approx(0.1), pytest.approx(0.2), 0.2)
    assert Window(None, Scrape(0.0, {})).spread("x") == Spread(0)


def test_quantile_as_prometheus_documents_it():
    buckets = {1.0: 2.0, 2.0: 4.0, math.inf: 4.0}
    assert quantile(0.5, buckets) == 1.0
    assert quantile(0.75, buckets) == 1.5
    assert quantile(0.0, buckets) == 0.0
    assert quantile(0.5, {1.0: 0.0, math.inf: 3.0}) == 1.0  # above the last finite edge
    assert quantile(0.5, {}) is None and quantile(0.5, {1.0: 0.0, math.inf: 0.0}) is None


EDGES = (0.5, 1.0, 2.0, 4.0, 8.0)


@given(st.lists(st.floats(0.0, 7.9), min_size=1, max_size=200), st.floats(0.01, 1.0))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values, share):
    buckets = {edge: float(sum(value <= edge for value in values)) for edge in EDGES}
    found = quantile(share, {**buckets, math.inf: float(len(values))})
    true = sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]
    above = min(edge for edge in EDGES if true <= edge)
    below = max((edge for edge in EDGES if edge < above), default=0.0)
    assert below - 1e-9 <= found <= above + 1e-9


@given(st.lists(st.integers(0, 50), min_size=2, max_size=20))
def test_increases_of_parts_add_up(steps):
    """A counter that never falls: the increase over a time is the sum of those over its parts."""
    values = [float(sum(steps[: n + 1])) for n in range(len(steps))]
    scrapes = [Scrape(float(n), {"x": {actor("ffn-0"): v}}) for n, v in enumerate(values)]
    parts = sum(Window(a, b).increase("x") for a, b in itertools.pairwise(scrapes))
    assert Window(scrapes[0], scrapes[-1]).increase("x") == parts
