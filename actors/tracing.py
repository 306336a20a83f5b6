"""What a process is told about OpenTelemetry traces, and the tracer that it makes of it.

OpenTelemetry is imported when a ``Tracing`` is made and not before: without tracing a process pays
nothing. The tracer is ours alone; the process-wide one stays free for vLLM's own spans. Not for
deciding what a span is: see ``request_spans`` and the frontend's ``cluster/tracing``.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

EXPORT_EVERY_S = 1.0
"""Ended spans leave this often, and are lost when a process is killed before."""

EXPORT_TIMEOUT_S = 5.0
CLOSE_S = 3.0
"""How long a process that ends tries to hand over its last spans."""

QUIET_S = 300.0
"""Pause between two warnings of the same kind about a receiver that doesn't answer."""


@dataclass(frozen=True)
class TracingConfig:
    """Crosses Ray.

    Args:
        endpoint: URL of an OTLP receiver; for HTTP without a path, /v1/traces is meant.
        protocol: "http/protobuf" or "grpc" (without TLS when the URL begins with http://).
        sample_ratio: share of the requests to trace that come without a traceparent.
        deployment: resource attribute of every span.
    """

    endpoint: str
    protocol: str = "http/protobuf"
    sample_ratio: float = 1.0
    deployment: str = "afflux"


class Tracing:
    """A process's tracer; spans are exported in batches on a thread of its own.

    A receiver that can't be reached costs a warning now and then. Headers for it, such as a token,
    are taken from the environment variable OTEL_EXPORTER_OTLP_HEADERS.

    Args:
        config: see ``TracingConfig``.
        service: service.name, the kind of process.
        actor_id: which process of that kind.

    Attributes:
        tracer: makes spans that are exported; safe from any thread.
    """

    def __init__(self, config: TracingConfig, service: str, actor_id: str):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        about = {
            "service.name": service,
            "service.instance.id": f"{config.deployment}/{actor_id}",
            "deployment": config.deployment,
            "actor_id": actor_id,
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(config.sample_ratio)),
            resource=Resource.create(about),
            shutdown_on_exit=False,  # it would wait for a receiver that may be gone
        )
        self._exporter = _exporter(config)
        delay = EXPORT_EVERY_S * 1000
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, schedule_delay_millis=delay)
        )
        self.tracer: Tracer = self._provider.get_tracer("afflux")
        self._closed = False
        atexit.register(self.close)

    def flush(self) -> None:
        """Export what has ended so far; blocks."""
        self._provider.force_flush()

    def close(self) -> None:
        """Export what has ended, for ``CLOSE_S`` at most; idempotent."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        ending = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        ending.join(CLOSE_S)
        if ending.is_alive():  # an exporter that is told to stop gives up waiting to try again
            self._exporter.shutdown()


def _exporter(config: TracingConfig) -> SpanExporter:
    if config.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import trace_exporter as grpc

        _hush("opentelemetry.exporter.otlp.proto.grpc.exporter")
        plain = urlsplit(config.endpoint).scheme == "http"
        return grpc.OTLPSpanExporter(config.endpoint, insecure=plain, timeout=EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.http import trace_exporter as http

    _hush("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    endpoint = config.endpoint
    if urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    return http.OTLPSpanExporter(endpoint, timeout=EXPORT_TIMEOUT_S)


def _hush(name: str) -> None:
    logger = logging.getLogger(name)
    if not any(isinstance(known, _Seldom) for known in logger.filters):
        logger.addFilter(_Seldom())


class _Seldom(logging.Filter):
    """Lets each kind of message through once in ``QUIET_S``; the exporters log every attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now < self._next.get(str(record.msg), 0.0):
            return False
        self._next[str(record.msg)] = now + QUIET_S
        return True
