"""How GPUs can be divided into an attention and an FFN side, and what work is tried on them.

Enumeration only; nothing is timed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from planner.explore.kernels.base import Array
from planner.explore.model import Model
from planner.explore.points import Shape
from planner.explore.question import Options
from planner.explore.system import System

MOST_BATCH = 1024
"""Slots of an attention rank: no more are tried (as in aiconfigurator 0.12)."""
LEAST_CHUNK, MOST_CHUNK = 64, 8192
"""Prompt tokens of a step on an attention rank."""
FP8_BLOCK = 128
"""Columns that share a scale: a share of an expert holds whole blocks."""


@dataclass(frozen=True, order=True)
class AfdSplit:
    """One replica with attention and experts apart.

    Args:
        tp: GPUs of one attention rank.
        dp: attention ranks.
        moe_tp: GPUs that share each expert.
        ep: groups of experts.
    """

    tp: int
    dp: int
    moe_tp: int
    ep: int

    @property
    def attention(self) -> int:
        """GPUs of the attention side."""
        return self.tp * self.dp

    @property
    def ffn(self) -> int:
        """GPUs of the FFN side."""
        return self.moe_tp * self.ep

    @property
    def gpus(self) -> int:
        return self.attention + self.ffn


def splits_of(
    model: Model, gpus: int, attention_system: System, ffn_system: System
) -> Iterator[AfdSplit]:
    """Every split of a replica of ``gpus`` GPUs, by attention GPUs from 1 on.

    Tensor parallelism stays within the innermost tier and divides heads and experts evenly; expert
    groups needn't divide the experts: the fullest has ceil(E / ep).
    """
    tps, moe_tps = attention_tps(model, attention_system), expert_tps(model, ffn_system)
    for attention in range(1, gpus):
        ffn = gpus - attention
        for tp in tps:
            if attention % tp:
                continue
            for moe_tp in moe_tps:
                if ffn % moe_tp == 0 and ffn // moe_tp <= model.experts:
                    yield AfdSplit(tp, attention // tp, moe_tp, ffn // moe_tp)


def attention_tps(model: Model, system: System) -> list[int]:
    """Powers of two that an attention rank may span."""
    return [tp for tp in _powers(system) if model.attention.heads % tp == 0]


def expert_tps(model: Model, system: System) -> list[int]:
    """Powers of two that an expert may be shared by."""
    block = FP8_BLOCK if model.expert_format == "fp8" else 1
    return [tp for tp in _powers(system) if model.expert_inter % (tp * block) == 0]


def replica_sizes(gpus: int) -> list[int]:
    """GPUs per replica that are tried: divisors of all, and powers of two; at least 2.

    Where a power of two doesn't divide them, the remainder stays idle: it counts for nothing, and
    the system's tokens/s show it.
    """
    divisors = {size for size in range(2, gpus + 1) if gpus % size == 0}
    return sorted(divisors | {1 << i for i in range(1, gpus.bit_length()) if 1 << i <= gpus})


@dataclass(frozen=True)
class Settings:
    """Work of one attention rank; arrays of one length.

    Args:
        batch: requests in decode, over all lanes.
        lanes: micro-batches, no more than requests.
        chunk: prompt tokens of a step; 0 without prefill.
    """

    batch: Array
    lanes: Array
    chunk: Array

    def __len__(self) -> int:
        return len(self.batch)

    def where(self, mask: np.ndarray) -> Settings:
        """Those that are chosen."""
        return Settings(self.batch[mask], self.lanes[mask], self.chunk[mask])


def lanes_of(options: Options) -> tuple[int, ...]:
    """Numbers of micro-batches that are tried."""
    return options.lanes or (1, 2, 4 if options.full_duplex else 3)


def settings(options: Options, most: int, chunks: list[int]) -> Settings:
    """All that is tried on an attention rank.

    Args:
        most: requests of a rank.
        chunks: prompt tokens of a step; [0]: none.
    """
    rows = {
        (batch, lanes)
        for wanted in lanes_of(options)
        for batch, lanes in _batches(wanted, min(most, MOST_BATCH))
    }
    found = [(b, m, c) for b, m in sorted(rows) for c in chunks]
    columns = np.array(found, float).reshape(-1, 3).T
    return Settings(*columns)


def chunks_of(shape: Shape) -> list[int]:
    """Prompt tokens per step that are tried: powers of two, and the whole prompt."""
    powers = {1 << i for i in range(32) if LEAST_CHUNK <= 1 << i <= MOST_CHUNK}
    return sorted(powers | {shape.prompt}) if shape.prompt <= MOST_CHUNK else sorted(powers)


def sizes_up_to(most: int) -> list[int]:
    """Whole numbers: all up to 16, from then on in steps of about 9 %."""
    found, value = [], 1.0
    while round(value) <= most:
        found.append(round(value))
        value = value + 1 if value < 16 else value * 2**0.125
    return found


def _batches(lanes: int, most: int) -> Iterator[tuple[int, int]]:
    """Requests of a rank and micro-batches: whole ones, and as many as requests below that."""
    for batch in range(1, min(lanes, most + 1)):
        yield batch, batch
    for size in sizes_up_to(most // lanes):
        yield lanes * size, lanes


def _powers(system: System) -> list[int]:
    reach = system.tiers[0].gpus or system.node
    return [1 << i for i in range(4) if 1 << i <= reach]
