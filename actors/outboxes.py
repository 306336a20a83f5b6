"""Messages on their way to clients, one outbox per client and at most one listener each.

A client that has given no sign of life for long is gone: its outbox is closed, and whoever puts
messages is told so. Used on the event loop only. Not for engines or requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

SILENCE_S = 60.0
"""Seconds without a sign of life after which a client counts as gone."""

_END = object()


class Outboxes:
    """Outboxes by client.

    Args:
        silence_s: see ``SILENCE_S``.
        clock: seconds, monotonic.
    """

    def __init__(
        self, silence_s: float = SILENCE_S, *, clock: Callable[[], float] = time.monotonic
    ):
        self.silence_s = silence_s
        self._clock = clock
        self._boxes: dict[int, asyncio.Queue[Any]] = {}
        self._heard: dict[int, float] = {}
        self._listened: set[int] = set()

    def heard(self, client: int) -> None:
        """A client has given a sign of life."""
        self._heard[client] = self._clock()

    def listened(self, client: int) -> bool:
        """Whether somebody has listened for this client already."""
        return client in self._listened

    def put(self, client: int, message: Any) -> bool:
        """Queue a message, for a listener that may still come.

        Returns:
            False when the client is gone: the message is dropped, and all that waited with it.
        """
        now = self._clock()
        if now - self._heard.setdefault(client, now) > self.silence_s:
            self.renew(client)
            return False
        self._box(client).put_nowait(message)
        return True

    def renew(self, client: int) -> None:
        """Empty a client's outbox and end its listener's stream, if it has one."""
        box = self._boxes.pop(client, None)
        if box is not None:
            _close(box)
        self._listened.discard(client)
        self._heard.pop(client, None)

    def close(self) -> None:
        """End every stream once its messages are read."""
        for box in self._boxes.values():
            box.put_nowait(_END)

    async def listen(self, client: int) -> AsyncIterator[Any]:
        """A client's messages, with those that came before anybody listened."""
        self.heard(client)
        self._listened.add(client)
        box = self._box(client)
        while (message := await box.get()) is not _END:
            yield message

    def _box(self, client: int) -> asyncio.Queue[Any]:
        return self._boxes.setdefault(client, asyncio.Queue())


def _close(box: asyncio.Queue[Any]) -> None:
    while not box.empty():
        box.get_nowait()
    box.put_nowait(_END)
