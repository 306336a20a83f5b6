"""Requests in flight and the actors that they are at: the data behind ``pool.py``, and its errors.

A ``Flight`` knows everything that is needed to start its request again elsewhere: the request as
the engine client got it and the tokens that were handed on. Not for deciding where it goes.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from vllm.exceptions import GracefulHTTPError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason

from cluster.request_metrics import Journey
from cluster.routing import Load

if TYPE_CHECKING:
    from cluster.tracing import Trail

MAX_REPLAYS = 5
"""How often one request is started again after a fault; drained actors don't count."""

REPLAYABLE = frozenset({"peer_lost", "peer_timeout", "peer_refused", "no_holder", "stale_epoch"})
"""Codes of step errors that say nothing against the request: experts were out of reach."""

_CODE = re.compile(r"\[([a-z_]+)\] ")


class RequestLost(GracefulHTTPError):
    """A request that could not be brought to its end; safe to send again (503)."""

    def __init__(self, message: str):
        super().__init__(message, HTTPStatus.SERVICE_UNAVAILABLE)


class NoAttentionActor(RequestLost):
    """No attention actor is alive to take the request (503)."""


@dataclass(slots=True, eq=False)
class Flight:
    """A request in flight.

    Args:
        request: the request as the engine client got it.
        session: a streaming-input session; its parts are known to its actor only, so it can't move.
        actor: name of the actor that it is at; None while it waits for one.
        emitted: token ids that were handed to the engine client's reader.
        prefill_tokens: tokens that the actor probably has still to compute before the next one.
        faults: how often it was started again because of a fault.
        refusals: how often living actors have given it back since its last token.
        avoid: the actor where it failed last; another one is preferred.
        not_before: loop time before which it isn't sent again.
        deadline: the timer that ends its waiting.
        journey: when what happened to it, for metrics; None without metrics.
        trail: its stays at actors, for traces; None without tracing.
    """

    request: EngineCoreRequest
    session: bool = False
    actor: str | None = None
    emitted: list[int] = field(default_factory=list)
    prefill_tokens: int = 0
    faults: int = 0
    refusals: int = 0
    avoid: str | None = None
    not_before: float = 0.0
    deadline: asyncio.TimerHandle | None = None
    journey: Journey | None = None
    trail: Trail | None = None

    @property
    def id(self) -> str:
        """The engine's id of the request."""
        return self.request.request_id

    @property
    def prompt(self) -> list[int]:
        """Prompt token ids; empty when the prompt came as embeddings."""
        return self.request.prompt_token_ids or []

    @property
    def tokens(self) -> list[int]:
        """Prompt and emitted token ids: what an actor has to compute to go on."""
        return [*self.prompt, *self.emitted] if self.emitted else self.prompt

    @property
    def complete(self) -> bool:
        """Every token that was asked for has been emitted."""
        params = self.request.sampling_params
        limit = params.max_tokens if params is not None else None
        return limit is not None and len(self.emitted) >= limit

    def settle(self) -> None:
        """An actor has taken it: waiting is over."""
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


@dataclass(slots=True, eq=False)
class Member:
    """An attention actor in the pool; ``engine_index`` is its label in vLLM's metrics.

    It gets no requests before it says that it has this pool for its listener: Ray keeps no order
    between calls, and a request must not be taken for one of an older listener's.
    """

    name: str
    handle: Any
    engine_index: int
    listening: bool = False
    draining: bool = False
    pump: asyncio.Task[None] | None = None
    flights: dict[str, Flight] = field(default_factory=dict)
    _clock: float = math.inf

    @property
    def open(self) -> bool:
        """Whether it takes requests."""
        return self.listening and not self.draining

    @property
    def load(self) -> Load:
        """What waits at this actor, as this pool knows it."""
        prefill = sum(flight.prefill_tokens for flight in self.flights.values())
        return Load(len(self.flights), prefill)

    def label(self, outputs: EngineCoreOutputs) -> None:
        """Put this member's label on outputs, and this process's clock into them.

        vLLM takes differences of the engine's monotonic times over the life of a request, and a
        request may see several engines on several machines.
        """
        outputs.engine_index = self.engine_index
        self._clock = min(self._clock, time.monotonic() - outputs.timestamp)
        outputs.timestamp += self._clock
        for output in outputs.outputs:
            for event in output.events or ():
                event.timestamp += self._clock


def fault_of(output: EngineCoreOutput) -> str | None:
    """The code of a step error that leaves the request intact; None for any other output."""
    if output.finish_reason != FinishReason.ERROR or not isinstance(output.stop_reason, str):
        return None
    match = _CODE.match(output.stop_reason)
    return match[1] if match is not None and match[1] in REPLAYABLE else None
