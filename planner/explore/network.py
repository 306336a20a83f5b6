"""What attention and FFN GPUs of AFD send each other per layer, and how long that takes.

They exchange hidden states M to N: every sender fans out, every receiver takes from all. How long
bytes take on a system's tiers is the business of ``transfers``. Experts are loaded evenly here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from planner.errors import PlannerError
from planner.explore.calibration import Calibration
from planner.explore.fairness import Array
from planner.explore.kernels.base import Side, Sides
from planner.explore.system import System
from planner.explore.transfers import Percentile, exchange_time, line_of

METADATA = 8
"""Bytes of routing metadata per (token, expert) pair: an int32 id and a float32 weight."""

Fan = Literal["distinct", "paper"]


@dataclass(frozen=True)
class Placement:
    """Which GPUs do attention and which hold experts.

    Args:
        name: "paired", "segregated", "striped", ...
        attention, ffn: numbers of GPUs, counted through the system: GPU g is in domain
            ``g // tier.gpus`` of a tier.
    """

    name: str
    attention: tuple[int, ...]
    ffn: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """What a token sends to the experts of one layer and gets back.

    Args:
        hidden: size of a hidden state.
        experts, top_k: routed experts per layer, and per token.
        wire_bytes: per element of a hidden state.
        fan: "distinct" or "paper", see ``copies``.
        sides: a router on the FFN side has every rank get every token, without metadata; shared
            experts on the FFN side are on every rank, each token uses those of one.
    """

    hidden: int
    experts: int
    top_k: int
    wire_bytes: float = 2.0
    fan: Fan = "distinct"
    sides: Sides = field(default_factory=Sides)

    def copies(self, ranks: int) -> float:
        """FFN ranks that answer a token."""
        count = fan_out(self.fan, self.experts, self.top_k, ranks)
        if self.sides.shared is Side.FFN:
            count += 1 - min(1.0, count / ranks)
        return count

    def a2f_bytes(self, ranks: int) -> float:
        """Bytes a token sends to ``ranks`` FFN ranks together."""
        state = self.hidden * self.wire_bytes
        if self.sides.router is Side.FFN:
            return ranks * state
        return self.copies(ranks) * state + METADATA * self.top_k

    def f2a_bytes(self, ranks: int) -> float:
        """Bytes a token gets back: one reduced hidden state per rank that answers."""
        return self.copies(ranks) * self.hidden * self.wire_bytes


def fan_out(fan: Fan, experts: int, top_k: int, ranks: int) -> float:
    """FFN ranks that one token goes to.

    "distinct": the expected number of ranks among the holders of ``top_k`` experts drawn evenly,
    sum over ranks of 1 - C(E - e, k) / C(E, k), e experts on the rank; with E/N experts on each
    it is N (1 - C(E - E/N, k) / C(E, k)). "paper": (1 + min(k, N)) / 2, the tool of arXiv
    2605.28302. Of more ranks than experts the rest holds copies, so that at most E count.

    Raises:
        PlannerError: fewer experts than ``top_k``, or no ranks.
    """
    if ranks < 1 or not 1 <= top_k <= experts:
        raise PlannerError(
            f"top-{top_k} of {experts} experts on {ranks} ranks, expected 1 rank or more and top-k "
            "between 1 and the experts"
        )
    if fan == "paper":
        return (1 + min(top_k, ranks)) / 2
    if fan != "distinct":
        raise PlannerError(f"fan {fan!r}, expected 'distinct' or 'paper'")
    holders = min(ranks, experts)
    few, more = divmod(experts, holders)
    missed = [math.comb(max(0, experts - held), top_k) for held in (few, few + 1)]
    every = math.comb(experts, top_k)
    return (holders - more) * (1 - missed[0] / every) + more * (1 - missed[1] / every)


def a2f(
    system: System,
    placement: Placement,
    tokens: ArrayLike,
    traffic: Traffic,
    *,
    ffn_tp: int = 1,
    ffn_system: System | None = None,
    percentile: Percentile = "p50",
    calibration: Calibration | None = None,
) -> Array:
    """Seconds of one layer's transfer from all attention GPUs to all FFN GPUs.

    Args:
        system: of the attention GPUs, and of the FFN GPUs where ``ffn_system`` is not given.
        placement: of both.
        tokens: of one attention GPU, any shape; an attention rank of several GPUs sends its tokens
            in equal parts. No tokens take no time.
        traffic: of a token.
        ffn_tp: FFN GPUs that share each expert: all of them get its tokens.
        ffn_system: of the FFN GPUs where they differ; the sides then meet at the outermost tier.
        percentile: "p99" takes the largest factor of the tiers in use, or the calibration's
            spread where that is more.
        calibration: what links reach; none: ``calibration.calibration_of`` the system.

    Raises:
        PlannerError: no GPUs on a side, GPUs that ``ffn_tp`` does not divide, negative tokens.
    """
    ranks = _ranks(placement, ffn_tp)
    per_pair = traffic.a2f_bytes(ranks) / ranks
    line = line_of(
        system, placement.attention, placement.ffn, per_pair, ffn_system, percentile, calibration
    )
    return line.seconds(tokens)


def f2a(
    system: System,
    placement: Placement,
    tokens: ArrayLike,
    traffic: Traffic,
    *,
    ffn_tp: int = 1,
    ffn_system: System | None = None,
    percentile: Percentile = "p50",
    calibration: Calibration | None = None,
) -> Array:
    """Seconds of the way back, see ``a2f``. The GPUs that share an expert have reduced what they
    made (part of their kernels' time) and send a share each."""
    ranks = _ranks(placement, ffn_tp)
    per_pair = traffic.f2a_bytes(ranks) / len(placement.ffn)
    # every port has the same bandwidth in and out, so the way back is the way there turned around
    line = line_of(
        system, placement.attention, placement.ffn, per_pair, ffn_system, percentile, calibration
    )
    return line.seconds(tokens)


def kv_transfer(
    system: System,
    size: float,
    sources: Sequence[int],
    targets: Sequence[int],
    *,
    percentile: Percentile = "p50",
    calibration: Calibration | None = None,
) -> float:
    """Seconds that the KV cache of one request takes from prefill to decode GPUs; once per request.

    Args:
        system: of all of them.
        size: bytes of the request's KV cache.
        sources: GPUs that hold an equal part each, in order.
        targets: GPUs that get an equal part each, in order. Every target takes what it needs from
            the sources that have it: one to one where there are as many.
        percentile, calibration: see ``a2f``.
    """
    held = np.arange(len(sources) + 1) / max(1, len(sources))
    wanted = np.arange(len(targets) + 1) / max(1, len(targets))
    overlap = np.minimum(held[1:, None], wanted[None, 1:]) - np.maximum(
        held[:-1, None], wanted[None, :-1]
    )
    overlap[overlap < 1e-12] = 0.0
    return exchange_time(
        system, sources, targets, size * overlap, percentile=percentile, calibration=calibration
    )


def _ranks(placement: Placement, ffn_tp: int) -> int:
    ranks, rest = divmod(len(placement.ffn), max(1, ffn_tp))
    if ffn_tp < 1 or rest or not ranks:
        raise PlannerError(
            f"{len(placement.ffn)} FFN GPUs in groups of {ffn_tp} that share experts: the group "
            "must divide the GPUs"
        )
    return ranks
