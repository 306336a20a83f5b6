"""The rules of Grafana's dashboard-linter (github.com/grafana/dashboard-linter), on JSON data.

That linter is a Go program; these are its rules under its names, so that what passes here passes
there. Rules for Loki are left out: we have none. Two are stricter: units and descriptions are asked
of every panel that shows numbers, not of a few kinds. Not for whether metrics exist: ``coverage``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from grafana_foundation_sdk.models import units

from dashboards.build import Json
from dashboards.promql import SAMPLES, PromQLError, Selector, selectors, substitute, variables

UNITS = frozenset(
    value for name, value in vars(units).items() if isinstance(value, str) and name[0] != "_"
)

_RATE_INTERVAL_S = 4242.0
# With a length that nobody writes, a range that was the variable can be told from all others.
_MARKED = {**SAMPLES, "__rate_interval": f"{_RATE_INTERVAL_S:.0f}s"}
_LABEL_QUERY = re.compile(
    r"^(?:label_values|query_result|metrics|label_names)\((.*?)(?:, *(\w+))?\)$"
)
_SOURCES = ("$datasource", "${datasource}")

Finding = Iterator[str]


def problems(page: Json) -> list[str]:
    """What the linter would report about a dashboard, each as "rule: where: what"."""
    return [
        f"{rule}: {text}" for rule, check in _RULES.items() for text in dict.fromkeys(check(page))
    ]


def panels(page: Json) -> Iterator[Json]:
    """The panels of a dashboard, those of closed rows included, rows themselves not."""
    for panel in page.get("panels", ()):
        if panel["type"] == "row":
            yield from panel.get("panels") or ()
        else:
            yield panel


def targets(page: Json) -> Iterator[tuple[Json, Json]]:
    """Every (panel, query)."""
    for panel in panels(page):
        for target in panel.get("targets", ()):
            yield panel, target


def label_query(query: str) -> tuple[str, str] | None:
    """Selector and label of a variable's query; None if it is none that Grafana knows."""
    found = _LABEL_QUERY.match(query.strip())
    return None if found is None else (found[1], found[2] or "")


def _template_datasource(page: Json) -> Finding:
    found = [one for one in _variables(page) if one["type"] == "datasource"]
    if len(found) != 1:
        yield f"there are {len(found)} data source variables, expected one"
    for one in found:
        if one["name"] != "datasource" or one.get("label") != "Data source":
            shown = f"{one['name']!r}, labelled {one.get('label')!r}"
            yield f"variable {shown}: expected 'datasource', labelled 'Data source'"


def _template(name: str) -> Callable[[Json], Finding]:
    def check(page: Json) -> Finding:
        found = [one for one in _variables(page) if one["name"] == name]
        if not found:
            yield f"there is no variable {name!r}"
            return
        one = found[0]
        if one["type"] != "query" or one.get("datasource", {}).get("uid") not in _SOURCES:
            yield f"variable {name!r} is no query of the data source variable"
        if one.get("label") != name.title():
            yield f"variable {name!r} is labelled {one.get('label')!r}, expected {name.title()!r}"
        if not one.get("multi") or one.get("allValue") != ".+":
            yield f"variable {name!r}: expected multi and an allValue of '.+'"

    return check


def _template_promql(page: Json) -> Finding:
    for one in _variables(page):
        if one["type"] != "query":
            continue
        asked = label_query(one["query"])
        if asked is None:
            yield f"variable {one['name']!r}: {one['query']!r} is no label_values or the like"
            continue
        try:
            selectors(substitute(asked[0]))
        except PromQLError as error:
            yield f"variable {one['name']!r}: {error}"


def _template_reload(page: Json) -> Finding:
    for one in _variables(page):
        if one["type"] == "query" and one.get("refresh") != 2:
            yield f"variable {one['name']!r} is not refreshed on time range change (2)"


