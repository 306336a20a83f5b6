"""The metrics' HTTP server: pages, formats, and what goes wrong without harm."""

import http.client
import json
import logging
import socket

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from actors.errors import AffluxError
from actors.metrics.exporter import Exporter, json_page, plain_page, registry_page

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


def ask(exporter: Exporter, path: str, method: str = "GET", accept: str = "") -> tuple:
    """Status, content type and body."""
    connection = http.client.HTTPConnection(exporter.address, timeout=10)
    try:
        connection.request(method, path, headers={"Accept": accept})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def broken(accept):
    raise RuntimeError("no such thing")


@pytest.fixture
def exporter():
    registry = CollectorRegistry()
    Gauge("vllm:running", "With a colon.", registry=registry).set(3)
    pages = {
        "/metrics": registry_page(registry),
        "/vllm/metrics": plain_page(registry),
        "/sd": json_page(lambda: [{"targets": []}]),
        "/broken": broken,
    }
    made = Exporter("127.0.0.1", 0, pages)
    yield made
    made.close()


def test_formats(exporter):
    status, kind, text = ask(exporter, "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert [f.name for f in text_string_to_metric_families(text)] == ["vllm:running"]
    status, kind, text = ask(exporter, "/metrics", accept=OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    assert list(openmetrics.text_string_to_metric_families(text))


def test_the_plain_page_keeps_colons_whatever_is_asked_for(exporter):
    for accept in ("", OPENMETRICS):
        _, kind, text = ask(exporter, "/vllm/metrics", accept=accept)
        assert kind == "text/plain; version=0.0.4; charset=utf-8"
        assert "\nvllm:running 3.0\n" in text


def test_json_and_queries(exporter):
    status, kind, text = ask(exporter, "/sd?x=1")
    assert (status, kind, json.loads(text)) == (200, "application/json", [{"targets": []}])


def test_a_page_that_is_not_there_names_those_that_are(exporter):
    status, _, text = ask(exporter, "/metric")
    assert status == 404
    assert text == "no page /metric; there are: /broken, /metrics, /sd, /vllm/metrics\n"


def test_head_has_no_body(exporter):
    _, _, whole = ask(exporter, "/metrics")
    connection = http.client.HTTPConnection(exporter.address, timeout=10)
    connection.request("HEAD", "/metrics")
    answer = connection.getresponse()
    assert answer.status == 200
    assert int(answer.headers["Content-Length"]) == len(whole)
    assert answer.read() == b""
    connection.close()


def test_a_page_that_raises_leaves_the_others_alone(exporter, caplog):
    with caplog.at_level(logging.ERROR):
        assert ask(exporter, "/broken")[0] == 500
    assert "no such thing" in caplog.text
    assert ask(exporter, "/metrics")[0] == 200


def test_a_port_that_is_taken_is_replaced(exporter, caplog):
    second = Exporter("127.0.0.1", exporter.port, exporter.pages)
    try:
        assert second.port not in (0, exporter.port)
        assert f"port {exporter.port} is taken; metrics are on port {second.port}" in caplog.text
        assert ask(second, "/metrics")[0] == 200
    finally:
        second.close()


def test_a_host_of_another_machine_is_refused():
    with pytest.raises(AffluxError, match=r"served on 192\.0\.2\.1, port 0.*metrics\.host") as info:
        Exporter("192.0.2.1", 0, {})
    assert info.value.code == "bad_metrics_address"


def test_after_close_nobody_listens(exporter):
    host, _, port = exporter.address.rpartition(":")
    exporter.close()
    exporter.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)


def test_a_reader_that_says_nothing_holds_nobody_up(exporter):
    host, _, port = exporter.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=5):
        assert ask(exporter, "/metrics")[0] == 200
