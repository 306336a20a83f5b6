"""Number formats of weights and KV cache: bytes per value, and what a checkpoint says it uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import PlannerError
from planner.explore.hf_keys import Keys

Format = Literal["bf16", "fp8", "mxfp4", "nvfp4"]

MXFP4_BYTES = 0.5 + 1 / 32
"""4 bits per value and one 8-bit scale per 32 (OCP Microscaling Formats 1.0)."""
NVFP4_BYTES = 0.5 + 1 / 16
"""4 bits per value and one 8-bit scale per 16."""
SCALE_BYTES = 4
"""An FP8 block's scale is one float32 (DeepSeek-V3, section 3.3)."""


@dataclass(frozen=True)
class Precision:
    """How weights are stored.

    Args:
        weights: of attention, dense layers and shared experts.
        experts: of routed experts.
        weight_bytes, expert_bytes: per parameter of those, scales included.
        kv_bytes: per element of the KV cache.
    """

    weights: Format
    experts: Format
    weight_bytes: float
    expert_bytes: float
    kv_bytes: float


def read_precision(
    keys: Keys, precision: Literal["fp8", "bf16"] | None, kv: Literal["fp8", "bf16"] | None
) -> Precision:
    """What the config's ``quantization_config`` says, unless overridden.

    Without ``kv``, the KV cache is FP8 for models in FP8 or NVFP4, else BF16: as aiconfigurator
    0.12 takes it (vLLM's own default is BF16: say ``kv="bf16"`` for that).

    Raises:
        PlannerError: a quantisation that is not known, or an override that is not one.
    """
    _check_choice("precision", precision)
    _check_choice("kv_precision", kv)
    weights: Format
    experts: Format
    block: tuple[int, int] | None
    if precision is not None:
        weights, experts, block = precision, precision, (128, 128)
    else:
        weights, experts, block = _formats(keys)
    kv_format = kv or ("fp8" if {weights, experts} & {"fp8", "nvfp4"} else "bf16")
    return Precision(
        weights=weights,
        experts=experts,
        weight_bytes=_bytes(weights, block),
        expert_bytes=_bytes(experts, block),
        kv_bytes=2.0 if kv_format == "bf16" else 1.0,
    )


def _check_choice(name: str, value: str | None) -> None:
    if value not in (None, "fp8", "bf16"):
        raise PlannerError(f"{name} is {value!r}, expected 'fp8', 'bf16' or nothing")


def _formats(keys: Keys) -> tuple[Format, Format, tuple[int, int] | None]:
    """Formats of weights and routed experts, and the block that shares a scale."""
    quantised = keys.get("quantization_config")
    if quantised is None:
        return "bf16", "bf16", None
    if not isinstance(quantised, Mapping):
        raise PlannerError(
            f"quantization_config of {keys.name} is {quantised!r}, expected a mapping"
        )
    method = str(quantised.get("quant_method", "")).lower()
    algorithm = str(quantised.get("quant_algo", "")).lower()
    if method == "fp8" or (method == "modelopt" and algorithm.startswith("fp8")):
        return "fp8", "fp8", _block(quantised.get("weight_block_size"), keys.name)
    if method == "mxfp4":
        # such checkpoints keep everything but the experts in BF16
        return "bf16", "mxfp4", None
    if method == "modelopt" and algorithm == "nvfp4":
        # most of these checkpoints leave attention out, in BF16
        left_out = str(quantised.get("exclude_modules") or quantised.get("ignore") or "")
        return "bf16" if "attn" in left_out else "nvfp4", "nvfp4", None
    raise PlannerError(
        f"{keys.name} is quantised with {method or 'an unnamed method'}"
        f"{' ' + algorithm if algorithm else ''}, expected fp8, mxfp4 or nvfp4: take another "
        "checkpoint, or say precision='fp8' or 'bf16'"
    )


def _block(size: Any, name: str) -> tuple[int, int] | None:
    if size is None:
        return None
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise PlannerError(
            f"weight_block_size of {name} is {size!r}, expected two whole numbers above 0"
        )
    return size[0], size[1]


def _bytes(form: Format, block: tuple[int, int] | None) -> float:
    if form == "bf16":
        return 2.0
    if form == "fp8":
        return 1.0 + (SCALE_BYTES / (block[0] * block[1]) if block else 0.0)
    return MXFP4_BYTES if form == "mxfp4" else NVFP4_BYTES
