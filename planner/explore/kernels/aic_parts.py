"""A model's operations sorted by what they belong to, and by what they depend on.

aiconfigurator's partition for AFD knows two sides and keeps composites whole; here composites are
taken apart, so that router, shared experts and collectives can be put where ``Sides`` says and
every measured table is looked at alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from planner.explore.kernels.aic_package import PHASES, Graph, Op, Phase
from planner.explore.kernels.base import NotCovered
from planner.explore.model import Model

PROMPT_KINDS = {
    "ContextAttention", "ContextMla", "MlaModuleContext", "DsaContext", "WideEpContextMla",
}  # fmt: skip
"""Attention of prompts."""
DECODE_KINDS = {
    "GenerationAttention", "GenerationMla", "MlaModuleGeneration", "DsaGeneration",
    "WideEpGenerationMla",
}  # fmt: skip
"""Attention in decode; all kinds but these two depend only on the number of tokens."""
_EXPERTS = {"Moe", "MoeExpertCompute"}
_COLLECTIVES = {"P2P", "MoeDispatch", "CustomAllReduce", "Nccl"}  # made anew for any split
_OTHERS = {"Embedding", "Elementwise", "Gemm", "MlaBmm", "MoeAllToAll"}
_KNOWN = PROMPT_KINDS | DECODE_KINDS | _EXPERTS | _COLLECTIVES | _OTHERS


@dataclass
class Parts:
    """Operations of one step through all layers, collectives left out.

    Args:
        both: by tokens of the step, whichever phase they are in.
        prompt, decoding: by tokens of that phase only.
        context, generation: attention of prompts and of decode.
        output: of the tokens that are sampled.
        router, shared: parts of MoE layers that can be on either side.
        experts: routed ones, for many tokens and for few: {"context": ..., "generation": ...}.
        libraries: of all-to-all, the same.
        hides_shared: in decode, shared experts run while the routed ones do.
    """

    both: list[Op] = field(default_factory=list)
    prompt: list[Op] = field(default_factory=list)
    decoding: list[Op] = field(default_factory=list)
    context: list[Op] = field(default_factory=list)
    generation: list[Op] = field(default_factory=list)
    output: list[Op] = field(default_factory=list)
    router: list[Op] = field(default_factory=list)
    shared: list[Op] = field(default_factory=list)
    experts: dict[Phase, list[Op]] = field(default_factory=dict)
    libraries: dict[Phase, list[Op]] = field(default_factory=dict)
    hides_shared: bool = False


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
    parts = Parts(hides_shared=any(map(_hides_shared, graph.ops["generation"])))
    seen: dict[Phase, list[tuple[str, Op]]] = {phase: [] for phase in PHASES}
    for phase in PHASES:
        decode = phase == "generation"
        apart = [leaf for op in graph.ops[phase] for leaf in _apart(op)]
        leaves = [
            (side, leaf)
            for side, op in zip(graph.sides[phase], apart, strict=True)
            for leaf in _kernels(op, measured)
        ]
        layers = max(_fields(leaf)["scale_factor"] for _, leaf in leaves)
        for side, given in leaves:
            op = given
            kind, fields = next(iter(op.items()))
            name = fields["name"].removeprefix(f"{phase}_")
            if kind not in _KNOWN:
                raise NotCovered(f"{model.name} has {kind} ({name}), which is not sorted yet")
            moe = kind in _EXPERTS or kind == "MoeAllToAll" or (side == "ffn")
            if moe and not all_moe and fields["scale_factor"] == layers:
                # the package gives every layer experts
                share = model.moe_layers / model.layers
                op = {kind: {**fields, "scale_factor": layers * share}}
            if kind in _COLLECTIVES:
                continue
            if kind in PROMPT_KINDS:
                parts.context.append(op)
            elif kind in DECODE_KINDS:
                parts.generation.append(op)
            elif kind in _EXPERTS:
                parts.experts.setdefault(phase, []).append(op)
            elif kind == "MoeAllToAll":
                parts.libraries.setdefault(phase, []).append(op)
            elif "logits" in name or side == "ffn":
                if decode:
                    part = parts.router if "router" in name else parts.shared
                    (parts.output if "logits" in name else part).append(op)
            else:
                seen[phase].append((name, op))
    _by_phase(parts, seen)
    if not all_moe:
        _dense(parts, model, tp)
    return parts


def _apart(op: Op) -> Iterator[Op]:
    """Operations that overlap, one by one."""
    kind, fields = next(iter(op.items()))
    if kind == "Overlap":
        for inner in (*fields["group_a"], *fields["group_b"]):
            yield from _apart(inner)
    else:
        yield op


def _kernels(op: Op, measured: Callable[[Op], bool]) -> Iterator[Op]:
    """A block, or the kernels it is made of."""
    kind, fields = next(iter(op.items()))
    if kind != "Fallback":
        yield op
    elif measured(fields["primary"]):
        yield from _kernels(fields["primary"], measured)
    else:
        for inner in fields["fallback"]:
            yield from _kernels(inner, measured)


def _hides_shared(op: Op) -> bool:
    """Whether it is routed experts beside shared ones."""
    kind, fields = next(iter(op.items()))
    return kind == "Overlap" and any(
        next(iter(inner)) in _EXPERTS for inner in (*fields["group_a"], *fields["group_b"])
    )


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
    """Dense layers have one feed-forward instead of router and experts."""
    if not model.dense_layers:
        return
    quant = next((_fields(op)["quant_mode"] for op in parts.shared if "Gemm" in op), "bfloat16")
    inter, times = model.dense_inter // tp, float(model.dense_layers)
    common = {"scale_factor": times, "scale_num_tokens": 1, "seq_split": 1}
    shape = {"quant_mode": quant, "low_precision_input": False, "below_grid_sol": False, **common}
    parts.both += [
        {"Gemm": {"name": "dense_gate_up", "n": 2 * inter, "k": model.hidden, **shape}},
        {"Elementwise": {"name": "dense_act", "bytes_per_token": 6.0 * inter, **common}},
        {"Gemm": {"name": "dense_down", "n": model.hidden, "k": inter, **shape}},
    ]


def _fields(op: Op) -> dict[str, Any]:
    fields: dict[str, Any] = next(iter(op.values()))
    return fields
