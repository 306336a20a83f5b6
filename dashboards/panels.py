"""The few kinds of panel that our dashboards are made of, with one look for all of them.

On top of grafana-foundation-sdk, which knows Grafana's schema. Every panel uses the dashboard's
data source variable and has a title, a unit, and a description that says what is good and what to
do otherwise. Not for what is on a dashboard: see ``slo``, ``elasticity``, ``dataplane`` and
``ray_serve``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmaps
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = options.DataSourceRef(type_val="prometheus", uid="${datasource}")

GREEN, YELLOW, RED, BLUE, GREY = "green", "#EAB839", "red", "blue", "text"

AnyPanel = timeseries.Panel | stat.Panel | heatmap.Panel | bargauge.Panel | table.Panel
_P = TypeVar("_P", bound=Any)


@dataclass(frozen=True)
class Query:
    """One query of a panel.

    Args:
        expr: PromQL with Grafana's variables.
        legend: name of its series, as in ``{{actor_id}}``.
        style: how a line is drawn: ``limit`` is a red dashed line that others are compared with,
            ``wanted`` a grey one.
    """

    expr: str
    legend: str = ""
    style: Literal["line", "limit", "wanted"] = "line"


Step = tuple[float | None, str]
"""From this value on, this colour; None is minus infinity."""

Steps = Sequence[Step]
PLAIN: Steps = ((None, BLUE),)


def lines(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 12,
    height: int = 8,
    stacked: bool = False,
    stepped: bool = False,
    bars: bool = False,
    limits: Steps = (),
    lowest: float | None = 0,
    highest: float | None = None,
    legend: Literal["table", "list"] = "table",
) -> AnyPanel:
    """Values over time.

    Args:
        unit: Grafana's, as in ``s``, ``reqps``, ``percentunit``.
        width: of 24 columns.
        stacked: areas on top of each other: for parts of a whole.
        stepped: for counts of things, which don't move between two samples.
        bars: for events.
        limits: horizontal lines.
        lowest: of the axis; None lets it float.
    """
    panel = _common(timeseries.Panel(), title, description, unit, queries, width, height)
    panel.line_width(1 if stacked else 2).fill_opacity(60 if stacked or bars else 8)
    panel.show_points(options.VisibilityMode.NEVER)
    panel.tooltip(
        common.VizTooltipOptions()
        .mode(options.TooltipDisplayMode.MULTI)
        .sort(options.SortOrder.DESCENDING)
    )
    shown = common.VizLegendOptions().placement(options.LegendPlacement.BOTTOM).show_legend(True)
    if legend == "table":
        shown.display_mode(options.LegendDisplayMode.TABLE).calcs(["mean", "max", "lastNotNull"])
    else:
        shown.display_mode(options.LegendDisplayMode.LIST).calcs([])
    panel.legend(shown)
    if stacked or bars:
        panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL).group("A"))
    if stepped:
        panel.line_interpolation(options.LineInterpolation.STEP_AFTER)
    if bars:
        panel.draw_style(options.GraphDrawStyle.BARS)
    if limits:
        panel.thresholds(_thresholds(((None, "transparent"), *limits)))
        panel.thresholds_style(
            common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED)
        )
    if lowest is not None:
        panel.min(lowest)
    if highest is not None:
        panel.max(highest)
    for index, query in enumerate(queries):
        if query.style != "line":
            _set_apart(panel, _ref(index), RED if query.style == "limit" else GREY)
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps = PLAIN,
    width: int = 3,
    height: int = 4,
    decimals: float | None = None,
    words: Mapping[str, tuple[str, str]] | None = None,
    graph: bool = True,
    names: bool = False,
) -> AnyPanel:
    """The newest value, large, with its course behind it.

    Args:
        steps: colours by value.
        words: values that are shown as a word in a colour, as in ``{"1": ("yes", "green")}``.
        graph: draw the course behind the number.
        names: show the series' names too, for panels with several.
    """
    panel = _common(stat.Panel(), title, description, unit, queries, width, height)
    panel.thresholds(_thresholds(steps)).color_mode(options.BigValueColorMode.VALUE)
    panel.graph_mode(options.BigValueGraphMode.AREA if graph else options.BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.justify_mode(options.BigValueJustifyMode.AUTO)
    if names:
        panel.text_mode(options.BigValueTextMode.VALUE_AND_NAME)
    if decimals is not None:
        panel.decimals(decimals)
    if words:
        panel.mappings([_mapping(words)])
    return panel


def heat(
    title: str,
    description: str,
    unit: str,
    query: str,
    *,
    width: int = 8,
    height: int = 8,
    legend: str = "{{le}}",
    scheme: str = "Oranges",
    rows: bool = False,
) -> AnyPanel:
    """How values are distributed over time; ``query`` gives series by ``le``.

    Args:
        unit: of the vertical axis.
        rows: the query's series are rows of their own (actors, experts), not a histogram's buckets.
    """
    panel = _common(heatmap.Panel(), title, description, unit, (), width, height)
    target = _target(0, Query(query, legend))
    panel.with_target(
        target.format(PromQueryFormat.TIME_SERIES if rows else PromQueryFormat.HEATMAP)
    )
    panel.calculate(False).cell_gap(1).show_legend()
    panel.color(
        heatmap.HeatmapColorOptions()
        .mode(heatmaps.HeatmapColorMode.SCHEME)
        .scheme(scheme)
        .fill("dark-orange")
        .scale(heatmaps.HeatmapColorScale.EXPONENTIAL)
        .exponent(0.5)
        .steps(64)
        .reverse(False)
    )
    # empty buckets would cover the background
    panel.filter_values(heatmap.FilterValueRange().le(1e-9))
    panel.y_axis(
        heatmap.YAxisConfig().unit(unit).reverse(False).axis_placement(options.AxisPlacement.LEFT)
    )
    panel.tooltip(
        heatmap.HeatmapTooltip().mode(options.TooltipDisplayMode.SINGLE).y_histogram(not rows)
    )
    return panel


def gauges(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    steps: Steps = PLAIN,
    width: int = 8,
    height: int = 8,
    highest: float | None = None,
) -> AnyPanel:
    """The newest value of each series as a bar: for comparing actors with each other."""
    panel = _common(bargauge.Panel(), title, description, unit, queries, width, height)
    panel.thresholds(_thresholds(steps)).display_mode(options.BarGaugeDisplayMode.LCD)
    panel.orientation(options.VizOrientation.HORIZONTAL).min(0)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if highest is not None:
        panel.max(highest)
    return panel


def facts(
    title: str,
    description: str,
    query: str,
    labels: Mapping[str, str],
    *,
    width: int = 12,
    height: int = 4,
) -> AnyPanel:
    """Labels of a series as a table: for versions and settings.

    Args:
        labels: those to show, in order, with their titles.
    """
    panel = _common(table.Panel(), title, description, "string", (), width, height)
    panel.with_target(_target(0, Query(query)).instant().format(PromQueryFormat.TABLE))
    panel.with_transformation(
        models.DataTransformerConfig(
            id_val="filterFieldsByName", options={"include": {"names": list(labels)}}
        )
    )
    order = {label: place for place, label in enumerate(labels)}
    panel.with_transformation(
        models.DataTransformerConfig(
            id_val="organize", options={"indexByName": order, "renameByName": dict(labels)}
        )
    )
    return panel


def _common(
    panel: _P,
    title: str,
    description: str,
    unit: str,
    queries: Sequence[Query],
    width: int,
    height: int,
) -> _P:
    panel.title(title).description(description).datasource(SOURCE).unit(unit)
    panel.span(width).height(height)
    for index, query in enumerate(queries):
        panel.with_target(_target(index, query))
    return panel


def _target(index: int, query: Query) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(_ref(index)).datasource(SOURCE).expr(query.expr).range()
    return target.legend_format(query.legend or "__auto")


def _ref(index: int) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index]


def _thresholds(steps: Steps) -> builders.ThresholdsConfig:
    return (
        builders.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=color) for value, color in steps])
    )


def _mapping(words: Mapping[str, tuple[str, str]]) -> models.ValueMap:
    return models.ValueMap(
        options={
            value: models.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, (text, color)) in enumerate(words.items())
        }
    )


def _set_apart(panel: timeseries.Panel, ref: str, color: str) -> None:
    """A dashed line of one colour, out of any stack, for what others are compared with."""
    panel.override_by_query(
        ref,
        [
            models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color}),
            models.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]}),
            models.DynamicConfigValue("custom.fillOpacity", 0),
            models.DynamicConfigValue("custom.stacking", {"mode": "none", "group": "B"}),
        ],
    )
