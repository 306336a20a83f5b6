"""Every expression that a person or Prometheus runs for us, in one list.

Panels, variables and annotations of the dashboards, recording rules, alerts, and what alerts
compare. For tests that try each against a real Prometheus, and for ``coverage``. Pure but for
reading the rule files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dashboards import lint, rules
from dashboards.build import build_all
from dashboards.promql import SAMPLES, measured, substitute

Kind = Literal["panel", "variable", "annotation", "rule", "alert", "alert input"]


@dataclass(frozen=True)
class Expression:
    """One expression.

    Args:
        source: uid of the dashboard; "prometheus" for rules and alerts.
        kind: what it is for. An ``alert input`` is what an alert compares with a number: it gives
            data always, the alert itself only when something is wrong.
        place: title of the panel, name of the variable, rule or alert.
        expr: as Grafana or Prometheus sends it.
        raw: with Grafana's variables.
    """

    source: str
    kind: Kind
    place: str
    expr: str
    raw: str


ERRORS_ONLY: Mapping[tuple[str, str], str] = {
    ("annotation", "Alerts"): "an alert that fires",
    ("panel", "HTTP errors"): "an answer that Ray Serve counts as an error",
    ("panel", "Exceptions in replicas"): "an exception that leaves a Serve replica",
    ("panel", "Workers that died"): "a Ray worker that dies without being asked to",
}
"""(kind, place) of what only errors fill, and which error does. Alerts belong here too: all of
them, see ``only_errors_fill``."""

NEEDS_GPU: frozenset[tuple[str, str]] = frozenset({("panel", "GPU use"), ("panel", "GPU memory")})
"""(kind, place) of what is there on nodes with GPUs only."""

OPT_IN: frozenset[tuple[str, str]] = frozenset(
    {("panel", "Tokens by expert"), ("panel", "Busiest experts"), ("variable", "layer")}
)
"""(kind, place) of what needs ``metrics.expert_tokens: true`` in the spec."""


def only_errors_fill(expression: Expression) -> bool:
    """Whether it gives nothing while nothing is wrong."""
    return expression.kind == "alert" or (expression.kind, expression.place) in ERRORS_ONLY


def expressions(values: Mapping[str, str] = SAMPLES) -> list[Expression]:
    """All of them, dashboards first.

    Args:
        values: of Grafana's variables by name, without ``$``; a variable that is not in it stands
            for All (``.+``).
    """
    found: list[Expression] = []
    for uid, page in build_all().items():
        for one in page["templating"]["list"]:
            asked = lint.label_query(one["query"]) if one["type"] == "query" else None
            if asked is not None:
                found.append(_expression(uid, "variable", one["name"], asked[0], values))
        for one in page["annotations"]["list"]:
            if one.get("expr"):
                found.append(_expression(uid, "annotation", one["name"], one["expr"], values))
        for panel, target in lint.targets(page):
            found.append(_expression(uid, "panel", panel["title"], target["expr"], values))
    return [*found, *_of_rules()]


def _of_rules() -> Iterator[Expression]:
    for rule in rules.load():
        kind: Kind = "alert" if rule.alert else "rule"
        yield Expression("prometheus", kind, rule.name, rule.expr, rule.expr)
        if rule.alert:
            for part in measured(rule.expr):
                yield Expression("prometheus", "alert input", rule.name, part, part)


def _expression(
    source: str, kind: Kind, place: str, raw: str, values: Mapping[str, str]
) -> Expression:
    return Expression(source, kind, place, substitute(raw, values), raw)
