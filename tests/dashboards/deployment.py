"""A deployment that only exports: pages of made-up processes, with every metric of the catalogue.

Stands in for Ray and vLLM where something reads metrics. Each process has a registry with what the
catalogue says of its side; a test moves the values and looks at who read them.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from actors.metrics import catalogue
from actors.metrics.catalogue import Side

KINDS: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Process:
    """What one process exports: ``process["afd_x"]`` with the base labels bound."""

    def __init__(self, side: Side, actor: str = "", model: str = "verse"):
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model}
        if side not in ("manager", "controller"):
            self._labels |= {"role": side, "actor_id": actor}
        self._metrics: dict[str, Any] = {}
        for name, metric in catalogue.of(side).items():
            options = {"buckets": metric.buckets} if metric.kind == "histogram" else {}
            base = catalogue.base_labels(side)
            self._metrics[name] = KINDS[metric.kind](
                name, metric.help, (*base, *metric.labels), registry=self.registry, **options
            )
        self.actor = actor

    def __call__(self, name: str, **labels: str) -> Any:
        """The child of a metric with these labels of its own."""
        return self._metrics[name].labels(**self._labels, **labels)

    def text(self) -> str:
        return generate_latest(self.registry).decode()


class Deployment:
    """One manager, one frontend, and actors; served over HTTP by ``served``."""

    def __init__(self, attention: int = 1, ffn: int = 2):
        self.manager = Process("manager")
        self.controller = Process("controller")
        self.frontend = Process("frontend", "frontend-0")
        self.attention = [Process("attention", f"attention-{n}") for n in range(attention)]
        self.ffn = [Process("ffn", f"ffn-{n}") for n in range(ffn)]
        self.broken: set[str] = set()
        """Paths that answer 500."""
        self.address = ""

    @property
    def pages(self) -> dict[str, Process]:
        """By path."""
        every = [self.frontend, *self.attention, *self.ffn]
        alone = {"/metrics": self.manager, "/controller": self.controller}
        return {**alone, **{f"/{one.actor}": one for one in every}}

    def discovery(self) -> list[dict[str, Any]]:
        """As the manager serves it, but with one port for all, told apart by path."""
        groups = [
            {"targets": [self.address], "labels": {"job": "afflux", "__metrics_path__": path}}
            for path in self.pages
        ]
        vllm = {"job": "vllm", "__metrics_path__": "/vllm/metrics"}
        return [*groups, {"targets": [self.address], "labels": vllm}]

    def answer(self, path: str) -> bytes | None:
        if path in self.broken:
            return None
        if path == "/sd":
            return json.dumps(self.discovery()).encode()
        page = self.pages.get(path)
        return None if page is None else page.text().encode()


@contextmanager
def served(deployment: Deployment) -> Iterator[str]:
    """Inside, the pages can be read; gives the URL of the manager's."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name is http.server's
            body = deployment.answer(self.path)
            self.send_response(500 if body is None else 200)
            kind = "application/json" if self.path == "/sd" else "text/plain; version=0.0.4"
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        deployment.address = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://{deployment.address}"
        finally:
            server.shutdown()
            thread.join()


def busy(deployment: Deployment) -> None:
    """A second's worth of traffic, with round numbers."""
    manager, frontend = deployment.manager, deployment.frontend
    manager("afd_healthy").set(1)
    manager("afd_epoch").set(4)
    for role, actors in (("attention", deployment.attention), ("ffn", deployment.ffn)):
        manager("afd_actors", role=role, state="ready").set(len(actors))
        manager("afd_actors", role=role, state="draining").set(0)
        manager("afd_actors_target", role=role).set(len(actors))
    manager("afd_attention_ffn_ratio").set(len(deployment.attention) / len(deployment.ffn))
    manager("afd_config_info", deployment="afflux", lanes="2", emulated="false", dtype="bf16").set(
        1
    )
    frontend("afd_requests_running").set(8)
    frontend("afd_requests_waiting").set(0)
    frontend("afd_generation_tokens_total").inc(400)
    frontend("afd_prompt_tokens_total").inc(100)
    frontend("afd_requests_total", outcome="stop").inc(10)
    frontend("afd_slo_target_seconds", slo="ttft").set(0.5)
    frontend("afd_slo_target_seconds", slo="tpot").set(0.05)
    frontend("afd_slo_objective_ratio").set(0.99)
    frontend("afd_slo_requests_total", slo="ttft").inc(10)
    frontend("afd_slo_good_requests_total", slo="ttft").inc(9)
    for _ in range(10):
        frontend("afd_time_to_first_token_seconds").observe(0.09)
        frontend("afd_inter_token_latency_seconds").observe(0.02)
    for actor in deployment.attention:
        for _ in range(20):
            actor("afd_attention_step_seconds").observe(0.04)
            actor("afd_attention_compute_seconds").observe(0.025)
            actor("afd_attention_wait_seconds").observe(0.015)
            actor("afd_attention_batch_tokens").observe(16)
            actor("afd_attention_lanes").observe(2)
            stages = ("queue", "wire_out", "boarding", "compute", "reply", "wire_back")
            for stage in stages:
                actor("afd_transport_hop_seconds", stage=stage).observe(0.0001)
            actor("afd_transport_hop_seconds", stage="total").observe(0.0006)
        actor("afd_attention_kv_cache_usage_ratio").set(0.25)
        actor("afd_attention_requests_running").set(8)
        actor("afd_attention_requests_waiting").set(0)
        actor("afd_table_epoch").set(4)
        actor("afd_transport_bytes_total", direction="dispatch", transport="shm").inc(1e6)
        actor("afd_transport_bytes_total", direction="combine", transport="shm").inc(2e6)
    for actor in deployment.ffn:
        for _ in range(40):
            actor("afd_ffn_step_seconds").observe(0.015)
            actor("afd_ffn_compute_seconds").observe(0.01)
            actor("afd_ffn_boarding_wait_seconds").observe(0.001)
            actor("afd_ffn_batch_tokens").observe(8)
        actor("afd_ffn_busy_seconds_total").inc(0.6)
        actor("afd_ffn_idle_seconds_total").inc(0.4)
        actor("afd_ffn_queue_depth").set(0)
        actor("afd_ffn_experts").set(64)
        actor("afd_ffn_expert_load_balance_ratio").set(1.25)
        actor("afd_table_epoch").set(4)


def scraped(deployment: Deployment) -> dict[str, Any]:
    """All pages as series, as ``Scrape`` holds them."""
    from dashboards.scrape import parse

    series: dict[str, Any] = {}
    for process in deployment.pages.values():
        for name, values in parse(process.text()).items():
            series.setdefault(name, {}).update(values)
    return series
