"""Model classes are inspected in this process, and whatever can't be is left to vLLM."""

from __future__ import annotations


def inspect(architecture: str) -> str | None:
    from vllm.model_executor.models.registry import ModelRegistry

    from actors.vllm_models import inspect_in_process

    inspect_in_process([architecture])
    inspect_in_process([architecture])  # again: nothing left to do
    entry = ModelRegistry.models.get(architecture)
    return None if entry is None else type(entry).__name__


def test_known_classes_are_inspected_here(vllm_process):
    assert vllm_process(inspect, "PhiMoEForCausalLM") == "_RegisteredModel"


def test_unknown_architectures_are_left_alone(vllm_process):
    assert vllm_process(inspect, "NoSuchModelForCausalLM") is None


def replaced_twice() -> tuple[bool, bool]:
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import KernelOverride
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    from actors.vllm_models import replace_kernels_now

    replace_kernels_now()
    first = ComputeSlotMappingKernel.kernel
    current_platform.register_triton_kernel_overrides()  # what vLLM does for a worker
    replaced = HAS_TRITON or isinstance(first, KernelOverride)
    return replaced, ComputeSlotMappingKernel.kernel is first


def test_kernels_are_replaced_once(vllm_process):
    assert vllm_process(replaced_twice) == (True, True)
