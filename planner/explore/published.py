"""Published measurements beside what the planner makes of the same setting; errors are shown.

DeepEP's exchanges (measured tables and its own README), DeepSeek-V3's decode on H800, and DeepSeek-
V3.2 with and without AFD on Ascend. Predictions use what the modes use: kernel times of a
``KernelDB``, ``network``, ``overlap``. For the paper's own figures see ``reproduce_2605``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.errors import PlannerError
from planner.explore.calibration import (
    NOMINAL,
    Calibration,
    Measurement,
    predicted,
)
from planner.explore.exchanges import (
    DEEPEP_HIDDEN,
    DEEPEP_TOKENS,
    DEEPEP_TOP_K,
    deepep_bytes,
    deepep_published,
)
from planner.explore.kernels.base import KernelDB, Load, Provenance, Sides
from planner.explore.model import Model
from planner.explore.network import Traffic, a2f, f2a
from planner.explore.overlap import overlapped
from planner.explore.placement import segregated
from planner.explore.system import Gpu, System, Tier, find_system
from planner.explore.transfers import symmetric_time

# -- (a) exchanges -------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExchangeRow:
    """One of DeepEP's published times beside ours; seconds.

    Args:
        op: "dispatch" or "combine".
        gpus: expert-parallel size.
        published, ours: seconds.
        error: ours over published, less one.
    """

    op: str
    gpus: int
    published: float
    ours: float
    error: float


@dataclass(frozen=True)
class TableRow:
    """How well a calibration meets one measured table.

    Args:
        source: the table.
        tier: over which it goes.
        count: of measurements.
        median, p90, worst: absolute relative errors.
        bias: mean of ours over measured, less one.
    """

    source: str
    tier: str
    count: int
    median: float
    p90: float
    worst: float
    bias: float


def deepep_rows() -> list[ExchangeRow]:
    """DeepEP's README against ``network`` on H800; the calibration is fitted to other tables."""
    system = find_system("h800")
    sent = deepep_bytes(DEEPEP_TOKENS, DEEPEP_TOP_K, DEEPEP_HIDDEN)
    rows = []
    for op, gpus, one in deepep_published():
        ours = symmetric_time(system, range(gpus), range(gpus), sent[op] / gpus)
        rows.append(ExchangeRow(op, gpus, one.seconds, ours, ours / one.seconds - 1))
    return rows


def table_rows(calibration: Calibration, measured: Sequence[Measurement]) -> list[TableRow]:
    """Errors of a calibration by table and tier."""
    errors: dict[tuple[str, str], list[float]] = {}
    for one in measured:
        error = predicted(calibration, one) / one.seconds - 1
        errors.setdefault((one.source, one.tier), []).append(error)
    rows = []
    for (source, tier), found in errors.items():
        size = np.abs(found)
        rows.append(
            TableRow(
                source, tier, len(found), float(np.median(size)), float(np.quantile(size, 0.9)),
                float(size.max()), float(np.mean(found)),
            )
        )  # fmt: skip
    return rows


# -- (b) DeepSeek-V3 decode on H800 --------------------------------------------------------------

H800_TOKENS_PER_S = 2324.0
"""Per GPU: DeepSeek-V3 decode on Hopper GPUs, 4K context, FP8, no MTP, as arXiv 2507.19427
(Step-3, abstract) states it."""
H800_GPUS, H800_BATCH, H800_CONTEXT, H800_LANES = 128, 128, 4096, 2
"""Setting of DeepSeek's published decode profile (github.com/deepseek-ai/profile-data): EP128, TP1,
prompts of 4K, 128 requests per GPU, two micro-batches, experts balanced. That the 2,324 are of this
profile is our reading: the abstract names the context and the format only."""


@dataclass(frozen=True)
class DecodeRow:
    """A decode throughput beside ours.

    Args:
        name: of the setting.
        published, ours: tokens per second and GPU.
        error: ours over published, less one.
        batch: requests of one GPU.
        tpot: seconds of our step.
        parts: seconds of a micro-batch in all layers, by stage.
        source: of the kernel times.
        shares: of the kernel times by provenance.
    """

    name: str
    published: float
    ours: float
    error: float
    batch: int
    tpot: float
    parts: Mapping[str, float]
    source: str
    shares: Mapping[Provenance, float]


