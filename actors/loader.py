"""Builds and loads an attention actor's model: the checkpoint without its routed experts.

vLLM's default loader reads every tensor and lets layers drop what they don't own. This one never
opens the routed experts' tensors, so an attention actor neither maps nor reads them.
"""

from collections.abc import Iterator

import torch
from safetensors import safe_open
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import get_model_architecture

from actors.checkpoint import Checkpoint
from actors.seam import RemoteExperts
from actors.vllm_models import experts_replaced_by

LOAD_FORMAT = "afflux_attention"


@register_model_loader(LOAD_FORMAT)
class AttentionLoader(DefaultModelLoader):
    """Default loader with the routed experts left out. ``tensors_read`` lists what was read."""

    tensors_read: list[str] = []

    def create_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> torch.nn.Module:
        get_model_architecture(model_config)  # imports the family's own layer classes
        with experts_replaced_by(RemoteExperts):
            return super().create_model(vllm_config, model_config, prefix)

    def get_all_weights(
        self, model_config: ModelConfig, model: torch.nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        checkpoint = Checkpoint.open(model_config.model)
        type(self).tensors_read = []
        wanted: dict[str, list[str]] = {}
        for name, info in checkpoint.tensors.items():
            if checkpoint.routed(name) is None:
                wanted.setdefault(info.file, []).append(name)
        for file, names in wanted.items():
            with safe_open(checkpoint.path / file, framework="pt") as tensors:
                for name in names:
                    self.tensors_read.append(name)
                    yield name, tensors.get_tensor(name)
