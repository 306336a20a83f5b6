"""One GPU as a roofline: what a single kernel costs from peak rates, bytes and a launch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from planner.explore.kernels.base import Array
from planner.explore.model import BF16
from planner.explore.precision import Format
from planner.explore.system import Gpu


@dataclass(frozen=True)
class Unit:
    """Times of kernels on one GPU.

    Args:
        gpu: its rates.
    """

    gpu: Gpu

    def kernel(self, flops: ArrayLike, moved: ArrayLike, dtype: str = "bf16") -> Array:
        """Seconds of a kernel; 0 where it has nothing to do.

        Args:
            flops: operations (a multiply-add is two).
            moved: bytes read and written.
            dtype: of the arithmetic.
        """
        gpu = self.gpu
        rate = gpu.flops[self.arithmetic(dtype)] * gpu.flops_share
        flops, moved = np.asarray(flops, float), np.asarray(moved, float)
        seconds = np.maximum(flops / rate, moved / (gpu.bandwidth * gpu.bandwidth_share))
        busy = (flops > 0) | (moved > 0)
        return np.where(busy, np.maximum(seconds, gpu.launch), 0.0)

    def arithmetic(self, form: str) -> str:
        """The dtype a GPU computes in for weights of a format: the fastest it has for them.

        MXFP4 and NVFP4 weights are multiplied in FP8 and FP4 where the GPU has FP4 (Blackwell),
        else unpacked to BF16; FP8 without FP8 units too.
        """
        has = self.gpu.flops
        wanted = {
            "mxfp4": "fp8" if "fp4" in has else "bf16",
            "nvfp4": "fp4",
        }.get(form, form)
        return wanted if wanted in has else "bf16"

    def gemm(
        self, rows: ArrayLike, columns: float, inner: float, form: Format, per_weight: float
    ) -> Array:
        """Seconds of [rows, inner] x [inner, columns]; 0 for no rows.

        Args:
            form: of the weights.
            per_weight: bytes of each.
        """
        rows = np.asarray(rows, float)
        operand = 1 if self.arithmetic(form) == "fp8" else BF16
        flops = 2.0 * rows * columns * inner
        moved = columns * inner * per_weight + rows * (inner * operand + columns * BF16)
        return np.where(rows > 0, self.kernel(flops, moved, form), 0.0)

    def elementwise(self, values: ArrayLike) -> Array:
        """Seconds of a kernel that reads or writes ``values`` BF16 numbers."""
        return self.kernel(0.0, np.asarray(values, float) * BF16)
