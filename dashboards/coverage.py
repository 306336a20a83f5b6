"""Both ways: what dashboards and rules ask for exists, and what we export is asked for somewhere.

A name is known from the catalogue, from our own recording rules, or from the lists here of what
Prometheus makes and what Ray exports. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from actors.metrics.catalogue import METRICS, Metric
from dashboards import rules
from dashboards.expressions import Expression
from dashboards.promql import Selector, selectors

PROMETHEUS = frozenset({"up", "ALERTS"})
"""Series that Prometheus makes itself."""

RAY: Mapping[str, str] = {
    "ray_actors": "gauge",
    "ray_component_rss_bytes": "gauge",
    "ray_node_cpu_count": "gauge",
    "ray_node_cpu_utilization": "gauge",
    "ray_node_disk_free": "gauge",
    "ray_node_disk_usage": "gauge",
    "ray_node_gpus_utilization": "gauge",
    "ray_node_gram_used": "gauge",
    "ray_node_manager_unexpected_worker_failure_total": "counter",
    "ray_node_mem_available": "gauge",
    "ray_node_mem_used": "gauge",
    "ray_node_network_receive_speed": "gauge",
    "ray_node_network_send_speed": "gauge",
    "ray_object_store_memory": "gauge",
    "ray_placement_groups": "gauge",
    "ray_resources": "gauge",
    "ray_serve_application_status": "gauge",
    "ray_serve_controller_control_loop_duration_s": "gauge",
    "ray_serve_deployment_error_counter_total": "counter",
    "ray_serve_deployment_queued_queries": "gauge",
    "ray_serve_deployment_replica_healthy": "gauge",
    "ray_serve_http_request_latency_ms": "histogram",
    "ray_serve_num_http_error_requests_total": "counter",
    "ray_serve_num_http_requests_total": "counter",
    "ray_serve_num_ongoing_http_requests": "gauge",
    "ray_serve_replica_processing_queries": "gauge",
}
"""What we use of Ray 2.60's metrics, and its kind."""

NOT_SHOWN: Mapping[str, str] = {}
"""Metrics of ours that no dashboard, rule or alert asks for, each with the reason."""


def problems(expressions: Iterable[Expression]) -> list[str]:
    """What does not fit, each as one line; empty if all is well."""
    known = {name: metric for metric in METRICS for name in _series_of(metric)}
    others = PROMETHEUS | {name for metric in RAY.items() for name in _names(*metric)}
    others |= {rule.name for rule in rules.load() if not rule.alert}
    found: list[str] = []
    used: set[str] = set()
    for one in expressions:
        for selector in selectors(one.expr):
            metric = known.get(selector.name)
            where = f"{one.source}: {one.kind} {one.place!r}"
            if metric is not None:
                used.add(metric.name)
                found += [
                    f"{where}: {metric.name} has no label {label!r}"
                    for label in _asked(selector) - _labels(metric)
                ]
            elif selector.name not in others:
                found.append(f"{where}: nobody exports {selector.name or 'a series without name'}")
    for metric in METRICS:
        if metric.name not in used and metric.name not in NOT_SHOWN:
            found.append(f"{metric.name} is exported, but neither shown nor on the list NOT_SHOWN")
        if metric.name in used and metric.name in NOT_SHOWN:
            found.append(f"{metric.name} is on the list NOT_SHOWN, but shown")
    found += [
        f"{name} is on the list NOT_SHOWN, but not in the catalogue"
        for name in NOT_SHOWN.keys() - {metric.name for metric in METRICS}
    ]
    return list(dict.fromkeys(found))


def _series_of(metric: Metric) -> list[str]:
    return _names(metric.name, metric.kind)


def _names(name: str, kind: str) -> list[str]:
    if kind == "histogram":
        return [f"{name}_{suffix}" for suffix in ("bucket", "sum", "count")]
    return [name]


def _labels(metric: Metric) -> set[str]:
    """Those of the series and those that Prometheus adds from the target."""
    bucket = {"le"} if metric.kind == "histogram" else set()
    return {*metric.label_names, "job", "instance", "deployment"} | bucket


def _asked(selector: Selector) -> set[str]:
    return {label for label, _, _ in selector.matchers} | selector.by
