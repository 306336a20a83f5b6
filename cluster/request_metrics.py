"""What one frontend measures about requests: latencies, lengths, outcomes and the targets met.

The pool tells what happens to a request (arrived, scheduled, tokens, finished); everything is
measured at this process, as its clients see it. A *request* is one of the engine: an HTTP request
with n choices counts n times. Not for vLLM's own metrics, which vLLM keeps beside these.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from actors.metrics.catalogue import OUTCOMES, REJECTIONS, SLOS
from actors.metrics.families import Families, Value
from cluster.arrivals import Arrival
from cluster.request_log import RequestLog
from cluster.spec import SLOSpec

Outcome = Literal["stop", "length", "abort", "error"]
Rejection = Literal["queue_full", "no_actor"]


@dataclass(slots=True, eq=False, weakref_slot=True)
class Journey:
    """What happened to a request so far; times in seconds of one monotonic clock.

    Args:
        arrived: at the front door.
        prompt_tokens: length of its prompt.
        arrival: of the HTTP request around it, to be told of the first token.
        scheduled: an attention actor first took it up. first, last: its first and newest token.
        tokens: output tokens.
        cached: prompt tokens that came from a prefix cache.
        replays: how often it was started again.
    """

    arrived: float
    prompt_tokens: int
    arrival: Arrival | None = None
    scheduled: float | None = None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    cached: int = 0
    replays: int = 0

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token; None while there is none."""
        return None if self.first is None else self.first - self.arrived

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None with fewer than two tokens."""
        if self.first is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(frozen=True, slots=True)
class InFlight:
    """Requests at an attention actor, those that wait for one, and all replays so far."""

    running: int = 0
    waiting: int = 0
    replays: int = 0


def verdicts(journey: Journey, outcome: Outcome, slo: SLOSpec) -> dict[str, bool]:
    """Which targets a finished request counts for, and whether it met them.

    Nobody waited for an aborted request's end, so it counts for none. An error meets none. An
    answer of one token has no time per token: it counts for ``ttft``, and for ``both`` by that.
    """
    if outcome == "abort":
        return {}
    if outcome == "error":
        return dict.fromkeys(SLOS, False)
    ttft, tpot = journey.ttft_s, journey.tpot_s
    if ttft is None:  # nothing was generated
        return {}
    met = {"ttft": ttft <= slo.ttft_s}
    if tpot is not None:
        met["tpot"] = tpot <= slo.tpot_s
    return {**met, "both": all(met.values())}


class RequestMetrics:
    """The metrics of a frontend; used by one event loop, scraped from any thread.

    Args:
        model_name: the name that clients use.
        frontend: this process, as in ``frontend-0``.
        slo: the targets.
        clock: seconds, the one that engines' events are mapped to.

    Attributes:
        families: holds the registry to be exported.
        log: single requests, for the controller.
    """

    def __init__(
        self,
        model_name: str,
        frontend: str,
        slo: SLOSpec,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.families = families = Families(
            "frontend", {"model_name": model_name, "role": "frontend", "actor_id": frontend}
        )
        self.clock = clock
        self.log = RequestLog(clock)
        self._slo = slo
        self._look: Callable[[], InFlight] = InFlight
        self._ttft = families["afd_time_to_first_token_seconds"]
        self._itl = families["afd_inter_token_latency_seconds"]
        self._tpot = families["afd_time_per_output_token_seconds"]
        self._e2e = families["afd_e2e_request_latency_seconds"]
        self._queue = families["afd_request_queue_time_seconds"]
        self._prefill = families["afd_request_prefill_time_seconds"]
        self._decode = families["afd_request_decode_time_seconds"]
        self._prompt_length = families["afd_request_prompt_tokens"]
        self._output_length = families["afd_request_generation_tokens"]
        self._prompt_tokens = families["afd_prompt_tokens_total"]
        self._output_tokens = families["afd_generation_tokens_total"]
        self._finished = _each(families, "afd_requests_total", OUTCOMES)
        self._rejected = _each(families, "afd_requests_rejected_total", REJECTIONS)
        self._counted = _each(families, "afd_slo_requests_total", SLOS)
        self._good = _each(families, "afd_slo_good_requests_total", SLOS)
        families.collect_from(
            self._collect,
            (
                "afd_requests_running",
                "afd_requests_waiting",
                "afd_requests_replayed_total",
                "afd_slo_target_seconds",
                "afd_slo_objective_ratio",
            ),
        )

    def follow(self, look: Callable[[], InFlight]) -> None:
        """From now on ``look`` tells what is in flight; it is called on any thread."""
        self._look = look

    def arrived(self, prompt_tokens: int, arrival: Arrival | None = None) -> Journey:
        """A request has begun; its time counts from ``arrival`` if that is given and not over."""
        if arrival is not None and not arrival.answered:
            journey = Journey(arrival.at, prompt_tokens, arrival)
        else:
            journey = Journey(self.clock(), prompt_tokens)
        self.log.arrived(journey)
        return journey

    def scheduled(self, journey: Journey, at: float) -> None:
        """An attention actor took it up; the first time counts."""
        if journey.scheduled is None:  # clocks of two machines agree within a message's time
            journey.scheduled = min(max(at, journey.arrived), self.clock())

    def tokens(self, journey: Journey, count: int, at: float) -> None:
        """A message with ``count`` > 0 output tokens came."""
        if journey.first is None:
            journey.first = at
            self._ttft.observe(at - journey.arrived)
            self.log.first_token(journey, at)
            self._prompt_tokens.inc(journey.prompt_tokens)
            if journey.arrival is not None:
                journey.arrival.answered = True
        else:
            self._itl.observe(at - journey.last)
            self.log.gap(at - journey.last)
        journey.last = at
        journey.tokens += count
        self._output_tokens.inc(count)
        self.log.tokens(count)

    def finished(self, journey: Journey, outcome: Outcome) -> None:
        """Nothing more will come. Only complete answers have a length and a duration."""
        self._finished[outcome].inc()
        self.log.done(journey, outcome)
        for slo, good in verdicts(journey, outcome, self._slo).items():
            self._counted[slo].inc()
            if good:
                self._good[slo].inc()
        if outcome not in ("stop", "length") or journey.first is None:
            return
        self._e2e.observe(journey.last - journey.arrived)
        self._decode.observe(journey.last - journey.first)
        if journey.scheduled is not None:
            self._queue.observe(journey.scheduled - journey.arrived)
            self._prefill.observe(max(0.0, journey.first - journey.scheduled))
        if journey.tpot_s is not None:
            self._tpot.observe(journey.tpot_s)
        self._prompt_length.observe(journey.prompt_tokens)
        self._output_length.observe(journey.tokens)

    def batch(self, since: int = 0, limit: int | None = None) -> dict[str, Any]:
        """Records above ``since`` and what is in flight; see ``RequestLog.since``.

        Returns:
            besides: ``running`` requests, and ``waiting`` ones that are at no actor.
        """
        now = self._look()
        return {**self.log.since(since, limit), "running": now.running, "waiting": now.waiting}

    def rejected(self, reason: Rejection) -> None:
        """A request was not accepted, or found no actor in time."""
        self._rejected[reason].inc()
        if reason == "queue_full":
            self.log.turned_away()
        else:
            self.log.refused()

    def _collect(self) -> Iterator[Value]:
        now = self._look()
        yield Value("afd_requests_running", (), now.running)
        yield Value("afd_requests_waiting", (), now.waiting)
        yield Value("afd_requests_replayed_total", (), now.replays)
        yield Value("afd_slo_target_seconds", ("ttft",), self._slo.ttft_s)
        yield Value("afd_slo_target_seconds", ("tpot",), self._slo.tpot_s)
        yield Value("afd_slo_objective_ratio", (), self._slo.percentile)


def _each(families: Families, name: str, values: tuple[str, ...]) -> dict[str, Any]:
    """The children of a metric with one label, all of them, so that they begin at zero."""
    metric = families[name]
    return {value: metric.labels(value) for value in values}
