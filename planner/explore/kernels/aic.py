"""Kernel times measured by NVIDIA, as aiconfigurator-core 0.12 ships them.

The package says which operations a model runs and what each takes (``aic_package``); here they are
summed by side, tabulated (``adaptive``) so that many loads cost little, and labelled by where in
its tables they lie (``aic_coverage``). Departures from aiconfigurator: attention's all-reduce is
counted with attention, shared experts aren't hidden behind routed ones, dense layers are dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planner.errors import PlannerError
from planner.explore.kernels.adaptive import Adaptive
from planner.explore.kernels.aic_coverage import Coverage, SequenceCover
from planner.explore.kernels.aic_package import Backend, Engine, Graph, Op, Package
from planner.explore.kernels.aic_parts import Parts, parts_of
from planner.explore.kernels.aic_sums import Sums, Work, group
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


@dataclass
class _Rank:
    """An attention rank's operations, tabulated as they are asked for."""

    both: list[Work]
    prompt: list[Work]
    decoding: list[Work]
    output: list[Work]
    router: list[Work]
    shared: list[Work]
    context: list[SequenceCover]
    generation: list[SequenceCover]
    engine: Engine
    first_generation: int
    decode: dict[int, list[Adaptive]] = field(default_factory=dict)
    prompts: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)


@dataclass
class _Exchange:
    """Ways to dispatch and combine, for many tokens and for few, and what attention has counted of
    them already."""

    ways: list[list[Work]]
    counted: list[Work]

    @property
    def measured(self) -> bool:
        """Whether there is a table for so many GPUs."""
        return all(work.cover.points or work.cover.formula for way in self.ways for work in way)


