"""Expert layers as rows: another set of experts in a layer of vLLM without building it anew.

Once vLLM has packed a layer for its kernels, nearly every tensor of it has one row per local
expert. Such a layer can be had with other rows: a new layer object that shares vLLM's code and
choices with the old one, and nothing that the old one computes with. Layers that keep anything
else per expert are refused with ``NotByRow`` and are built anew by ``local_experts.py``.
"""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from actors.local_experts import LocalExperts


class NotByRow(Exception):
    """This layer can't be changed row by row; says why."""


def rows_of(module: LocalExperts) -> dict[str, torch.Tensor]:
    """The packed tensors of a layer by name, each with one row per local expert.

    The tensors share the layer's memory and outlive it.

    Raises:
        NotByRow: a tensor of the layer, or one that its kernel keeps, is not made of such rows.
    """
    rows: dict[str, torch.Tensor] = {}
    for name, tensor in module.named_parameters():
        if tensor.is_meta:  # of the router, which has no place here
            continue
        if tensor.dim() < 1 or len(tensor) != len(module.local_experts):
            raise NotByRow(f"{name} has shape {tuple(tensor.shape)}")
        rows[name] = tensor.data
    known = {tensor.data_ptr() for tensor in rows.values()}
    for name, tensor in _other_tensors(module):
        if not tensor.is_meta and tensor.numel() and tensor.data_ptr() not in known:
            raise NotByRow(f"{name} is a tensor of shape {tuple(tensor.shape)}")
    return rows


def with_rows(
    module: LocalExperts, experts: Sequence[int], rows: Mapping[str, torch.Tensor]
) -> LocalExperts:
    """A layer like ``module`` that holds other experts.

    Args:
        module: a packed layer; unchanged.
        experts: global ids, in the order of the rows.
        rows: the packed tensors by the names of ``rows_of(module)``, not shared with ``module``.

    Raises:
        NotByRow: see ``rows_of``.
    """
    rows_of(module)
    made = _copied(module)
    state = made.__dict__
    state["local_experts"] = tuple(experts)
    state["_local_id"] = {expert: i for i, expert in enumerate(experts)}
    state["_parameters"] = {
        name: _parameter(rows[name], old) if name in rows else old
        for name, old in module._parameters.items()
    }
    made.local_num_experts = made.global_num_experts = len(experts)
    made.moe_config = copy.copy(module.moe_config)
    made.moe_config.num_local_experts = len(experts)

    method = _copied(module.quant_method)
    state["_modules"] = {**module._modules, "quant_method": method}
    method.moe = made.moe_config
    method.moe_quant_config = method.get_fused_moe_quant_config(made)
    if method.moe_kernel is not None:
        kernel = method.moe_kernel = _copied(method.moe_kernel)
        kernel.impl = _copied(kernel.impl)
        fused = kernel.impl.fused_experts = _copied(kernel.impl.fused_experts)
        fused.moe_config = made.moe_config
        fused.quant_config = method.moe_quant_config
    return made


def joined(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]):
    """Rows of both, in this order; raises NotByRow when their rows differ in shape or dtype."""
    if {name: _row(t) for name, t in first.items()} != {
        name: _row(t) for name, t in second.items()
    }:
        raise NotByRow("two parts of the layer were packed differently")
    return {name: torch.cat([tensor, second[name]]) for name, tensor in first.items()}


def chosen(rows: Mapping[str, torch.Tensor], positions: Sequence[int]) -> dict[str, torch.Tensor]:
    """Copies of some of the rows."""
    return {name: tensor[list(positions)] for name, tensor in rows.items()}


def forget(module: LocalExperts) -> None:
    """Give a layer's memory back now; nobody may compute with it any more.

    vLLM's objects refer to each other in circles, so it would wait for the garbage collector.
    """
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.new_empty(0)


def _row(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, torch.device]:
    return tensor.dtype, tensor.shape[1:], tensor.device


def _parameter(tensor: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    made = nn.Parameter(tensor, requires_grad=False)
    # Kernels may leave marks on a parameter; its loader belongs to the layer it was made for.
    made.__dict__.update(
        {name: value for name, value in vars(like).items() if name != "weight_loader"}
    )
    return made


def _copied(thing: Any) -> Any:
    """A shallow copy with containers and bound methods of its own."""
    made = copy.copy(thing)
    for name, value in vars(thing).items():
        if isinstance(value, (dict, list, set)):
            made.__dict__[name] = copy.copy(value)
        elif inspect.ismethod(value) and value.__self__ is thing:
            made.__dict__[name] = types.MethodType(value.__func__, made)
    return made


def _other_tensors(module: LocalExperts) -> Iterator[tuple[str, torch.Tensor]]:
    """What a layer's objects keep beside its parameters.

    The quantisation configuration is left out: it is made again from the parameters.
    """
    for name, buffer in module.named_buffers():
        yield name, buffer
    method = module.quant_method
    holders: list[Any] = [module, method]
    kernel = method.moe_kernel
    if kernel is not None:
        impl = getattr(kernel, "impl", None)
        if impl is None or not hasattr(impl, "fused_experts"):
            raise NotByRow(f"{type(kernel).__name__} is not a kernel of the usual make")
        holders += [kernel, impl, impl.fused_experts, impl.prepare_finalize]
    for holder in holders:
        for name, value in vars(holder).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                for tensor in _tensors_in(value):
                    yield f"{type(holder).__name__}.{name}", tensor


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors_in(each)
