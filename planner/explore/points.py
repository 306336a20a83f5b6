"""One configuration of one mode, evaluated: the currency of the explorer.

Modes make points, ``search`` compares them, reports print them. Nothing is computed here but ratios
of what is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from planner.errors import PlannerError
from planner.explore.kernels.base import Provenance


class Mode(StrEnum):
    """The levels of disaggregation."""

    AGGREGATED = "aggregated"
    PD = "pd"
    AFD = "afd"
    PD_AFD = "pd+afd"


@dataclass(frozen=True)
class Shape:
    """What requests are like.

    Args:
        name: for people.
        prefix: prompt tokens whose KV is already there (prefix cache).
        prompt: prompt tokens that have to be computed (the papers' ISL without the prefix).
        output: tokens generated.
    """

    name: str
    prefix: int
    prompt: int
    output: int

    def __post_init__(self) -> None:
        for name, value, least in (
            ("prefix", self.prefix, 0),
            ("prompt", self.prompt, 1),
            ("output", self.output, 1),
        ):
            if value < least:
                raise PlannerError(f"{name} is {value}, expected {least} or more tokens")

    @property
    def context(self) -> float:
        """Mean context during decode, tokens: prefix + prompt + half the output."""
        return self.prefix + self.prompt + self.output / 2

    @property
    def longest(self) -> int:
        """Context at the end, tokens: what the KV cache must have room for."""
        return self.prefix + self.prompt + self.output


@dataclass(frozen=True)
class Targets:
    """Latency targets in seconds; inf: none."""

    ttft: float
    tpot: float


SHAPES: Mapping[str, tuple[Shape, Targets]] = {
    "chat": (Shape("chat", 4096, 512, 256), Targets(0.050, 0.015)),
    "coding": (Shape("coding", 2048, 4096, 1024), Targets(0.100, 0.015)),
    "agentic": (Shape("agentic", 524_288, 256, 8192), Targets(0.150, 0.015)),
}
"""Workloads and strict targets of arXiv 2605.28302."""


@dataclass(frozen=True)
class Group:
    """GPUs that do the same in one replica.

    Args:
        role: "worker" (aggregated), "prefill", "decode", "attention", "ffn"; prefixed in pd+afd
            ("prefill attention", ...).
        replicas: of the group.
        tp, dp: of attention in one replica; 1 for FFN groups.
        moe_tp, ep: of the experts in one replica; 1 for attention-only groups.
        gpus: of one replica.
        memory: bytes used on its fullest GPU.
        room: bytes that GPU has.
    """

    role: str
    replicas: int
    tp: int
    dp: int
    moe_tp: int
    ep: int
    gpus: int
    memory: float
    room: float


@dataclass(frozen=True)
class Point:
    """A configuration and what it yields.

    Args:
        mode: level of disaggregation.
        groups: what the GPUs do; ``gpus`` is their sum.
        batch: requests that decode on one attention rank.
        concurrency: requests in decode over the whole system.
        chunk: prompt tokens in a step; 0 where prefill is apart.
        lanes: micro-batches of AFD; 1 elsewhere.
        ttft, tpot: seconds.
        tokens_per_s: output tokens per second of the whole system.
        tpot_paper, tpot_safe: TPOT by both forms of AFD's overlap (``overlap.Overlapped``), one of
            which is ``tpot``; both equal it where nothing overlaps.
        parts: seconds of the decode step by stage ("attention", "a2f", "ffn", "f2a", ...), full
            batch, before overlap.
        shares: of the time by provenance.
        placement: how AFD's groups are put on nodes, "" elsewhere.
    """

    mode: Mode
    groups: tuple[Group, ...]
    batch: int
    concurrency: float
    ttft: float
    tpot: float
    tokens_per_s: float
    chunk: int = 0
    lanes: int = 1
    tpot_paper: float = 0.0
    tpot_safe: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[Provenance, float] = field(default_factory=dict)
    placement: str = ""

    @property
    def gpus(self) -> int:
        return sum(group.replicas * group.gpus for group in self.groups)

    @property
    def tokens_per_s_gpu(self) -> float:
        """Output tokens per second and GPU."""
        return self.tokens_per_s / self.gpus

    @property
    def tokens_per_s_user(self) -> float:
        """Output tokens per second that one request sees, 1/TPOT."""
        return 1.0 / self.tpot if self.tpot > 0 else 0.0

    def meets(self, targets: Targets) -> bool:
        return self.ttft <= targets.ttft and self.tpot <= targets.tpot
