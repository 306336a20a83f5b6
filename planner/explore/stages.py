"""What the four stages of an AFD step take: attention, A2F, FFN, F2A, for many loads at once.

Asks kernels and network, and remembers what experts take for how many tokens: many splits ask the
same. How stages overlap is ``overlap``'s business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.explore.afd_split import AfdSplit
from planner.explore.calibration import NOMINAL
from planner.explore.covered import seconds_where_covered
from planner.explore.kernels.base import Array, KernelDB, Load, Time
from planner.explore.network import Placement, Traffic, a2f, f2a
from planner.explore.overlap import Overlapped, overlapped
from planner.explore.placement import placements, segregated
from planner.explore.points import Shape
from planner.explore.question import Question
from planner.explore.transfers import symmetric_time


@dataclass(frozen=True)
class Micro:
    """One micro-batch on one attention rank; arrays of one length.

    Args:
        decode: requests that get a token.
        prefill: prompt tokens.
        lanes: micro-batches of the step.
    """

    decode: Array
    prefill: Array
    lanes: Array

    @property
    def tokens(self) -> Array:
        return self.decode + self.prefill

    def where(self, mask: np.ndarray) -> Micro:
        """Those that are chosen."""
        return Micro(self.decode[mask], self.prefill[mask], self.lanes[mask])


@dataclass(frozen=True)
class _Exchange:
    """Both transfers of one placement: seconds without tokens, and per token of an attention GPU,
    all layers."""

    name: str
    a2f_latency: float
    a2f_slope: float
    f2a_latency: float
    f2a_slope: float

    @property
    def key(self) -> tuple[float, ...]:
        return self.a2f_latency, self.a2f_slope, self.f2a_latency, self.f2a_slope

    def both(self, tokens: Array) -> float:
        """Seconds there and back."""
        there, back = self.seconds(tokens)
        return float(there[0] + back[0])

    def seconds(self, tokens: Array) -> tuple[Array, Array]:
        return (
            self.a2f_latency + self.a2f_slope * tokens,
            self.f2a_latency + self.f2a_slope * tokens,
        )


def micro(decode: Array, prefill: Array, lanes: Array) -> Micro:
    """A rank's step cut into micro-batches: no more than it has tokens; the largest counts."""
    count = np.maximum(np.minimum(lanes, decode + prefill), 1.0)
    return Micro(np.ceil(decode / count), np.ceil(prefill / count), count)


def load_of(shape: Shape, work: Micro) -> Load:
    """What attention kernels see of it.

    Prompt tokens of a micro-batch are pieces of as many prompts as they fill; a piece finds the
    prefix and, on average, half of the rest of its prompt before it.
    """
    prompts = np.maximum(work.prefill / shape.prompt, 1.0)
    piece = work.prefill / prompts
    return Load(
        decode=work.decode,
        context=np.full_like(work.decode, shape.context),
        prefill=work.prefill,
        past=shape.prefix + (shape.prompt - piece) / 2,
        prompts=prompts,
    )


