"""Where measured tables end: which answers of aiconfigurator's engine are more than a guess.

The engine interpolates inside its tables and extrapolates outside without saying so; this looks
the tables' own points up. Inside means between the least and the greatest point of every axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from planner.explore.kernels.aic_package import Op
from planner.explore.kernels.base import Array, Provenance


class Tables(Protocol):
    """Where measured rows come from: ``aic_package.Package``."""

    def table(self, name: str) -> dict[str, Any]:
        """A small table as nested dictionaries."""
        ...

    def rows(self, file: str, columns: Sequence[str], **equal: float | str) -> NDArray[np.float64]:
        """Columns of the rows of a large one, [rows, columns]."""
        ...


Labels = NDArray[np.int8]
ORDER = tuple(Provenance)
"""Labels are positions in this."""
_MEASURED, _BETWEEN, _OUTSIDE, _FORMULA = (ORDER.index(one) for one in Provenance)


@dataclass(frozen=True)
class TokenCover:
    """Of an operation that depends on tokens only.

    Args:
        points: measured numbers of tokens, ascending; () where nothing was.
        exact: its other axes were measured at just these values.
        formula: it has no table, the package computes it from peak rates.
    """

    points: tuple[float, ...] = ()
    exact: bool = False
    formula: bool = False

    def labels(self, tokens: Array) -> Labels:
        """Provenance of each, as positions in ``ORDER``."""
        tokens = np.asarray(tokens, float)
        if self.formula:
            return np.full(tokens.shape, _FORMULA, np.int8)
        if not self.points:
            return np.full(tokens.shape, _OUTSIDE, np.int8)
        inside = (tokens >= self.points[0]) & (tokens <= self.points[-1])
        met = np.isin(tokens, self.points) if self.exact else np.zeros(tokens.shape, bool)
        return np.where(met, _MEASURED, np.where(inside, _BETWEEN, _OUTSIDE)).astype(np.int8)


@dataclass(frozen=True)
class SequenceCover:
    """Of attention, by requests and length; measured where both fit into memory.

    Args:
        longest: greatest measured length by number of requests, ascending.
        lengths: measured lengths.
        window: tokens beyond which length doesn't matter; 0: none.
        exact: its other axes were measured at just these values.
    """

    longest: tuple[tuple[float, float], ...] = ()
    lengths: frozenset[float] = field(default_factory=frozenset)
    exact: bool = False
    window: int = 0

    @property
    def points(self) -> tuple[float, ...]:
        """Measured numbers of requests."""
        return tuple(requests for requests, _ in self.longest)

    def labels(self, requests: Array, length: Array | float) -> Labels:
        """Provenance of each, as positions in ``ORDER``."""
        requests, length = np.broadcast_arrays(
            np.asarray(requests, float), np.asarray(length, float)
        )
        if not self.longest:
            return np.full(requests.shape, _OUTSIDE, np.int8)
        length = np.minimum(length, self.window) if self.window else length
        counts, ends = np.array(self.longest).T
        # between two measured numbers of requests the larger one's end counts: memory ends it
        above = np.minimum(np.searchsorted(counts, requests), len(counts) - 1)
        inside = (requests <= counts[-1]) & (length <= ends[above])
        met = inside & np.isin(requests, counts) & np.isin(length, list(self.lengths))
        met = met if self.exact else np.zeros_like(met)
        return np.where(met, _MEASURED, np.where(inside, _BETWEEN, _OUTSIDE)).astype(np.int8)


class Coverage:
    """What was measured.

    Args:
        tables: of one system and backend.
    """

    def __init__(self, tables: Tables):
        self._tables = tables
        self._table = tables.table
        self._gemm: dict[str, dict[tuple[float, float], list[float]]] = {}
        self._moe: dict[tuple[Any, ...], dict[tuple[int, int], list[float]]] = {}
        self._attention: dict[tuple[Any, ...], NDArray[np.float64]] = {}

    def tokens(self, op: Op) -> TokenCover:
        """Of an operation that depends on tokens only."""
        kind, at = next(iter(op.items()))
        find = {
            "Gemm": self._of_gemm,
            "Moe": self._of_moe,
            "MoeExpertCompute": self._of_expert_compute,
            "MlaBmm": self._of_bmm,
            "CustomAllReduce": self._of_all_reduce,
            "MoeDispatch": self._of_dispatch,
            "MoeAllToAll": self._of_all_to_all,
        }.get(kind)
        return TokenCover(formula=True) if find is None else find(at)

    def groups(self, op: Op) -> list[int]:
        """Numbers of expert groups that routed experts were measured with, ascending."""
        at = op["Moe"]
        return sorted(ep for tp, ep in self._experts(at) if tp == at["moe_tp_size"])

    def sequence(self, op: Op) -> SequenceCover:
        """Of attention."""
        kind, at = next(iter(op.items()))
        prompts = "Context" in kind
        heads = str(at.get("n", at.get("num_heads")))
        cache = at["kv_cache_dtype"]
        first = (at["fmha_quant_mode"],) if prompts else ()
        if kind in ("ContextAttention", "GenerationAttention"):
            return self._of_attention(at, prompts)
        if kind in ("ContextMla", "GenerationMla"):
            table = "_context_mla_data" if prompts else "_generation_mla_data"
            return self._grid(table, (*first, cache), heads, prompts)
        if kind in ("WideEpContextMla", "WideEpGenerationMla"):
            table = "_wideep_context_mla_data" if prompts else "_wideep_generation_mla_data"
            return self._grid(table, (at["attn_backend"], *first, cache), heads, prompts)
        if kind in ("MlaModuleContext", "MlaModuleGeneration"):
            table = "_context_mla_module_data" if prompts else "_generation_mla_module_data"
            keys = (*first, cache, at["gemm_quant_mode"], at["native_num_heads"])
            return self._grid(table, keys, heads, prompts)
        table = "_context_dsa_module_data" if prompts else "_generation_dsa_module_data"
        keys = (*first, cache, at["gemm_quant_mode"], at["architecture"])
        return self._sparse(table, keys, heads, prompts)

    # -- by tokens -----------------------------------------------------------------------------

    def _of_gemm(self, at: dict[str, Any]) -> TokenCover:
        quant = at["quant_mode"]
        if quant not in self._gemm:
            shapes: dict[tuple[float, float], list[float]] = {}
            for m, n, k in self._tables.rows("gemm", ("m", "n", "k"), gemm_dtype=quant).tolist():
                shapes.setdefault((n, k), []).append(m)
            self._gemm[quant] = shapes
        shapes = self._gemm[quant]
        shape = (float(at["n"]), float(at["k"]))
        if shape in shapes:
            return TokenCover(tuple(sorted(shapes[shape])), exact=True)
        if not shapes:
            return TokenCover()
        corners = np.array(list(shapes))
        if np.any(corners.min(axis=0) > shape) or np.any(corners.max(axis=0) < shape):
            return TokenCover()
        # all shapes were measured at about the same numbers of tokens
        longest = max(shapes, key=lambda one: len(shapes[one]))
        return TokenCover(tuple(sorted(shapes[longest])))

    def _of_moe(self, at: dict[str, Any]) -> TokenCover:
        return _cover(self._experts(at).get((at["moe_tp_size"], at["moe_ep_size"]), ()))

    def _experts(self, at: dict[str, Any]) -> dict[tuple[int, int], list[float]]:
        """Measured tokens by split of such experts."""
        equal = {
            "moe_dtype": at["quant_mode"],
            "distribution": at["workload_distribution"],
            **{key: at[key] for key in ("topk", "num_experts", "hidden_size", "inter_size")},
        }
        key = tuple(equal.values())
        if key not in self._moe:
            found: dict[tuple[int, int], list[float]] = {}
            columns = ("moe_tp_size", "moe_ep_size", "num_tokens")
            for tp, ep, tokens in self._tables.rows("moe", columns, **equal).tolist():
                found.setdefault((int(tp), int(ep)), []).append(tokens)
            self._moe[key] = found
        return self._moe[key]

    def _of_expert_compute(self, at: dict[str, Any]) -> TokenCover:
        """Experts behind an all-to-all library; without a table of their own that of any."""
        for by_quant in self._table("_moe_ep_data").values():
            keys = (
                at["quant_mode"], at["workload_distribution"], at["inference_phase"], at["topk"],
                at["num_experts"], at["num_slots"], at["hidden_size"], at["inter_size"], 1,
                at["moe_ep_size"],
            )  # fmt: skip
            tokens = _inner(by_quant, keys)
            if tokens:
                return _cover(tokens)
        return self._of_moe({**at, "moe_tp_size": 1})

    def _of_bmm(self, at: dict[str, Any]) -> TokenCover:
        name = "mla_gen_pre" if at["is_pre"] else "mla_gen_post"
        return _cover(
            _inner(self._table("_mla_bmm_data"), (at["quant_mode"], name, at["num_heads"]))
        )

    def _of_all_reduce(self, at: dict[str, Any]) -> TokenCover:
        return self._collective("_custom_allreduce_data", at["tp_size"], at["hidden_size"])

    def _of_dispatch(self, at: dict[str, Any]) -> TokenCover:
        gpus, ranks = at["moe_tp_size"] * at["moe_ep_size"], at["attention_dp_size"]
        table = "_custom_allreduce_data" if ranks == 1 else "_nccl_data"
        return self._collective(table, gpus, at["hidden_size"] * ranks)

    def _collective(self, table: str, gpus: int, per_token: int) -> TokenCover:
        """By message, elements per token; collectives of more GPUs than measured are outside."""
        if gpus == 1:
            return TokenCover(formula=True)
        half = self._table(table).get("half", {})
        by_gpus = half.get("all_gather", {}) if table == "_nccl_data" else half
        at = by_gpus.get(str(gpus), {})
        sizes = at if table == "_nccl_data" else at.get("AUTO", {})
        points = sorted(float(size) / per_token for size in sizes)
        # smaller messages than any measured take as long as the least: latency
        return TokenCover((0.0, points[-1])) if points else TokenCover()

    def _of_all_to_all(self, at: dict[str, Any]) -> TokenCover:
        keys = (
            at["comm_backend"], at["phase"], at["comm_dtype"], at["moe_ep_size"], at["node_num"],
            at["hidden_size"], at["topk"], at["num_experts"],
        )  # fmt: skip
        by_sms = _inner(self._table("_moe_a2a_data"), keys)
        return _cover(by_sms.get(str(at["sms"]), next(iter(by_sms.values()), {})))

    # -- by requests and length ----------------------------------------------------------------

    def _of_attention(self, at: dict[str, Any], prompts: bool) -> SequenceCover:
        equal = {
            "kv_cache_dtype": at["kv_cache_dtype"],
            "head_dim": at["head_size"],
            "window_size": at["window_size"],
        }
        # in decode the arithmetic follows the cache
        equal |= {"attn_dtype": at["fmha_quant_mode"]} if prompts else {}
        key = (prompts, *equal.values())
        if key not in self._attention:
            self._attention[key] = self._tables.rows(
                "context_attention" if prompts else "generation_attention",
                ("num_heads", "num_key_value_heads", "batch_size", "isl", "step"),
                **equal,
            )
        rows = self._attention[key]
        alone = at["n_kv"] == at["n"]
        same = rows[:, 0] == rows[:, 1] if alone else rows[:, 1] == at["n_kv"]
        rows = rows[same]
        exact = rows[rows[:, 0] == at["n"]]
        if len(exact):
            cover = _by_requests(exact[:, 2], exact[:, 3] + exact[:, 4], exact=True)
            return replace(cover, window=at["window_size"])
        heads = rows[:, 0]
        if not len(rows) or not heads.min() <= at["n"] <= heads.max():
            return SequenceCover()
        near = rows[heads == heads[np.argmin(np.abs(heads - at["n"]))]]
        cover = _by_requests(near[:, 2], near[:, 3] + near[:, 4], exact=False)
        return replace(cover, window=at["window_size"])

    def _grid(self, table: str, keys: Iterable[Any], heads: str, prompts: bool) -> SequenceCover:
        by_heads = _inner(self._table(table), keys)
        return _nested(by_heads[heads], prompts) if heads in by_heads else SequenceCover()

    def _sparse(self, table: str, keys: Iterable[Any], heads: str, prompts: bool) -> SequenceCover:
        """Whichever kernel was measured; for prompts with the fewest cached tokens."""
        for by_heads in _inner(self._table(table), keys).values():
            if heads in by_heads:
                grid = by_heads[heads]
                if prompts:
                    grid = grid[min(grid, key=int)]
                return _nested(grid, prompts)
        return SequenceCover()


def _inner(table: dict[str, Any], keys: Iterable[Any]) -> dict[str, Any]:
    """The table below ``keys``; {} where there is none."""
    for key in keys:
        table = table.get(str(key), {})
    return table


def _cover(grid: Iterable[float | str]) -> TokenCover:
    points = tuple(sorted({float(point) for point in grid}))
    return TokenCover(points, exact=bool(points))


def _nested(grid: dict[str, Any], prompts: bool) -> SequenceCover:
    """From rows [length][requests] (prompts) or [requests][length] (decode)."""
    pairs = np.array([(float(a), float(b)) for a, rows in grid.items() for b in rows])
    length, requests = (pairs[:, 0], pairs[:, 1]) if prompts else (pairs[:, 1], pairs[:, 0])
    return _by_requests(requests, length, exact=True)


def _by_requests(requests: Array, length: Array, exact: bool) -> SequenceCover:
    counts = np.unique(requests)
    longest = tuple((float(one), float(np.max(length[requests == one]))) for one in counts)
    return SequenceCover(longest, frozenset(length.tolist()), exact)
