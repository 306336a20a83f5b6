"""Sources of kernel times by name, made when they are asked for: one of them needs an extra."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from planner.errors import PlannerError
from planner.explore.kernels.base import KernelDB
from planner.explore.system import System

SOURCES = ("aic", "roofline")

Word = TypeVar("Word", bound=str)


def find_source(
    name: str, system: System, *, backend: str = "trtllm", allow_extrapolation: bool = False
) -> KernelDB:
    """Kernel times of a system's GPUs.

    Args:
        name: "aic", aiconfigurator's measured kernels; "roofline", data sheets alone; or a file of
            our own measurements (*.json).
        backend: whose kernels were measured: "trtllm", "vllm" or "sglang".
        allow_extrapolation: outside of what was measured.

    Raises:
        PlannerError: there is no such source or backend, its package is missing (says what to
            install), or it has nothing of this system.
    """
    from planner.explore.kernels.aic_package import BACKENDS

    if Path(name).suffix == ".json":
        from planner.explore.kernels.measured import MeasuredDB

        return MeasuredDB(name, allow_extrapolation=allow_extrapolation)
    source = _known("kernels", name, SOURCES)
    stack = _known("backend", backend, BACKENDS)
    if source == "roofline":
        from planner.explore.kernels.roofline import RooflineDB

        return RooflineDB(system)
    from planner.explore.kernels.aic import AicDB

    return AicDB(system, backend=stack, allow_extrapolation=allow_extrapolation)


def _known(what: str, word: str, words: Sequence[Word]) -> Word:
    for known in words:
        if known == word:
            return known
    near = difflib.get_close_matches(word, words, 1)
    perhaps = f"; did you mean {near[0]}?" if near else ""
    file = ", or a file of measurements (*.json)" if what == "kernels" else ""
    raise PlannerError(f"{what} {word!r}: expected one of {', '.join(words)}{file}{perhaps}")
