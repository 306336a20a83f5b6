"""The dashboard of what is below us: Ray Serve's HTTP side and the Ray cluster's nodes.

Only metrics that Ray 2.60 exports (its own dashboards use the same). Ray's agents are found through
the manager's service discovery, so no Ray dashboard is needed.
"""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from dashboards.frame import Row, dashboard, query_variable
from dashboards.panels import GREEN, RED, YELLOW, AnyPanel, Query, lines, number
from dashboards.queries import TARGETS, quantile, rate, series, share, total

UID = "afflux-ray"

_APP = 'application=~"$application"'
_REQUESTS = "ray_serve_num_http_requests_total"
_LATENCY = "ray_serve_http_request_latency_ms"
# What is asked for by Serve itself and by health checks is not traffic.
_USERS = 'route!~"/-/.*"'


def build() -> models.Dashboard:
    """The dashboard."""
    return dashboard(
        UID,
        "afflux / Ray and Serve",
        "The layers below: HTTP requests as Ray Serve sees them, the health of its replicas, and "
        "CPU, memory, network and GPUs of the nodes. Look here when the other dashboards show "
        "trouble that afflux itself does not explain.",
        [
            query_variable(
                "job",
                "Job",
                "label_values(ray_node_cpu_count, job)",
                "Prometheus's job of Ray's node agents.",
            ),
            query_variable(
                "instance",
                "Instance",
                'label_values(ray_node_cpu_count{job=~"$job"}, instance)',
                "host:port of the agents: one per node.",
            ),
            query_variable(
                "application",
                "Application",
                'label_values(ray_serve_application_status{job=~"$job"}, application)',
                "Ray Serve's applications; a deployment of afflux is one.",
            ),
        ],
        [
            Row("Serve", _serve()),
            Row("Ray", _ray()),
            Row("Nodes", _nodes()),
            Row("GPUs", _gpus(), collapsed=True),
        ],
        alerts=False,
    )


def _serve() -> list[AnyPanel]:
    status = _ray_series("ray_serve_application_status", _APP)
    return [
        number(
            "Applications",
            "Ray Serve's word on each application. Not RUNNING for minutes: see serve status and "
            "the frontend's log.",
            "short",
            Query(f"max by (application) ({status})", "{{application}}"),
            words={
                "0": ("unknown", YELLOW),
                "1": ("deploy failed", RED),
                "2": ("unhealthy", RED),
                "3": ("not started", YELLOW),
                "4": ("deleting", YELLOW),
                "5": ("deploying", YELLOW),
                "6": ("running", GREEN),
            },
            width=6,
            names=True,
            graph=False,
        ),
        number(
            "Healthy replicas",
            "Replicas of each Serve deployment that pass their health check. The frontend's number "
            "of replicas is frontend.replicas in the spec.",
            "short",
            Query(
                total(
                    _ray_series("ray_serve_deployment_replica_healthy", _APP),
                    "application",
                    "deployment",
                ),
                "{{application}} {{deployment}}",
            ),
            steps=((None, RED), (1, GREEN)),
            width=6,
            names=True,
            graph=False,
        ),
        number(
            "HTTP requests under way",
            "Requests that Serve's proxies hold: streams that are being read, above all.",
            "short",
            Query(total(_ray_series("ray_serve_num_ongoing_http_requests"))),
            width=6,
        ),
        number(
            "Controller's loop",
            "Duration of the last turn of Serve's controller. Above 10 s it is overloaded and "
            "replaces replicas late.",
            "s",
            Query(f"max({_ray_series('ray_serve_controller_control_loop_duration_s')})"),
            steps=((None, GREEN), (5, YELLOW), (10, RED)),
            width=6,
        ),
        lines(
            "HTTP requests",
            "Requests per second by route and status code, counted when the answer has ended. 429 "
            "and 503 are our own refusals (see SLO overview); other 5xx are errors.",
            "reqps",
            Query(
                total(_ray_rate(_REQUESTS, _APP, _USERS), "route", "status_code"),
                "{{route}} {{status_code}}",
            ),
            stacked=True,
            width=8,
        ),
        lines(
            "HTTP latency",
            "Whole requests as Serve's proxy sees them, streams to their last token. It is above "
            "afflux's own latency by what the proxy costs: a few milliseconds.",
            "ms",
            *(
                Query(
                    quantile(q, _LATENCY, matchers=(_APP, _USERS), base=TARGETS),
                    f"p{q * 100:g}",
                )
                for q in (0.5, 0.9, 0.99)
            ),
            width=8,
        ),
        lines(
            "HTTP errors",
            "Answers that Serve counts as errors, by code. Empty without any.",
            "reqps",
            Query(
                total(_ray_rate("ray_serve_num_http_error_requests_total", _APP), "error_code"),
                "{{error_code}}",
            ),
            width=8,
        ),
        lines(
            "Requests in replicas and queues",
            "Requests that replicas work on, and those that wait for a replica. Queues here mean "
            "that the frontends are full: raise frontend.replicas.",
            "short",
            Query(
                total(_ray_series("ray_serve_replica_processing_queries", _APP), "deployment"),
                "{{deployment}} working",
            ),
            Query(
                total(_ray_series("ray_serve_deployment_queued_queries", _APP), "deployment"),
                "{{deployment}} queued",
            ),
            width=12,
        ),
        lines(
            "Exceptions in replicas",
            "Exceptions per second that left a replica, by deployment. Empty without any; the "
            "replica's log in Ray has the traceback.",
            "cps",
            Query(
                total(_ray_rate("ray_serve_deployment_error_counter_total", _APP), "deployment"),
                "{{deployment}}",
            ),
            width=12,
        ),
    ]