def _panel_datasource(page: Json) -> Finding:
    for panel in panels(page):
        sources = [
            panel.get("datasource"),
            *(t.get("datasource") for t in panel.get("targets", ())),
        ]
        if any((source or {}).get("uid") not in _SOURCES for source in sources):
            yield f"{_name(panel)}: a data source that is not the variable"


def _panel_texts(page: Json) -> Finding:
    for panel in panels(page):
        if not panel.get("title") or not panel.get("description"):
            yield f"{_name(panel)}: no title or no description"


def _panel_units(page: Json) -> Finding:
    for panel in panels(page):
        defaults = panel.get("fieldConfig", {}).get("defaults", {})
        if not defaults.get("mappings") and defaults.get("unit") not in UNITS:
            yield f"{_name(panel)}: {defaults.get('unit')!r} is no unit of Grafana's"


def _panel_targets(page: Json) -> Finding:
    for panel in panels(page):
        if not panel.get("targets"):
            yield f"{_name(panel)}: no queries"


def _target_promql(page: Json) -> Finding:
    known = {one["name"] for one in _variables(page)} | set(SAMPLES)
    for panel, target in targets(page):
        try:
            selectors(substitute(target["expr"]))
        except PromQLError as error:
            yield f"{_name(panel)}: {error}"
        for missing in variables(target["expr"]) - known:
            yield f"{_name(panel)}: there is no variable ${missing}"


def _target_rate_interval(page: Json) -> Finding:
    for panel, _, one in _selectors(page):
        if one.function in ("rate", "irate") and one.range_s != _RATE_INTERVAL_S:
            yield f"{_name(panel)}: rate of {one.name} not over $__rate_interval"
        if one.range_s == _RATE_INTERVAL_S and not one.function:
            yield f"{_name(panel)}: $__rate_interval of {one.name} without a function"


def _target_matcher(label: str) -> Callable[[Json], Finding]:
    def check(page: Json) -> Finding:
        for panel, _, one in _selectors(page):
            if (label, "=~", f"${label}") not in one.matchers:
                yield f'{_name(panel)}: {one.name} without {label}=~"${label}"'

    return check


def _target_counter(page: Json) -> Finding:
    for panel, _, one in _selectors(page):
        rated = one.range_s is not None and one.function in ("rate", "irate", "increase")
        if one.name.endswith("_total") and not rated:
            yield f"{_name(panel)}: counter {one.name} without rate, irate or increase"


def _uneditable(page: Json) -> Finding:
    if page.get("editable"):
        yield "the dashboard is editable"


_RULES: dict[str, Callable[[Json], Finding]] = {
    "template-datasource-rule": _template_datasource,
    "template-job-rule": _template("job"),
    "template-instance-rule": _template("instance"),
    "template-label-promql-rule": _template_promql,
    "template-on-time-change-reload-rule": _template_reload,
    "panel-datasource-rule": _panel_datasource,
    "panel-title-description-rule": _panel_texts,
    "panel-units-rule": _panel_units,
    "panel-no-targets-rule": _panel_targets,
    "target-promql-rule": _target_promql,
    "target-rate-interval-rule": _target_rate_interval,
    "target-job-rule": _target_matcher("job"),
    "target-instance-rule": _target_matcher("instance"),
    "target-counter-agg-rule": _target_counter,
    "uneditable-dashboard": _uneditable,
}
RULES = tuple(_RULES)


def _variables(page: Json) -> list[Any]:
    return page.get("templating", {}).get("list", [])


def _name(panel: Json) -> str:
    return f"panel {panel.get('title') or panel.get('id')!r}"


def _selectors(page: Json) -> Iterator[tuple[Json, Json, Selector]]:
    for panel, target in targets(page):
        # variables within strings stay: the matcher rules look for them
        expression = re.sub(
            r'"[^"]*"|\$\{?\w+\}?',
            lambda found: found[0] if found[0][0] == '"' else substitute(found[0], _MARKED),
            target["expr"],
        )
        try:
            found = selectors(expression)
        except PromQLError:  # another rule's
            continue
        yield from ((panel, target, one) for one in found)