class Stages:
    """Stage times of one question.

    Args:
        question: model, shape, systems, options.
        db: kernel times of the attention side.
        ffn_db: of the FFN side; none: the same.
    """

    def __init__(self, question: Question, db: KernelDB, ffn_db: KernelDB | None = None):
        self.question = question
        self.model = question.model
        self.system = question.system
        self.ffn_system = question.ffn_system or question.system
        self.db = db
        self.ffn_db = ffn_db or db
        self.refusal = ""
        self._experts: dict[tuple[int, int], dict[float, float]] = {}
        self._reductions: dict[tuple[int, int], tuple[float, float]] = {}
        self._lines: dict[tuple[int, int, int], list[_Exchange]] = {}
        self.traffic = Traffic(
            self.model.hidden,
            self.model.experts,
            self.model.top_k,
            question.options.wire_bytes,
            question.options.fan,
            question.options.sides,
        )

    # -- one micro-batch, all layers -----------------------------------------------------------

    def attention(self, tp: int, work: Micro) -> Array:
        """Seconds; nan where nothing is known."""
        pairs, back = np.unique(np.stack([work.decode, work.prefill]), axis=1, return_inverse=True)
        seconds, refusal = seconds_where_covered(
            lambda chosen: self.attention_time(tp, *pairs[:, chosen]), pairs.shape[1]
        )
        self.refusal = self.refusal or refusal
        return seconds[back.reshape(-1)]

    def attention_time(self, tp: int, decode: Array, prefill: Array) -> Time:
        """With its provenance.

        Raises:
            NotCovered: the source knows nothing of some of these loads.
        """
        one = np.ones_like(decode)
        load = load_of(self.question.shape, Micro(decode, prefill, one))
        return self.db.attention(self.model, tp, self.question.options.sides, load)

    def experts(self, moe_tp: int, ep: int, tokens: Array) -> Array:
        """Seconds for tokens of all attention ranks; nan where nothing is known."""
        known = self._experts.setdefault((moe_tp, ep), {})
        wanted, back = np.unique(tokens, return_inverse=True)
        new = np.array([one for one in wanted.tolist() if one not in known])
        if len(new):
            seconds, refusal = seconds_where_covered(
                lambda chosen: self.experts_time(moe_tp, ep, new[chosen]), len(new)
            )
            self.refusal = self.refusal or refusal
            known.update(zip(new.tolist(), seconds.tolist(), strict=True))
        return np.array([known[one] for one in wanted.tolist()])[back.reshape(tokens.shape)]

    def experts_time(self, moe_tp: int, ep: int, tokens: Array) -> Time:
        """With its provenance.

        Raises:
            NotCovered: the source knows nothing of some of these loads.
        """
        sides = self.question.options.sides
        return self.ffn_db.experts(self.model, moe_tp, ep, sides, tokens)

    def reduction(self, moe_tp: int, ep: int, tokens: Array) -> Array:
        """Seconds in which the GPUs that share an expert add up what each of them made, all
        layers: every one is sent its part by the others. No source counts it with the experts."""
        if moe_tp == 1:
            return np.zeros_like(tokens)
        if (moe_tp, ep) not in self._reductions:
            options = self.question.options
            group = range(moe_tp)
            one, two = (
                symmetric_time(
                    self.ffn_system,
                    group,
                    group,
                    size,
                    percentile=options.percentile,
                    calibration=NOMINAL if options.network == "nominal" else None,
                )
                for size in (1.0, 2.0)
            )
            # of the tokens, those that a group answers; each of its GPUs gets an equal part
            bytes_each = self.traffic.f2a_bytes(ep) / ep / moe_tp
            self._reductions[moe_tp, ep] = (2 * one - two, (two - one) * bytes_each)
        latency, slope = self._reductions[moe_tp, ep]
        return self.model.moe_layers * (latency + slope * tokens)

    # -- a step --------------------------------------------------------------------------------

    def parts(self, split: AfdSplit, work: Micro, attention: Array) -> dict[str, Array]:
        """Seconds of one micro-batch by stage, all layers.

        Args:
            attention: of ``work``: it is the same whatever the other side.
        """
        there, back = self.transfers(split, work.tokens)
        tokens = split.dp * work.tokens
        ffn = self.experts(split.moe_tp, split.ep, tokens)
        ffn = ffn + self.reduction(split.moe_tp, split.ep, tokens)
        return {"attention": attention, "a2f": there, "ffn": ffn, "f2a": back}

    def step(self, split: AfdSplit, work: Micro, attention: Array) -> Overlapped:
        """Seconds of a step of all micro-batches; ``attention`` as in ``parts``."""
        stages = self.parts(split, work, attention)
        return overlapped(list(stages.values()), work.lanes, self.model.layers)

    # -- between the sides ---------------------------------------------------------------------

    def transfers(self, split: AfdSplit, tokens: Array) -> tuple[Array, Array]:
        """Seconds of A2F and F2A of one micro-batch, all MoE layers, best placement for each load.

        Args:
            tokens: of one attention rank.
        """
        sent = tokens / split.tp
        timed = [line.seconds(sent) for line in self._exchanges(split)]
        if len(timed) == 1:
            return timed[0]
        best = np.argmin([there + back for there, back in timed], axis=0)
        there, back = (np.choose(best, ways) for ways in zip(*timed, strict=True))
        return there, back

    def placement(self, split: AfdSplit, tokens: float) -> str:
        """Name of the one that ``transfers`` takes for a load."""
        sent = np.array([tokens / split.tp])
        return min(self._exchanges(split), key=lambda line: line.both(sent)).name

    def _exchanges(self, split: AfdSplit) -> list[_Exchange]:
        """Per placement on the first nodes."""
        key = (split.attention, split.ffn, split.moe_tp)
        if key not in self._lines:
            found = [self._exchange(split, where) for where in self._ways(*key[:2])]
            # of placements that are alike the first
            self._lines[key] = list({line.key: line for line in reversed(found)}.values())[::-1]
        return self._lines[key]

    def _exchange(self, split: AfdSplit, where: Placement) -> _Exchange:
        options, layers = self.question.options, self.model.moe_layers
        # transfers are linear in tokens (``network``), so that two loads tell all others
        (a_one, a_two), (f_one, f_two) = (
            layers
            * way(
                self.system,
                where,
                np.array([1.0, 2.0]),
                self.traffic,
                ffn_tp=split.moe_tp,
                ffn_system=self.question.ffn_system,
                percentile=options.percentile,
                calibration=NOMINAL if options.network == "nominal" else None,
            )
            for way in (a2f, f2a)
        )
        return _Exchange(
            where.name, 2 * a_one - a_two, a_two - a_one, 2 * f_one - f_two, f_two - f_one
        )

    def _ways(self, attention: int, ffn: int) -> tuple[Placement, ...]:
        if self.ffn_system != self.system:
            return (segregated(self.system, attention, ffn),)
        # no replica takes nodes that it doesn't fill from the next one
        return tuple(
            where
            for where in placements(self.system, attention, ffn)
            if max(where.attention + where.ffn) < attention + ffn
        )
