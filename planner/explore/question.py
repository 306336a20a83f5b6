"""What is asked of the explorer, and what it answers: plain data shared by search and reports.

The factors here are inputs that a user can see and change; where each comes from is said with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from planner.explore.kernels.base import Sides
from planner.explore.model import Model
from planner.explore.points import Mode, Point, Shape, Targets
from planner.explore.system import System

Fan = Literal["distinct", "paper"]
Overlap = Literal["paper", "safe"]
Percentile = Literal["p50", "p99"]
PdAfd = Literal["any", "both"]
Network = Literal["calibrated", "nominal"]


@dataclass(frozen=True)
class Options:
    """How the modes are evaluated.

    Args:
        sides: where router and shared experts are.
        fan: copies of a token that leave an attention rank: "distinct", the expected number of
            distinct FFN ranks, N (1 - C(E - E/N, k) / C(E, k)), or "paper", (1 + min(k, N)) / 2.
        wire_bytes: per element of hidden states between the sides (2 in the paper even for FP8).
        overlap: which AFD step time counts against the target; both are reported.
        full_duplex: 4 micro-batches where sending and receiving go at once, else 3.
        lanes: the numbers of micro-batches tried; none: 1, 2, and 3 or 4 by ``full_duplex``.
        percentile: of the network's times.
        network: transfers of AFD at what measured exchanges reach of the links ("calibrated"), or
            at what the system's tiers say ("nominal", as in the paper).
        queueing: TTFT of chunked prefill includes the wait behind other prompts (aiconfigurator's
            factor, 1.9 to 4 with TensorRT-LLM); otherwise it is the prompt's own passage.
        prefill_rate, decode_rate: share of their rate that prefill and decode pools keep when they
            are matched (0.9 and 0.92 in aiconfigurator and the paper).
        pd_ttft: factor on TTFT of P/D (1.8, same source).
        pd_afd: P/D+AFD has AFD in at least one pool ("any"), or in both as in the paper.
        memory_share: of a GPU's memory that may be used.
        allow_extrapolation: outside what was measured.
    """

    sides: Sides = field(default_factory=Sides)
    fan: Fan = "distinct"
    wire_bytes: float = 2.0
    overlap: Overlap = "safe"
    full_duplex: bool = True
    lanes: tuple[int, ...] = ()
    percentile: Percentile = "p50"
    network: Network = "calibrated"
    queueing: bool = True
    prefill_rate: float = 0.9
    decode_rate: float = 0.92
    pd_ttft: float = 1.8
    pd_afd: PdAfd = "any"
    memory_share: float = 0.9
    allow_extrapolation: bool = False


@dataclass(frozen=True)
class Question:
    """Which level of disaggregation pays?

    Args:
        model, shape, targets: what is served, to whom, how fast.
        system: of the GPUs; with ``ffn_system`` those of attention, prefill and decode.
        gpus: all of them.
        ffn_system: GPUs of the FFN side of AFD where they differ.
        modes: to be compared.
        options: how they are evaluated.
    """

    model: Model
    system: System
    gpus: int
    shape: Shape
    targets: Targets
    ffn_system: System | None = None
    modes: tuple[Mode, ...] = tuple(Mode)
    options: Options = field(default_factory=Options)


@dataclass(frozen=True)
class Refusal:
    """Why no configuration of a mode holds the targets.

    Args:
        limit: "memory", "ttft", "tpot", "ttft and tpot" (each can be held, not both), "kernels"
            (nothing measured), "gpus".
        needed: best that was reached of what is limited: bytes or seconds; nan where there is none.
        allowed: the limit in the same unit.
        text: for people: names the limit, what was reached, what was allowed.
    """

    limit: str
    needed: float
    allowed: float
    text: str


@dataclass(frozen=True)
class Exploration:
    """The answer.

    Args:
        best: the point with the most tokens per second that holds the targets, per mode; None
            where there is none.
        frontier: Pareto front of tokens/s/user against tokens/s/GPU, per mode, whatever the
            targets; rising in tokens/s/user.
        refusals: why, for modes without a best.
        evaluated: configurations (splits, batches, lanes) whose time was computed.
        seconds: the search took.
        source: of the kernel times, for people.
    """

    question: Question
    best: Mapping[Mode, Point | None]
    frontier: Mapping[Mode, tuple[Point, ...]]
    refusals: Mapping[Mode, Refusal]
    evaluated: int
    seconds: float
    source: str

    @property
    def winner(self) -> Mode | None:
        """The mode whose best serves the most tokens per second; None where none holds."""
        held = {mode: point for mode, point in self.best.items() if point is not None}
        return max(held, key=lambda mode: held[mode].tokens_per_s) if held else None