def _ray() -> list[AnyPanel]:
    return [
        lines(
            "Ray actors by state",
            "Every Ray actor in the cluster, ours and Serve's. Many in PENDING_CREATION: there is "
            "no room to place them.",
            "short",
            Query(total(_ray_series("ray_actors", 'Source="gcs"'), "State"), "{{State}}"),
            stepped=True,
            stacked=True,
            width=8,
        ),
        lines(
            "Placement groups by state",
            "One small placement group per actor. PENDING for long: no node has its resources; "
            "ray status shows what is asked for.",
            "short",
            Query(total(_ray_series("ray_placement_groups"), "State"), "{{State}}"),
            stepped=True,
            stacked=True,
            width=8,
        ),
        lines(
            "Resources in use",
            "Share of each of Ray's resources that is reserved. At 100 % nothing more can be "
            "placed: add nodes before you scale up.",
            "percentunit",
            Query(
                share(
                    total(_ray_series("ray_resources", 'State="USED"'), "Name"),
                    total(_ray_series("ray_resources"), "Name"),
                ),
                "{{Name}}",
            ),
            highest=1,
            width=8,
        ),
        lines(
            "Object store",
            "Bytes in Ray's object store by place. Ours are small (requests and tokens go through "
            "it, tensors don't): SPILLED should stay at 0.",
            "bytes",
            Query(total(_ray_series("ray_object_store_memory"), "Location"), "{{Location}}"),
            stacked=True,
            width=12,
        ),
        lines(
            "Workers that died",
            "Worker processes per second that died unexpectedly, by type of failure. Empty without "
            "any. Out of memory is the usual reason: see the nodes' memory.",
            "cps",
            Query(
                total(_ray_rate("ray_node_manager_unexpected_worker_failure_total"), "Type"),
                "{{Type}}",
            ),
            width=12,
        ),
    ]


def _nodes() -> list[AnyPanel]:
    return [
        lines(
            "CPU",
            "Use of each node's CPUs. Actors poll while they have work, so busy actors show full "
            "cores; more actors than cores makes all of them slow.",
            "percent",
            Query(f"max by (instance) ({_ray_series('ray_node_cpu_utilization')})", "{{instance}}"),
            highest=100,
            width=8,
        ),
        lines(
            "Memory",
            "Share of each node's memory in use. From 95 % on Ray kills workers.",
            "percentunit",
            Query(
                share(
                    total(_ray_series("ray_node_mem_used"), "instance"),
                    f"({total(_ray_series('ray_node_mem_used'), 'instance')} + "
                    f"{total(_ray_series('ray_node_mem_available'), 'instance')})",
                ),
                "{{instance}}",
            ),
            highest=1,
            limits=((0.95, RED),),
            width=8,
        ),
        lines(
            "Memory by component",
            "Resident memory of Ray's processes by kind: our actors are named by their class.",
            "bytes",
            Query(total(_ray_series("ray_component_rss_bytes"), "Component"), "{{Component}}"),
            stacked=True,
            width=8,
        ),
        lines(
            "Network",
            "Bytes per second in and out of each node. The data plane over TCP shows here; over "
            "shared memory and RDMA it does not.",
            "Bps",
            Query(
                total(_ray_series("ray_node_network_receive_speed"), "instance"),
                "in {{instance}}",
            ),
            Query(
                total(_ray_series("ray_node_network_send_speed"), "instance"), "out {{instance}}"
            ),
            width=12,
        ),
        lines(
            "Disk in use",
            "Share of the disk that holds Ray's logs and the checkpoints. Ray places nothing on a "
            "node above 95 %.",
            "percentunit",
            Query(
                share(
                    total(_ray_series("ray_node_disk_usage"), "instance"),
                    f"({total(_ray_series('ray_node_disk_usage'), 'instance')} + "
                    f"{total(_ray_series('ray_node_disk_free'), 'instance')})",
                ),
                "{{instance}}",
            ),
            highest=1,
            limits=((0.95, RED),),
            width=12,
        ),
    ]


def _gpus() -> list[AnyPanel]:
    return [
        lines(
            "GPU use",
            "Use of each GPU as the driver reports it: that a kernel ran, not how full it was. "
            "Empty on nodes without GPUs.",
            "percent",
            Query(
                total(_ray_series("ray_node_gpus_utilization"), "instance", "GpuIndex"),
                "{{instance}} GPU {{GpuIndex}}",
            ),
            highest=100,
        ),
        lines(
            "GPU memory",
            "Memory of each GPU in use. It is reserved for KV cache at start, so it hardly moves; "
            "the KV cache's own use is on Data plane and experts.",
            "mbytes",
            Query(
                total(_ray_series("ray_node_gram_used"), "instance", "GpuIndex"),
                "{{instance}} GPU {{GpuIndex}}",
            ),
        ),
    ]


def _ray_series(name: str, *matchers: str) -> str:
    return series(name, *matchers, base=TARGETS)


def _ray_rate(name: str, *matchers: str) -> str:
    return rate(name, *matchers, base=TARGETS)
