"""OpenTelemetry spans of a frontend: one per HTTP request, and one per stay at an attention actor.

The first continues the client's trace (W3C traceparent) when there is one. A request that is
started again elsewhere has several stays, so a replay can be seen. Its trace headers tell the actor
of the current stay. Imported only when tracing is on, since it imports OpenTelemetry. Not for what
happens inside an actor: see ``actors/request_spans``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors.tracing import Tracing

UNTRACED = frozenset({"/health", "/ping", "/load", "/version", "/metrics"})
"""Paths that machines ask every few seconds."""

_HEADERS = TraceContextTextMapPropagator()


class FrontDoorTraces:
    """Makes a frontend's spans; used by one event loop.

    Args:
        tracing: exports them.
    """

    def __init__(self, tracing: Tracing):
        self._tracing = tracing
        self._tracer = tracing.tracer

    def around(self, app: ASGIApp) -> ASGIApp:
        """ASGI middleware that gives every HTTP request a span; put it outermost."""

        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in UNTRACED:
                await app(scope, receive, send)
            else:
                await self._serve(app, scope, receive, send)

        return traced

    async def _serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        parent = _HEADERS.extract(scope["headers"], Context(), _AsgiHeaders())
        about = {
            "http.request.method": method,
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme", "http"),
        }
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, about)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(StatusCode.ERROR)
            await send(message)

        token = contexts.attach(trace.set_span_in_context(span, parent))
        try:
            await app(scope, receive, watched)
        except Exception as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise
        finally:
            contexts.detach(token)
            route = getattr(scope.get("route"), "path", None)
            if route is not None:  # known once the app has chosen it
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            span.end()

    def begin(self, request_id: str) -> Trail:
        """An engine request has begun in the context of the current HTTP request, if there is one.

        Nothing is recorded before it ``arrives`` somewhere.
        """
        return Trail(self._tracer, request_id)

    def close(self) -> None:
        """Export what has ended; waits ``tracing.CLOSE_S`` at most."""
        self._tracing.close()


class Trail:
    """The stays of one engine request at attention actors, one after the other.

    Attributes:
        door: trace headers of the HTTP request's span, for vLLM's own span; None without one.
        headers: trace headers of the current stay, for its actor.
    """

    __slots__ = (
        "_before",
        "_context",
        "_request_id",
        "_stay",
        "_stays",
        "_tracer",
        "door",
        "headers",
    )

    def __init__(self, tracer: trace.Tracer, request_id: str):
        self._tracer = tracer
        self._request_id = request_id
        span = trace.get_current_span()
        self._context = trace.set_span_in_context(span, Context())
        self.door: Mapping[str, str] | None = _headers_of(span)
        self.headers = self.door
        self._stay: Span | None = None
        self._stays = 0
        self._before = 0

    def arrive(self, actor: str, tokens: int) -> None:
        """It is sent to ``actor``, to go on after ``tokens`` output tokens."""
        about: dict[str, AttributeValue] = {
            "afflux.request_id": self._request_id,
            "afflux.actor": actor,
            "afflux.replay": self._stays,
            "afflux.tokens_before": tokens,
        }
        self._stay = self._tracer.start_span("stay", self._context, SpanKind.CLIENT, about)
        self._stays += 1
        self._before = tokens
        self.headers = _headers_of(self._stay)

    def leave(self, end: str, tokens: int, reason: str | None = None) -> None:
        """The stay is over, if it is at an actor at all.

        Args:
            end: stop, length, abort or error; when the request goes on elsewhere ``lost`` (after a
                fault) or ``moved``.
            tokens: output tokens by now, those of earlier stays included.
            reason: why, in words.
        """
        stay, self._stay = self._stay, None
        if stay is None:
            return
        stay.set_attributes({"afflux.end": end, "afflux.tokens": tokens - self._before})
        if reason is not None:
            stay.set_attribute("afflux.reason", reason)
        if end in ("error", "lost"):
            stay.set_status(Status(StatusCode.ERROR, reason))
        stay.end()


def _headers_of(span: Span) -> dict[str, str] | None:
    """W3C headers; an unsampled span has them too, so that nobody below begins a trace anew."""
    carrier: dict[str, str] = {}
    _HEADERS.inject(carrier, trace.set_span_in_context(span, Context()))
    return carrier or None


class _AsgiHeaders(Getter[Iterable[tuple[bytes, bytes]]]):
    """Reads headers as ASGI has them."""

    def get(self, carrier: Iterable[tuple[bytes, bytes]], key: str) -> list[str] | None:
        wanted = key.lower().encode()
        return [value.decode("latin-1") for name, value in carrier if name == wanted] or None

    def keys(self, carrier: Iterable[tuple[bytes, bytes]]) -> list[str]:
        return [name.decode("latin-1") for name, _ in carrier]
