"""Builds vLLM's expert layers with some of the experts, and loads only those.

The model's own class is built on the meta device, so that attention, embeddings and shared experts
cost nothing; its expert layers are swapped for ones that allocate their local experts for real.
vLLM's own loaders then fill them, fed with nothing else, and vLLM packs them for its kernels. So
quantisation, layouts and kernels stay vLLM's, for any model family. Calling the kernels is the
job of ``shard.py``.

vLLM keeps caches per process, and here they come to hold meta tensors: a process that built a shard
can build more shards, but no engine that runs attention. Its process groups and its default dtype
are global too, so one build runs at a time; ``kernel_lock`` is for the kernels' shared scratch
memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.distributed.parallel_state import model_parallel_is_initialized
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import (
    MoEPrepareAndFinalizeNoDPEPModular,
)
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.torch_utils import set_default_torch_dtype

from actors.checkpoint import Checkpoint
from actors.errors import AffluxError, CheckpointError, UnsupportedModel
from actors.vllm_models import experts_replaced_by, inspect_in_process

BareKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]

kernel_lock = threading.Lock()
"""Held around every kernel call: vLLM's CPU kernels share one piece of scratch memory."""

_build_lock = threading.Lock()


class _Build(NamedTuple):
    """What the expert layers that are being built shall hold, and where."""

    experts: Mapping[int, tuple[int, ...]]
    device: torch.device


_current_build: ContextVar[_Build] = ContextVar("expert shard under construction")


class LocalExperts(RoutedExperts):
    """An expert layer of vLLM that allocates and loads only its local experts.

    Mixed into RoutedExperts and into each of its subclasses. Local ids are the positions in
    ``local_experts``, which holds global ids.
    """

    _of_afflux = True

    layer: int
    local_experts: tuple[int, ...]
    loads_stacked: bool
    _local_id: dict[int, int]

    def __init__(self, layer_name: str, params_dtype: torch.dtype, moe_config: Any, *args, **kw):
        build = _current_build.get()
        self.__dict__["layer"] = extract_layer_index(layer_name)
        local = build.experts.get(self.__dict__["layer"], ())
        self.__dict__["local_experts"] = local
        self.__dict__["_local_id"] = {expert: i for i, expert in enumerate(local)}
        self.__dict__["loads_stacked"] = False
        moe_config.num_local_experts = len(local)
        with build.device:
            super().__init__(layer_name, params_dtype, moe_config, *args, **kw)

    def update_expert_map_info(self):
        super().update_expert_map_info()
        self.local_num_experts = len(self.local_experts)

    def _map_global_expert_id_to_local_expert_id(self, expert_id: int) -> int:
        if self.loads_stacked:  # the tensor in hand holds the local experts alone, in order
            return expert_id if expert_id < len(self.local_experts) else -1
        return self._local_id.get(expert_id, -1)


def engine_config(
    checkpoint: Checkpoint, dtype: str, engine_args: Mapping[str, Any], device: torch.device
) -> VllmConfig:
    """vLLM's configuration of a model.

    Raises:
        AffluxError: code ``bad_engine_args``.
        UnsupportedModel: vLLM can't serve it, with vLLM's own reason.
    """
    if device.type == "cpu":
        _prepare_cpu()
    inspect_in_process(checkpoint.config.get("architectures") or ())
    model = str(checkpoint.path)
    given = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        **engine_args,
    }
    try:
        args = EngineArgs(model=model, dtype=dtype, **given)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise AffluxError(f"ffn.engine: {error}", code="bad_engine_args") from error
    try:
        return args.create_engine_config()
    except Exception as error:  # vLLM raises whatever its many checks raise
        raise UnsupportedModel(
            f"vLLM can't serve {model} with dtype={dtype!r} and engine arguments {given}: {error}"
        ) from error


