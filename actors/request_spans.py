"""Spans of traced requests at an attention actor: queue, prefill, decode, and their first steps.

Everything here runs on the engine's thread, between steps. Who sends a request decides whether it
is traced, by its trace headers; for all others a step costs two reads. Imported only when tracing
is on, since it imports OpenTelemetry. Not for totals: see ``metrics``.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from opentelemetry.context import Context
from opentelemetry.trace import (
    Span,
    Status,
    StatusCode,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, FinishReason

from actors.tracing import Tracing

if TYPE_CHECKING:
    from actors.experts_client import ExpertsClient

P = ParamSpec("P")

logger = logging.getLogger(__name__)

MAX_STEPS = 64
"""Steps of one request that get a span of their own at one actor; later ones are only counted."""


@dataclass(slots=True, eq=False)
class _Stay:
    """A traced request at this actor.

    Args:
        request: vLLM's own object; its counters tell whether a step took it along.
        context: of the caller's span.
        span: of the phase that it is in.
        began: when that phase began, ns since 1970.
        computed: tokens whose keys and values were computed before the newest step.
    """

    request: Any
    context: Context
    span: Span
    began: int
    computed: int
    phase: str = "queue"
    tokens: int = 0
    steps: int = 0


def _harmless(
    method: Callable[Concatenate[RequestSpans, P], None],
) -> Callable[Concatenate[RequestSpans, P], None]:
    """No fault in a trace may cost a request: the first one ends this actor's traces instead."""

    @functools.wraps(method)
    def call(self: RequestSpans, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception:
            logger.exception("a trace failed; this actor traces no further request")
            self.failed = True
            self._stays.clear()

    return call


class RequestSpans:
    """Follows the traced requests of one engine.

    Args:
        tracing: exports the spans.
        client: of the engine; tells lanes, tokens and waiting time of a step.
    """

    def __init__(self, tracing: Tracing, client: ExpertsClient):
        self._tracing = tracing
        self._tracer = tracing.tracer
        self._client = client
        self._headers = TraceContextTextMapPropagator()
        self._stays: dict[str, _Stay] = {}
        self._idle = client.stats.idle_seconds
        self.failed = False

    @_harmless
    def admitted(self, request: Any, emitted: int) -> None:
        """A request (vLLM's ``Request``) was queued, to go on after ``emitted`` tokens."""
        if self.failed or not request.trace_headers:
            return
        context = self._headers.extract(request.trace_headers)
        if not get_current_span(context).get_span_context().trace_flags.sampled:
            return
        self.ended([request.request_id], "continued")  # a session's earlier part
        now = time.time_ns()
        about = {
            "afflux.request_id": request.request_id,
            "afflux.prompt_tokens": request.num_prompt_tokens,
            "afflux.tokens_before": emitted,
        }
        span = self._tracer.start_span("queue", context, attributes=about, start_time=now)
        computed = request.num_computed_tokens
        self._stays[request.request_id] = _Stay(request, context, span, now, computed)

    @_harmless
    def stepped(self, began: float, outputs: dict[int, Any]) -> None:
        """A step has ended; see ``AttentionEngine.observer``."""
        before, self._idle = self._idle, self._client.stats.idle_seconds
        if not self._stays:
            return
        step = _Step(self._client, began, self._idle - before)
        mine: dict[str, EngineCoreOutput] = {}
        for message in outputs.values():
            for output in message.outputs:
                if output.request_id in self._stays:
                    mine[output.request_id] = output
        for request_id, stay in [*self._stays.items()]:
            self._advance(request_id, stay, step, mine.get(request_id))

    def _advance(
        self, request_id: str, stay: _Stay, step: _Step, output: EngineCoreOutput | None
    ) -> None:
        # vLLM hands the events on with the first output; a long prompt takes steps without one.
        source = stay.request if output is None else output
        events = source.events or ()
        for event in events:
            at = step.unix_ns(event.timestamp)
            if event.type == EngineCoreEventType.SCHEDULED and stay.phase == "queue":
                self._enter(stay, "prefill", at)
                if source.prefill_stats is not None:
                    cached = source.prefill_stats.num_cached_tokens
                    stay.span.set_attribute("afflux.cached_tokens", cached)
                    stay.computed += cached
            elif event.type == EngineCoreEventType.PREEMPTED and output is not None:
                stay.span.add_event("preempted", timestamp=at)
        computed = stay.request.num_computed_tokens
        moved, stay.computed = computed - stay.computed, computed
        if moved > 0:
            self._note_step(stay, step, moved)
        if output is None:
            return
        stay.tokens += len(output.new_token_ids)
        if output.finish_reason is not None:
            self._end(request_id, str(output.finish_reason), output, at=step.ended)
        elif output.new_token_ids and stay.phase == "prefill":
            self._enter(stay, "decode", step.ended)

    def _enter(self, stay: _Stay, phase: str, at: int) -> None:
        at = max(at, stay.began)
        stay.span.end(at)
        stay.span = self._tracer.start_span(phase, stay.context, start_time=at)
        stay.phase, stay.began = phase, at

    def _note_step(self, stay: _Stay, step: _Step, tokens: int) -> None:
        stay.steps += 1
        if stay.steps > MAX_STEPS:
            return
        span = self._tracer.start_span(
            "step",
            set_span_in_context(stay.span, Context()),
            attributes={**step.attributes, "afflux.request_tokens": tokens},
            start_time=max(step.began, stay.began),
        )
        span.end(step.ended)

    @_harmless
    def ended(self, request_ids: Iterable[str], end: str) -> None:
        """Requests have left in another way than by an output; unknown ids are ignored."""
        for request_id in request_ids:
            if request_id in self._stays:
                self._end(request_id, end)

    def _end(
        self,
        request_id: str,
        end: str,
        output: EngineCoreOutput | None = None,
        at: int | None = None,
    ) -> None:
        stay = self._stays.pop(request_id)
        stay.span.set_attributes(
            {"afflux.end": end, "afflux.tokens": stay.tokens, "afflux.steps": stay.steps}
        )
        if output is not None and output.finish_reason == FinishReason.ERROR:
            stay.span.set_status(Status(StatusCode.ERROR, str(output.stop_reason)))
        stay.span.end(at)

    def close(self) -> None:
        """End and export what is open; for a thread that may wait (``tracing.CLOSE_S``)."""
        self.ended([*self._stays], "stopped")
        self._tracing.close()

    @property
    def followed(self) -> Collection[str]:
        """Ids of the traced requests that are here."""
        return self._stays.keys()


class _Step:
    """What one step's spans share; times in ns since 1970."""

    def __init__(self, client: ExpertsClient, began: float, wait_s: float):
        seconds = time.perf_counter() - began
        self.ended = time.time_ns()
        self.began = self.ended - int(seconds * 1e9)
        self._monotonic = self.ended - time.monotonic_ns()
        wait_s = min(wait_s, seconds)
        self.attributes = {
            "afflux.step": client.stats.steps,
            "afflux.epoch": client.epoch,
            "afflux.lanes": client.lanes,
            "afflux.batch_tokens": client.step_tokens,
            "afflux.compute_seconds": seconds - wait_s,
            "afflux.wait_seconds": wait_s,
        }

    def unix_ns(self, monotonic_s: float) -> int:
        """A time of ``time.monotonic()``."""
        return self._monotonic + int(monotonic_s * 1e9)
