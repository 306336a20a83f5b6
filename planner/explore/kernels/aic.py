"""Kernel times measured by NVIDIA, as aiconfigurator-core 0.12 ships them.

The package says which operations a model runs and what each takes (``aic_package``); here they are
summed by side, tabulated (``adaptive``) so that many loads cost little, and labelled by where in
its tables they lie (``aic_coverage``). Departures from aiconfigurator: attention's all-reduce is
counted with attention, dense layers are dense, and what was measured on one node isn't stretched
over several. Sides on GPUs of their own can't hide shared experts behind routed ones, and run the
kernels of collectives; ``AicDB.replica`` has what one replica's GPUs do that have both.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

from planner.errors import PlannerError
from planner.explore.kernels.aic_coverage import Coverage
from planner.explore.kernels.aic_engine import Engine
from planner.explore.kernels.aic_package import PHASES, Backend, Graph, Op, Package, Phase
from planner.explore.kernels.aic_parts import Parts, parts_of
from planner.explore.kernels.aic_rank import Rank, rank_of, works_of
from planner.explore.kernels.aic_sums import Sums, Work
from planner.explore.kernels.base import Array, Load, NotCovered, Side, Sides, Time
from planner.explore.kernels.roofline import RooflineDB
from planner.explore.memory import check_experts
from planner.explore.model import Model
from planner.explore.system import System

TOLERATED = 0.02
"""Share of a step's time that may come from outside of the tables before it is refused.

Output heads don't count: they are wider than any matrix that was measured, no model was covered."""
FEW_TOKENS = 256
"""Per attention rank, up to which low-latency all-to-all runs: where its tables end."""


@dataclass(frozen=True)
class _Exchange:
    """Dispatch and combine for many tokens and for few, and what attention has counted of it."""

    ways: dict[Phase, list[Work]]
    counted: list[Work]

    @property
    def measured(self) -> bool:
        """Whether there is a table for so many GPUs."""
        works = [work for way in self.ways.values() for work in way]
        return all(work.cover.points or work.cover.formula for work in works)