def build_experts(
    config: VllmConfig,
    checkpoint: Checkpoint,
    experts: Mapping[int, tuple[int, ...]],
    device: torch.device,
    *,
    blank: bool = False,
) -> dict[int, LocalExperts]:
    """Build, load and pack the layers that hold an expert of ``experts`` (layer -> global ids).

    Args:
        blank: load nothing, and keep no memory for the weights once they are packed: such a
            layer shows what others are like, see ``expert_rows``; it can't compute.

    Raises:
        UnsupportedModel: vLLM runs this model's experts outside of modular kernels, or builds
            other expert layers than the checkpoint holds.
        CheckpointError: vLLM's loader refused a tensor, or left a local expert unwritten.
    """
    with (
        _build_lock,
        set_current_vllm_config(config),
        set_default_torch_dtype(config.model_config.dtype),
        _fresh_registries(config),
    ):
        _init_distributed(device)
        model = _build_on_meta(config, _Build(experts, device))
        layers = _expert_layers(model)
        absent = sorted(set(experts) - set(layers))
        if absent:
            raise UnsupportedModel(
                f"vLLM builds no routed experts in layers {absent} of {checkpoint.path}, only in "
                f"{sorted(layers)}: the model runs them outside of its expert layers"
            )
        held = {layer: layers[layer] for layer, local in experts.items() if local}
        if not blank:
            _load(model, held, checkpoint)
        for layer, module in held.items():
            if blank:
                _zero(module)
            else:
                _check_written(module, checkpoint, layer)
            module.quant_method.process_weights_after_loading(module)
            if module.quant_method.is_monolithic:
                raise UnsupportedModel(
                    f"vLLM chose a kernel for layer {layer} that routes inside "
                    f"({module.quant_method.method_name}); experts apart need a modular one: "
                    "set engine argument moe_backend"
                )
            module._ensure_moe_quant_config_init()
            # From here on ids are local: what the kernels count is what is held.
            module.global_num_experts = len(module.local_experts)
            if blank:
                _hollow(module)
    return held


def allocated_bytes(modules: Iterator[nn.Module]) -> int:
    """Bytes of the distinct storages behind the modules' parameters and buffers."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
        if not tensor.is_meta
    }
    return sum(storages.values())


def bare_kernel(module: LocalExperts) -> BareKernel | None:
    """The layer's kernel itself, if vLLM's steps around it would only copy; else None.

    On a CPU without quantisation nothing has to be prepared or finalised, and the kernel can then
    write its result where the caller wants it (measured: 7 instead of 21 us for one small token).

    Returns:
        A function of x [T, H], local ids [T, K], weights [T, K] and the result [T, H].
    """
    method = module.quant_method
    if type(method) is not UnquantizedFusedMoEMethod or method.moe_kernel is None:
        return None
    kernel = method.moe_kernel.fused_experts
    prepare = method.moe_kernel.prepare_finalize
    if (
        not isinstance(kernel, CPUUnquantizedExperts)
        or type(prepare) is not MoEPrepareAndFinalizeNoDPEPModular
        or module.apply_router_weight_on_input
    ):
        return None
    activation, held = module.activation, len(module.local_experts)
    w13: torch.Tensor = module.get_parameter("w13_weight")
    w2: torch.Tensor = module.get_parameter("w2_weight")

    def run(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> None:
        # The kernel has scratch memory of its own: its workspaces are empty, any tensor does.
        kernel.apply(
            out, x, w13, w2, weights, ids, activation, held, None, None, None, out, out, None, False
        )

    return run


def _prepare_cpu() -> None:
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # without it the AMX kernels die with SIGILL


def _init_distributed(device: torch.device) -> None:
    """vLLM's layers ask for process groups: a world of one, met in memory, not on a port."""
    if model_parallel_is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            backend, store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    init_distributed_environment(1, 0, "", 0, backend)
    ensure_model_parallel_initialized(1, 1)


@contextmanager
def _fresh_registries(config: VllmConfig) -> Iterator[None]:
    """A configuration notes the layers built with it and refuses a second one of the same name."""
    noted = (
        config.compilation_config.static_forward_context,
        config.compilation_config.static_all_moe_layers,
    )
    try:
        yield
    finally:
        for registry in noted:
            registry.clear()


def _build_on_meta(config: VllmConfig, build: _Build) -> nn.Module:
    model_class, _ = get_model_architecture(config.model_config)  # imports the family's module
    token = _current_build.set(build)
    try:
        with experts_replaced_by(LocalExperts), torch.device("meta"):
            return initialize_model(vllm_config=config, model_class=model_class)
    except Exception as error:  # model classes assert, index and look up attributes
        raise UnsupportedModel(
            f"vLLM's {model_class.__name__} can't be built from {config.model_config.model}: "
            f"{type(error).__name__}: {error}"
        ) from error
    finally:
        _current_build.reset(token)


