"""The schema check: our pages pass, and what Grafana does not know is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dashboards import schema
from dashboards.build import Json, build_all

PAGES = build_all()


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_our_dashboards_pass(page: Json) -> None:
    assert schema.problems(page) == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("refreshh",), "10s", "dashboard.refreshh: unknown field"),
        (("panels", 1, "colour"), "red", "panels[1].colour: unknown field"),
        (("panels", 2, "options", "foo"), 1, "panels[2].options.foo: unknown field"),
        (("panels", 1, "targets", 0, "exprr"), "up", "targets[0].exprr: unknown field"),
        (("templating", "list", 1, "querry"), "", "list[1].querry: unknown field"),
        (("annotations", "list", 0, "colour"), "", "list[0].colour: unknown field"),
        (("panels", 3, "gridPos", "h"), "x", "'x' is no int"),
        (("panels", 3, "title"), 5, "title: 5 is no"),
        (("panels", 4, "options", "graphMode"), "round", "'round' is no BigValueGraphMode"),
        (("templating", "list", 1, "refresh"), 9, "refresh: 9 is no"),
        (("panels", 1, "targets"), "up", "targets"),
        (("panels",), [1], "cannot be read"),
        (("editable",), 1, "editable: 1 is no"),
    ],
)
def test_what_is_wrong_is_named(path: tuple[Any, ...], value: Any, words: str) -> None:
    page: Any = copy.deepcopy(PAGES["afflux-slo"])
    inner = page
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    found = schema.problems(page)
    assert any(words in problem for problem in found), found


def test_nested_objects_that_the_sdk_leaves_alone_are_checked_too() -> None:
    page = copy.deepcopy(PAGES["afflux-elasticity"])
    table = next(panel for panel in page["panels"] if panel["type"] == "table")
    table["transformations"][0]["optionss"] = {}
    assert any("optionss: unknown field" in problem for problem in schema.problems(page))
