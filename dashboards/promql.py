"""Reads PromQL: which series an expression asks for, and what Grafana would send for it.

The grammar is promql-parser's; here are only the questions that our checks ask. Not for writing
expressions: see ``queries``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import promql_parser as grammar

from actors.errors import AffluxError

SAMPLES: Mapping[str, str] = {
    "__rate_interval": "1m",
    "__range": "30m",
}
"""Values of Grafana's variables with which an expression means what it usually means; any other
variable is a choice of label values, where ``.+`` is All."""

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_COMPARISONS = frozenset({">", "<", ">=", "<=", "==", "!="})


class PromQLError(AffluxError):
    """An expression that Prometheus would refuse."""

    code = "bad_promql"


@dataclass(frozen=True)
class Selector:
    """One selector of an expression.

    Args:
        name: of the metric; empty if it is chosen by matchers only.
        matchers: (label, operator, value).
        range_s: seconds of ``[...]``; None without.
        function: that the selector is an argument of; empty if it is none's.
        by: labels that sums and the like around it keep apart.
    """

    name: str
    matchers: tuple[tuple[str, str, str], ...]
    range_s: float | None
    function: str
    by: frozenset[str] = frozenset()


def substitute(expression: str, values: Mapping[str, str] = SAMPLES) -> str:
    """With Grafana's variables replaced.

    Args:
        values: by name, without ``$``; what is not in it becomes ``.+``.
    """

    def value(found: re.Match[str]) -> str:
        return values.get(found[1] or found[2], ".+")

    return _VARIABLE.sub(value, expression)


def variables(expression: str) -> set[str]:
    """Names of the Grafana variables in it, Grafana's own (``__rate_interval``) included."""
    return {braced or plain for braced, plain in _VARIABLE.findall(expression)}


def selectors(expression: str) -> list[Selector]:
    """All selectors of an expression without variables, in order.

    Raises:
        PromQLError: it is no PromQL.
    """
    return list(_selectors(parse(expression), ""))


def measured(expression: str) -> list[str]:
    """What an alert's expression compares with numbers: the operands, without the comparisons.

    For trying an alert's inputs where nothing is wrong and the alert itself gives nothing. An
    expression without such a comparison is its own operand.
    """
    found = [" ".join(part.prettify().split()) for part in _compared(parse(expression))]
    return list(dict.fromkeys(found)) or [expression]


def parse(expression: str) -> Any:
    """The grammar's tree.

    Raises:
        PromQLError: it is no PromQL.
    """
    try:
        return grammar.parse(expression)
    except ValueError as error:
        raise PromQLError(f"no PromQL: {expression!r}: {error}") from None


def _selectors(node: Any, function: str) -> Iterator[Selector]:
    match node:
        case grammar.Call():
            for argument in node.args:
                yield from _selectors(argument, node.func.name)
        case grammar.MatrixSelector():
            yield _selector(node.vector_selector, node.range.total_seconds(), function)
        case grammar.VectorSelector():
            yield _selector(node, None, function)
        case _:
            by = _kept(node)
            for child in _children(node):
                for found in _selectors(child, ""):
                    yield replace(found, by=found.by | by) if by else found


def _kept(node: Any) -> frozenset[str]:
    modifier = getattr(node, "modifier", None) if isinstance(node, grammar.AggregateExpr) else None
    if modifier is None or modifier.type != grammar.AggModifierType.By:
        return frozenset()
    return frozenset(modifier.labels)


def _selector(node: Any, range_s: float | None, function: str) -> Selector:
    matchers = tuple(
        (one.name, _OPERATORS[str(one.op)], one.value) for one in node.matchers.matchers
    )
    return Selector(node.name or "", matchers, range_s, function)


_OPERATORS = {
    "MatchOp.Equal": "=",
    "MatchOp.NotEqual": "!=",
    "MatchOp.Re": "=~",
    "MatchOp.NotRe": "!~",
}


def _children(node: Any) -> list[Any]:
    if isinstance(node, grammar.BinaryExpr):
        return [node.lhs, node.rhs]
    inner = getattr(node, "expr", None)
    return [] if inner is None else [inner]


def _compared(node: Any) -> Iterator[Any]:
    if isinstance(node, grammar.BinaryExpr) and str(node.op) in _COMPARISONS:
        yield from (side for side in (node.lhs, node.rhs) if _asks(side))
        return
    for child in _children(node):
        yield from _compared(child)


def _asks(node: Any) -> bool:
    return any(True for _ in _selectors(node, ""))
