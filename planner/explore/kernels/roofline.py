"""Step times from peak rates alone: what is left where nothing was measured.

Every kernel takes the longest of its arithmetic, its memory traffic and a launch, at the shares of
the peaks that ``Gpu`` states; collectives are alpha-beta over the system's tiers. It knows no
kernel's weaknesses, so all of it is marked ROOFLINE. Experts are taken as chosen evenly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from planner.barrier import distinct_holders
from planner.errors import PlannerError
from planner.explore.kernels.base import Array, Load, Provenance, Side, Sides, Time
from planner.explore.kernels.collectives import all_reduce, all_to_all
from planner.explore.kernels.unit import Unit
from planner.explore.memory import check_experts
from planner.explore.model import BF16, Model
from planner.explore.precision import Format
from planner.explore.system import System


@dataclass
class RooflineDB:
    """A ``KernelDB`` for any model on any system.

    Args:
        system: whose GPU and tiers count.
    """

    system: System
    name: str = field(init=False)
    unit: Unit = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"roofline of {self.system.gpu.name} ({self.system.gpu.source})"
        self.unit = Unit(self.system.gpu)

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        """One step of an attention rank of ``tp`` GPUs; see ``KernelDB``.

        Raises:
            PlannerError: ``tp`` doesn't divide the heads.
        """
        unit, tokens = self.unit, load.tokens
        hidden = model.hidden
        weights: tuple[Format, float] = (model.weight_format, model.weight_bytes)
        norms = 2 * unit.elementwise(4 * tokens * hidden)
        reduce = all_reduce(self.system, tp, tokens * hidden * BF16)
        layer = norms + _projections(unit, model, tp, load) + reduce
        seconds = model.layers * layer + _scores(unit, model, tp, load)
        if model.dense_layers:
            dense = _feed_forward(unit, tokens, hidden, model.dense_inter / tp, *weights)
            seconds = seconds + model.dense_layers * (dense + reduce)
        if sides.router is Side.ATTENTION:
            seconds = seconds + model.moe_layers * _router(unit, model, tokens)
        if model.shared_inter and sides.shared is Side.ATTENTION:
            shared = _feed_forward(unit, tokens, hidden, model.shared_inter / tp, *weights)
            seconds = seconds + model.moe_layers * (shared + reduce)
        # one row of logits per request that decodes or ends its prompt
        rows = load.decode + np.where(load.prefill > 0, load.prompts, 0.0)
        seconds = seconds + unit.gemm(rows, model.vocab / tp, hidden, "bf16", BF16)
        seconds = seconds + unit.elementwise(2 * tokens * hidden)
        return _time(seconds)

    def experts(self, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
        """One step of an FFN group of ``tp * ep`` GPUs; see ``KernelDB``.

        A rank has E/ep experts, of which tokens touch E/ep (1 - (1 - k/E)^tokens) on average; the
        busiest has at least one. Sums over the ``tp`` GPUs of an expert aren't in: they are part
        of what travels (``exchange``, or the network between the sides).

        Raises:
            PlannerError: more groups than experts, or an uneven split of one.
        """
        check_experts(model, tp, ep)
        unit, tokens = self.unit, np.asarray(tokens, float)
        some = tokens > 0
        held = -(-model.experts // ep)
        chosen = model.top_k / model.experts
        touched = np.where(some, np.maximum(held * (1 - (1 - chosen) ** tokens), 1.0), 0.0)
        pairs = np.where(some, np.maximum(tokens * chosen * held, touched), 0.0)
        inter = model.expert_inter / tp
        weight = model.hidden * inter * model.expert_bytes
        form = model.expert_format
        operand = 1 if unit.arithmetic(form) == "fp8" else BF16
        gate_up = unit.kernel(
            4 * pairs * model.hidden * inter,
            2 * touched * weight + pairs * (model.hidden * operand + 2 * inter * BF16),
            form,
        )
        down = unit.kernel(
            2 * pairs * model.hidden * inter,
            touched * weight + pairs * (inter * operand + model.hidden * BF16),
            form,
        )
        layer = gate_up + unit.elementwise(3 * pairs * inter) + down
        if sides.router is Side.FFN:
            layer = layer + _router(unit, model, tokens / ep)
        if model.shared_inter and sides.shared is Side.FFN:
            layer = layer + _feed_forward(
                unit,
                tokens / ep,
                model.hidden,
                model.shared_inter / tp,
                model.weight_format,
                model.weight_bytes,
            )
        return _time(model.moe_layers * layer)

    def exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int, tokens: Array) -> Time:
        """Dispatch and combine within one replica; see ``KernelDB``.

        One attention rank (dp 1): all GPUs have all tokens, so one sum over them. Several without
        expert parallelism: tokens are gathered and results summed over all. Else every GPU sends
        its tokens to the distinct groups that hold their experts, and gets a result from each.

        Raises:
            PlannerError: the two sides don't share the same GPUs.
        """
        gpus = tp * dp
        if gpus != moe_tp * ep:
            raise PlannerError(
                f"attention over {tp} x {dp} GPUs and experts over {moe_tp} x {ep}: expected as "
                "many"
            )
        check_experts(model, moe_tp, ep)
        tokens = np.asarray(tokens, float)
        state = tokens * model.hidden * BF16
        if gpus == 1:
            return _time(np.zeros_like(tokens))
        if dp == 1:
            layer = all_reduce(self.system, gpus, state)
        elif ep == 1:
            # gather + scatter move as much as one sum of all tokens
            layer = all_reduce(self.system, gpus, state * dp)
        else:
            copies = distinct_holders(ep, model.top_k, model.experts) * moe_tp
            narrow = model.expert_format == "fp8"
            out = state * (0.5 + 2 / 128 if narrow else 1.0)  # FP8, one float32 per 128
            layer = all_to_all(self.system, gpus, copies * out / tp)
            layer = layer + all_to_all(self.system, gpus, copies * state / tp)
        return _time(model.moe_layers * layer)


def seen(past: ArrayLike, chunk: ArrayLike, cap: float) -> Array:
    """Tokens that a token of a chunk sees on average, no more than ``cap``; 0 for no chunk.

    The mean over x in 0..chunk of min(past + x, cap).
    """
    start, length = np.asarray(past, float), np.asarray(chunk, float)
    end = start + length
    # up to ``ramp`` a token sees all that is before it, from there on ``cap``
    ramp = np.clip(cap, start, end)
    capped = np.where(end > ramp, cap, 0.0) * (end - ramp) if np.isfinite(cap) else 0.0
    area = (ramp**2 - start**2) / 2 + capped
    return np.divide(area, length, out=np.zeros_like(area), where=length > 0)


def _time(seconds: Array) -> Time:
    return Time({Provenance.ROOFLINE: np.asarray(seconds, float)})


def _feed_forward(
    unit: Unit, rows: Array, hidden: int, inter: float, form: Format, per_weight: float
) -> Array:
    """A gated feed-forward part: gate and up, activation, down."""
    up = unit.gemm(rows, 2 * inter, hidden, form, per_weight)
    return (
        up + unit.elementwise(3 * rows * inter) + unit.gemm(rows, hidden, inter, form, per_weight)
    )


def _router(unit: Unit, model: Model, tokens: Array) -> Array:
    """Scores of all experts and the choice of the best."""
    scores = unit.gemm(tokens, model.experts, model.hidden, "bf16", BF16)
    return scores + unit.elementwise(tokens * model.experts)


def _projections(unit: Unit, model: Model, tp: int, load: Load) -> Array:
    """What makes queries, keys and values of one layer, and what brings them back."""
    a, hidden, tokens = model.attention, model.hidden, load.tokens
    form, per_weight = model.weight_format, model.weight_bytes

    def gemm(rows: Array, columns: float, inner: float) -> Array:
        return unit.gemm(rows, columns, inner, form, per_weight)

    heads = a.local_heads(tp)
    if a.kind == "gqa":
        made = gemm(tokens, (heads + 2 * a.local_kv_heads(tp)) * a.head_dim, hidden)
        return made + gemm(tokens, hidden, heads * a.head_dim)
    total = gemm(tokens, a.q_rank + a.kv_rank + a.rope_dim, hidden)
    total = total + gemm(tokens, heads * (a.nope_dim + a.rope_dim), a.q_rank or hidden)
    # the up-projection of keys and values: absorbed into queries and outputs of single tokens,
    # applied to the prompt's tokens otherwise; with an indexer always absorbed
    absorbed = tokens if a.kind == "dsa" else load.decode
    if a.kind == "mla":
        total = total + gemm(load.prefill, heads * (a.nope_dim + a.v_dim), a.kv_rank)
    total = total + gemm(absorbed, heads * a.nope_dim, a.kv_rank)
    total = total + gemm(absorbed, heads * a.v_dim, a.kv_rank)
    total = total + gemm(tokens, hidden, heads * a.v_dim)
    if a.kind == "dsa":
        total = total + gemm(tokens, a.index_heads * a.index_dim, a.q_rank or hidden)
        total = total + gemm(tokens, a.index_dim + a.index_heads, hidden)
    return total


def _scores(unit: Unit, model: Model, tp: int, load: Load) -> Array:
    """Attention proper of all layers: windowed and full ones."""
    a = model.attention
    full = (model.layers - a.windowed) * _scores_of_layer(unit, model, tp, load, np.inf)
    if not a.windowed:
        return full
    return full + a.windowed * _scores_of_layer(unit, model, tp, load, a.window)


def _scores_of_layer(unit: Unit, model: Model, tp: int, load: Load, window: float) -> Array:
    """Attention proper of one layer whose tokens see ``window`` others at most."""
    a = model.attention
    heads = a.local_heads(tp)
    chunk = np.divide(load.prefill, load.prompts)
    cap = min(window, a.index_topk) if a.kind == "dsa" else window
    at_decode = np.minimum(load.context, cap)
    at_prefill = seen(load.past, chunk, cap)
    # operations per query token and token seen, one GPU; absorbed MLA works on the latent
    absorbed = 2 * heads * (2 * a.kv_rank + a.rope_dim)
    apart = 2 * heads * (a.nope_dim + a.rope_dim + a.v_dim)
    plain = 4 * heads * a.head_dim
    decode_ops = plain if a.kind == "gqa" else absorbed
    prefill_ops = {"gqa": plain, "mla": apart, "dsa": absorbed}[a.kind]
    stored = a.token_bytes(model.kv_bytes, tp)
    if a.kind == "dsa":
        stored -= a.index_bytes
    decode = unit.kernel(load.decode * at_decode * decode_ops, load.decode * at_decode * stored)
    # the tokens of a chunk choose apart from each other, windows overlap
    distinct = chunk * cap if a.kind == "dsa" else chunk + cap
    kept = np.minimum(load.past + chunk, distinct)
    read = np.where(load.prefill > 0, load.prompts * kept, 0.0)
    prefill = unit.kernel(load.prefill * at_prefill * prefill_ops, read * stored)
    if a.kind != "dsa":
        return decode + prefill
    return decode + prefill + _index(unit, model, load, chunk)


def _index(unit: Unit, model: Model, load: Load, chunk: Array) -> Array:
    """The indexer's scores of one layer, in FP8: every token against all of its context."""
    a = model.attention
    ops = 2 * a.index_heads * a.index_dim
    at_prefill = seen(load.past, chunk, np.inf)
    decode = unit.kernel(
        load.decode * load.context * ops, load.decode * load.context * a.index_bytes, "fp8"
    )
    read = np.where(load.prefill > 0, load.prompts * (load.past + chunk), 0.0)
    prefill = unit.kernel(load.prefill * at_prefill * ops, read * a.index_bytes, "fp8")
    return decode + prefill
