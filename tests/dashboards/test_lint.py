"""The linter's rules: our pages keep them all, and each rule sees what it is there for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from dashboards import lint
from dashboards.build import Json, build_all

PAGES = build_all()


@pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))
def test_our_dashboards_keep_every_rule(page: Json) -> None:
    assert lint.problems(page) == []


def _expr(text: str) -> Callable[[Any], None]:
    def edit(page: Any) -> None:
        page["panels"][1]["targets"][0]["expr"] = text

    return edit


def _panel(**changed: Any) -> Callable[[Any], None]:
    return lambda page: page["panels"][1].update(changed)


def _variable(which: str, **changed: Any) -> Callable[[Any], None]:
    def edit(page: Any) -> None:
        one = next(one for one in page["templating"]["list"] if one["name"] == which)
        one.update(changed)

    return edit


TARGETS = '{job=~"$job", instance=~"$instance"}'

BAD: dict[str, list[Callable[[Any], None]]] = {
    "template-datasource-rule": [
        lambda page: page["templating"]["list"].pop(0),
        _variable("datasource", label="Source"),
    ],
    "template-job-rule": [_variable("job", name="task"), _variable("job", allValue=".*")],
    "template-instance-rule": [
        _variable("instance", multi=False),
        _variable("instance", label="instance"),
        _variable("instance", type="custom"),
    ],
    "template-label-promql-rule": [
        _variable("job", query="up"),
        _variable("job", query="label_values(up{, job)"),
    ],
    "template-on-time-change-reload-rule": [_variable("deployment", refresh=1)],
    "panel-datasource-rule": [_panel(datasource={"uid": "abc"})],
    "panel-title-description-rule": [_panel(description=""), _panel(title="")],
    "panel-units-rule": [_panel(fieldConfig={"defaults": {"unit": "furlongs"}})],
    "panel-no-targets-rule": [_panel(targets=[])],
    "target-promql-rule": [_expr("sum(up"), _expr(f"up{TARGETS} * $nowhere")],
    "target-rate-interval-rule": [
        _expr(f"rate(up{TARGETS}[5m])"),
        _expr(f"up{TARGETS}[$__rate_interval]"),
    ],
    "target-job-rule": [_expr('up{instance=~"$instance"}'), _expr('up{job="$job"}')],
    "target-instance-rule": [_expr('up{job=~"$job"}')],
    "target-counter-agg-rule": [_expr(f"sum(x_total{TARGETS})")],
    "uneditable-dashboard": [lambda page: page.update(editable=True)],
}


def test_every_rule_is_tried() -> None:
    assert set(BAD) == set(lint.RULES)


@pytest.mark.parametrize(
    ("rule", "edit"),
    [(rule, edit) for rule, edits in BAD.items() for edit in edits],
)
def test_rule_sees_what_it_is_for(rule: str, edit: Callable[[Any], None]) -> None:
    page = copy.deepcopy(PAGES["afflux-slo"])
    edit(page)
    assert any(problem.startswith(f"{rule}: ") for problem in lint.problems(page))


def test_other_functions_may_use_other_windows() -> None:
    """As in Grafana's linter: increase over an hour is a choice, rate over it is a mistake."""
    page = copy.deepcopy(PAGES["afflux-slo"])
    _expr(f"increase(x_total{TARGETS}[1h])")(page)
    assert lint.problems(page) == []


def test_panels_of_closed_rows_are_checked() -> None:
    page = copy.deepcopy(PAGES["afflux-ray"])
    closed = next(panel for panel in page["panels"] if panel.get("panels"))
    closed["panels"][0]["description"] = ""
    assert lint.problems(page)


@pytest.mark.parametrize(
    ("query", "parts"),
    [
        ("label_values(up, job)", ("up", "job")),
        ('label_values(up{a=~"$b", c="d"}, job)', ('up{a=~"$b", c="d"}', "job")),
        ("query_result(topk(1, up))", ("topk(1, up)", "")),
        ("up", None),
        ("labels(up, job)", None),
    ],
)
def test_label_query(query: str, parts: tuple[str, str] | None) -> None:
    assert lint.label_query(query) == parts
