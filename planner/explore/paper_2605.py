"""What arXiv 2605.28302 reports, and its conventions as far as they are known.

Figures as published; what isn't known of the paper (version of its kernel data, batches, how TTFT
is composed) isn't made up here. ``reproduce_2605`` compares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from planner.explore.points import Mode
from planner.explore.question import Options

MODEL, SYSTEM, GPUS = "deepseek-v3.2", "b200_sxm", 128
MODELS = ("deepseek-v3.2", "qwen3-235b-a22b-fp8", "gpt-oss-120b")
"""Of the throughput end: three of the paper's four, those that are bundled."""

FIGURE_2: Mapping[tuple[str, Mode], float | None] = {
    ("chat", Mode.AGGREGATED): None,
    ("chat", Mode.AFD): 3970.0,
    ("chat", Mode.PD): None,
    ("chat", Mode.PD_AFD): 763.0,
    ("coding", Mode.AGGREGATED): None,
    ("coding", Mode.AFD): 3815.0,
    ("coding", Mode.PD): None,
    ("coding", Mode.PD_AFD): 1564.0,
    ("agentic", Mode.AGGREGATED): None,
    ("agentic", Mode.AFD): 3881.0,
    ("agentic", Mode.PD): None,
    ("agentic", Mode.PD_AFD): 3309.0,
}
"""Tokens/s of the whole system, DeepSeek-V3.2, 128 B200, strict targets; None: infeasible."""

WORKLOADS = tuple(dict.fromkeys(workload for workload, _ in FIGURE_2))
RATIOS: Mapping[str, tuple[int, int]] = {"chat": (16, 112), "agentic": (2, 126)}
"""Attention and FFN GPUs of AFD at the latency end."""
BINDING: Mapping[str, str] = {"chat": "ttft", "coding": "ttft"}
"""Limit that aggregation fails at, where it is known: measured kernels of TensorRT-LLM."""


@dataclass(frozen=True)
class Convention:
    """How a cell is computed.

    Args:
        name: for people.
        options: of the modes.
        kernels: "aic" or "roofline".
        attention, experts: factors on their times.
        cluster: bandwidth between nodes, bytes per second; 0: the system's.
    """

    name: str
    options: Options
    kernels: str = "aic"
    attention: float = 1.0
    experts: float = 1.0
    cluster: float = 0.0


OURS = Convention("ours", Options(allow_extrapolation=True))
"""What ``afflux plan`` takes by default, but for the permission to leave what was measured: no
kernels were measured at half a million tokens of context."""

PAPER = Convention(
    "paper's",
    Options(
        fan="paper",
        overlap="paper",
        network="nominal",
        full_duplex=True,
        lanes=(4,),
        wire_bytes=2.0,
        prefill_rate=0.9,
        decode_rate=0.92,
        pd_ttft=1.8,
        pd_afd="both",
        allow_extrapolation=True,
    ),
)

ROOFLINE = replace(PAPER, name="paper's, roofline", kernels="roofline")
"""Its memory operations are a roofline too: 0.8 of the HBM and 3 us."""


def moves(base: Convention) -> tuple[Convention, ...]:
    """One input of a convention moved at a time."""
    options = base.options

    def other(name: str, **changed: object) -> Convention:
        return replace(base, name=name, options=replace(options, **changed))  # type: ignore[arg-type]

    return (
        other("overlap: safe bound", overlap="safe"),
        other("micro-batches: 1, 2 or 4", lanes=()),
        other("half duplex: 3 micro-batches", lanes=(3,), full_duplex=False),
        other("fan-out: distinct ranks", fan="distinct"),
        other("P/D+AFD: AFD in one pool or both", pd_afd="any"),
        other("links: as measured", network="calibrated"),
        replace(base, name="InfiniBand: 50 GB/s", cluster=50e9),
        other("TTFT: a prompt's own passage", queueing=False, pd_ttft=1.0),
        replace(base, name="expert time x0.5", experts=0.5),
        replace(base, name="attention time x0.5", attention=0.5),
        replace(base, name="attention time x0.25", attention=0.25),
        replace(base, name="kernels: roofline", kernels="roofline"),
    )


def error(ours: float, theirs: float | None) -> float:
    """Relative error in tokens/s; nan where the paper has none. Infeasible counts as 0 tokens/s."""
    return math.nan if theirs is None else ours / theirs - 1.0
