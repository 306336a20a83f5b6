"""What the planner asks a source of kernel times, and what an answer carries.

A source answers for a whole step of one side through all layers, not for single kernels: how it
makes the sum (measured kernels, our own measurements, a roofline) is its business. Every answer
says where it comes from, by share of its time, so that the final table can. Not for what travels
between the sides: see ``planner.explore.network``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.explore.model import Model

Array = NDArray[np.float64]


class Provenance(StrEnum):
    """Where a time comes from, the most trustworthy first."""

    MEASURED = "measured"
    INTERPOLATED = "interpolated"
    EXTRAPOLATED = "extrapolated"
    ROOFLINE = "roofline"


class Side(StrEnum):
    """The two sides of a layer."""

    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True)
class Sides:
    """Which side the two movable parts of a MoE layer are on. Routed experts are on the FFN side,
    everything else (norms, attention, dense layers, embedding, output) on the attention side."""

    router: Side = Side.ATTENTION
    shared: Side = Side.ATTENTION


@dataclass(frozen=True)
class Load:
    """What one attention rank (one DP rank, ``tp`` GPUs) does in one step. Arrays broadcast.

    Args:
        decode: requests that get one token each.
        context: mean tokens in the KV cache of one of those.
        prefill: prompt tokens computed in the step.
        past: tokens already in the KV cache before the prompt chunk (prefix or earlier chunks),
            per request of the chunk.
        prompts: requests that the prompt tokens belong to.
    """

    decode: Array
    context: Array
    prefill: Array = field(default_factory=lambda: np.zeros(1))
    past: Array = field(default_factory=lambda: np.zeros(1))
    prompts: Array = field(default_factory=lambda: np.ones(1))

    @property
    def tokens(self) -> Array:
        """Tokens that go through the layers, shape of the broadcast."""
        return np.asarray(self.decode + self.prefill, float)


@dataclass(frozen=True)
class Time:
    """Seconds, and where they come from.

    Args:
        seconds: of the step, all layers; any shape.
        parts: the same by provenance; sums to ``seconds``.
    """

    parts: Mapping[Provenance, Array]

    @property
    def seconds(self) -> Array:
        total: Array = np.asarray(0.0)
        for part in self.parts.values():
            total = total + part
        return total

    def __add__(self, other: Time) -> Time:
        keys = [key for key in Provenance if key in self.parts or key in other.parts]
        nothing = np.zeros(())
        return Time(
            {key: self.parts.get(key, nothing) + other.parts.get(key, nothing) for key in keys}
        )

    def shares(self) -> dict[Provenance, float]:
        """Share of all the time by provenance, summing to 1; empty where there is none."""
        sums = {key: float(np.sum(part)) for key, part in self.parts.items()}
        total = sum(sums.values())
        return {key: value / total for key, value in sums.items() if value > 0} if total else {}


class NotCovered(PlannerError):
    """A question outside what was measured; says what, and that ``--allow-extrapolation`` exists.

    Attributes:
        covered: which loads of the question could be answered alone; None: not said.
    """

    covered: NDArray[np.bool_] | None = None


class KernelDB(Protocol):
    """A source of step times.

    All methods raise ``NotCovered`` outside of what the source covers, unless it was made with
    ``allow_extrapolation``; then the answer's provenance says so.
    """

    name: str
    """Where the numbers come from, for the reader of a table: source, version, hardware."""

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        """One step of one attention rank through all layers: everything that ``sides`` leaves on
        the attention side, tensor-parallel collectives within the rank included."""
        ...

    def experts(self, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
        """One step of an FFN group of ``tp * ep`` GPUs through all MoE layers.

        Args:
            tp: GPUs that share each expert.
            ep: groups of experts.
            tokens: that all attention ranks together send to the group in the step. The busiest
                rank sets the time.
        """
        ...

    def exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int, tokens: Array) -> Time:
        """Dispatch and combine within one replica where both sides share its GPUs, all MoE layers.

        Args:
            tp, dp: of attention; ``tp * dp == moe_tp * ep``.
            tokens: of one attention rank.
        """
        ...
