"""Reading a dashboard's JSON: panels, their places, variables, names of series."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.build import build_all
from dashboards.picture import (
    COLUMNS,
    KINDS,
    Panel,
    Query,
    choose,
    legend,
    panels_of,
    place,
    variables,
)

BOARD = {
    "uid": "u",
    "title": "Board",
    "templating": {
        "list": [
            {"type": "datasource", "name": "datasource"},
            {"type": "query", "name": "job", "allValue": ".+"},
            {"type": "query", "name": "free"},
            {"type": "textbox", "name": "advised", "query": "NaN"},
        ]
    },
    "panels": [
        {"type": "row", "title": "Empty", "panels": []},
        {"type": "row", "title": "Open"},
        {
            "type": "timeseries",
            "title": "Steps",
            "gridPos": {"w": 8, "h": 6},
            "targets": [
                {"refId": "A", "expr": 'x{job=~"$job"}', "legendFormat": "{{actor_id}}"},
                {"refId": "B", "expr": "y"},
            ],
            "fieldConfig": {
                "defaults": {
                    "unit": "s",
                    "min": 0,
                    "thresholds": {
                        "steps": [{"value": None, "color": "green"}, {"value": 2, "color": "red"}]
                    },
                    "custom": {
                        "thresholdsStyle": {"mode": "dashed"},
                        "lineInterpolation": "stepAfter",
                        "stacking": {"mode": "normal"},
                    },
                },
                "overrides": [
                    {
                        "matcher": {"id": "byFrameRefID", "options": "B"},
                        "properties": [
                            {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}},
                            {"id": "custom.lineStyle", "value": {"fill": "dash"}},
                        ],
                    }
                ],
            },
        },
        {"type": "table", "title": "Versions"},
        {
            "type": "row",
            "title": "Closed",
            "panels": [{"type": "stat", "title": "Up", "targets": [{"refId": "A", "expr": "up"}]}],
        },
        {"type": "row", "title": "Last", "panels": []},
    ],
}


def test_panels_with_headings_and_without_tables_and_empty_rows():
    open_, steps, closed, up = panels_of(BOARD)
    assert (open_, closed) == ("Open", "Closed")
    assert isinstance(up, Panel) and up.title == "Up"
    assert steps == Panel(
        title="Steps",
        kind="timeseries",
        unit="s",
        width=8,
        height=6,
        queries=(
            Query('x{job=~"$job"}', "{{actor_id}}"),
            Query("y", "", colour="red", dashed=True),
        ),
        limits=((2, "red"),),
        steps=((None, "green"), (2, "red")),
        lowest=0,
        stacked=True,
        stepped=True,
    )


def test_variables_with_everything_chosen():
    found = variables(BOARD, interval_s=2.0, scrape_s=5.0, range_s=600.0)
    assert found == {
        "__interval": "2000ms",
        "__rate_interval": "20000ms",
        "__range": "600000ms",
        "__range_s": "600",
        "job": ".+",
        "free": ".*",
        "advised": "NaN",
    }


def test_names_of_series():
    labels = {"__name__": "x", "actor_id": "ffn-0", "role": "ffn"}
    assert legend(Query("x", "{{actor_id}} of {{ role }}"), labels) == "ffn-0 of ffn"
    assert legend(Query("x", "__auto"), labels) == "ffn-0, ffn"
    assert legend(Query("x", "{{gone}} left"), labels) == "left"


def test_choosing_by_title():
    (up, steps) = choose([BOARD], ["up", "Steps"])
    assert (up.title, steps.title, steps.width) == ("Up", "Steps", 12)
    with pytest.raises(ValueError, match="no panel 'Down'; there are: Steps, Up"):
        choose([BOARD], ["Down"])


def test_places():
    a, b, c = (Panel(name, "stat", width=10, height=4) for name in "abc")
    placed, height = place(["One", a, b, c, "Two", a])
    assert [(one.x, one.y) for one in placed] == [(0, 0), (0, 1), (10, 1), (0, 5), (0, 9), (0, 10)]
    assert height == 14


@given(st.lists(st.one_of(
    st.just("heading"),
    st.builds(Panel, st.just("p"), st.just("stat"), width=st.integers(1, COLUMNS),
              height=st.integers(1, 12)),
)))  # fmt: skip
def test_nothing_lies_on_anything(parts):
    placed, height = place(parts)
    cells: set[tuple[int, int]] = set()
    for one in placed:
        wide, high = (one.panel.width, one.panel.height) if one.panel else (COLUMNS, 1)
        own = {(one.x + x, one.y + y) for x in range(wide) for y in range(high)}
        assert not own & cells
        assert all(x < COLUMNS and y < height for x, y in own)
        cells |= own


def test_our_dashboards_can_be_read():
    for board in build_all().values():
        parts = panels_of(board)
        assert all(isinstance(part, str) or part.kind in KINDS for part in parts)
        assert sum(isinstance(part, Panel) for part in parts) >= 10
        known = variables(board, interval_s=1.0, scrape_s=1.0, range_s=60.0)
        assert {"__rate_interval", "job", "instance"} <= known.keys()
