"""Which attention actor takes a request (pure: no Ray, no vLLM, no clock).

One cost in tokens decides: the work that already waits at an actor plus the part of the prompt
that the actor would have to compute. An actor that has seen the prompt's beginning wins as long as
its queue isn't longer than what its prefix cache saves, nor far longer than the shortest one. Not
for admission or for retries.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

DECODE_TOKENS = 32
"""What a running request counts for, in prompt tokens: the decode steps that it still needs."""

UNEVEN_RATIO, UNEVEN_REQUESTS = 1.5, 4
"""An actor with more requests than the ratio times the least loaded one's, and so many besides, is
passed over whatever it has cached. Else a new actor would stay idle as long as everybody's prompt
begins with the same long document; once it has computed that, it is as good as the others."""


@dataclass(frozen=True, slots=True)
class Load:
    """What waits at one actor: requests in flight, and prompt tokens not yet computed."""

    requests: int = 0
    prefill_tokens: int = 0

    @property
    def cost(self) -> int:
        """The load in tokens."""
        return self.prefill_tokens + DECODE_TOKENS * self.requests


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen actor and how many leading prompt tokens it has probably cached."""

    actor: str
    cached_tokens: int


class Router:
    """Prefix affinity balanced with load.

    Args:
        block_size: tokens per hashed block; the prefix cache's block size is a good choice.
        capacity: how many (block, actor) pairs are remembered; the least recently used go first.
    """

    def __init__(self, block_size: int = 16, capacity: int = 65536):
        if block_size < 1 or capacity < 1:
            raise ValueError(f"block_size {block_size} and capacity {capacity} must be positive")
        self.block_size = block_size
        self.capacity = capacity
        self._seen: OrderedDict[tuple[bytes, str], None] = OrderedDict()
        self._turn = 0

    def __len__(self) -> int:
        return len(self._seen)

    def choose(
        self, prompt: Sequence[int], loads: Mapping[str, Load], *, salt: str = ""
    ) -> Choice | None:
        """Pick an actor for a prompt and remember that it will have seen it.

        Args:
            prompt: prompt token ids; may be empty (prompt given as embeddings).
            loads: every actor that may be chosen, with its load.
            salt: requests with different salts share no cache (LoRA adapter, ``cache_salt``).

        Returns:
            None when ``loads`` is empty.
        """
        if not loads:
            return None
        blocks = list(self._blocks(prompt, salt))
        # Equal actors take turns: without it, short prompts would all go to the first name.
        names = sorted(loads)
        self._turn = (self._turn + 1) % len(names)
        names = names[self._turn :] + names[: self._turn]
        cheapest = min(loads[name].cost for name in names)
        most = UNEVEN_RATIO * min(loads[name].requests for name in names) + UNEVEN_REQUESTS
        names = [n for n in names if loads[n].requests <= most or loads[n].cost == cheapest]
        cached = {name: self._cached_tokens(blocks, name) for name in names}
        best = min(names, key=lambda name: (loads[name].cost - cached[name], loads[name].requests))
        self._remember(blocks, best)
        return Choice(best, cached[best])

    def forget(self, actor: str) -> None:
        """Drop what is known about an actor that has gone or has lost its cache."""
        for key in [key for key in self._seen if key[1] == actor]:
            del self._seen[key]

    def _blocks(self, prompt: Sequence[int], salt: str) -> Iterator[bytes]:
        """Chained digests, so that a block only matches behind the same beginning."""
        digest = blake2b(salt.encode(), digest_size=16)
        for start in range(0, len(prompt) - self.block_size + 1, self.block_size):
            block = prompt[start : start + self.block_size]
            digest.update(b"".join(token.to_bytes(8, "little", signed=True) for token in block))
            yield digest.digest()

    def _cached_tokens(self, blocks: Sequence[bytes], actor: str) -> int:
        for index, block in enumerate(blocks):
            if (block, actor) not in self._seen:
                return index * self.block_size
        return len(blocks) * self.block_size

    def _remember(self, blocks: Sequence[bytes], actor: str) -> None:
        # Last block first, so that the beginning of a prompt is the last to be forgotten: a block
        # is only useful when every block before it is still known.
        for block in reversed(blocks):
            self._seen[(block, actor)] = None
            self._seen.move_to_end((block, actor))
        while len(self._seen) > self.capacity:
            self._seen.popitem(last=False)
