"""What a built dashboard shows, read from its JSON: panels, queries, units, limits, places.

For drawing our own dashboards without a Grafana, so it knows the parts of Grafana's schema that we
use. Pure; ``draw.py`` asks and draws.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

COLUMNS = 24
"""Of Grafana's grid."""

KINDS = ("timeseries", "stat", "heatmap", "bargauge")
"""What can be drawn; other panels (tables) are left out."""

_LABEL = re.compile(r"\{\{\s*(\w+)\s*\}\}")


@dataclass(frozen=True)
class Query:
    """One query: PromQL with variables, and the name of its series, as in ``{{actor_id}}``.

    Attributes:
        colour: of all its series, in Grafana's words; None: any.
        dashed: drawn apart from the others, and out of any stack.
    """

    expression: str
    legend: str = ""
    colour: str | None = None
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: Grafana's, as in ``s``.
        width, height: in cells of Grafana's grid.
        limits: horizontal lines, as value and colour.
        steps: from this value on, this colour; None is minus infinity.
        cumulative: a heatmap of a histogram's buckets by ``le``.
        words: what is shown in place of a value.
    """

    title: str
    kind: str
    unit: str = ""
    width: int = 12
    height: int = 8
    queries: tuple[Query, ...] = ()
    limits: tuple[tuple[float, str], ...] = ()
    steps: tuple[tuple[float | None, str], ...] = ()
    lowest: float | None = None
    highest: float | None = None
    stacked: bool = False
    stepped: bool = False
    bars: bool = False
    cumulative: bool = False
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """A panel, or a heading where there is none, and its upper left cell."""

    x: int
    y: int
    title: str
    panel: Panel | None


def panels_of(board: Mapping[str, Any]) -> list[Panel | str]:
    """Panels in order; a row's title is a text. Rows without a panel to draw are left out."""
    found: list[Panel | str] = []
    for part in board.get("panels") or ():
        if part["type"] != "row":
            found += _drawable([part])
            continue
        if found and isinstance(found[-1], str):
            found.pop()
        found += [part.get("title", ""), *_drawable(part.get("panels") or ())]
    return found[:-1] if found and isinstance(found[-1], str) else found


def place(parts: Iterable[Panel | str]) -> tuple[list[Placed], int]:
    """Beside each other while there is room, then below, as Grafana does; and the height of all."""
    placed: list[Placed] = []
    x = y = lowest = 0
    for part in parts:
        if isinstance(part, str):
            placed.append(Placed(0, lowest, part, None))
            x, y, lowest = 0, lowest + 1, lowest + 1
            continue
        if x + part.width > COLUMNS:
            x, y = 0, lowest
        placed.append(Placed(x, y, part.title, part))
        x, lowest = x + part.width, max(lowest, y + part.height)
    return placed, lowest


def choose(boards: Iterable[Mapping[str, Any]], titles: Sequence[str]) -> list[Panel]:
    """Panels by title, in that order, two beside each other.

    Raises:
        ValueError: there is no such panel; the text has those that there are.
    """
    known = {
        part.title.casefold(): part
        for board in boards
        for part in panels_of(board)
        if isinstance(part, Panel)
    }
    missing = [title for title in titles if title.casefold() not in known]
    if missing:
        raise ValueError(
            f"there is no panel {missing[0]!r}; there are: "
            + ", ".join(sorted(part.title for part in known.values()))
        )
    return [replace(known[title.casefold()], width=12, height=8) for title in titles]


def variables(
    board: Mapping[str, Any], *, interval_s: float, scrape_s: float, range_s: float
) -> dict[str, str]:
    """Values of a dashboard's variables with everything chosen, and of Grafana's own.

    Args:
        interval_s: between two points.
        scrape_s: between two scrapes; ``$__rate_interval`` covers four, as Grafana has it.
        range_s: length of the whole picture.
    """
    rate_s = max(interval_s + scrape_s, 4 * scrape_s)
    values = {
        "__interval": _seconds(interval_s),
        "__rate_interval": _seconds(rate_s),
        "__range": _seconds(range_s),
        "__range_s": str(round(range_s)),
    }
    for one in (board.get("templating") or {}).get("list") or ():
        if one["type"] == "query":
            values[one["name"]] = one.get("allValue") or ".*"
        elif one["type"] != "datasource":
            values[one["name"]] = str((one.get("current") or {}).get("value") or one.get("query"))
    return values


def legend(query: Query, labels: Mapping[str, str]) -> str:
    """The name of one of a query's series."""
    if query.legend and query.legend != "__auto":
        return _LABEL.sub(lambda match: labels.get(match[1], ""), query.legend).strip()
    return ", ".join(value for name, value in sorted(labels.items()) if name != "__name__")


def _drawable(parts: Iterable[Mapping[str, Any]]) -> list[Panel]:
    return [_panel(part) for part in parts if part["type"] in KINDS]


def _panel(part: Mapping[str, Any]) -> Panel:
    config = part.get("fieldConfig") or {}
    defaults = config.get("defaults") or {}
    custom = defaults.get("custom") or {}
    steps = tuple(
        (step.get("value"), step["color"])
        for step in (defaults.get("thresholds") or {}).get("steps") or ()
    )
    limits = (custom.get("thresholdsStyle") or {}).get("mode", "off") != "off"
    grid = part.get("gridPos") or {}
    targets = part.get("targets") or ()
    return Panel(
        title=part.get("title", ""),
        kind=part["type"],
        unit=_unit(part, defaults),
        width=grid.get("w", 12),
        height=grid.get("h", 8),
        queries=tuple(_query(target, config.get("overrides") or ()) for target in targets),
        limits=tuple((value, colour) for value, colour in steps if limits and value is not None),
        steps=steps,
        lowest=defaults.get("min"),
        highest=defaults.get("max"),
        stacked=(custom.get("stacking") or {}).get("mode") == "normal",
        stepped=custom.get("lineInterpolation") == "stepAfter",
        bars=custom.get("drawStyle") == "bars",
        cumulative=any(target.get("format") == "heatmap" for target in targets),
        words={
            value: (shown.get("text", value), shown.get("color", "text"))
            for mapping in defaults.get("mappings") or ()
            if mapping["type"] == "value"
            for value, shown in mapping["options"].items()
        },
    )


def _unit(part: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """A heatmap's is its vertical axis's."""
    axis = (part.get("options") or {}).get("yAxis") or {}
    return axis.get("unit") or defaults.get("unit") or ""


def _query(target: Mapping[str, Any], overrides: Iterable[Mapping[str, Any]]) -> Query:
    query = Query(target["expr"], target.get("legendFormat") or "")
    for override in overrides:
        matcher = override["matcher"]
        if matcher["id"] == "byFrameRefID" and matcher.get("options") == target.get("refId"):
            for change in override["properties"]:
                if change["id"] == "color":
                    query = replace(query, colour=change["value"].get("fixedColor"))
                elif change["id"] == "custom.lineStyle":
                    query = replace(query, dashed=change["value"].get("fill") == "dash")
    return query


def _seconds(value: float) -> str:
    """A duration in Prometheus' words, whole milliseconds."""
    return f"{max(1, round(value * 1000))}ms"
