"""The optional package aiconfigurator-core 0.12: its tables, models and operations as plain data.

Its own model objects say which kernels a model runs and its own engine what they take, so that
neither is written twice. All imports of the package are here and in ``aic_models``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from planner.errors import PlannerError
from planner.explore.kernels.aic_engine import Engine
from planner.explore.kernels.aic_models import formats_of, path_of
from planner.explore.kernels.base import NotCovered
from planner.explore.model import Model

Backend = Literal["trtllm", "vllm", "sglang"]
BACKENDS: tuple[Backend, ...] = ("trtllm", "vllm", "sglang")
Phase = Literal["context", "generation"]
PHASES: tuple[Phase, ...] = ("context", "generation")
Op = dict[str, dict[str, Any]]
"""An operation as the package writes it: its kind, and the fields of that."""


@dataclass(frozen=True)
class Graph:
    """What the package runs for a model.

    Args:
        ops: by phase, in order.
        sides: of each, those that overlap one by one: "attention", "ffn" or "skip", by its own
            partition for AFD.
        engine: what its engine has to know besides.
    """

    ops: Mapping[Phase, Sequence[Op]]
    sides: Mapping[Phase, Sequence[str]]
    engine: Mapping[str, Any]


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

    def graph(self, model: Model, tp: int, distribution: str, wide: int = 0) -> Graph:
        """What runs for a model with attention split over ``tp`` GPUs.

        Args:
            distribution: of tokens over experts: "power_law" or "balanced".
            wide: as many GPUs with experts of their own, reached by an all-to-all library (which
                brings kernels of its own); 0: by collectives.

        Raises:
            NotCovered: no such model there, or it can't be split like that.
        """
        from aiconfigurator_core.sdk import common, config, models
        from aiconfigurator_core.sdk.afd_partition import build_afd_ops_partition
        from aiconfigurator_core.sdk.engine import build_engine_spec_json

        path = path_of(model)
        asked = config.ModelConfig(
            tp_size=tp,
            attention_dp_size=max(wide // tp, 1),
            moe_tp_size=1,
            moe_ep_size=wide or tp,
            workload_distribution=distribution,
            system=self.system,
            num_gpus_per_node=self.node,
            **formats_of(model, self.system, self.backend),
        )
        if wide:
            asked.moe_comm_backend = self.libraries(model, max(wide // tp, 1), 1, wide)
            if self.backend == "sglang" and model.attention.kind == "mla":
                # its tables say so of the kernels that were measured with DeepEP
                asked.fmha_quant_mode = common.FMHAQuantMode.fp8_block
                asked.kvcache_quant_mode = common.KVCacheQuantMode.fp8
        try:
            if asked.fmha_quant_mode is None:
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
            # it refuses composites that span both sides
            flat = SimpleNamespace(
                **{f"{phase}_ops": _apart(getattr(built, f"{phase}_ops")) for phase in PHASES}
            )
            sides: dict[Phase, list[str]] = {}
            for phase in PHASES:
                partition = build_afd_ops_partition(flat, phase)
                side = {id(op): "skip" for op in partition.skipped_ops}
                side |= {id(op): "ffn" for op in partition.ffn_ops}
                side |= {id(op): "attention" for op in partition.attn_ops}
                sides[phase] = [side[id(op)] for op in getattr(flat, f"{phase}_ops")]
        except Exception as error:
            raise NotCovered(
                f"aiconfigurator-core can't run {model.name} with attention over {tp} GPUs on "
                f"{self.system}, {self.backend}: {error}"
            ) from error
        ops: dict[Phase, list[Op]] = {phase: spec[f"{phase}_ops"] for phase in PHASES}
        return Graph(ops, sides, spec["engine"])

    def all_reduce(self, hidden: int, gpus: int, times: float) -> Op:
        """Sum of the tokens' hidden states over ``gpus``, ``times`` times."""
        from aiconfigurator_core.sdk import operations

        return _written(operations.CustomAllReduce("all_reduce", times, hidden, gpus))

    def collectives(self, model: Model, dp: int, moe_tp: int, ep: int, times: float) -> list[Op]:
        """Dispatch and combine by collectives, ``times`` times."""
        from aiconfigurator_core.sdk import operations

        quant = formats_of(model, self.system, self.backend)["moe_quant_mode"]
        shape = (model.hidden, model.top_k, model.experts, moe_tp, ep, dp)
        return [
            _written(
                operations.MoEDispatch(
                    "dispatch", times, *shape, before, quant_mode=quant, backend=self.backend
                )
            )
            for before in (True, False)
        ]

    def libraries(
        self, model: Model, dp: int, moe_tp: int, ep: int, stretch: bool = True
    ) -> dict[str, str]:
        """All-to-all library by phase, {} unless one was measured for both: the first for many
        tokens, the second for few (aiconfigurator 0.12, ``moe_comm_resolver``).

        Args:
            stretch: over several nodes take what was measured on one, where there is nothing else.
        """
        from aiconfigurator_core.sdk.operations.moe_comm import MOE_A2A_BACKENDS, nodes_for

        if moe_tp != 1 or ep <= 1 or (self.backend == "trtllm" and dp <= 1):
            return {}
        quant = formats_of(model, self.system, self.backend)["moe_quant_mode"]
        nodes = nodes_for(ep, self.node)
        sm = self._data.system_spec["gpu"].get("sm_version")
        found: dict[str, str] = {}
        for phase in PHASES:
            measured = self._data.moe_a2a_coverage(
                model.hidden, model.top_k, model.experts, quant, phase
            )
            for name, spec in MOE_A2A_BACKENDS.items():
                pairs = measured.get(name, set())
                # the table of one node also stands in for several, marked "estimated"
                stands_in = stretch and "deepep" in name and nodes > 1 and (self.node, 1) in pairs
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
                    found[phase] = name
                    break
        return found if len(found) == len(PHASES) else {}

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


def _apart(ops: Sequence[Any]) -> list[Any]:
    """Operations, those that overlap one by one."""
    from aiconfigurator_core.sdk.operations import OverlapOp

    return [
        leaf
        for op in ops
        for leaf in (_apart([*op._group_a, *op._group_b]) if isinstance(op, OverlapOp) else [op])
    ]


def _written(op: Any) -> Op:
    from aiconfigurator_core.sdk.engine import build_ops_json

    written: Op = json.loads(build_ops_json([op]))[0]
    return written


def _without_tables(system: str, backend: str, version: str, why: str) -> PlannerError:
    return PlannerError(
        f"aiconfigurator-core has no kernels of {backend} {version} for {system!r}: {why}; "
        "take --kernels roofline"
    )
