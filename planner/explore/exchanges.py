"""Measured all-to-alls of others: tables in ``aiconfigurator-core``, and what DeepEP published.

Reads and converts; fitting them is ``calibration``'s business.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.explore.calibration import Measurement
from planner.explore.network import fan_out
from planner.explore.systems import SYSTEMS

FP8_BLOCK = 128
HEADER = 16
"""DeepEP's low-latency dispatch sends FP8 with a float32 scale per 128 elements, and an int4 of
source index, for every (token, expert) pair, also where two experts are on one GPU; its combine
sends bfloat16 (csrc/kernels/internode_ll.cu)."""

LEAST_EXPERTS = 16
"""Per GPU, in a table that is fitted: DeepEP gives each expert a fixed number of warps, so that
with few experts the kernel is slow, not the link (top-2 of 8 experts on 8 GPUs takes 300 us for
what takes 70 us with 128 experts)."""

DEEPEP_TOKENS, DEEPEP_HIDDEN, DEEPEP_TOP_K = 128, 7168, 8
DEEPEP_GPUS = (8, 16, 32, 64, 128, 256)
DEEPEP_DISPATCH = (77e-6, 118e-6, 155e-6, 173e-6, 192e-6, 194e-6)
DEEPEP_COMBINE = (114e-6, 195e-6, 273e-6, 314e-6, 369e-6, 360e-6)
"""Low-latency kernels on H800 with CX7 InfiniBand at 400 Gb/s, 128 tokens per batch, 7168 hidden,
top-8, FP8 dispatch and BF16 combine: performance table of DeepEP's README (docs/legacy.md since
version 2)."""


def deepep_bytes(tokens: int, top_k: int, hidden: int) -> dict[str, float]:
    """Bytes that one GPU sends, itself included, by "dispatch" and "combine"."""
    pairs = tokens * top_k
    return {
        "dispatch": pairs * (hidden + 4 * hidden / FP8_BLOCK + HEADER),
        "combine": pairs * 2.0 * hidden,
    }


def deepep_published() -> list[tuple[str, int, Measurement]]:
    """("dispatch" or "combine", GPUs, what was measured) of DeepEP's published table."""
    found = []
    for op, times in (("dispatch", DEEPEP_DISPATCH), ("combine", DEEPEP_COMBINE)):
        sent = deepep_bytes(DEEPEP_TOKENS, DEEPEP_TOP_K, DEEPEP_HIDDEN)[op]
        for gpus, seconds in zip(DEEPEP_GPUS, times, strict=True):
            one = _deepep(f"DeepEP {op}, H800", "h800", 8, gpus, sent, seconds, held_out=True)
            found.append((op, gpus, one))
    return found


def hopper_tables() -> list[Measurement]:
    """DeepEP low latency on H100 and H200 (the multi-node tables of both are the same: one).

    Raises:
        PlannerError: aiconfigurator-core is missing.
    """
    multi = list(_low_latency("h200_sxm", "0.5.6.post2", 8))
    return multi + [
        one for name in ("h100_sxm", "h200_sxm") for one in _low_latency(name, "0.5.12", 8)
    ]


def blackwell_tables() -> list[Measurement]:
    """DeepEP low latency within one node, and NVLink all-to-alls in a GB200 rack.

    Raises:
        PlannerError: aiconfigurator-core is missing.
    """
    nodes = (("b200_sxm", 8), ("b300_sxm", 8), ("gb200", 4), ("gb300", 4))
    found = [one for name, node in nodes for one in _low_latency(name, "0.5.12", node)]
    return found + list(_rack("gb200"))


def _low_latency(system: str, version: str, node: int) -> Iterator[Measurement]:
    table = _table(f"{system}/comm/sglang/{version}/wideep_deepep_ll_perf.parquet")
    for row in table.itertuples():
        gpus = int(row.node_num) * node
        if row.num_experts < LEAST_EXPERTS * node:
            continue
        for op, sent in deepep_bytes(row.num_token, row.num_topk, row.hidden_size).items():
            seconds = 1e-6 * float(getattr(row, f"{op}_avg_t_us"))
            yield _deepep(f"DeepEP {op}, {system} {version}", system, node, gpus, sent, seconds)


def _rack(system: str) -> Iterator[Measurement]:
    """TensorRT-LLM's all-to-all sends a token once to every GPU with one of its experts. Two GPUs
    are left out: they are held up by the kernel, not by the link."""
    table = _table(f"{system}/comm/trtllm/1.3.0rc10/trtllm_alltoall_perf.parquet")
    tier = SYSTEMS[system].tiers[0]
    rows = table[(table.moe_dtype == "bfloat16") & (table.moe_ep_size >= 4)]
    for op in ("dispatch", "combine"):
        for row in rows[rows.op_name == f"alltoall_{op}"].itertuples():
            gpus = int(row.moe_ep_size)
            copies = fan_out("distinct", int(row.num_experts), int(row.topk), gpus)
            sent = row.num_tokens * copies * 2.0 * row.hidden_size * (1 - 1 / gpus)
            yield Measurement(
                f"TensorRT-LLM {op}, {system}", "nvlink", tier.latency, tier.bandwidth,
                gpus - 1, float(sent), 1e-3 * float(row.latency),
            )  # fmt: skip


def _deepep(
    source: str,
    system: str,
    node: int,
    gpus: int,
    sent: float,
    seconds: float,
    held_out: bool = False,
) -> Measurement:
    between = gpus > node
    tier = SYSTEMS[system].tiers[-1 if between else 0]
    elsewhere = 1 - (node if between else 1) / gpus  # of the experts, by the slowest tier
    name = "cluster" if between else "nvlink"
    return Measurement(
        source, name, tier.latency, tier.bandwidth, gpus - 1, sent * elsewhere, seconds, held_out
    )


def _table(path: str) -> Any:
    try:
        import aiconfigurator_core
        import pandas
    except ImportError as error:
        raise PlannerError(
            "measured tables come from aiconfigurator-core, which is not installed: "
            "pip install 'afflux[plan]'"
        ) from error
    root = Path(aiconfigurator_core.__file__).parent / "systems" / "data"
    if not (root / path).is_file():
        raise PlannerError(
            f"aiconfigurator-core has no table {path}: expected version 0.12.0, "
            "pip install 'afflux[plan]'"
        )
    return pandas.read_parquet(root / path)
