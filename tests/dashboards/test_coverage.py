"""Both ways: nothing is asked for that nobody exports, nothing is exported that nobody sees."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

from actors.metrics.catalogue import METRICS
from dashboards import coverage
from dashboards.expressions import (
    ERRORS_ONLY,
    NEEDS_GPU,
    OPT_IN,
    Expression,
    expressions,
    only_errors_fill,
)
from dashboards.promql import selectors

ALL = expressions()


def asking(text: str) -> list[Expression]:
    """Everything, and one expression more."""
    return [*ALL, Expression("test", "panel", "P", text, text)]


def test_both_ways() -> None:
    assert coverage.problems(ALL) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("afd_no_such_metric", "nobody exports afd_no_such_metric"),
        ("afd_time_to_first_token_seconds", "nobody exports afd_time_to_first_token_seconds"),
        ("afd:no_such_rule:rate", "nobody exports afd:no_such_rule:rate"),
        ("ray_no_such_metric", "nobody exports ray_no_such_metric"),
        ('{job="afflux"}', "a series without name"),
        ('afd_actors{actor_id="x"}', "afd_actors has no label 'actor_id'"),
        ("sum by (stage) (afd_ffn_queue_depth)", "afd_ffn_queue_depth has no label 'stage'"),
    ],
)
def test_what_does_not_exist_is_named(text: str, words: str) -> None:
    found = coverage.problems(asking(text))
    assert len(found) == 1 and words in found[0]


def test_what_is_not_shown_is_named() -> None:
    without = [one for one in ALL if "afd_ffn_experts" not in one.expr]
    assert any(problem.startswith("afd_ffn_experts is exported") for problem in
               coverage.problems(without))  # fmt: skip


def test_lists_of_exceptions_name_what_exists() -> None:
    places = {(one.kind, one.place) for one in ALL}
    assert set(ERRORS_ONLY) <= places
    assert places >= NEEDS_GPU
    assert places >= OPT_IN


def test_opt_in_is_exactly_what_asks_for_opt_in_metrics() -> None:
    names = {metric.name for metric in METRICS if metric.opt_in}
    asking = {
        (one.kind, one.place)
        for one in ALL
        if names & {selector.name for selector in selectors(one.expr)}
    }
    assert asking == OPT_IN


def test_alerts_come_with_what_they_measure() -> None:
    alerts = {one.place for one in ALL if one.kind == "alert"}
    assert alerts == {one.place for one in ALL if one.kind == "alert input"}
    assert all(only_errors_fill(one) for one in ALL if one.kind == "alert")
    assert not any(only_errors_fill(one) for one in ALL if one.kind == "alert input")


def test_values_of_variables_are_put_in() -> None:
    given = expressions({"__rate_interval": "15s", "__range": "2m", "advised": "3", "job": "me"})
    assert not [one for one in given if "$" in one.expr]
    assert any('job=~"me"' in one.expr and "[15s]" in one.expr for one in given)
    assert [replace(one, expr="") for one in given] == [replace(one, expr="") for one in ALL]


def test_ray_exports_what_we_ask_it_for() -> None:
    """By the source of the Ray that is installed; none is started."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    files = [
        *(root / "serve" / "_private").glob("*.py"),
        root / "dashboard" / "modules" / "reporter" / "reporter_agent.py",
        *(root / "dashboard" / "modules" / "metrics" / "dashboards").glob("*_panels.py"),
    ]
    text = "\n".join(file.read_text() for file in files)
    for name in coverage.RAY:
        bare = name.removeprefix("ray_").removesuffix("_total")
        # names for HTTP are put together: f"serve_num_{protocol_name}_requests"
        pattern = re.escape(bare).replace("http", r"(http|\{protocol_name\})")
        assert re.search(rf'["_{{(]{pattern}(_total)?\b', text), name
