"""How afflux gets its own expert layers, and a quick start, out of vLLM's model classes.

``experts_replaced_by`` swaps the layer class that holds routed experts while a model is built.
``inspect_in_process`` spares vLLM a second process when a family is first used on a machine: to
learn what a model class can do, vLLM imports it in a subprocess of its own (6 to 7 s measured) and
caches the answer on disk. It does so to keep CUDA out of a parent that forks; our actors don't
fork, so the class can be inspected where it will be used. ``replace_kernels_now`` does for a warm
process what vLLM does when a worker is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from vllm.model_executor import custom_op
from vllm.model_executor.custom_op import PluggableLayer
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform


@contextmanager
def experts_replaced_by(replacement: type[RoutedExperts]) -> Iterator[None]:
    """While open, vLLM builds ``replacement`` for RoutedExperts and for every subclass of it.

    vLLM looks replacements up by class name, so the model's module must be imported before: a
    family may bring a subclass of its own. What was registered before is put back at the end.
    """
    registry = custom_op.op_registry_oot
    before = dict(registry)
    registry.pop("RoutedExperts", None)
    PluggableLayer.register_oot(name="RoutedExperts")(replacement)
    for cls in list(_subclasses(RoutedExperts)):
        if not issubclass(cls, replacement) and not getattr(cls, "_of_afflux", False):
            mixed = type(f"Our{cls.__name__}", (replacement, cls), {"_of_afflux": True})
            registry.pop(cls.__name__, None)
            PluggableLayer.register_oot(name=cls.__name__)(mixed)
    try:
        yield
    finally:
        registry.clear()
        registry.update(before)


def _subclasses(cls: type) -> Iterator[type]:
    child: type
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def inspect_in_process(architectures: Iterable[str]) -> None:
    """Import and inspect the classes of these architectures here and now.

    Unknown architectures, and classes that can't be imported, are left to vLLM, which has its own
    fallbacks and error texts.
    """
    for architecture in architectures:
        entry = ModelRegistry.models.get(architecture)
        if entry is None or not hasattr(entry, "module_name"):  # only lazy entries name a module
            continue
        try:
            model_class = entry.load_model_cls()
        except Exception:
            continue
        del ModelRegistry.models[architecture]  # or vLLM warns about registering it twice
        ModelRegistry.register_model(architecture, model_class)


def replace_kernels_now() -> None:
    """Have vLLM replace its Triton kernels where there is no Triton, and not again later.

    It looks through every name of every loaded module for them: 0.3 s of CPU, more than all the
    rest of a small engine's start. A module that is loaded later imports what replaced them.
    """
    current_platform.register_triton_kernel_overrides()
    vars(current_platform)["register_triton_kernel_overrides"] = lambda: None  # of this process
