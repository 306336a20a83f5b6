"""Turns a cancelled request into a disconnect, so that abandoned requests leave the engine.

When a client goes away, Ray Serve cancels the task that runs the app. vLLM's handlers wait for the
ASGI message ``http.disconnect`` instead: cancelled from outside, they leave the generation running
as an orphan. This middleware stands in between. It knows nothing of requests or engines.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

WIND_DOWN_S = 5.0


class DisconnectOnCancel:
    """ASGI middleware: the app sees ``http.disconnect`` when the surrounding task is cancelled."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        gone = asyncio.Event()
        app = asyncio.ensure_future(self.app(scope, _Until(gone, receive), send))
        try:
            await asyncio.shield(app)
        except asyncio.CancelledError:
            gone.set()
            await asyncio.wait([app], timeout=WIND_DOWN_S)
            if not app.done():
                app.cancel()
            elif not app.cancelled():
                app.exception()  # nobody is left to be told
            raise


class _Until:
    """``receive`` that answers ``http.disconnect`` once ``gone`` is set."""

    def __init__(self, gone: asyncio.Event, receive: Receive):
        self._gone = gone
        self._receive = receive

    async def __call__(self) -> Message:
        message: asyncio.Future[Any] = asyncio.ensure_future(self._receive())
        gone = asyncio.ensure_future(self._gone.wait())
        try:
            await asyncio.wait([message, gone], return_when=asyncio.FIRST_COMPLETED)
            if self._gone.is_set():
                return {"type": "http.disconnect"}
            return message.result()
        finally:
            for waiting in (message, gone):
                if not waiting.done():
                    waiting.cancel()
                elif not waiting.cancelled():
                    waiting.exception()
