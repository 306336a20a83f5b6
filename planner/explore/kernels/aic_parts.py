"""A model's operations sorted by what they belong to, and by what they depend on.

aiconfigurator's partition for AFD knows two sides and keeps composites whole; here composites are
taken apart, so that router, shared experts and collectives can be put where ``Sides`` says and
every measured table is looked at alone. Overlap of the shared experts with the routed ones, which
it takes for granted in decode, is thereby given up: their times add.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from planner.explore.kernels.aic_package import PHASES, Graph, Op, Phase
from planner.explore.kernels.base import NotCovered
from planner.explore.model import Model

SEQUENCE = {
    "ContextAttention", "ContextMla", "MlaModuleContext", "DsaContext",
    "GenerationAttention", "GenerationMla", "MlaModuleGeneration", "DsaGeneration",
}  # fmt: skip
"""Kinds that depend on contexts; all others only on the number of tokens."""
_DROPPED = {"P2P", "MoeDispatch", "MoeAllToAll", "CustomAllReduce", "Nccl"}
_KNOWN = {"Embedding", "Elementwise", "Gemm", "MlaBmm", "Moe", *SEQUENCE, *_DROPPED}


@dataclass
class Parts:
    """Operations of one step through all layers, collectives left out.

    Args:
        both: by tokens of the step, whichever phase they are in.
        prompt, decoding: by tokens of that phase only.
        context, generation: attention of prompts and of decode.
        output: of the tokens that are sampled.
        router, shared: parts of MoE layers that can be on either side.
        moe: routed experts.
    """

    both: list[Op] = field(default_factory=list)
    prompt: list[Op] = field(default_factory=list)
    decoding: list[Op] = field(default_factory=list)
    context: list[Op] = field(default_factory=list)
    generation: list[Op] = field(default_factory=list)
    output: list[Op] = field(default_factory=list)
    router: list[Op] = field(default_factory=list)
    shared: list[Op] = field(default_factory=list)
    moe: list[Op] = field(default_factory=list)


def parts_of(
    graph: Graph, model: Model, tp: int, measured: Callable[[Op], bool], all_moe: bool
) -> Parts:
    """Sorts.

    Args:
        tp: GPUs of an attention rank.
        measured: whether there is a kernel for an operation; where a block was not measured as a
            whole, its kernels are taken.
        all_moe: take dense layers for MoE layers, as aiconfigurator does.

    Raises:
        NotCovered: an operation of a kind that isn't known here.
    """
    flat = {
        phase: [
            (side, leaf)
            for side, op in zip(graph.sides[phase], graph.ops[phase], strict=True)
            for leaf in _leaves(op, measured)
        ]
        for phase in PHASES
    }
    parts = Parts()
    seen: dict[Phase, list[tuple[str, Op]]] = {phase: [] for phase in PHASES}
    for phase in PHASES:
        for side, op in flat[phase]:
            kind, fields = next(iter(op.items()))
            name = fields["name"].removeprefix(f"{phase}_")
            if kind not in _KNOWN:
                raise NotCovered(f"{model.name} has {kind} ({name}), which is not sorted yet")
            if kind in _DROPPED:
                continue
            if kind in SEQUENCE:
                (parts.context if phase == "context" else parts.generation).append(op)
            elif "logits" in name:
                if phase == "generation":
                    parts.output.append(op)
            elif kind == "Moe":
                if phase == "generation":
                    parts.moe.append(op)
            elif side == "ffn":
                if phase == "generation":
                    (parts.router if "router" in name else parts.shared).append(op)
            else:
                seen[phase].append((name, op))
    _by_phase(parts, seen)
    if not all_moe:
        _dense(parts, model, tp)
    return parts


def _leaves(op: Op, measured: Callable[[Op], bool]) -> Iterator[Op]:
    """Operations without composites."""
    kind, fields = next(iter(op.items()))
    if kind == "Overlap":
        for inner in (*fields["group_a"], *fields["group_b"]):
            yield from _leaves(inner, measured)
    elif kind == "Fallback":
        if measured(fields["primary"]):
            yield from _leaves(fields["primary"], measured)
        else:
            for inner in fields["fallback"]:
                yield from _leaves(inner, measured)
    else:
        yield op


def _by_phase(parts: Parts, seen: Mapping[Phase, list[tuple[str, Op]]]) -> None:
    """Equal operations of the two phases run once, on the tokens of both."""
    decoding = list(seen["generation"])
    for name, op in seen["context"]:
        twin = next((at for at in decoding if at[0] == name and _alike(op, at[1])), None)
        if twin is None:
            parts.prompt.append(op)
        else:
            decoding.remove(twin)
            parts.both.append(twin[1])
    parts.decoding.extend(op for _, op in decoding)


def _alike(one: Op, other: Op) -> bool:
    (kind, fields), (twin, others) = next(iter(one.items())), next(iter(other.items()))
    return kind == twin and all(fields[key] == others.get(key) for key in fields if key != "name")


def _dense(parts: Parts, model: Model, tp: int) -> None:
    """Dense layers: no router and experts, one feed-forward instead.

    aiconfigurator gives every layer experts where its scale is the number of all layers.
    """
    if not model.dense_layers:
        return
    gemm = next(iter(parts.shared), None)
    for group in (parts.router, parts.shared, parts.moe):
        for index, op in enumerate(group):
            kind, fields = next(iter(op.items()))
            if fields["scale_factor"] == model.layers:
                group[index] = {kind: {**fields, "scale_factor": float(model.moe_layers)}}
    quant = gemm["Gemm"]["quant_mode"] if gemm and "Gemm" in gemm else "bfloat16"
    inter, times = model.dense_inter // tp, float(model.dense_layers)
    common = {"scale_factor": times, "scale_num_tokens": 1, "seq_split": 1}
    shape = {"quant_mode": quant, "low_precision_input": False, "below_grid_sol": False, **common}
    parts.both += [
        {"Gemm": {"name": "dense_gate_up", "n": 2 * inter, "k": model.hidden, **shape}},
        {"Elementwise": {"name": "dense_act", "bytes_per_token": 6.0 * inter, **common}},
        {"Gemm": {"name": "dense_down", "n": model.hidden, "k": inter, **shape}},
    ]
