"""Bytes on both sides of an AFD replica, for many loads at once; see ``memory``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.explore import memory
from planner.explore.afd_split import AfdSplit
from planner.explore.kernels.base import Array
from planner.explore.question import Question


def room(question: Question) -> tuple[float, float]:
    """Bytes that a GPU of the attention and of the FFN side may use."""
    share = question.options.memory_share
    ffn = question.ffn_system or question.system
    return question.system.gpu.memory * share, ffn.gpu.memory * share


def attention_bytes(
    question: Question, tp: int, batch: Array, tokens: Array, length: int | None = None
) -> Array:
    """Of a GPU of the attention side.

    Args:
        batch: requests of a rank, all lanes together.
        tokens: that the rank computes in a step, all lanes together.
        length: context of each, tokens; none: as at its end.
    """
    model, sides = question.model, question.options.sides
    kv = memory.kv_per_request(model, tp, length or question.shape.longest)
    live = _live(lambda one: memory.activations(model, tp, one), tokens)
    fixed = memory.attention_weights(model, tp, sides) + memory.buffers(tp)
    return fixed + live + kv * batch


def most_requests(question: Question, tp: int) -> int:
    """Requests of a rank that have room for their KV caches."""
    none = attention_bytes(question, tp, np.zeros(1), np.ones(1))[0]
    kv = memory.kv_per_request(question.model, tp, question.shape.longest)
    return max(0, int((room(question)[0] - none) // kv))


def ffn_bytes(question: Question, split: AfdSplit, tokens: Array) -> Array:
    """Of the fullest GPU of the FFN side.

    Args:
        tokens: that one attention rank sends in a step, all lanes together.
    """
    model = question.model
    fixed = memory.expert_weights(model, split.moe_tp, split.ep, question.options.sides)
    fixed += memory.buffers(split.ffn)
    live = _live(
        lambda one: memory.expert_activations(model, split.moe_tp, split.ep, one),
        split.dp * tokens,
    )
    return fixed + live


def _live(of: Callable[[float], float], tokens: Array) -> Array:
    """Activations for many loads: in proportion to tokens, above a floor (``memory``)."""
    many = 1e9
    return np.maximum(memory.LEAST_ACTIVATIONS, of(many) / many * tokens)
