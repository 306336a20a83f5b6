"""The optional package aiconfigurator-core 0.12: its tables, models and operations as plain data.

Its own model objects say which kernels a model runs and its own engine what they take, so that
neither is written twice. All imports of the package are here.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.explore.kernels.base import NotCovered
from planner.explore.model import Model

Backend = Literal["trtllm", "vllm", "sglang"]
BACKENDS: tuple[Backend, ...] = ("trtllm", "vllm", "sglang")
Phase = Literal["context", "generation"]
PHASES: tuple[Phase, ...] = ("context", "generation")
Op = dict[str, dict[str, Any]]
"""An operation as the package writes it: its kind, and the fields of that."""

_GEMM = {"bf16": "bfloat16", "fp8": "fp8_block", "mxfp4": "bfloat16", "nvfp4": "nvfp4"}
_MOE = {"bf16": "bfloat16", "fp8": "fp8_block", "mxfp4": "w4a16_mxfp4", "nvfp4": "nvfp4"}
_MXFP4_BLACKWELL = "w4a8_mxfp4_mxfp8"  # what TensorRT-LLM runs there, as aiconfigurator takes it


@dataclass(frozen=True)
class Graph:
    """What the package runs for a model.

    Args:
        ops: by phase, in order.
        sides: of each: "attention", "ffn" or "skip", by its own partition for AFD.
        engine: what its engine has to know besides.
        moe_format: of the experts' kernels.
    """

    ops: Mapping[Phase, Sequence[Op]]
    sides: Mapping[Phase, Sequence[str]]
    engine: Mapping[str, Any]
    moe_format: str


class Package:
    """Measured kernels of one system and backend.

    Args:
        system: as the package calls it ("h200_sxm").
        backend, version: whose kernels; "current" is the newest complete set.
        estimate: let it transfer efficiencies where kernels are missing (its HYBRID mode).

    Raises:
        PlannerError: not installed, or without tables for this.
    """

    def __init__(self, system: str, backend: Backend, version: str, estimate: bool):
        try:
            from aiconfigurator_core.sdk import perf_database
        except ImportError as error:
            raise PlannerError(
                "measured kernels need aiconfigurator-core, which is not installed: "
                "pip install 'afflux[plan]', or take --kernels roofline"
            ) from error
        if backend not in BACKENDS:
            raise PlannerError(f"no kernels of {backend!r}, expected {', '.join(BACKENDS)}")
        # else it says at length which rows it fills in from other versions
        logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)
        mode = "HYBRID" if estimate else "SILICON"
        try:
            self._data = perf_database.get_database_view(
                system, backend, version, allow_missing_data=estimate, database_mode=mode
            )
        except Exception as error:
            raise _without_tables(system, backend, version, str(error)) from error
        if self._data is None:
            raise _without_tables(system, backend, version, "no such tables")
        self.system, self.backend = system, backend
        self.version = str(self._data.version)
        self._views: dict[str, dict[str, Any]] = {}
        self._read: dict[str, list[Any]] = {}

    @property
    def node(self) -> int:
        """GPUs per node."""
        return int(self._data.system_spec["node"]["num_gpus_per_node"])

    def table(self, name: str) -> dict[str, Any]:
        """A small table as nested dictionaries, keys as text; {} where there is none."""
        if name not in self._views:
            from aiconfigurator_core.sdk.engine_table_view import _probe_engine_handle

            # the public reader turns keys into enums, which takes longer than all else
            text = _probe_engine_handle(self._data)._engine.table_view_json(name)
            self._views[name] = json.loads(text) if text else {}
        return self._views[name]

    def rows(self, file: str, columns: Sequence[str], **equal: float | str) -> NDArray[np.float64]:
        """Columns of the rows of a large table, [rows, columns]; a view of it takes seconds.

        Args:
            file: "gemm", "moe", "context_attention" or "generation_attention".
            equal: columns and their values.
        """
        import pyarrow.compute as pc

        found = []
        for table in self._files(file):
            if not set(columns) <= set(table.column_names):
                continue
            there = table
            # numbers first: comparing text takes longest
            for column, value in sorted(equal.items(), key=lambda one: isinstance(one[1], str)):
                if column in table.column_names:
                    there = there.filter(pc.equal(there[column], value))
            kept = [there[column].to_numpy().astype(np.float64) for column in columns]
            found.append(np.stack(kept, axis=-1))
        return np.concatenate(found) if found else np.zeros((0, len(columns)))

    def _files(self, file: str) -> list[Any]:
        """Its parts in the order in which the package fills one with the next."""
        if file not in self._read:
            import pyarrow.parquet as pq
            from aiconfigurator_core.sdk.operations.base import resolve_op_data_path
            from aiconfigurator_core.sdk.perf_database import PerfDataFilename

            data = self._data
            root = str(Path(data.systems_root) / data.system_spec["data_dir"])
            kind = PerfDataFilename[file]
            first = resolve_op_data_path(root, data.backend, data.version, kind.value)
            paths = [path for path, _ in data._build_op_sources(kind, first, root)]
            self._read[file] = [pq.read_table(path) for path in paths if Path(path).exists()]
        return self._read[file]

    def graph(self, model: Model, tp: int, distribution: str) -> Graph:
        """What runs for a model with attention split over ``tp`` GPUs.

        Args:
            distribution: of tokens over experts: "power_law" or "balanced".

        Raises:
            NotCovered: no such model there, or it can't be split like that.
        """
        from aiconfigurator_core.sdk import config, models
        from aiconfigurator_core.sdk.afd_partition import build_afd_ops_partition
        from aiconfigurator_core.sdk.engine import build_engine_spec_json

        path = _path(model)
        asked = config.ModelConfig(
            tp_size=tp,
            attention_dp_size=1,
            moe_tp_size=1,
            moe_ep_size=tp,
            workload_distribution=distribution,
            system=self.system,
            num_gpus_per_node=self.node,
            **self._formats(model),
        )
        try:
            models.resolve_context_fmha_by_data(
                asked, path, self._data, self.backend, is_context_role=True
            )
            built = models.get_model(path, asked, self.backend)
            spec = json.loads(
                build_engine_spec_json(
                    built,
                    model_path=path,
                    system=self.system,
                    backend=self.backend,
                    backend_version=self.version,
                    kv_block_size=None,
                    systems_path=None,
                    nextn=0,
                    database=self._data,
                )
            )
            sides: dict[Phase, list[str]] = {}
            for phase in PHASES:
                partition = build_afd_ops_partition(built, phase)
                side = {id(op): "skip" for op in partition.skipped_ops}
                side |= {id(op): "ffn" for op in partition.ffn_ops}
                side |= {id(op): "attention" for op in partition.attn_ops}
                sides[phase] = [side[id(op)] for op in getattr(built, f"{phase}_ops")]
        except Exception as error:
            raise NotCovered(
                f"aiconfigurator-core can't run {model.name} with attention over {tp} GPUs on "
                f"{self.system}, {self.backend}: {error}"
            ) from error
        ops: dict[Phase, list[Op]] = {phase: spec[f"{phase}_ops"] for phase in PHASES}
        return Graph(ops, sides, spec["engine"], asked.moe_quant_mode.name)

    def all_reduce(self, hidden: int, gpus: int, times: float) -> Op:
        """Sum of the tokens' hidden states over ``gpus``, ``times`` times."""
        from aiconfigurator_core.sdk import operations

        return _written(operations.CustomAllReduce("all_reduce", times, hidden, gpus))

    def dispatch(
        self, model: Model, moe_format: str, dp: int, moe_tp: int, ep: int, times: float
    ) -> list[list[Op]]:
        """Ways to dispatch and combine, each a list of operations; the fastest counts.

        All-to-all libraries where the package measured them for this model, one for many and one
        for few tokens, as aiconfigurator chooses; else collectives.
        """
        from aiconfigurator_core.sdk import common, operations

        quant = common.MoEQuantMode[moe_format]
        found = self._libraries(model, quant, dp, moe_tp, ep)
        if found:
            return [self._all_to_all(model, quant, *way, ep, times) for way in found]
        shape = (model.hidden, model.top_k, model.experts, moe_tp, ep, dp)
        return [
            [
                _written(
                    operations.MoEDispatch(
                        "dispatch", times, *shape, before, quant_mode=quant, backend=self.backend
                    )
                )
                for before in (True, False)
            ]
        ]

    def _libraries(
        self, model: Model, quant: Any, dp: int, moe_tp: int, ep: int
    ) -> list[tuple[Phase, str]]:
        """(phase, library), [] unless there is one for both (aiconfigurator 0.12,
        ``moe_comm_resolver``)."""
        from aiconfigurator_core.sdk.operations.moe_comm import MOE_A2A_BACKENDS, nodes_for

        if moe_tp != 1 or ep <= 1 or (self.backend == "trtllm" and dp <= 1):
            return []
        nodes = nodes_for(ep, self.node)
        sm = self._data.system_spec["gpu"].get("sm_version")
        found: list[tuple[Phase, str]] = []
        for phase in PHASES:
            measured = self._data.moe_a2a_coverage(
                model.hidden, model.top_k, model.experts, quant, phase
            )
            for name, spec in MOE_A2A_BACKENDS.items():
                pairs = measured.get(name, set())
                # the table of one node also stands in for several, marked "estimated"
                stands_in = "deepep" in name and nodes > 1 and (self.node, 1) in pairs
                if (
                    self.backend in spec.frameworks
                    and phase in spec.inference_phases
                    and ((ep, nodes) in pairs or stands_in)
                    and spec.feasible(
                        topk=model.top_k,
                        num_experts=model.experts,
                        moe_tp_size=moe_tp,
                        moe_ep_size=ep,
                        sm_version=None if sm is None else int(sm),
                    )
                ):
                    found.append((phase, name))
                    break
        return found if len(found) == len(PHASES) else []

    def _all_to_all(
        self, model: Model, quant: Any, phase: Phase, library: str, ep: int, times: float
    ) -> list[Op]:
        from aiconfigurator_core.sdk import operations
        from aiconfigurator_core.sdk.operations.moe_comm import (
            MOE_A2A_BACKENDS,
            communication_dtype_for,
            nodes_for,
        )

        return [
            _written(
                operations.MoEAllToAll(
                    f"all_to_all_{part}",
                    times,
                    phase=part,
                    comm_backend=library,
                    hidden_size=model.hidden,
                    topk=model.top_k,
                    num_experts=model.experts,
                    moe_ep_size=ep,
                    node_num=nodes_for(ep, self.node),
                    comm_dtype=communication_dtype_for(
                        system=self.system,
                        comm_backend=library,
                        model_quantization=quant,
                        communication_phase=part,
                        inference_phase=phase,
                    ),
                    sms=_SMS if library == "deepep_ht" else 0,
                )
            )
            for part in MOE_A2A_BACKENDS[library].comm_phases
        ]

    def engine(self, graph: Graph, ops: Mapping[Phase, Sequence[Op]]) -> Engine:
        """An engine for operations by phase."""
        import aiconfigurator_core
        from aiconfigurator_core.sdk.engine import ENGINE_SPEC_SCHEMA_VERSION, EngineHandle

        spec = {
            "schema_version": ENGINE_SPEC_SCHEMA_VERSION,
            "engine": dict(graph.engine),
            **{f"{phase}_ops": list(ops[phase]) for phase in PHASES},
        }
        packed = aiconfigurator_core.engine_spec_bincode_from_json(json.dumps(spec))
        return Engine(EngineHandle(packed), f"{self.system}, {self.backend} {self.version}")

    def _formats(self, model: Model) -> dict[str, Any]:
        """Kernels for the model's number formats.

        Raises:
            NotCovered: there are none.
        """
        from aiconfigurator_core.sdk import common
        from aiconfigurator_core.sdk.perf_database import is_blackwell_system

        blackwell = is_blackwell_system(self.system)
        gemm, moe = _GEMM[model.weight_format], _MOE[model.expert_format]
        if model.expert_format == "mxfp4" and blackwell and self.backend == "trtllm":
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