class AicDB:
    """A ``KernelDB`` of measured kernels.

    Args:
        system: ``system.kernels`` names its tables.
        backend: whose kernels: TensorRT-LLM, vLLM or SGLang.
        version: of these; "current": the newest complete set.
        allow_extrapolation: answer outside of the tables too; labelled.
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
        balanced: bool = False,
        all_moe: bool = False,
        beyond: Literal["network", "package"] = "network",
    ):
        if not system.kernels:
            raise PlannerError(
                f"no measured kernels are known of {system.name}; take --kernels roofline"
            )
        self._package = Package(system.kernels, backend, version, estimate=allow_extrapolation)
        self._coverage = Coverage(self._package)
        self.backend = backend
        self._extrapolate = allow_extrapolation
        self._distribution = "balanced" if balanced else "power_law"
        self._all_moe = all_moe
        self._network = RooflineDB(system) if beyond == "network" else None
        self._graphs: dict[tuple[Model, int], tuple[Graph, Parts]] = {}
        self._ranks: dict[tuple[Model, int], _Rank] = {}
        self._routed: dict[tuple[Model, int, int], list[Work]] = {}
        self._exchanges: dict[tuple[Model, int, int, int, int], _Exchange] = {}
        self.name = f"aiconfigurator-core 0.12: {backend} {self._package.version} on {system.name}"

    # -- KernelDB ------------------------------------------------------------------------------

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        """One step of an attention rank of ``tp`` GPUs; see ``KernelDB``.

        Raises:
            NotCovered: outside of the tables, or no kernel of this kind was measured.
            PlannerError: ``tp`` doesn't divide the heads.
        """
        decode, context, prefill, past, prompts = (
            np.array(part, float)
            for part in np.broadcast_arrays(
                load.decode, load.context, load.prefill, load.past, load.prompts
            )
        )
        if np.any(prefill > 0):
            self._check_prompts(model)
        rank = self._rank(model, tp)
        tokens = decode + prefill
        sums = Sums(tokens.shape)
        sums.work(rank.both, tokens)
        sums.work(rank.prompt, prefill)
        sums.work(rank.decoding, decode)
        sums.work(rank.output, decode + np.where(prefill > 0, prompts, 0.0), refusable=False)
        if sides.router is Side.ATTENTION:
            sums.work(rank.router, tokens)
        if sides.shared is Side.ATTENTION:
            sums.work(rank.shared, tokens)
        _add_decode(sums, rank, decode, context)
        _add_prompts(sums, rank, prefill, past, prompts)
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
        sums = Sums(tokens.shape)
        low, high, share = self._groups(model, tp, ep)
        sums.work(self._routed_by(model, tp, low), tokens)
        if high != low:
            other = Sums(tokens.shape)
            other.work(self._routed_by(model, tp, high), tokens)
            sums = sums.between(other, share)
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
        """
        key = (model, tp, dp, moe_tp, ep)
        if key not in self._exchanges:
            self._exchanges[key] = self._exchange(*key)
        found, tokens = self._exchanges[key], np.asarray(tokens, float)
        if self._network is not None and not found.measured:
            return self._network.exchange(model, tp, dp, moe_tp, ep, tokens)
        ways = [Sums(tokens.shape) for _ in found.ways]
        for sums, works in zip(ways, found.ways, strict=True):
            sums.work(works, tokens)
        # libraries for many tokens and for few: no table of the first begins with few
        best = np.where(tokens <= FEW_TOKENS, len(ways) - 1, 0)
        chosen = Sums(tokens.shape)
        counted = Sums(tokens.shape)
        counted.work(found.counted, tokens)
        for position, sums in enumerate(ways):
            left = np.maximum(sums.total - counted.total, 0.0)
            whole = np.maximum(sums.total, 1e-12)
            chosen.take(sums, np.where(best == position, left / whole, 0.0))
        gpus = f"{tp} x {dp} GPUs of attention, {moe_tp} x {ep} of experts"
        return self._answer(chosen, f"dispatch of {model.name} between {gpus}")

    # -- what runs -----------------------------------------------------------------------------

    def _parts(self, model: Model, tp: int) -> tuple[Graph, Parts]:
        key = (model, tp)
        if key not in self._graphs:
            if model.attention.heads % tp:
                raise PlannerError(
                    f"attention over {tp} GPUs: expected a number that divides the "
                    f"{model.attention.heads} heads of {model.name}"
                )
            graph = self._package.graph(model, tp, self._distribution)
            self._graphs[key] = graph, parts_of(graph, model, tp, self._whole, self._all_moe)
        return self._graphs[key]

    def _whole(self, op: Op) -> bool:
        """Whether a block was measured as a whole."""
        return bool(self._coverage.sequence(op).longest)

    def _rank(self, model: Model, tp: int) -> _Rank:
        key = (model, tp)
        if key not in self._ranks:
            graph, parts = self._parts(model, tp)
            reduced = list(parts.both)
            if tp > 1:
                # after attention, after a dense layer, after the embedding
                dense = 0 if self._all_moe else model.dense_layers
                times = model.layers + dense + 1
                reduced.append(self._package.all_reduce(model.hidden, tp, float(times)))
            lists = (
                reduced, parts.prompt, parts.decoding, parts.output, parts.router, parts.shared
            )  # fmt: skip
            flat = [op for ops in lists for op in ops]
            engine = self._package.engine(
                graph,
                {"generation": [*flat, *parts.generation], "context": parts.context},
            )
            works, start = [], 0
            for ops in lists:
                works.append(self._works(engine, ops, start))
                start += len(ops)
            both, prompt, decoding, output, router, shared = works
            self._ranks[key] = _Rank(
                both=both,
                prompt=prompt,
                decoding=decoding,
                output=output,
                router=router,
                shared=shared,
                context=[self._coverage.sequence(op) for op in parts.context],
                generation=[self._coverage.sequence(op) for op in parts.generation],
                engine=engine,
                first_generation=start,
            )
        return self._ranks[key]

    def _groups(self, model: Model, tp: int, ep: int) -> tuple[int, int, float]:
        """Measured numbers of groups around a number of groups, and how far it is from the first
        to the second, in logarithms."""
        even = model.experts / -(-model.experts // ep)
        _, parts = self._parts(model, 1)
        measured = self._coverage.groups(_with(parts.moe[0], moe_tp_size=tp))
        if even in measured or not measured or not measured[0] < even < measured[-1]:
            return ep, ep, 0.0
        at = int(np.searchsorted(measured, even))
        low, high = measured[at - 1], measured[at]
        return low, high, float(np.log(even / low) / np.log(high / low))

    def _routed_by(self, model: Model, tp: int, ep: int) -> list[Work]:
        key = (model, tp, ep)
        if key not in self._routed:
            graph, parts = self._parts(model, 1)
            # the group's own split; all tokens are the group's, not one rank's of many
            own = {"moe_tp_size": tp, "moe_ep_size": ep, "attention_dp_size": 1}
            ops = [_with(op, **own) for op in parts.moe]
            engine = self._package.engine(graph, {"generation": ops, "context": []})
            self._routed[key] = self._works(engine, ops, 0)
        return self._routed[key]

    def _exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int) -> _Exchange:
        if tp * dp != moe_tp * ep:
            raise PlannerError(
                f"attention over {tp} x {dp} GPUs and experts over {moe_tp} x {ep}: expected as "
                "many"
            )
        graph, _ = self._parts(model, tp)
        times = float(model.layers if self._all_moe else model.moe_layers)
        ways = self._package.dispatch(model, graph.moe_format, dp, moe_tp, ep, times)
        counted = []
        if tp > 1 and next(iter(ways[0][0])) == "MoeDispatch":
            # collectives between layers begin with attention's all-reduce
            counted = [self._package.all_reduce(model.hidden, tp, times)]
        flat = [op for ops in (*ways, counted) for op in ops]
        engine = self._package.engine(graph, {"generation": flat, "context": []})
        works, start = [], 0
        for ops in (*ways, counted):
            works.append(self._works(engine, ops, start))
            start += len(ops)
        return _Exchange(works[:-1], works[-1])

    def _works(self, engine: Engine, ops: Sequence[Op], start: int) -> list[Work]:
        """Operations at ``start`` of the engine's list, tabulated by tokens."""
        names = [next(iter(op.values()))["name"] for op in ops]
        covers = [self._coverage.tokens(op) for op in ops]
        return group(
            names, covers, lambda at, tokens: engine.total([start + one for one in at], tokens)
        )

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


