"""An open loop of streaming completions: every request is sent at its moment, whatever became of
the ones before it.

Runs in a process of its own, as the closed loop of ``load`` does, whose streams it shares. Not for
judging what it saw: see ``attainment.py``.
"""

from __future__ import annotations

import asyncio

import aiohttp

from benchmarks.load import Driver, Load


class OpenLoad(Load):
    """Sends each request once, at ``Request.at`` after the start; ``concurrency`` and ``minimum``
    mean nothing here. ``stop`` sends nothing new, and breaks off what still streams after
    ``GRACE_S``: an overloaded deployment would else be waited for through its whole backlog."""

    def _driver(self) -> type[Driver]:
        return _OpenDriver


GRACE_S = 1.0
ENDED = "broken off at the end of the run"
"""The error of a stream that was still under way then."""


class _OpenDriver(Driver):
    async def _all(self, session: aiohttp.ClientSession) -> None:
        begin = asyncio.get_running_loop().time()
        streams: set[asyncio.Task[object]] = set()
        for index, request in enumerate(self._requests):
            while (left := begin + request.at - asyncio.get_running_loop().time()) > 0:
                if self._stopping:
                    break
                await asyncio.sleep(min(left, 0.1))
            if self._stopping:
                break
            streams.add(asyncio.create_task(self._one(session, index)))
        while not self._stopping and any(not stream.done() for stream in streams):
            await asyncio.wait(streams, timeout=0.1)
        if streams:
            _, late = await asyncio.wait(streams, timeout=GRACE_S)
            for stream in late:
                stream.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        self._break_off()

    def _break_off(self) -> None:
        """Streams that were cancelled have no end yet."""
        for stream in self._streams:
            if not stream.ended:
                stream.ended, stream.error = self._now(), ENDED