def two_batch_step(compute: float, exchange: float) -> float:
    """Seconds of a step whose two micro-batches take turns at the GPU and on the network.

    Whichever of the two is busier works all the time, unless a micro-batch's own passage is longer:
    max(2 compute, 2 exchange, compute + exchange). The least that two can take (no gaps).
    """
    return max(2 * compute, 2 * exchange, compute + exchange)


def decode_row(model: Model, db: KernelDB, batch: int = H800_BATCH) -> DecodeRow:
    """DeepSeek-V3 decode with 128 experts' GPUs of H800.

    Args:
        model: DeepSeek-V3; its KV cache was BF16 (DeepSeek's overview of its inference system:
            FP8 for matrix products and dispatch, BF16 for attention proper and combine).
        db: kernel times of H100 for balanced experts, as the profile's are: the H800 differs in
            NVLink only, and that is ``network``'s here.
        batch: requests per GPU.

    Raises:
        PlannerError: nothing known of these kernels.
    """
    each = np.array(batch / H800_LANES)
    attention = db.attention(model, 1, Sides(), Load(each, np.array(float(H800_CONTEXT))))
    experts = db.experts(model, 1, H800_GPUS, Sides(), each * H800_GPUS)
    system, gpus = find_system("h800"), range(H800_GPUS)
    sent = deepep_bytes(int(each), model.top_k, model.hidden)
    moe_layers = model.layers - model.dense_layers
    travel = {
        op: moe_layers * symmetric_time(system, gpus, gpus, size / H800_GPUS)
        for op, size in sent.items()
    }
    parts = {"attention": float(attention.seconds), "ffn": float(experts.seconds), **travel}
    step = two_batch_step(parts["attention"] + parts["ffn"], sum(travel.values()))
    ours = batch / step
    return DecodeRow(
        "DeepSeek-V3 decode, H800, EP128",
        H800_TOKENS_PER_S,
        ours,
        ours / H800_TOKENS_PER_S - 1,
        batch,
        step,
        parts,
        db.name,
        (attention + experts).shares(),
    )


def decode_within(model: Model, db: KernelDB, tpot: float = 0.050) -> DecodeRow:
    """The same with as many requests as a step of ``tpot`` seconds allows, up to the profile's.

    The abstract's comparison is at 50 ms per token; 128 requests at 2,324 tokens/s take 55 ms.

    Raises:
        PlannerError: not even two requests hold it.
    """
    batches = range(H800_LANES, H800_BATCH + 1, H800_LANES)
    held = bisect_right(batches, tpot, key=lambda batch: decode_row(model, db, batch).tpot)
    if not held:
        least = decode_row(model, db, batches[0])
        raise PlannerError(
            f"{least.tpot:g} s for {least.batch} requests per GPU, allowed are {tpot:g} s"
        )
    row = decode_row(model, db, batches[held - 1])
    return replace(row, name=f"{row.name}, TPOT <= {1e3 * tpot:g} ms")


# -- (c) AFD on Ascend ---------------------------------------------------------------------------


@dataclass(frozen=True)
class AscendRun:
    """One run of DeepSeek-V3.2 decode on Ascend 910C dies, W8A8, experts forced to be balanced.

    Args:
        prompt: tokens of context, before 512 to 1,536 tokens of output.
        attention, ffn: dies of each side; ``ffn`` 0: EP64, every die does both.
        batch: requests of an attention die.
        published: tokens per second and die, all dies counted.
    """

    prompt: int
    attention: int
    ffn: int
    batch: int
    published: float

    @property
    def name(self) -> str:
        return f"{self.attention}A{self.ffn}F" if self.ffn else f"EP{self.attention}"

    @property
    def dies(self) -> int:
        return self.attention + self.ffn

    @property
    def step(self) -> float:
        """Seconds per token and request that the published throughput means with full batches."""
        return self.attention * self.batch / (self.published * self.dies)


ASCEND_RUNS = (
    AscendRun(16_384, 64, 0, 16, 232.6),
    AscendRun(16_384, 48, 16, 28, 220.3),
    AscendRun(16_384, 64, 16, 28, 258.9),
    AscendRun(32_768, 64, 0, 8, 168.2),
    AscendRun(32_768, 48, 16, 14, 151.4),
    AscendRun(32_768, 64, 16, 14, 183.3),
)
"""On an Atlas 900 A3: github.com/vllm-project/afd-plugin,
recipe/npu/CAMP2pAFDConnector/deepseek_v3_2. A step of 48A16F took longer than one of 64A16F, with
the same batch and fewer tokens per FFN die: no model of stages says so, and ours does not."""