def _add_decode(sums: Sums, rank: _Rank, decode: Array, context: Array) -> None:
    """Attention of requests that get one token each."""
    wanted = np.rint(context).astype(int)
    for length in np.unique(wanted[decode > 0]):
        curves = rank.decode.get(int(length))
        if curves is None:
            curves = rank.decode[int(length)] = _curves(rank, int(length))
        chosen = (wanted == length) & (decode > 0)
        for curve, cover in zip(curves, rank.generation, strict=True):
            seconds = np.where(chosen, curve(decode), 0.0)
            sums.add("attention in decode", seconds, cover.labels(decode, float(length)))


def _curves(rank: _Rank, length: int) -> list[Adaptive]:
    """Seconds by requests with that many tokens in the cache, of each operation."""

    def timed(position: int) -> Adaptive:
        at = [rank.first_generation + position]
        # the token itself is in the cache when it is attended to
        return Adaptive(
            lambda requests: rank.engine.total_generation(at, requests, length + 1),
            rank.generation[position].points,
        )

    return [timed(position) for position in range(len(rank.generation))]


def _add_prompts(sums: Sums, rank: _Rank, prefill: Array, past: Array, prompts: Array) -> None:
    """Attention of prompt tokens: every load is asked for, there are few."""
    some = prefill > 0
    if not np.any(some):
        return
    whole = np.maximum(np.rint(prompts), 1.0)
    each = np.maximum(np.rint(prefill / prompts), 1.0)
    loads = np.stack([whole, each, np.rint(past)], axis=-1).astype(int)
    rows, back = np.unique(loads[some], axis=0, return_inverse=True)
    table = []
    for row in rows:
        key = (int(row[0]), int(row[1]), int(row[2]))
        if key not in rank.prompts:
            rank.prompts[key] = rank.engine.context(range(len(rank.context)), *key)
        table.append(rank.prompts[key])
    seconds = np.zeros((len(rank.context), *prefill.shape))
    # whole prompts stand for as many tokens as there are
    scale = (prefill / (whole * each))[some]
    seconds[:, some] = np.array(table).T[:, back.reshape(-1)] * scale
    for one, cover in zip(seconds, rank.context, strict=True):
        sums.add("attention of prompts", one, cover.labels(whole, each + past))


def _with(op: Op, **fields: float) -> Op:
    kind, old = next(iter(op.items()))
    return {kind: {**old, **fields}}
