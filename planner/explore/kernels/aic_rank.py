"""What an attention rank does in a step, tabulated as it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from planner.explore.kernels.adaptive import Adaptive
from planner.explore.kernels.aic_coverage import Coverage, SequenceCover
from planner.explore.kernels.aic_engine import Engine
from planner.explore.kernels.aic_package import Op, Phase
from planner.explore.kernels.aic_parts import Parts
from planner.explore.kernels.aic_sums import Sums, Work, group
from planner.explore.kernels.base import Array, Load

Compile = Callable[[dict[Phase, Sequence[Op]]], Engine]


@dataclass
class Rank:
    """Operations of one rank; see ``Parts``.

    Args:
        first: position of attention in decode in the engine's list.
    """

    both: list[Work]
    prompt: list[Work]
    decoding: list[Work]
    output: list[Work]
    router: list[Work]
    shared: list[Work]
    context: list[SequenceCover]
    generation: list[SequenceCover]
    engine: Engine
    first: int
    _decode: dict[int, list[Adaptive]] = field(default_factory=dict)
    _prompts: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)

    def add(self, sums: Sums, load: Load, *, router: bool, shared: bool, hide: bool) -> None:
        """A step, loads of one shape.

        Args:
            router, shared: whether these are here.
            hide: shared experts cost nothing in steps of decode alone.
        """
        tokens, some = load.decode + load.prefill, load.prefill > 0
        sums.work(self.both, tokens)
        sums.work(self.prompt, load.prefill)
        sums.work(self.decoding, load.decode)
        sampled = load.decode + np.where(some, load.prompts, 0.0)
        # output heads are wider than any matrix that was measured
        sums.work(self.output, sampled, refusable=False)
        if router:
            sums.work(self.router, tokens)
        if shared:
            sums.work(self.shared, np.where(some, tokens, 0.0) if hide else tokens)
        self._add_decode(sums, load.decode, load.context)
        self._add_prompts(sums, load.prefill, load.past, load.prompts)

    def _add_decode(self, sums: Sums, decode: Array, context: Array) -> None:
        """Attention of requests that get one token each."""
        wanted = np.rint(context).astype(int)
        for length in np.unique(wanted[decode > 0]).tolist():
            if length not in self._decode:
                self._decode[length] = [
                    self._curve(length, position) for position in range(len(self.generation))
                ]
            chosen = (wanted == length) & (decode > 0)
            for curve, cover in zip(self._decode[length], self.generation, strict=True):
                seconds = np.where(chosen, curve(decode), 0.0)
                sums.add("attention in decode", seconds, cover.labels(decode, float(length)))

    def _curve(self, length: int, position: int) -> Adaptive:
        """Seconds of an operation by requests with ``length`` tokens in the cache."""
        at = [self.first + position]
        # the token itself is in the cache when it is attended to
        return Adaptive(
            lambda requests: self.engine.total_generation(at, requests, length + 1),
            self.generation[position].points,
        )

    def _add_prompts(self, sums: Sums, prefill: Array, past: Array, prompts: Array) -> None:
        """Attention of prompt tokens: every load is asked for, there are few."""
        some = prefill > 0
        if not np.any(some):
            return
        whole = np.maximum(np.rint(prompts), 1.0)
        each = np.maximum(np.rint(prefill / prompts), 1.0)
        loads = np.stack([whole, each, np.rint(past)], axis=-1).astype(int)
        rows, back = np.unique(loads[some], axis=0, return_inverse=True)
        table = []
        for row in rows.tolist():
            key = (row[0], row[1], row[2])
            if key not in self._prompts:
                self._prompts[key] = self.engine.context(range(len(self.context)), *key)
            table.append(self._prompts[key])
        seconds = np.zeros((len(self.context), *prefill.shape))
        # whole prompts stand for as many tokens as there are
        scale = (prefill / (whole * each))[some]
        seconds[:, some] = np.array(table).T[:, back.reshape(-1)] * scale
        for one, cover in zip(seconds, self.context, strict=True):
            sums.add("attention of prompts", one, cover.labels(whole, each + past))


def rank_of(parts: Parts, reduces: Sequence[Op], coverage: Coverage, compile_: Compile) -> Rank:
    """A rank of a model's parts.

    Args:
        reduces: collectives within the rank.
        compile_: an engine for operations by phase.
    """
    lists = (
        [*parts.both, *reduces], parts.prompt, parts.decoding, parts.output, parts.router,
        parts.shared,
    )  # fmt: skip
    flat = [op for ops in lists for op in ops]
    engine = compile_({"generation": [*flat, *parts.generation], "context": parts.context})
    both, prompt, decoding, output, router, shared = works_of(engine, lists, coverage)
    return Rank(
        both=both,
        prompt=prompt,
        decoding=decoding,
        output=output,
        router=router,
        shared=shared,
        context=[coverage.sequence(op) for op in parts.context],
        generation=[coverage.sequence(op) for op in parts.generation],
        engine=engine,
        first=len(flat),
    )


def works_of(engine: Engine, lists: Sequence[Sequence[Op]], coverage: Coverage) -> list[list[Work]]:
    """Operations that depend on tokens only, tabulated.

    Args:
        engine: whose list "generation" begins with all of these, in order.
    """
    found, start = [], 0
    for ops in lists:
        names = [next(iter(op.values()))["name"] for op in ops]
        total = _total(engine, start, max(map(_least, ops), default=1))
        found.append(group(names, [coverage.tokens(op) for op in ops], total))
        start += len(ops)
    return found


def _total(engine: Engine, start: int, least: int) -> Callable[[list[int], int], float]:
    return lambda at, tokens: engine.total([start + one for one in at], max(tokens, least))


def _least(op: Op) -> int:
    """Tokens below which a GPU of those that divide them among each other would have none."""
    fields = next(iter(op.values()))
    return max(int(fields.get(key, 1)) for key in ("scale_num_tokens", "attention_tp_size"))