class AicDB:
    """A ``KernelDB`` of measured kernels.

    Args:
        system: ``system.kernels`` names its tables.
        backend: whose kernels: TensorRT-LLM, vLLM or SGLang.
        version: of these; "current": the newest complete set.
        allow_extrapolation: answer outside of the tables too; labelled.
        estimate: answer where no kernel of a shape was measured, by the efficiency of others
            (the package's HYBRID mode); none: as ``allow_extrapolation``.
        balanced: tokens spread evenly over experts; else as measured in chat traffic, a power law
            (1.01 for DeepSeek, 1.2 for others, aiconfigurator's choice).
        all_moe: take dense layers for MoE layers, as aiconfigurator does.
        beyond: of the exchange between more GPUs than were measured, the system's tiers
            ("network", see ``RooflineDB``) or the package's own guess ("package").

    Raises:
        PlannerError: the package is missing, or has no tables of this system and backend.
    """

    def __init__(
        self,
        system: System,
        backend: Backend = "trtllm",
        version: str = "current",
        allow_extrapolation: bool = False,
        *,
        estimate: bool | None = None,
        balanced: bool = False,
        all_moe: bool = False,
        beyond: Literal["network", "package"] = "network",
    ):
        if not system.kernels:
            raise PlannerError(
                f"no measured kernels are known of {system.name}; take --kernels roofline"
            )
        guess = allow_extrapolation if estimate is None else estimate
        self._package, self._coverage = _opened(system.kernels, backend, version, guess)
        self.backend = backend
        self.name = f"aiconfigurator-core 0.12: {backend} {self._package.version} on {system.name}"
        self._extrapolate = allow_extrapolation
        self._distribution = "balanced" if balanced else "power_law"
        self._all_moe = all_moe
        self._network = RooflineDB(system) if beyond == "network" else None
        self._together = False
        self._wide = 0
        self._variants: dict[tuple[Model, int], AicDB] = {}
        self._forget()

    def _forget(self) -> None:
        self._graphs: dict[tuple[Model, int], tuple[Graph, Parts]] = {}
        self._ranks: dict[tuple[Model, int], Rank] = {}
        self._routed: dict[tuple[Model, int, int], dict[Phase, list[Work]]] = {}
        self._exchanges: dict[tuple[Model, int, int, int, int], _Exchange] = {}

    def replica(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int) -> AicDB:
        """Kernels of a replica whose GPUs do both sides.

        Where an all-to-all library was measured for it, the kernels that go with that, for others
        those of collectives (as aiconfigurator chooses); in decode, shared experts are hidden
        behind routed ones where the backend does so.
        """
        stretch = self._network is None
        library = self._package.libraries(model, dp, moe_tp, ep, stretch)
        key = (model, ep if library else 0)
        if key not in self._variants:
            variant = copy.copy(self)
            variant._together, variant._wide = True, key[1]
            variant._forget()
            self._variants[key] = variant
        return self._variants[key]

    # -- KernelDB ------------------------------------------------------------------------------

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        """One step of an attention rank of ``tp`` GPUs; see ``KernelDB``.

        Raises:
            NotCovered: outside of the tables, or no kernel of this kind was measured.
            PlannerError: ``tp`` doesn't divide the heads.
        """
        given = (load.decode, load.context, load.prefill, load.past, load.prompts)
        same = Load(*(np.array(part, float) for part in np.broadcast_arrays(*given)))
        if np.any(same.prefill > 0):
            self._check_prompts(model)
        sums = Sums(same.decode.shape)
        self._rank(model, tp).add(
            sums,
            same,
            router=sides.router is Side.ATTENTION,
            shared=sides.shared is Side.ATTENTION,
            hide=self._together and self._parts(model, tp)[1].hides_shared,
        )
        return self._answer(sums, f"attention of {model.name} over {tp} GPUs")

    def experts(self, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
        """One step of an FFN group; see ``KernelDB``.

        Groups that don't divide the experts take as long as their fullest one; numbers of groups
        that were not measured lie between their neighbours. Shared experts and routers that are
        here are split over ``tp`` and copied over ``ep``: each copy gets as many of the tokens.

        Raises:
            NotCovered: outside of the tables, or no kernel of this kind was measured.
            PlannerError: the experts can't be split like that.
        """
        check_experts(model, tp, ep)
        tokens = np.asarray(tokens, float)
        low, high, share = self._groups(model, tp, ep)
        sums = self._routed_sums(model, tp, low, tokens, tokens / ep)
        if high != low:
            sums = sums.between(self._routed_sums(model, tp, high, tokens, tokens / ep), share)
        if sides.shared is Side.FFN:
            sums.work(self._rank(model, tp).shared, tokens / ep)
        if sides.router is Side.FFN:
            sums.work(self._rank(model, tp).router, tokens / ep)
        return self._answer(sums, f"experts of {model.name} over {tp} x {ep} GPUs")

    def exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int, tokens: Array) -> Time:
        """Dispatch and combine; see ``KernelDB``.

        Most collectives were measured on one node only: see ``beyond``.

        Raises:
            NotCovered: outside of the tables.
            PlannerError: the two sides don't share the same GPUs.
        """
        if tp * dp != moe_tp * ep:
            raise PlannerError(
                f"attention over {tp} x {dp} GPUs and experts over {moe_tp} x {ep}: expected as "
                "many"
            )
        if not self._together:
            return self.replica(model, tp, dp, moe_tp, ep).exchange(
                model, tp, dp, moe_tp, ep, tokens
            )
        key = (model, tp, dp, moe_tp, ep)
        if key not in self._exchanges:
            self._exchanges[key] = self._exchange(*key)
        found, tokens = self._exchanges[key], np.asarray(tokens, float)
        if self._network is not None and not found.measured:
            return self._network.exchange(model, tp, dp, moe_tp, ep, tokens)
        counted = Sums(tokens.shape)
        counted.work(found.counted, tokens)
        whole = self._by_load(found.ways, tokens, tokens)
        left = np.maximum(whole.total - counted.total, 0.0)
        sums = Sums(tokens.shape)
        sums.take(whole, left / np.maximum(whole.total, 1e-12))
        gpus = f"{tp} x {dp} GPUs of attention, {moe_tp} x {ep} of experts"
        return self._answer(sums, f"dispatch of {model.name} between {gpus}")

    # -- what runs -----------------------------------------------------------------------------

    def _parts(self, model: Model, tp: int) -> tuple[Graph, Parts]:
        key = (model, tp)
        if key not in self._graphs:
            if model.attention.heads % tp:
                raise PlannerError(
                    f"attention over {tp} GPUs: expected a number that divides the "
                    f"{model.attention.heads} heads of {model.name}"
                )
            graph = self._package.graph(model, tp, self._distribution, self._wide)
            self._graphs[key] = graph, parts_of(graph, model, tp, self._block, self._all_moe)
        return self._graphs[key]

    def _block(self, op: Op) -> bool:
        """Whether a block was measured as a whole."""
        return bool(self._coverage.sequence(op).longest)

    def _rank(self, model: Model, tp: int) -> Rank:
        key = (model, tp)
        if key not in self._ranks:
            graph, parts = self._parts(model, tp)
            reduces = []
            if tp > 1:
                # after attention, after a dense layer, after the embedding
                dense = 0 if self._all_moe else model.dense_layers
                times = model.layers + dense + 1
                reduces = [self._package.all_reduce(model.hidden, tp, float(times))]
            self._ranks[key] = rank_of(
                parts, reduces, self._coverage, lambda ops: self._package.engine(graph, ops)
            )
        return self._ranks[key]

    def _groups(self, model: Model, tp: int, ep: int) -> tuple[int, int, float]:
        """Measured numbers of groups around a number of groups, and how far it is from the first
        to the second, in logarithms."""
        even = model.experts / -(-model.experts // ep)
        op = self._parts(model, 1)[1].experts["generation"][0]
        measured = [] if "Moe" not in op else self._coverage.groups(_with(op, moe_tp_size=tp))
        if even in measured or not measured or not measured[0] < even < measured[-1]:
            return ep, ep, 0.0
        at = int(np.searchsorted(measured, even))
        low, high = measured[at - 1], measured[at]
        return low, high, float(np.log(even / low) / np.log(high / low))

    def _routed_sums(self, model: Model, tp: int, ep: int, tokens: Array, each: Array) -> Sums:
        key = (model, tp, ep)
        if key not in self._routed:
            graph, parts = self._parts(model, 1)
            lists = {
                # the group's own split; all tokens are the group's, not one rank's of many
                phase: [
                    _with(op, moe_tp_size=tp, moe_ep_size=ep, attention_dp_size=1) for op in ops
                ]
                for phase, ops in parts.experts.items()
            }
            self._routed[key] = self._compiled(graph, lists)
        return self._by_load(self._routed[key], tokens, each)

    def _exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int) -> _Exchange:
        graph, parts = self._parts(model, tp)
        if self._wide:
            return _Exchange(self._compiled(graph, parts.libraries), [])
        times = float(model.layers if self._all_moe else model.moe_layers)
        ops = self._package.collectives(model, dp, moe_tp, ep, times)
        works = self._compiled(graph, {"generation": ops})
        if tp == 1:
            return _Exchange(works, [])
        # collectives between layers begin with attention's all-reduce
        reduce = [self._package.all_reduce(model.hidden, tp, times)]
        return _Exchange(works, self._compiled(graph, {"generation": reduce})["generation"])

    def _compiled(self, graph: Graph, lists: dict[Phase, list[Op]]) -> dict[Phase, list[Work]]:
        flat = [op for ops in lists.values() for op in ops]
        engine: Engine = self._package.engine(graph, {"generation": flat, "context": []})
        found = works_of(engine, list(lists.values()), self._coverage)
        return dict(zip(lists, found, strict=True))

    def _by_load(self, works: dict[Phase, list[Work]], tokens: Array, each: Array) -> Sums:
        """What runs for as many tokens as each attention rank has."""
        sums = Sums(tokens.shape)
        if len(works) < len(PHASES):
            sums.work(next(iter(works.values())), tokens)
            return sums
        few = each <= FEW_TOKENS
        sums.work(works["generation"], np.where(few, tokens, 0.0))
        sums.work(works["context"], np.where(few, 0.0, tokens))
        return sums

    # -- refusals ------------------------------------------------------------------------------

    def _check_prompts(self, model: Model) -> None:
        if (
            model.attention.kind == "dsa"
            and self._package.backend != "trtllm"
            and not self._extrapolate
        ):
            raise NotCovered(
                f"{self._package.backend}'s sparse attention was measured with launches that hide "
                "the kernel for short prompts: take --backend trtllm, or --allow-extrapolation"
            )

    def _answer(self, sums: Sums, what: str) -> Time:
        covered = sums.outside <= TOLERATED
        if not self._extrapolate and not np.all(covered):
            worst = float(np.max(sums.outside))
            error = NotCovered(
                f"{what}: {worst:.0%} of a step's time ({sums.culprit}) lies outside of what was "
                f"measured for {self.name}; --allow-extrapolation answers all the same"
            )
            error.covered = covered
            raise error
        return sums.time()


@cache
def _opened(
    system: str, backend: Backend, version: str, estimate: bool
) -> tuple[Package, Coverage]:
    """Tables, read once per process: it takes seconds."""
    package = Package(system, backend, version, estimate)
    return package, Coverage(package)


def _with(op: Op, **fields: Any) -> Op:
    """With other values of the fields it has."""
    kind, old = next(iter(op.items()))
    return {kind: {**old, **{key: value for key, value in fields.items() if key in old}}}
