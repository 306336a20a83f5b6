"""Where measured tables end: which answers of aiconfigurator's engine are more than a guess.

The engine interpolates inside its tables and extrapolates outside without saying so; this looks
the tables' own points up. Inside means between the least and the greatest point of every axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.explore.kernels.aic_package import Op
from planner.explore.kernels.base import Array, Provenance

Table = Callable[[str], dict[str, Any]]
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
        exact: its other axes were measured at just these values.
    """

    longest: tuple[tuple[float, float], ...] = ()
    lengths: frozenset[float] = field(default_factory=frozenset)
    exact: bool = False

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
        counts, ends = np.array(self.longest).T
        # between two measured numbers of requests the larger one's end counts: memory ends it
        above = np.minimum(np.searchsorted(counts, requests), len(counts) - 1)
        inside = (requests <= counts[-1]) & (length <= ends[above])
        met = inside & np.isin(requests, counts) & np.isin(length, list(self.lengths))
        met = met if self.exact else np.zeros_like(met)
        return np.where(met, _MEASURED, np.where(inside, _BETWEEN, _OUTSIDE)).astype(np.int8)


class Coverage:
    """What was measured in a package's tables.

    Args:
        table: of a name, as nested dictionaries.
    """

    def __init__(self, table: Table):
        self._table = table
        self._gemm: dict[str, dict[tuple[float, float], list[float]]] = {}

    def tokens(self, op: Op) -> TokenCover:
        """Of an operation that depends on tokens only."""
        kind, at = next(iter(op.items()))
        find = {
            "Gemm": self._of_gemm,
            "Moe": self._of_moe,
            "MlaBmm": self._of_bmm,
            "CustomAllReduce": self._of_all_reduce,
            "MoeDispatch": self._of_dispatch,
            "MoeAllToAll": self._of_all_to_all,
        }.get(kind)
        return TokenCover(formula=True) if find is None else find(at)

    def sequence(self, op: Op) -> SequenceCover:
        """Of attention."""
        kind, at = next(iter(op.items()))
        prompts = kind in ("ContextAttention", "ContextMla", "MlaModuleContext", "DsaContext")
        heads = str(at.get("n", at.get("num_heads")))
        cache, arithmetic = at["kv_cache_dtype"], at.get("fmha_quant_mode", "")
        first = (arithmetic,) if prompts else ()
        if kind in ("ContextAttention", "GenerationAttention"):
            side = "context" if prompts else "generation"
            shared = at["n_kv"] if at["n_kv"] != at["n"] else 0
            keys = (*first, cache, shared, at["head_size"], at["window_size"])
            return self._grid(f"_{side}_attention_data", keys, heads, prompts)
        if kind in ("ContextMla", "GenerationMla"):
            table = "_context_mla_data" if prompts else "_generation_mla_data"
            return self._grid(table, (*first, cache), heads, prompts)
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
            for m, columns in self._table("_gemm_data").get(quant, {}).items():
                for n, rows in columns.items():
                    for k in rows:
                        shapes.setdefault((float(n), float(k)), []).append(float(m))
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
        return TokenCover(tuple(sorted({m for grid in shapes.values() for m in grid})))

    def _of_moe(self, at: dict[str, Any]) -> TokenCover:
        keys = (
            at["quant_mode"], at["workload_distribution"], at["topk"], at["num_experts"],
            at["hidden_size"], at["inter_size"], at["moe_tp_size"], at["moe_ep_size"],
        )  # fmt: skip
        return _cover(_inner(self._table("_moe_data"), keys))

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

    def _grid(
        self, table: str, keys: Iterable[Any], heads: str, prompts: bool
    ) -> SequenceCover:
        by_heads = _inner(self._table(table), keys)
        if heads in by_heads:
            return _by_requests(by_heads[heads], prompts, exact=True)
        counts = [int(count) for count in by_heads]
        if not counts or not min(counts) <= int(heads) <= max(counts):
            return SequenceCover()
        nearest = min(counts, key=lambda count: abs(count - int(heads)))
        return _by_requests(by_heads[str(nearest)], prompts, exact=False)

    def _sparse(
        self, table: str, keys: Iterable[Any], heads: str, prompts: bool
    ) -> SequenceCover:
        """Whichever kernel was measured; for prompts with the fewest cached tokens."""
        for by_heads in _inner(self._table(table), keys).values():
            if heads in by_heads:
                grid = by_heads[heads]
                if prompts:
                    grid = grid[min(grid, key=int)]
                return _by_requests(grid, prompts, exact=True)
        return SequenceCover()


def _inner(table: dict[str, Any], keys: Iterable[Any]) -> dict[str, Any]:
    """The table below ``keys``; {} where there is none."""
    for key in keys:
        table = table.get(str(key), {})
    return table


def _cover(grid: dict[str, Any]) -> TokenCover:
    return TokenCover(tuple(sorted(float(point) for point in grid)), exact=bool(grid))


def _by_requests(grid: dict[str, Any], prompts: bool, exact: bool) -> SequenceCover:
    """From rows [length][requests] (prompts) or [requests][length] (decode)."""
    longest: dict[float, float] = {}
    lengths: set[float] = set()
    for outer, rows in grid.items():
        for inner in rows:
            length, requests = (outer, inner) if prompts else (inner, outer)
            lengths.add(float(length))
            longest[float(requests)] = max(longest.get(float(requests), 0.0), float(length))
    return SequenceCover(tuple(sorted(longest.items())), frozenset(lengths), exact)
