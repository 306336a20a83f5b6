"""Reading PromQL: selectors, variables, and what an alert compares."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards import queries
from dashboards.promql import (
    PromQLError,
    Selector,
    measured,
    selectors,
    substitute,
    variables,
)

NAMES = st.from_regex(r"[a-z_:][a-z0-9_:]{0,12}", fullmatch=True).filter(
    lambda name: name not in {"by", "on", "or", "and", "inf", "nan", "bool", "avg", "sum", "min"}
)
LABELS = st.from_regex(r"l_[a-z0-9]{1,6}", fullmatch=True)
VALUES = st.text(st.characters(exclude_characters='"\\$\n', codec="ascii", min_codepoint=32))


def test_selectors_with_their_matchers_functions_and_groups() -> None:
    text = (
        'histogram_quantile(0.9, sum by (le, role) (rate(a_bucket{x=~"1|2", y!="3"}[5m])))'
        " / on (role) group_left () max by (role) (b:c:d) > bool 0.5 or vector(1)"
    )
    assert selectors(text) == [
        Selector(
            "a_bucket",
            (("x", "=~", "1|2"), ("y", "!=", "3")),
            300.0,
            "rate",
            frozenset({"le", "role"}),
        ),
        Selector("b:c:d", (), None, "", frozenset({"role"})),
    ]


@given(NAMES, st.lists(st.tuples(LABELS, VALUES), max_size=3, unique_by=lambda pair: pair[0]))
def test_a_selector_is_read_as_it_was_written(name: str, matchers: list[tuple[str, str]]) -> None:
    words = [f'{label}="{value}"' for label, value in matchers]
    text = queries.total(queries.rate(f"m_{name}", *words, base='b=~"c"'), "role")
    (found,) = selectors(substitute(text))
    assert found.name == f"m_{name}"
    assert set(found.matchers) == {("b", "=~", "c"), *((la, "=", v) for la, v in matchers)}
    assert (found.range_s, found.function, found.by) == (60.0, "rate", {"role"})


@pytest.mark.parametrize("text", ["sum(up", "up{a=b}", "", "rate(up[5x])", "up up"])
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(PromQLError, match="no PromQL"):
        selectors(text)


def test_variables() -> None:
    text = 'rate(up{job=~"$job", a="${b}"}[$__rate_interval]) * $__range'
    assert variables(text) == {"job", "b", "__rate_interval", "__range"}
    assert substitute(text) == 'rate(up{job=~".+", a=".+"}[1m]) * 30m'
    given = {"job": "afflux", "b": "c", "__rate_interval": "20s", "__range": "2"}
    assert substitute(text, given) == 'rate(up{job=~"afflux", a="c"}[20s]) * 2'


@pytest.mark.parametrize(
    ("alert", "inputs"),
    [
        ("up == 0", ["up"]),
        ("time() - beat > 30", ["time() - beat"]),
        ("a > 5 and b > 5 and on (x) sum by (x) (c) > 1", ["a", "b", "sum by (x) (c)"]),
        ("a > 5 and a > 5", ["a"]),
        ("a / b", ["a / b"]),
        ("2 < a", ["a"]),
    ],
)
def test_what_an_alert_measures(alert: str, inputs: list[str]) -> None:
    assert measured(alert) == inputs
