"""The metrics' HTTP server takes whatever is sent to its port."""

from __future__ import annotations

import gc
import socket
import threading

import psutil
import pytest
from prometheus_client import CollectorRegistry, Gauge

from actors.metrics.exporter import Exporter, registry_page
from tests.http_noise import noise, send

PATHS = ("/metrics", "/sd", "/", "/../etc/passwd", "*")


def make() -> Exporter:
    registry = CollectorRegistry()
    Gauge("afd_x", "X.", registry=registry).set(3)
    return Exporter("127.0.0.1", 0, {"/metrics": registry_page(registry)})


def bombard(count: int) -> None:
    """Send it; the server lives, nothing is left and memory has not grown."""
    exporter = make()
    try:
        threads = threading.active_count()
        for number, data in enumerate(noise(1, count // 5, PATHS)):
            send("127.0.0.1", exporter.port, data, wait=number % 3 > 0)
        gc.collect()
        before = psutil.Process().memory_info().rss
        statuses = set()
        for number, data in enumerate(noise(2, count - count // 5, PATHS)):
            said = send("127.0.0.1", exporter.port, data, wait=number % 3 > 0)
            if said.startswith(b"HTTP/"):
                statuses.add(int(said.split()[1]))
        good = send("127.0.0.1", exporter.port, b"GET /metrics HTTP/1.0\r\n\r\n")
        assert good.startswith(b"HTTP/1.0 200") and b"afd_x 3.0" in good
        assert {200, 404, 431, 501} <= statuses and not statuses & {500, 502}
        gc.collect()
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        assert grown < 8, f"{grown:.1f} MiB more after {count} requests"
        assert threading.active_count() <= threads + 2
    finally:
        exporter.close()


def test_noise() -> None:
    bombard(4_000)


@pytest.mark.slow
def test_a_hundred_thousand() -> None:
    bombard(100_000)


def test_who_says_nothing_does_not_keep_prometheus_out() -> None:
    exporter = make()
    idle = []
    try:
        for _ in range(300):
            idle.append(socket.create_connection(("127.0.0.1", exporter.port), timeout=20))
        good = send("127.0.0.1", exporter.port, b"GET /metrics HTTP/1.0\r\n\r\n")
        assert good.startswith(b"HTTP/1.0 200")
    finally:
        for end in idle:
            end.close()
        exporter.close()
