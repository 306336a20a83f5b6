"""Our models in aiconfigurator's words: where their configs are, and which kernels they need."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from planner.explore.kernels.base import NotCovered
from planner.explore.model import Model

_GEMM = {"bf16": "bfloat16", "fp8": "fp8_block", "mxfp4": "bfloat16", "nvfp4": "nvfp4"}
_MOE = {"bf16": "bfloat16", "fp8": "fp8_block", "mxfp4": "w4a16_mxfp4", "nvfp4": "nvfp4"}
_MXFP4_BLACKWELL = "w4a8_mxfp4_mxfp8"  # what TensorRT-LLM runs there, as aiconfigurator takes it
_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def formats_of(model: Model, system: str, backend: str) -> dict[str, Any]:
    """Kernels for the model's number formats, as arguments of a ``ModelConfig``.

    Raises:
        NotCovered: there are none.
    """
    from aiconfigurator_core.sdk import common
    from aiconfigurator_core.sdk.perf_database import is_blackwell_system

    blackwell = is_blackwell_system(system)
    gemm, moe = _GEMM[model.weight_format], _MOE[model.expert_format]
    if model.expert_format == "mxfp4" and blackwell and backend == "trtllm":
        moe = _MXFP4_BLACKWELL
    if not blackwell:  # no 4-bit arithmetic: weights are widened first
        gemm = gemm.replace("nvfp4", "nvfp4_wo")
        moe = moe.replace("nvfp4", "nvfp4_wo")
    if model.kv_bytes not in (1.0, 2.0):
        raise NotCovered(
            f"a KV cache of {model.kv_bytes} bytes per element was not measured, "
            "expected 1 (FP8) or 2 (BF16)"
        )
    return {
        "gemm_quant_mode": common.GEMMQuantMode[gemm],
        "moe_quant_mode": common.MoEQuantMode[moe],
        "kvcache_quant_mode": common.KVCacheQuantMode[
            "fp8" if model.kv_bytes == 1.0 else "bfloat16"
        ],
    }


def path_of(model: Model) -> str:
    """Where the package finds the model's config: by name where it comes along, else a folder."""
    from aiconfigurator_core.sdk import common

    # never by an unknown name: the package would download it
    if model.name in common.DefaultHFModels and _same(model):
        return model.name
    return _folder(model.name, json.dumps(dict(model.config), sort_keys=True))


def _same(model: Model) -> bool:
    """Whether the package's config of that name says what the model's does."""
    from aiconfigurator_core.sdk.utils import get_model_config_from_model_path

    there = get_model_config_from_model_path(model.name)
    return (
        there["layers"] == model.layers
        and there["hidden_size"] == model.hidden
        and there["num_experts"] == model.experts
        and there["moe_inter_size"] == model.expert_inter
    )


@cache
def _folder(name: str, config: str) -> str:
    """A folder with the config, kept as long as the process."""
    # what the package insists on and no kernel depends on
    keys = {"max_position_embeddings": 131_072, **json.loads(config)}
    if not json.loads(config):
        raise NotCovered(f"{name} comes without a config: aiconfigurator-core needs one")
    folder = tempfile.TemporaryDirectory(prefix="afflux-plan-")
    _FOLDERS.append(folder)
    (Path(folder.name) / "config.json").write_text(json.dumps(keys), encoding="utf-8")
    return folder.name