class Engine:
    """Times of lists of operations, in seconds.

    Args:
        handle: of the package.
        where: for refusals.
    """

    def __init__(self, handle: Any, where: str):
        self._handle, self._where = handle, where

    def total(self, indices: Sequence[int], tokens: int) -> float:
        """Seconds of operations of the list "generation" that depend on tokens only, together.

        Raises:
            NotCovered: nothing was measured that could tell.
        """
        return self.total_generation(indices, tokens, 1)

    def total_generation(self, indices: Sequence[int], requests: int, context: int) -> float:
        """The same for one token of each of ``requests`` with ``context`` tokens in the cache."""
        call = self._handle.evaluate_generation_ops
        return sum(self._ask(call, indices, batch_size=requests, s=context))

    def context(self, indices: Sequence[int], prompts: int, tokens: int, past: int) -> list[float]:
        """Seconds of each operation of the list "context" for ``tokens`` new tokens of each of
        ``prompts`` with ``past`` tokens in the cache."""
        call = self._handle.evaluate_context_ops
        # one at a time: answers to operations of one name are merged
        return [
            sum(self._ask(call, [index], batch_size=prompts, s=tokens, prefix=past))
            for index in indices
        ]

    def _ask(self, call: Any, indices: Sequence[int], **load: int) -> list[float]:
        try:
            rows = call(list(indices), **load)
        except Exception as error:
            raise NotCovered(f"not measured on {self._where}: {error}") from error
        return [1e-3 * row[1] for row in rows]


_SMS = 20  # of a GPU that DeepEP's high-throughput kernels take, aiconfigurator's default


def _written(op: Any) -> Op:
    from aiconfigurator_core.sdk.engine import build_ops_json

    written: Op = json.loads(build_ops_json([op]))[0]
    return written


def _without_tables(system: str, backend: str, version: str, why: str) -> PlannerError:
    return PlannerError(
        f"aiconfigurator-core has no kernels of {backend} {version} for {system!r}: {why}; "
        "take --kernels roofline"
    )


def _path(model: Model) -> str:
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


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
