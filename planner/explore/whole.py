"""Steps of a replica whose GPUs do both sides, and the memory they take.

Attention, experts and the exchange between them follow each other; nothing overlaps. What the steps
add up to is ``aggregated``'s and ``pd``'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from planner.explore import memory
from planner.explore.kernels.base import Array, KernelDB, Load, NotCovered, Provenance, Sides, Time
from planner.explore.points import Group
from planner.explore.question import Question
from planner.explore.split import Split

Indices = NDArray[np.intp]
_SIDES = Sides()


@dataclass
class Steps:
    """Step times of one question's replicas, remembered by attention rank.

    Args:
        question: model, system.
        db: kernel times.

    Attributes:
        missing: one of the refusals; "" without.
    """

    question: Question
    db: KernelDB
    missing: str = ""

    def __post_init__(self) -> None:
        self._attention: dict[tuple[int, int, bytes], Array] = {}

    def seconds(self, split: Split, load: Load) -> Array:
        """Of each load, one dimension; nan where nothing is known."""
        db, tokens = self._kernels(split), load.tokens
        known = self._rank(db, split.tp, load)
        model, moe = self.question.model, (split.moe_tp, split.ep)
        known = known + self._asked(
            lambda chosen: db.experts(model, *moe, _SIDES, split.dp * tokens[chosen]),
            np.isfinite(known),
        )
        return known + self._asked(
            lambda chosen: db.exchange(model, split.tp, split.dp, *moe, tokens[chosen]),
            np.isfinite(known),
        )

    def times(self, split: Split, load: Load) -> Mapping[str, Time]:
        """By stage, with provenance.

        Raises:
            NotCovered: nothing is known of some of these loads.
        """
        db, model, tokens = self._kernels(split), self.question.model, load.tokens
        moe = (split.moe_tp, split.ep)
        return {
            "attention": db.attention(model, split.tp, _SIDES, load),
            "ffn": db.experts(model, *moe, _SIDES, split.dp * tokens),
            "exchange": db.exchange(model, split.tp, split.dp, *moe, tokens),
        }

    def _kernels(self, split: Split) -> KernelDB:
        """What GPUs run that do both sides, where the source knows that to differ."""
        replica = getattr(self.db, "replica", None)
        if replica is None:
            return self.db
        kernels: KernelDB = replica(self.question.model, split.tp, split.dp, split.moe_tp, split.ep)
        return kernels

    def _rank(self, db: KernelDB, tp: int, load: Load) -> Array:
        """Attention: mostly the same whatever the number of ranks and the split of the experts."""
        columns = np.stack(np.broadcast_arrays(*(getattr(load, f.name) for f in fields(load))))
        key = (id(db), tp, columns.tobytes())
        if key not in self._attention:
            self._attention[key] = self._asked(
                lambda chosen: db.attention(
                    self.question.model, tp, _SIDES, Load(*columns[:, chosen])
                ),
                np.ones(columns.shape[1], bool),
            )
        return self._attention[key]

    def _asked(self, ask: Callable[[Indices], Time], wanted: NDArray[np.bool_]) -> Array:
        """Seconds where wanted and known, else nan.

        Args:
            ask: the times of loads, by index.
        """
        seconds = np.full(len(wanted), np.nan)
        chosen = np.flatnonzero(wanted)
        try:
            if len(chosen):
                seconds[chosen] = np.broadcast_to(ask(chosen).seconds, len(chosen))
        except NotCovered as error:
            self.missing = self.missing or str(error)
            if error.covered is not None and np.any(error.covered):
                chosen = chosen[np.broadcast_to(error.covered, len(chosen))]
                seconds[chosen] = np.broadcast_to(ask(chosen).seconds, len(chosen))
        return seconds


def shares_of(weighted: list[tuple[float, Time]]) -> dict[Provenance, float]:
    """Shares by provenance of times that occur so many times each."""
    sums: dict[Provenance, float] = {}
    for count, time in weighted:
        for key, part in time.parts.items():
            sums[key] = sums.get(key, 0.0) + count * float(np.sum(part))
    total = sum(sums.values())
    return {key: value / total for key, value in sums.items() if value > 0} if total else {}


@dataclass(frozen=True)
class Room:
    """Bytes on a GPU of a replica.

    Args:
        fixed: weights, communication, libraries.
        per_token: activations of a token that an attention rank computes in a step.
        per_request: KV cache of a request at its end.
        allowed: what may be used.
    """

    fixed: float
    per_token: float
    per_request: float
    allowed: float

    def used(self, requests: Array, tokens: Array) -> Array:
        """Bytes with so many requests of a rank, and so many tokens in its largest step."""
        live = np.maximum(memory.LEAST_ACTIVATIONS, self.per_token * tokens)
        return self.fixed + live + self.per_request * requests

    def most_requests(self, tokens: float) -> int:
        """Requests of a rank that fit beside a step of so many tokens."""
        left = self.allowed - float(self.used(np.zeros(()), np.asarray(tokens)))
        return max(0, int(left // self.per_request))


def room_of(question: Question, split: Split, longest: float | None = None) -> Room:
    """Of a question's replica.

    Args:
        longest: context of a request at its end; none: that of the question's requests.
    """
    model, many = question.model, 1_000_000.0
    whole = memory.worker(
        model,
        tp=split.tp,
        dp=split.dp,
        moe_tp=split.moe_tp,
        ep=split.ep,
        tokens=many,
        requests=1.0,
        longest=question.shape.longest if longest is None else longest,
    )
    return Room(
        fixed=whole.weights + whole.buffers,
        per_token=whole.activations / many,
        per_request=whole.kv,
        allowed=question.system.gpu.memory * question.options.memory_share,
    )


def group_of(
    question: Question,
    split: Split,
    role: str,
    replicas: int,
    requests: float,
    tokens: float,
    longest: float | None = None,
) -> Group:
    """What such replicas are, for a point; ``longest`` as in ``room_of``."""
    room = room_of(question, split, longest)
    return Group(
        role=role,
        replicas=replicas,
        tp=split.tp,
        dp=split.dp,
        moe_tp=split.moe_tp,
        ep=split.ep,
        gpus=split.gpus,
        memory=float(room.used(np.asarray(requests), np.asarray(tokens))),
        room=room.allowed,
    )
