"""Where tables end, on tables small enough to see; the package isn't needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.explore.kernels.adaptive import Adaptive
from planner.explore.kernels.aic_coverage import ORDER, Coverage, SequenceCover, TokenCover
from planner.explore.kernels.aic_package import Graph, Op
from planner.explore.kernels.aic_parts import parts_of
from planner.explore.kernels.aic_sums import Sums, Work, group
from planner.explore.kernels.base import NotCovered, Provenance
from planner.explore.model import read_model

MEASURED, INTERPOLATED, EXTRAPOLATED, ROOFLINE = ORDER


def named(labels: np.ndarray) -> list[Provenance]:
    return [ORDER[label] for label in labels.tolist()]


class Tables:
    """Rows by file, and small tables."""

    def __init__(self, rows: dict[str, list[dict[str, Any]]], tables: dict[str, Any]):
        self._rows, self._tables = rows, tables

    def table(self, name: str) -> dict[str, Any]:
        return self._tables.get(name, {})

    def rows(self, file: str, columns: list[str], **equal: Any) -> np.ndarray:
        kept = [
            [float(row[column]) for column in columns]
            for row in self._rows.get(file, [])
            if all(row.get(key, value) == value for key, value in equal.items())
        ]
        return np.array(kept).reshape(-1, len(columns))


def gemm(n: int, k: int) -> Op:
    return {"Gemm": {"name": "g", "n": n, "k": k, "quant_mode": "fp8"}}


GEMMS = [
    {"gemm_dtype": "fp8", "m": m, "n": n, "k": k}
    for m in (1, 8, 64)
    for n in (128, 1024)
    for k in (128, 1024)
]


def test_matrices_at_between_and_beyond_measured_ones() -> None:
    coverage = Coverage(Tables({"gemm": GEMMS}, {}))
    tokens = np.array([8.0, 9.0, 65.0])
    assert named(coverage.tokens(gemm(128, 1024)).labels(tokens)) == [
        MEASURED,
        INTERPOLATED,
        EXTRAPOLATED,
    ]
    assert named(coverage.tokens(gemm(500, 1024)).labels(tokens)) == [
        INTERPOLATED,
        INTERPOLATED,
        EXTRAPOLATED,
    ]
    assert named(coverage.tokens(gemm(4096, 1024)).labels(tokens)) == [EXTRAPOLATED] * 3


def test_formulas_are_a_roofline_everywhere() -> None:
    coverage = Coverage(Tables({}, {}))
    cover = coverage.tokens({"Elementwise": {"name": "norm"}})
    assert named(cover.labels(np.array([1.0, 1e9]))) == [ROOFLINE, ROOFLINE]


def moe(ep: int, tokens: int) -> dict[str, Any]:
    return {
        "moe_dtype": "fp8", "distribution": "balanced", "topk": 8, "num_experts": 64,
        "hidden_size": 512, "inter_size": 256, "moe_tp_size": 1, "moe_ep_size": ep,
        "num_tokens": tokens,
    }  # fmt: skip


def test_experts_by_their_split() -> None:
    rows = [moe(ep, tokens) for ep in (1, 8, 64) for tokens in (1, 16, 256)]
    coverage = Coverage(Tables({"moe": rows}, {}))
    op = {
        "Moe": {
            "name": "moe", "quant_mode": "fp8", "workload_distribution": "balanced", "topk": 8,
            "num_experts": 64, "hidden_size": 512, "inter_size": 256, "moe_tp_size": 1,
            "moe_ep_size": 8,
        }
    }  # fmt: skip
    assert coverage.groups(op) == [1, 8, 64]
    assert coverage.tokens(op).points == (1.0, 16.0, 256.0)
    other = {"Moe": {**op["Moe"], "moe_ep_size": 16}}
    assert named(coverage.tokens(other).labels(np.array([16.0]))) == [EXTRAPOLATED]


def test_collectives_of_more_gpus_than_measured_are_outside() -> None:
    sizes = {str(size): {} for size in (1024, 4096, 65_536)}
    tables = {"_custom_allreduce_data": {"half": {"8": {"AUTO": sizes}}}}
    coverage = Coverage(Tables({}, tables))

    def labels(gpus: int) -> list[Provenance]:
        op = {"CustomAllReduce": {"name": "sum", "tp_size": gpus, "hidden_size": 512}}
        return named(coverage.tokens(op).labels(np.array([1.0, 128.0, 129.0])))

    # 65,536 elements are 128 tokens; less than any measured message takes what the least does
    assert labels(8) == [INTERPOLATED, INTERPOLATED, EXTRAPOLATED]
    assert labels(16) == [EXTRAPOLATED] * 3
    assert labels(1) == [ROOFLINE] * 3


def attention(heads: int, window: int = 0) -> Op:
    return {
        "GenerationAttention": {
            "name": "generation_attention", "n": heads, "n_kv": 2, "head_size": 64,
            "window_size": window, "kv_cache_dtype": "fp8",
        }
    }  # fmt: skip


def cached(heads: int, batch: int, length: int, window: int = 0) -> dict[str, Any]:
    return {
        "kv_cache_dtype": "fp8", "head_dim": 64, "window_size": window, "num_heads": heads,
        "num_key_value_heads": 2, "batch_size": batch, "isl": 1, "step": length - 1,
    }  # fmt: skip


# memory ends the lengths of larger batches
CACHED = [
    cached(heads, batch, length, window)
    for heads in (8, 32)
    for window in (0, 128)
    for batch, longest in ((1, 4096), (16, 4096), (64, 1024))
    for length in (16, 128, 1024, 4096)
    if length <= longest
]


def test_attention_inside_a_ragged_table() -> None:
    cover = Coverage(Tables({"generation_attention": CACHED}, {})).sequence(attention(8))
    batch = np.array([16.0, 16.0, 20.0, 20.0, 64.0, 65.0])
    length = np.array([4096.0, 5000.0, 1024.0, 4096.0, 1000.0, 16.0])
    assert named(cover.labels(batch, length)) == [
        MEASURED,
        EXTRAPOLATED,
        INTERPOLATED,  # between 16 and 64 requests the end of 64 counts
        EXTRAPOLATED,
        INTERPOLATED,
        EXTRAPOLATED,
    ]


def test_heads_between_measured_ones() -> None:
    coverage = Coverage(Tables({"generation_attention": CACHED}, {}))
    one, long = np.array([1.0]), np.array([1024.0])
    assert named(coverage.sequence(attention(16)).labels(one, long)) == [INTERPOLATED]
    assert named(coverage.sequence(attention(64)).labels(one, long)) == [EXTRAPOLATED]


def test_beyond_a_window_length_does_not_matter() -> None:
    cover = Coverage(Tables({"generation_attention": CACHED}, {})).sequence(attention(8, 128))
    assert cover.window == 128
    assert named(cover.labels(np.array([64.0]), 100_000.0)) == [MEASURED]


def test_nothing_measured_is_outside() -> None:
    assert named(SequenceCover().labels(np.ones(2), 5.0)) == [EXTRAPOLATED] * 2
    assert named(TokenCover().labels(np.ones(1))) == [EXTRAPOLATED]


# -- sums ------------------------------------------------------------------------------------------


def test_sums_by_label_and_what_is_outside() -> None:
    works = [
        Work("a", TokenCover((1.0, 10.0), True), Adaptive(lambda t: 2.0 * t)),
        Work("b", TokenCover((1.0, 100.0), True), Adaptive(lambda t: 1.0 * t)),
        Work("norm", TokenCover(formula=True), Adaptive(lambda t: 1.0)),
    ]
    sums = Sums((3,))
    sums.work(works, np.array([10.0, 50.0, 0.0]))
    time = sums.time()
    assert time.seconds == pytest.approx([31.0, 151.0, 0.0])
    assert time.parts[MEASURED] == pytest.approx([20.0, 0.0, 0.0])
    assert time.parts[EXTRAPOLATED] == pytest.approx([0.0, 100.0, 0.0])
    assert sums.outside == pytest.approx([0.0, 100 / 151, 0.0])
    assert sums.culprit == "a"


def test_what_is_not_refusable_is_not_counted() -> None:
    sums = Sums((1,))
    sums.work([Work("head", TokenCover(), Adaptive(lambda t: 5.0))], np.ones(1), refusable=False)
    assert sums.outside == pytest.approx([0.0])
    assert sums.time().parts[EXTRAPOLATED] == pytest.approx([5.0])


def test_between_two_tables() -> None:
    low, high = Sums((2,)), Sums((2,))
    cover = TokenCover((1.0, 8.0), True)
    tokens = np.array([8.0, 16.0])
    low.work([Work("low", cover, Adaptive(lambda t: 4.0))], tokens)
    high.work([Work("high", cover, Adaptive(lambda t: 1.0))], tokens)
    middle = low.between(high, 0.5)
    assert middle.total == pytest.approx([2.0, 2.0])
    assert middle.time().parts[INTERPOLATED] == pytest.approx([2.0, 0.0])
    assert middle.outside == pytest.approx([0.0, 1.0])


def test_operations_of_one_cover_are_asked_for_together() -> None:
    asked: list[list[int]] = []

    def total(at: list[int], tokens: int) -> float:
        asked.append(at)
        return float(len(at))

    one, other = TokenCover((1.0, 2.0)), TokenCover((1.0, 3.0))
    works = group(["a", "b", "c"], [one, other, one], total)
    assert [work.name for work in works] == ["a", "b"]
    assert works[0].seconds(np.ones(1)) == pytest.approx([2.0])
    assert asked[0] == [0, 2]


# -- parts -----------------------------------------------------------------------------------------


def op(kind: str, name: str, scale: float = 4.0, **fields: Any) -> Op:
    return {kind: {"name": name, "scale_factor": scale, **fields}}


def two_phases(generation_moe: list[Op]) -> Graph:
    def phase(name: str, attends: str, ffn: list[Op]) -> list[tuple[str, Op]]:
        return [
            ("attention", op("Elementwise", f"{name}_norm")),
            ("attention", op(attends, f"{name}_attention")),
            ("attention", op("Gemm", f"{name}_proj", k=1 if name == "context" else 2)),
            *(("ffn", one) for one in ffn),
            ("attention", op("Gemm", f"{name}_logits_gemm", 1.0)),
            ("skip", op("P2P", f"{name}_p2p", 0.0)),
        ]

    context = phase("context", "ContextMla", [op("Moe", "context_moe")])
    generation = phase("generation", "GenerationMla", generation_moe)
    return Graph(
        {"context": [o for _, o in context], "generation": [o for _, o in generation]},
        {"context": [s for s, _ in context], "generation": [s for s, _ in generation]},
        {},
    )


DEEPSEEK = read_model("deepseek-v3")


def test_parts_of_a_graph() -> None:
    ffn = [
        op("Gemm", "generation_router_gemm"),
        op("Moe", "generation_moe"),
        op("Gemm", "generation_shared_gate_up_gemm", quant_mode="fp8"),
    ]
    parts = parts_of(two_phases(ffn), DEEPSEEK, 1, lambda block: True, all_moe=True)

    def names(ops: list[Op]) -> list[str]:
        return [next(iter(one.values()))["name"] for one in ops]

    assert names(parts.both) == ["generation_norm"]
    assert names(parts.prompt) == ["context_proj"]  # not the same matrix in both phases
    assert names(parts.decoding) == ["generation_proj"]
    assert names(parts.context) == ["context_attention"]
    assert names(parts.generation) == ["generation_attention"]
    assert names(parts.output) == ["generation_logits_gemm"]
    assert names(parts.router) == ["generation_router_gemm"]
    assert names(parts.shared) == ["generation_shared_gate_up_gemm"]
    assert {phase: names(ops) for phase, ops in parts.experts.items()} == {
        "context": ["context_moe"],
        "generation": ["generation_moe"],
    }
    assert not parts.hides_shared


def test_dense_layers_get_a_feed_forward_of_their_own() -> None:
    ffn = [op("Moe", "generation_moe"), op("Gemm", "generation_shared", quant_mode="fp8")]
    parts = parts_of(two_phases(ffn), DEEPSEEK, 2, lambda block: True, all_moe=False)
    # scales are 4 in all layers here: 58 of 61 have experts
    scale = parts.experts["generation"][0]["Moe"]["scale_factor"]
    assert scale == pytest.approx(4.0 * 58 / 61)
    dense = [one["Gemm"] for one in parts.both if "Gemm" in one]
    assert [(one["n"], one["k"]) for one in dense] == [(18_432, 7168), (7168, 9216)]
    assert all(one["scale_factor"] == 3 and one["quant_mode"] == "fp8" for one in dense)


def test_composites_are_taken_apart() -> None:
    inner = [op("Gemm", "generation_router_gemm"), op("Moe", "generation_moe")]
    shared = [op("Gemm", "generation_shared", quant_mode="fp8")]
    overlap: Op = {"Overlap": {"name": "o", "group_a": inner, "group_b": shared}}
    graph = two_phases([])
    ops = {**graph.ops, "generation": [*graph.ops["generation"], overlap]}
    sides = {**graph.sides, "generation": [*graph.sides["generation"], "ffn", "ffn", "ffn"]}
    parts = parts_of(Graph(ops, sides, {}), DEEPSEEK, 1, lambda block: True, all_moe=True)
    assert parts.hides_shared
    assert len(parts.router) == len(parts.shared) == 1
    assert "generation" in parts.experts


def test_blocks_that_were_not_measured_are_their_kernels() -> None:
    block: Op = {
        "Fallback": {
            "name": "block",
            "primary": op("MlaModuleGeneration", "generation_module"),
            "fallback": [op("Gemm", "generation_q"), op("GenerationMla", "generation_attention")],
        }
    }
    graph = two_phases([op("Moe", "generation_moe")])
    ops = {**graph.ops, "generation": [*graph.ops["generation"], block]}
    sides = {**graph.sides, "generation": [*graph.sides["generation"], "attention"]}
    whole = parts_of(Graph(ops, sides, {}), DEEPSEEK, 1, lambda block: True, all_moe=True)
    apart = parts_of(Graph(ops, sides, {}), DEEPSEEK, 1, lambda block: False, all_moe=True)
    assert len(whole.generation) == len(apart.generation) == 2
    assert len(apart.decoding) == len(whole.decoding) + 1


def test_unknown_kernels_are_refused() -> None:
    graph = two_phases([op("Mamba2", "generation_mamba")])
    with pytest.raises(NotCovered, match="Mamba2"):
        parts_of(graph, DEEPSEEK, 1, lambda block: True, all_moe=True)
