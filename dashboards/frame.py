"""What all our dashboards have around their panels: variables, annotations, links, times.

The variables are those that Grafana's dashboard-linter asks for (data source, job, instance) and
the deployment. Changes and failures come from Grafana's own annotation store, where ``afflux
dashboards annotate`` writes them; alerts come from Prometheus. Not for panels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import SOURCE, AnyPanel

TAG = "afflux"
"""Every dashboard and every annotation of ours has it."""

CHANGE_TAG, FAILURE_TAG = "change", "failure"

ALERTS = 'ALERTS{alertstate="firing", alertname=~"Afflux.+", deployment=~"$deployment"}'

_STORE = options.DataSourceRef(type_val="grafana", uid="-- Grafana --")
_ALL = models.VariableOption(selected=True, text="All", value="$__all")


@dataclass(frozen=True)
class Row:
    """Panels under a heading.

    Args:
        collapsed: closed until clicked, so that it costs no queries.
    """

    title: str
    panels: Sequence[AnyPanel]
    collapsed: bool = False


def deployment_variables() -> list[builders.QueryVariable]:
    """Deployment, job and instance of afflux's own series."""
    return [
        query_variable(
            "deployment",
            "Deployment",
            "label_values(afd_build_info, deployment)",
            "Which deployments are shown; the name in the spec.",
            everything=".*",  # a Prometheus that does not use our service discovery knows none
        ),
        query_variable(
            "job",
            "Job",
            'label_values(afd_build_info{deployment=~"$deployment"}, job)',
            "Prometheus's job of the afflux processes.",
        ),
        query_variable(
            "instance",
            "Instance",
            'label_values(up{job=~"$job", deployment=~"$deployment"}, instance)',
            "host:port of single processes; All unless you look for one.",
        ),
    ]


def query_variable(
    name: str, label: str, query: str, description: str, *, everything: str = ".+"
) -> builders.QueryVariable:
    """A variable whose values come from Prometheus; several can be chosen, All is the default.

    Args:
        query: as in ``label_values(metric, label)``.
        everything: the regular expression that All stands for.
    """
    return (
        builders.QueryVariable(name)
        .label(label)
        .description(description)
        .query(query)
        .datasource(SOURCE)
        .multi(True)
        .include_all(True)
        .all_value(everything)
        .current(_ALL)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.NATURAL_ASC)
    )


def dashboard(
    uid: str,
    title: str,
    description: str,
    variables: Sequence[builders.QueryVariable | builders.TextBoxVariable],
    rows: Sequence[Row],
    *,
    alerts: bool = True,
) -> models.Dashboard:
    """A whole dashboard.

    Args:
        uid: stays for ever: it is in links and bookmarks.
        alerts: mark alerts of the chosen deployments, besides changes and failures.
    """
    page = (
        builders.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags([TAG])
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-30m", "now")
        .refresh("10s")
        .timezone("browser")
        .link(
            builders.DashboardLink("afflux")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .tooltip("The other dashboards of afflux, for the same time")
            .include_vars(True)
            .keep_time(True)
        )
    )
    source = (
        builders.DatasourceVariable("datasource")
        .label("Data source")
        .description("The Prometheus that scrapes the deployment.")
        .type("prometheus")
    )
    page.variables([source, *variables])
    page.annotations(_annotations(alerts))
    for row in rows:
        _add(page, row)
    return _numbered(page.build())


def _add(page: builders.Dashboard, row: Row) -> None:
    heading = builders.Row(row.title).collapsed(row.collapsed)
    if row.collapsed:
        for panel in row.panels:
            heading.with_panel(panel)
        page.with_row(heading)
        return
    page.with_row(heading)
    for panel in row.panels:
        page.with_panel(panel)


def _numbered(page: models.Dashboard) -> models.Dashboard:
    """With an id for every panel, in order, so that links to a panel last."""
    number = 0
    for panel in page.panels or []:
        number += 1
        panel.id_val = number
        if isinstance(panel, models.RowPanel):
            for inner in panel.panels or []:
                number += 1
                inner.id_val = number
    return page


def _annotations(with_alerts: bool) -> list[Builder[models.AnnotationQuery]]:
    changes: list[Builder[models.AnnotationQuery]] = [
        _stored("Changes", CHANGE_TAG, "blue"),
        _stored("Failures", FAILURE_TAG, "red"),
    ]
    if not with_alerts:
        return changes
    alerts = (
        builders.AnnotationQuery()
        .name("Alerts")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("orange")
        .expr(ALERTS)
        .target(prometheus.Dataquery().ref_id("Anno").datasource(SOURCE).expr(ALERTS).range())
        .step("15s")
        .title_format("{{alertname}}")
        .text_format("{{severity}} {{role}} {{actor_id}} {{instance}}")
        .tag_keys("alertname,severity")
    )
    return [*changes, alerts]


def _stored(name: str, tag: str, color: str) -> builders.AnnotationQuery:
    # a target of this kind is no data query for the SDK's types, only for its code
    tags: Any = builders.AnnotationTarget().tags([TAG, tag]).type("tags").limit(200)
    return (
        builders.AnnotationQuery()
        .name(name)
        .datasource(_STORE)
        .enable(True)
        .icon_color(color)
        .type("tags")
        .target(tags.match_any(False))
    )
