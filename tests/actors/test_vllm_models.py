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
