"""Streams of greedy tokens under way while something happens to the deployment."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import openai

PROMPTS = (
    "The sea",
    "In the beginning",
    "And the king said unto his servants, Go ye",
    "Blessed is the man that walketh not",
    "Now it came to pass in the days when the judges ruled",
    "Praise",
)


@dataclass
class Stream:
    """One request's tokens and when each came (monotonic seconds)."""

    prompt: str
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""

    def gap(self, since: float) -> float:
        """Longest pause between tokens that ends after ``since``."""
        pairs = zip(self.times, self.times[1:], strict=False)
        return max((b - max(a, since) for a, b in pairs if b > since), default=0.0)


class Streams:
    """A few concurrent streams on a thread of their own; a context manager.

    Leaving it waits for the streams to end.

    Args:
        tokens: of each stream.
        again: start every prompt anew when it has ended, until the context is left.
        sampling: further parameters of the requests.
    """

    def __init__(
        self,
        url: str,
        key: str,
        model: str,
        *,
        tokens: int = 160,
        again: bool = False,
        **sampling: Any,
    ):
        self.all = [Stream(prompt) for prompt in PROMPTS]
        self._url, self._key, self._model = url, key, model
        self.wanted = tokens
        self._again = again
        self._body = {"max_tokens": tokens, "temperature": 0.0, **sampling}
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Streams:
        self._thread.start()
        deadline = time.monotonic() + 90
        while any(len(s.tokens) < 5 and not s.error for s in self.all):
            assert time.monotonic() < deadline, "the streams don't start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._again = False
        self._thread.join(300)
        assert not self._thread.is_alive(), "streams hang"

    @property
    def tokens(self) -> list[tuple[str, list[int]]]:
        """Prompt and token ids of every stream."""
        errors = {s.error for s in self.all if s.error}
        assert not errors, errors
        return [(stream.prompt, stream.tokens) for stream in self.all]

    def gap(self, since: float) -> float:
        """The longest pause of any stream."""
        return max(stream.gap(since) for stream in self.all)

    async def _run(self) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{self._url}/v1", api_key=self._key, max_retries=0, timeout=180
        ) as client:
            await asyncio.gather(*(self._repeat(client, stream) for stream in [*self.all]))

    async def _repeat(self, client: openai.AsyncOpenAI, stream: Stream) -> None:
        await self._follow(client, stream)
        while self._again:
            stream = Stream(stream.prompt)
            self.all.append(stream)
            await self._follow(client, stream)

    async def _follow(self, client: openai.AsyncOpenAI, stream: Stream) -> None:
        try:
            chunks = await client.completions.create(
                model=self._model,
                prompt=stream.prompt,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
                **self._body,
            )
            async for chunk in chunks:
                for choice in chunk.choices:
                    ids = getattr(choice, "token_ids", None) or []
                    stream.tokens += ids
                    stream.times += [time.monotonic()] * len(ids)
        except Exception as error:
            stream.error = f"{type(error).__name__}: {error}"
