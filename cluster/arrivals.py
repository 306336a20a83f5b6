"""When the HTTP request arrived that an engine request belongs to.

The time to the first token begins at the front door, before keys are checked, the prompt is
tokenised or the request waits for an actor. A context variable carries it there, since vLLM's code
lies in between. Not for measuring: see ``request_metrics``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send


class Arrival:
    """One HTTP request's arrival.

    An HTTP request may lead to several engine requests, one after the other (tools, beam search):
    once the first was ``answered``, the time that the others took no longer counts from here.

    Args:
        at: seconds of ``time.monotonic``.
    """

    __slots__ = ("answered", "at")

    def __init__(self, at: float):
        self.at = at
        self.answered = False


_arrival: ContextVar[Arrival | None] = ContextVar("afflux_arrival", default=None)


def current() -> Arrival | None:
    """The arrival of the surrounding HTTP request; None outside of one."""
    return _arrival.get()


class StampArrivals:
    """ASGI middleware that notes when a request arrived; put it outermost.

    Args:
        app: the app to run.
        clock: seconds, monotonic.
    """

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic):
        self.app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        token = _arrival.set(Arrival(self._clock()))
        try:
            await self.app(scope, receive, send)
        finally:
            _arrival.reset(token)
