"""The way of a request's KV cache from a prefill to a decode GPU, once per request."""

from __future__ import annotations

from planner.explore import memory
from planner.explore.calibration import NOMINAL
from planner.explore.network import kv_transfer
from planner.explore.question import Question

TPS = (1, 2, 4, 8)
"""GPUs that an attention rank may have."""


def kv_seconds(question: Question, tp: int, decode_tp: int) -> float:
    """Seconds that the KV cache of a request takes from a prefill to a decode rank, once.

    What prefill computed goes; the prefix is in the cache of both. The ranks are on different
    nodes.

    Args:
        tp, decode_tp: GPUs of the ranks.
    """
    model, shape, system = question.model, question.shape, question.system
    whole = memory.kv_per_request(model, 1, shape.prefix + shape.prompt)
    size = whole - memory.kv_per_request(model, 1, shape.prefix)
    apart = max(tier.gpus or 1 for tier in system.tiers)
    return kv_transfer(
        system,
        size,
        range(tp),
        range(apart, apart + decode_tp),
        percentile=question.options.percentile,
        calibration=NOMINAL if question.options.network == "nominal" else None,
    )
