"""A closed loop of streaming completions that notes when every token arrived, and which it was.

Runs in a process of its own, so that what the benchmark does meanwhile does not delay its clock.
Works against any OpenAI server that returns token ids (vLLM's do). Not for judging what it saw:
see ``gaps.py``.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp

STALL_S = 120.0
"""A stream without a token for longer counts as failed."""

LOOK_S = 0.1

OPENINGS = (
    "Tell me about the sea.",
    "Tell me a story.",
    "In the beginning God created the heaven and the earth.",
    "And it came to pass in those days,",
    "The LORD is my shepherd;",
    "Recite John 3:16.",
    "Blessed is the man that walketh not in the counsel of the ungodly,",
    "And the king said unto his servants,",
    "Tell me about the mountains, and of the rivers that run among the hills.",
    "Behold, a sower went forth to sow;",
    "Now these are the names of the children of Israel, which came into the land;",
    "A soft answer turneth away wrath:",
    "To every thing there is a season, and a time to every purpose under the heaven:",
    "Then spake the prophet, and lifted up his voice before the people,",
    "And there was a famine in the land,",
    "He that hath ears to hear, let him hear.",
)


@dataclass(frozen=True)
class Request:
    """One thing to ask: greedy, exactly ``max_tokens`` tokens.

    Args:
        prompt: text, or token ids.
        at: seconds from the start of an open loop; a closed loop does not look at it.
    """

    prompt: str | tuple[int, ...]
    max_tokens: int
    at: float = 0.0


@dataclass
class Stream:
    """What came back for a request.

    Times are Unix seconds, ``times[i]`` that of ``tokens[i]``; tokens of one message share theirs.
    ``asked`` is the request's place in the list; ``error`` is empty when all went well.
    """

    asked: int
    sent: float
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""


@dataclass(frozen=True)
class Progress:
    """Counts so far."""

    sent: int = 0
    completed: int = 0
    failed: int = 0
    tokens: int = 0

    @property
    def done(self) -> int:
        """Streams that have ended, one way or the other."""
        return self.completed + self.failed


def make_requests(
    seed: int, count: int, *, tokens: tuple[int, int] = (48, 128)
) -> tuple[Request, ...]:
    """``count`` different requests: prompts of one to five openings, lengths in ``tokens``."""
    dice = random.Random(f"load {seed}")
    made = []
    for number in range(count):
        openings = dice.sample(OPENINGS, dice.randint(1, 5))
        made.append(Request(f"{number}. {' '.join(openings)}", dice.randint(*tokens)))
    return tuple(made)


class Load:
    """``concurrency`` streams at a time, the requests in turn and again from the first, until told
    to stop and at least ``minimum`` have been sent. Streams under way are then finished.

    Args:
        url: of the server, without ``/v1``.
        model: the name it serves the model under.
        key: an API key, or None.
        extra: further fields of every request's body.
    """

    def __init__(
        self,
        url: str,
        model: str,
        requests: Sequence[Request],
        *,
        concurrency: int,
        minimum: int = 0,
        key: str | None = None,
        stall_s: float = STALL_S,
        extra: Mapping[str, Any] | None = None,
    ):
        self._streams: list[Stream] | None = None
        context = multiprocessing.get_context("spawn")
        self._counts = context.Array("q", 4, lock=False)  # as in Progress
        self._pipe, theirs = context.Pipe()
        given = (tuple(requests), concurrency, minimum, key, stall_s, dict(extra or {}))
        self._process = context.Process(
            target=_process,
            args=(self._driver(), theirs, self._counts, url, model, *given),
            daemon=True,
        )
        self._process.start()
        theirs.close()

    def _driver(self) -> type[Driver]:
        """What runs in the process."""
        return Driver

    def progress(self) -> Progress:
        """How far it is.

        Raises:
            RuntimeError: the load failed, or its process ended by itself.
        """
        self._take(0.0)
        return Progress(*self._counts)

    def wait_done(self, count: int, timeout_s: float) -> bool:
        """Wait until ``count`` streams have ended; False when that takes too long."""
        deadline = time.monotonic() + timeout_s
        while self.progress().done < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(LOOK_S)
        return True

    def stop(self) -> None:
        """Send nothing new beyond the minimum; returns at once."""
        with suppress(OSError):
            self._pipe.send("stop")

    def streams(self, timeout_s: float = 300.0) -> list[Stream]:
        """Every stream in the order of sending, once all have ended (``stop`` comes first).

        Raises:
            TimeoutError: they did not end in time.
        """
        deadline = time.monotonic() + timeout_s
        while self._streams is None:
            if time.monotonic() > deadline:
                now = self.progress()
                raise TimeoutError(
                    f"{now.sent - now.done} streams did not end within {timeout_s:g} s"
                )
            self._take(LOOK_S)
        self.close()
        return self._streams

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join(10)
        self._pipe.close()

    def _take(self, timeout_s: float) -> None:
        """Read the result if it is there; wait for it up to ``timeout_s``."""
        if self._streams is not None:
            return
        try:
            if not self._pipe.poll(timeout_s):
                return
            message = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise RuntimeError(
                f"the load generator ended by itself, exit code {self._process.exitcode}"
            ) from None
        if isinstance(message, str):
            raise RuntimeError(f"the load generator failed: {message}")
        self._streams = message


# -- inside the process ----------------------------------------------------------------------------


def _process(driver: type[Driver], pipe: Any, counts: Any, *arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the benchmark's to handle
    try:
        pipe.send(asyncio.run(driver(pipe, counts, *arguments).run()))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


_SENT, _COMPLETED, _FAILED, _TOKENS = range(4)


class Driver:
    """The closed loop."""

    def __init__(
        self,
        pipe: Any,
        counts: Any,
        url: str,
        model: str,
        requests: Sequence[Request],
        concurrency: int,
        minimum: int,
        key: str | None,
        stall_s: float,
        extra: dict[str, Any],
    ):
        self._pipe = pipe
        self._counts = counts
        self._url = f"{url}/v1/completions"
        self._model = model
        self._requests = requests
        self._concurrency = concurrency
        self._minimum = minimum
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._stall_s = stall_s
        self._extra = extra
        self._streams: list[Stream] = []
        self._stopping = False
        # A clock that is never set back, and that other processes can compare with theirs
        self._zero = time.time() - time.monotonic()

    def _now(self) -> float:
        return self._zero + time.monotonic()

    async def run(self) -> list[Stream]:
        """Returns every stream once told to stop."""
        listener = asyncio.create_task(self._listen())
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=self._stall_s)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(
            timeout=timeout, connector=connector, headers=self._headers
        ) as session:
            await self._all(session)
        listener.cancel()
        return self._streams

    async def _all(self, session: aiohttp.ClientSession) -> None:
        """Sends everything; returns when all streams have ended."""
        await asyncio.gather(*(self._worker(session) for _ in range(self._concurrency)))

    async def _worker(self, session: aiohttp.ClientSession) -> None:
        while not self._stopping or len(self._streams) < self._minimum:
            stream = await self._one(session, len(self._streams) % len(self._requests))
            if stream.error:
                await asyncio.sleep(0.2)  # a server that refuses everything is not hammered

    async def _one(self, session: aiohttp.ClientSession, index: int) -> Stream:
        """The request of that place, from sending to its end."""
        stream = Stream(asked=index, sent=self._now())
        self._streams.append(stream)
        self._counts[_SENT] += 1
        request = self._requests[index]
        try:
            await self._stream(session, request, stream)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            stream.error = f"{type(error).__name__}: {error}".rstrip(": ")
        if not stream.error and len(stream.tokens) != request.max_tokens:
            stream.error = f"{len(stream.tokens)} of {request.max_tokens} tokens came"
        stream.ended = self._now()
        self._counts[_FAILED if stream.error else _COMPLETED] += 1
        return stream

    async def _stream(
        self, session: aiohttp.ClientSession, request: Request, stream: Stream
    ) -> None:
        body = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            **self._extra,
        }
        async with session.post(self._url, json=body) as answer:
            if answer.status != 200:
                stream.error = f"HTTP {answer.status}: {(await answer.text())[:300]}"
                return
            finished = False
            async for line in answer.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    finished = True
                    break
                self._take(json.loads(data), stream)
            if not finished and not stream.error:
                stream.error = "the stream ended without [DONE]"

    def _take(self, message: dict[str, Any], stream: Stream) -> None:
        if "error" in message:
            stream.error = f"error in the stream: {json.dumps(message['error'])[:300]}"
            return
        now = self._now()
        for choice in message.get("choices", ()):
            tokens = choice.get("token_ids") or ()
            stream.tokens.extend(tokens)
            stream.times.extend([now] * len(tokens))
            self._counts[_TOKENS] += len(tokens)

    async def _listen(self) -> None:
        while not self._pipe.poll():
            await asyncio.sleep(LOOK_S)
        self._stopping = True