def _expert_layers(model: nn.Module) -> dict[int, LocalExperts]:
    layers: dict[int, LocalExperts] = {}
    for name, module in model.named_modules():
        if not isinstance(module, RoutedExperts):
            continue
        if not isinstance(module, LocalExperts):
            raise UnsupportedModel(f"{name} is a {type(module).__name__} that can't be narrowed")
        if layers.setdefault(module.layer, module) is not module:
            raise UnsupportedModel(
                f"{module.layer_name} and {layers[module.layer].layer_name} have the same layer "
                "number: experts are placed by layer number, which must be unique in a model"
            )
    return layers


def _load(model: nn.Module, held: Mapping[int, LocalExperts], checkpoint: Checkpoint) -> None:
    """Let the model's own loader pick up the local experts' tensors and nothing else."""
    for module in held.values():
        for name, parameter in module.named_parameters():
            if name.endswith("_weight") and _shows_nan(parameter):
                parameter.data.fill_(torch.nan)  # what stays NaN was never written
    for stacked in (False, True):
        for module in held.values():
            module.loads_stacked = stacked
        names = [
            name
            for name, place in checkpoint.experts.items()
            if place.layer in held and (place.expert is None) == stacked
        ]
        if names:
            try:
                model.load_weights(_read(names, held, checkpoint))  # pyright: ignore[reportCallIssue]
            except (CheckpointError, UnsupportedModel):
                raise
            except Exception as error:  # loaders assert, index and look up attributes
                raise CheckpointError(
                    f"vLLM's loader refused an expert of {checkpoint.path}: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _read(
    names: list[str], held: Mapping[int, LocalExperts], checkpoint: Checkpoint
) -> Iterator[tuple[str, torch.Tensor]]:
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(checkpoint.tensors[name].file, []).append(name)
    for file, inside in by_file.items():
        with safe_open(checkpoint.path / file, framework="pt") as tensors:
            for name in inside:
                layer, expert = checkpoint.experts[name]
                local = held[layer].local_experts
                if expert is None:
                    part = tensors.get_slice(name)  # copies the local experts' rows alone
                    if part.get_shape()[0] != checkpoint.num_experts:
                        raise UnsupportedModel(
                            f"{name} has shape {part.get_shape()}; a tensor of all experts must "
                            f"start with their number, {checkpoint.num_experts}"
                        )
                    yield name, torch.cat([part[e : e + 1] for e in local])
                elif expert in local:
                    yield name, tensors.get_tensor(name)


def _zero(module: LocalExperts) -> None:
    for parameter in module.parameters():
        if not parameter.is_meta:
            parameter.data.zero_()


def _hollow(module: LocalExperts) -> None:
    """Leave each weight its shape alone."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            one = parameter.data.new_zeros([1] * parameter.dim())
            parameter.data = one.expand(parameter.shape)


def _shows_nan(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_written(module: LocalExperts, checkpoint: Checkpoint, layer: int) -> None:
    """Raise if a local expert was left (partly) unwritten; zero what is padding."""
    for name, parameter in module.named_parameters():
        if not name.endswith("_weight") or not _shows_nan(parameter):
            continue
        # vLLM notes how many elements a checkpoint fills where it pads the rest.
        filled = getattr(parameter, "weight_loader_numel", parameter.numel())
        padding = (parameter.numel() - filled) // len(module.local_experts)
        for expert, weight in zip(module.local_experts, parameter.data, strict=True):
            unwritten = int(torch.isnan(weight).sum())
            if unwritten > padding:
                own = [n for n, p in checkpoint.experts.items() if p == (layer, expert)]
                raise CheckpointError(
                    f"{checkpoint.path}: {unwritten} of {weight.numel()} values of {name} of "
                    f"expert {expert} in layer {layer} were not loaded or are not numbers; the "
                    f"checkpoint's tensors for it: {own or 'stacked ones'}",
                    code="missing_tensors",
                )
            if unwritten:
                weight.nan_to_num_(0.0)
