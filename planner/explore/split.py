"""How a replica whose GPUs do both sides is divided: attention by TP and DP, experts by TP and EP.

Enumeration only; nothing is timed here. With attention and experts on GPUs of their own see
``afd_split``.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import PlannerError
from planner.explore.model import Model

FP8_BLOCK = 128
"""Columns that share a scale: a share of an expert holds whole blocks."""


@dataclass(frozen=True, order=True)
class Split:
    """One replica.

    Args:
        tp: GPUs of one attention rank.
        dp: attention ranks.
        moe_tp: GPUs that share each expert.
        ep: groups of experts; ``tp * dp == moe_tp * ep``.
    """

    tp: int
    dp: int
    moe_tp: int
    ep: int

    def __post_init__(self) -> None:
        if min(self.tp, self.dp, self.moe_tp, self.ep) < 1 or self.gpus != self.moe_tp * self.ep:
            raise PlannerError(
                f"attention over {self.tp} x {self.dp} GPUs and experts over {self.moe_tp} x "
                f"{self.ep}: expected the same GPUs, at least one"
            )

    @property
    def gpus(self) -> int:
        return self.tp * self.dp


def splits(model: Model, gpus: int, node: int) -> list[Split]:
    """Every split of a replica of ``gpus`` GPUs.

    Powers of two, as in aiconfigurator 0.12. Tensor parallelism stays on a node and divides heads,
    and experts into whole scale blocks; groups of experts are equal.

    Args:
        node: GPUs per node.
    """
    block = FP8_BLOCK if model.expert_format == "fp8" else 1
    found = []
    for tp in _powers(min(gpus, node)):
        if gpus % tp or model.attention.heads % tp:
            continue
        for moe_tp in _powers(min(gpus, node)):
            if gpus % moe_tp or model.expert_inter % (moe_tp * block):
                continue
            if model.experts % (gpus // moe_tp) == 0:
                found.append(Split(tp, gpus // tp, moe_tp, gpus // moe_tp))
    return found


def replica_gpus(gpus: int) -> list[int]:
    """GPUs per replica that are tried: powers of two up to all."""
    return _powers(gpus)


def _powers(most: int) -> list[int]:
    return [1 << i for i in range(most.bit_length()) if 1 << i <= most]
