"""How many requests one frontend replica takes: beyond a limit, HTTP 429 instead of a longer queue.

Only requests that run the model count; health, metrics, lists of models, tokenising and cancelling
pass. Not for fairness between users, and not a queue: whoever is refused is told when to come back.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

WINDOW_S = 30.0
"""How far back completions are counted for the rate."""

SHORTEST_S, LONGEST_S = 1, 60
"""Bounds of Retry-After, in seconds."""

_FREE_ENDINGS = (
    "/tokenize",
    "/detokenize",
    "/count_tokens",
    "/render",
    "/derender",
    "/cancel",
    "_lora_adapter",
)
_PREFIXES = ("/v1/", "/v2/", "/inference/", "/cohere/")
_MORE_PATHS = frozenset(
    {"/invocations", "/classify", "/pooling", "/score", "/rerank", "/generative_scoring"}
)


class Admission:
    """ASGI middleware: at most ``limit`` requests that run the model at one time.

    Args:
        app: the app to run.
        limit: requests in hand, from arrival to the last byte of the answer.
        on_refused: called for every request that is refused.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: int,
        *,
        on_refused: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.app = app
        self.limit = limit
        self.in_hand = 0
        self._on_refused = on_refused
        self._clock = clock
        self._finished: deque[float] = deque(maxlen=4096)
        self._refused: deque[float] = deque(maxlen=4096)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not runs_the_model(scope):
            await self.app(scope, receive, send)
            return
        if self.in_hand >= self.limit:
            await self._refuse()(scope, receive, send)
            return
        self.in_hand += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.in_hand -= 1
            self._finished.append(self._clock())

    def _refuse(self) -> JSONResponse:
        if self._on_refused is not None:
            self._on_refused()
        now = self._clock()
        self._refused.append(now)
        seconds = retry_after_s(self._finished, self._refused, now)
        message = (
            f"{self.limit} requests are in hand, which is the limit of this server; "
            f"try again in {seconds} s"
        )
        error = {"message": message, "type": "Too Many Requests", "param": None, "code": 429}
        headers = {"Retry-After": str(seconds)}
        return JSONResponse({"error": error}, status_code=429, headers=headers)


def runs_the_model(scope: Scope) -> bool:
    """Whether a request takes a place."""
    if scope["type"] != "http" or scope.get("method") != "POST":
        return False
    path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
    if path.endswith(_FREE_ENDINGS):
        return False
    return path.startswith(_PREFIXES) or path in _MORE_PATHS


def retry_after_s(finished: Sequence[float], refused: Sequence[float], now: float) -> int:
    """When a refused request has a fair chance: whole seconds from 1 to 60.

    Places become free at the rate of the recent completions, and who was refused lately wants one
    too.

    Args:
        finished: times of completions, oldest first.
        refused: times of refusals, the one in question included.
        now: the time now, on the same clock.
    """
    recent = [then for then in finished if now - then <= WINDOW_S]
    if not recent:
        return LONGEST_S
    rate = len(recent) / max(now - recent[0], 1.0)
    rivals = sum(now - then <= SHORTEST_S for then in refused)
    return min(LONGEST_S, max(SHORTEST_S, math.ceil(max(rivals, 1) / rate)))
