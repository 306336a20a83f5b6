"""Bytes on one GPU: weights by side, KV cache, activations and what libraries keep.

Activations and buffers follow aiconfigurator-core 0.12 (``BaseBackend._get_memory_usage`` with the
coefficients of TensorRT-LLM, which it uses for vLLM too), so that both tools refuse about the same.
Weights differ from its where it simplifies: there dense layers hold experts like all others, the
embedding of DeepSeek models is copied to all GPUs, other families have no output head, and MXFP4
has no scales. How much of a GPU may be used is the caller's choice.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import PlannerError
from planner.explore.kernels.base import Side, Sides
from planner.explore.model import BF16, Model

GIB = 1024**3
OTHER_BYTES = 3.5 * GIB
"""CUDA context, libraries and slack (``other_mem`` of every system in aiconfigurator-core 0.12)."""
LEAST_ACTIVATIONS = 70 * 1024**2
"""What a forward pass keeps at least (``MIN_ACTIVATION_BYTES``, same source)."""
_NCCL_BYTES = {1: 0, 2: 358_612_992, 4: 411_041_792, 8: 411_041_792}
_ACTIVATION_FACTOR = {1: 22.0, 2: 13.0, 4: 10.0, 8: 10.0}
"""Live copies of a token's hidden state by tensor parallelism, MoE families (same source)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes on the fullest GPU of a group.

    Args:
        weights, activations, kv, buffers: ``buffers`` are communication and libraries.
    """

    weights: float
    activations: float
    kv: float
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.kv + self.buffers


def attention_weights(model: Model, tp: int, sides: Sides) -> float:
    """Weights of the attention side on one of ``tp`` GPUs.

    Attention, dense layers, shared experts, embedding and output head are split; routers copied.

    Raises:
        PlannerError: ``tp`` doesn't divide the heads.
    """
    layers = model.layers * model.attention.weights(model.hidden, tp)
    layers += model.dense_layers * model.dense_parameters / tp
    if sides.shared is Side.ATTENTION:
        layers += model.moe_layers * model.shared_parameters / tp
    heads = model.vocab_parameters * (1 if model.tied else 2) / tp
    router = model.moe_layers * model.router_parameters if sides.router is Side.ATTENTION else 0
    return layers * model.weight_bytes + (heads + router) * BF16


def expert_weights(model: Model, tp: int, ep: int, sides: Sides) -> float:
    """Weights of the FFN side on one of ``tp * ep`` GPUs.

    Routed experts are split by both; shared experts by ``tp`` and copied over ``ep``.

    Raises:
        PlannerError: more groups than experts.
    """
    check_experts(model, tp, ep)
    # where ep doesn't divide the experts, the fullest GPU counts
    local = -(-model.experts // ep)
    routed = model.moe_layers * local * model.expert_parameters / tp
    shared = router = 0.0
    if sides.shared is Side.FFN:
        shared = model.moe_layers * model.shared_parameters / tp
    if sides.router is Side.FFN:
        router = model.moe_layers * model.router_parameters
    return routed * model.expert_bytes + shared * model.weight_bytes + router * BF16


def kv_per_request(model: Model, tp: int, tokens: float) -> float:
    """KV cache of one request with ``tokens`` of context, on one of ``tp`` GPUs, bytes.

    Layers with a window keep no more tokens than it has. MLA's latent isn't split by ``tp``.
    """
    attention = model.attention
    windowed = min(tokens, attention.window) * attention.windowed
    everything = tokens * (model.layers - attention.windowed)
    return (windowed + everything) * attention.token_bytes(model.kv_bytes, tp)


def activations(model: Model, tp: int, tokens: float) -> float:
    """Activations of a GPU that runs attention on ``tokens`` tokens per step, bytes."""
    attention = model.attention
    gqa = attention.kind == "gqa"
    width = attention.heads * attention.head_dim if gqa else model.hidden
    return max(LEAST_ACTIVATIONS, BF16 * tokens * width * _ACTIVATION_FACTOR[_clamp(tp)])


def expert_activations(model: Model, tp: int, ep: int, tokens: float) -> float:
    """Activations of a GPU with routed experts only, bytes: tokens in, gate and up, tokens out.

    Args:
        tokens: that the group of ``tp * ep`` GPUs is sent in a step; spread evenly. Ours: the
            sources know no GPU without attention.
    """
    pairs = tokens * model.top_k / ep
    width = 2 * model.hidden + 3 * model.expert_inter / tp
    return max(LEAST_ACTIVATIONS, BF16 * pairs * width)


def dispatch_workspace(model: Model, ep: int, tokens: float) -> float:
    """Block scales that the DeepSeek families' dispatch keeps, bytes; 0 for others.

    Args:
        tokens: of all attention ranks of the replica together.
    """
    if model.attention.kind == "gqa":
        return 0.0
    return tokens * model.hidden * model.experts * model.top_k / ep / 128 * 4


def buffers(tp: int) -> float:
    """Communication and libraries, bytes."""
    return _NCCL_BYTES[_clamp(tp)] + OTHER_BYTES


def worker(
    model: Model,
    *,
    tp: int,
    dp: int,
    moe_tp: int,
    ep: int,
    tokens: float,
    requests: float,
    longest: float,
) -> Footprint:
    """A GPU that does everything: aggregated, prefill or decode of P/D.

    Args:
        tp, dp: of attention; ``tp * dp == moe_tp * ep``.
        tokens: one attention rank computes in a step.
        requests: one attention rank holds.
        longest: context of each at its end, tokens.

    Raises:
        PlannerError: the two sides don't share the same GPUs, or can't be split that way.
    """
    if tp * dp != moe_tp * ep:
        raise PlannerError(
            f"attention over {tp} x {dp} GPUs and experts over {moe_tp} x {ep}: expected as many"
        )
    sides = Sides()
    live = activations(model, tp, tokens) + dispatch_workspace(model, ep, tokens * dp)
    return Footprint(
        weights=attention_weights(model, tp, sides) + expert_weights(model, moe_tp, ep, sides),
        activations=live,
        kv=requests * kv_per_request(model, tp, longest),
        buffers=buffers(tp),
    )


def attention_side(
    model: Model, *, tp: int, sides: Sides, tokens: float, requests: float, longest: float
) -> Footprint:
    """A GPU of AFD's attention side (arXiv 2605.28302: weights, activations, KV, buffers).

    Args:
        tokens: one attention rank computes in a step.
        requests: one attention rank holds, all lanes together.
        longest: context of each at its end, tokens.
    """
    return Footprint(
        weights=attention_weights(model, tp, sides),
        activations=activations(model, tp, tokens),
        kv=requests * kv_per_request(model, tp, longest),
        buffers=buffers(tp),
    )


def ffn_side(model: Model, *, tp: int, ep: int, sides: Sides, tokens: float) -> Footprint:
    """A GPU of AFD's FFN side.

    Args:
        tokens: that the group of ``tp * ep`` GPUs is sent in a step.
    """
    return Footprint(
        weights=expert_weights(model, tp, ep, sides),
        activations=expert_activations(model, tp, ep, tokens),
        kv=0.0,
        buffers=buffers(tp * ep),
    )


def check_experts(model: Model, tp: int, ep: int) -> None:
    """Refuses splits of the experts that there can't be.

    Raises:
        PlannerError: fewer than one group, more groups than experts, or an uneven split of one.
    """
    if tp < 1 or model.expert_inter % tp:
        raise PlannerError(
            f"experts over {tp} GPUs each: expected a number that divides their intermediate size, "
            f"{model.expert_inter}"
        )
    if not 1 <= ep <= model.experts:
        raise PlannerError(
            f"{ep} expert groups: expected 1 to {model.experts}, the experts of {model.name}"
        )


def _clamp(tp: int) -> int:
    """The next lower degree that the tables know."""
    return max(degree for degree in _NCCL_BYTES if degree <= tp)