ASCEND_ACTIVE = 4
"""Experts per FFN die that the runs route to: the AFD runs hold 16 and force tokens to 4 of them,
EP64 holds 4."""
ASCEND_LANES = 2
ASCEND_OUTPUT = 1024

ASCEND = System(
    "ascend_910c_die",
    Gpu(
        "Ascend 910C die",
        64 * 2**30,
        1.6e12,
        {"bf16": 376e12, "fp8": 752e12},
        "half of a 910C of CloudMatrix384 (752 TFLOPS BF16, 3.2 TB/s, 128 GiB; arXiv 2506.12708); "
        "INT8 stands where others have FP8",
    ),
    16,
    (Tier("ub", None, 10e-6, 196e9),),
)
"""The unified bus joins all dies alike, 196 GB/s each way (same source). The 10 us per message are
assumed as for others; neither kernels nor exchanges of this die were measured by us."""


@dataclass(frozen=True)
class AscendRow:
    """A run beside ours.

    Args:
        run: as published.
        ours: tokens per second and die.
        step: seconds of our step.
        parts: seconds by stage, of a step or of a micro-batch of it.
    """

    run: AscendRun
    ours: float
    step: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class RatioRow:
    """AFD over EP64, tokens per second and die.

    Args:
        name: of the AFD run.
        prompt: tokens.
        published, ours: ratio less one.
        error: (1 + ours) / (1 + published) less one.
    """

    name: str
    prompt: int
    published: float
    ours: float
    error: float


def ascend_rows(model: Model, db: KernelDB) -> list[AscendRow]:
    """All runs by kernel times, network and overlap.

    Args:
        model: DeepSeek-V3.2.
        db: kernel times of ``ASCEND``; a roofline of its data sheet, as nothing is measured.
    """
    return [_ascend_row(model, db, run) for run in ASCEND_RUNS]


def ratio_rows(rows: Sequence[AscendRow]) -> list[RatioRow]:
    """Each AFD run against EP64 of the same context."""
    base = {row.run.prompt: row for row in rows if not row.run.ffn}
    found = []
    for row in rows:
        if row.run.ffn:
            under = base[row.run.prompt]
            published = row.run.published / under.run.published - 1
            ours = row.ours / under.ours - 1
            error = (1 + ours) / (1 + published) - 1
            found.append(RatioRow(row.run.name, row.run.prompt, published, ours, error))
    return found


def _ascend_row(model: Model, db: KernelDB, run: AscendRun) -> AscendRow:
    ranks = run.ffn or run.attention
    lanes = ASCEND_LANES if run.ffn else 1
    # a token chooses among the experts that are routed to, the same number on every rank
    routed = replace(model, experts=ASCEND_ACTIVE * ranks)
    each = np.array(run.batch / lanes)
    context = np.array(run.prompt + ASCEND_OUTPUT / 2)
    attention = db.attention(model, 1, Sides(), Load(each, context))
    experts = db.experts(routed, 1, ranks, Sides(), each * run.attention)
    traffic = Traffic(routed.hidden, routed.experts, routed.top_k)
    layers = model.layers - model.dense_layers
    if run.ffn:
        place = segregated(ASCEND, run.attention, run.ffn)
        there, back = (
            layers * float(move(ASCEND, place, each, traffic, calibration=NOMINAL))
            for move in (a2f, f2a)
        )
    else:
        dies = range(run.attention)
        there, back = (
            layers * symmetric_time(ASCEND, dies, dies, run.batch * size, calibration=NOMINAL)
            for size in (traffic.a2f_bytes(ranks) / ranks, traffic.f2a_bytes(ranks) / ranks)
        )
    parts = {
        "attention": float(attention.seconds),
        "a2f": there,
        "ffn": float(experts.seconds),
        "f2a": back,
    }
    step = sum(parts.values())  # one micro-batch: nothing overlaps
    if run.ffn:
        step = float(overlapped(tuple(parts.values()), lanes, model.layers).safe)
    return AscendRow(run, run.attention * run.batch / step / run.dies, step, parts)
