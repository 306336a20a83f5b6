"""Aggregation: every GPU does everything, prompts are computed in chunks that ride with decode.

The mean-field schedule of aiconfigurator 0.12 (``BaseBackend.run_agg``, in ``chunked``) with the
corrections of its backends as visible inputs. Prefix tokens are in the cache already: only the rest
of a prompt is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.explore.afd_split import chunks_of, sizes_up_to
from planner.explore.chunked import Chunked, chunked
from planner.explore.found import Found, Reach, better
from planner.explore.kernels.base import Array, KernelDB, Load
from planner.explore.pareto import front_indices
from planner.explore.points import Mode, Point, Shape
from planner.explore.question import Question
from planner.explore.split import Split
from planner.explore.whole import Steps, group_of, room_of, shares_of

MOST_BATCH = 1024
"""Slots of an attention rank: no more are tried (as in aiconfigurator 0.12)."""


@dataclass(frozen=True)
class Corrections:
    """What a serving engine does to the schedule, as aiconfigurator 0.12 found it.

    Args:
        drain: mixed steps that don't count for TPOT: after the last chunk no new request joins for
            that long (``_tpot_mix_steps``: 3 for TensorRT-LLM and SGLang).
        one_prompt: one prompt at a time is computed, all other slots decode meanwhile, and the
            wait for the first token grows with log2 of the slots (vLLM: ``_mix_step_gen_tokens``,
            ``_ttft_queuing_factor``).
        per_layer: seconds of dispatch that a prompt waits for (vLLM: 0.8 ms).
        littles_law: no more tokens/s than requests in flight over their latency (vLLM).
    """

    drain: int = 0
    one_prompt: bool = False
    per_layer: float = 0.0
    littles_law: bool = False


CORRECTIONS: Mapping[str, Corrections] = {
    "trtllm": Corrections(drain=3),
    "sglang": Corrections(drain=3),
    "vllm": Corrections(one_prompt=True, per_layer=0.0008, littles_law=True),
}
"""By backend of the kernels; none of them for other sources."""


@dataclass(frozen=True)
class Evaluated:
    """All that was tried on one split; arrays of one length, nan where nothing is known.

    Args:
        split, replicas: of the system.
        plan: the schedules.
        chunk: prompt tokens of a mixed step.
        ttft, tpot: seconds.
        rate: output tokens per second of the system.
        reach: what was lacking where nothing fits.
    """

    split: Split
    replicas: int
    plan: Chunked
    chunk: Array
    ttft: Array
    tpot: Array
    rate: Array
    reach: Reach

    @property
    def gpus(self) -> int:
        return self.replicas * self.split.gpus


def aggregated_points(question: Question, db: KernelDB, split: Split) -> list[Point]:
    """Every batch and chunk on replicas of one split that fits memory and is covered.

    As many replicas as there is room for; what is left idles. See ``explore_aggregated`` for what
    was pruned and why.
    """
    steps = Steps(question, db)
    found = evaluate(steps, split)
    known = np.flatnonzero(np.isfinite(found.ttft) & np.isfinite(found.tpot))
    return [point_of(steps, found, int(row)) for row in known]


def explore_aggregated(
    question: Question, db: KernelDB, splits: Iterable[Split], steps: Steps | None = None
) -> Found:
    """Best and front over splits of any sizes, and how near the rest came.

    Args:
        steps: of the same question, to share what attention ranks take; none: new ones.
    """
    steps = Steps(question, db) if steps is None else steps
    tables = [evaluate(steps, split) for split in splits if split.gpus <= question.gpus]
    reach = Reach(missing=steps.missing)
    for table in tables:
        reach |= table.reach
    rows = [(table, row) for table in tables for row in range(len(table.chunk))]
    if not rows:
        return Found(reach=reach)
    ttft, tpot, rate, gpus = (
        np.concatenate([np.broadcast_to(column(table), len(table.chunk)) for table in tables])
        for column in (
            lambda table: table.ttft,
            lambda table: table.tpot,
            lambda table: table.rate,
            lambda table: table.gpus,
        )
    )
    known = np.isfinite(ttft) & np.isfinite(tpot)
    reach |= Reach(
        ttft=float(np.min(ttft[known], initial=np.inf)),
        tpot=float(np.min(tpot[known], initial=np.inf)),
        uncovered=int((~known).sum()),
    )
    targets = question.targets
    held = np.flatnonzero(known & (ttft <= targets.ttft) & (tpot <= targets.tpot))
    tops = held[np.lexsort((tpot[held], gpus[held], -rate[held]))][:1]
    with np.errstate(divide="ignore"):
        kept = front_indices(1.0 / tpot, rate / gpus)
    return Found(
        better(*(point_of(steps, *rows[top]) for top in tops)),
        tuple(point_of(steps, *rows[row]) for row in kept),
        reach,
        int(known.sum()),
    )


def evaluate(
    steps: Steps,
    split: Split,
    batches: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
) -> Evaluated:
    """All batches and chunks on one split.

    Args:
        batches: slots of an attention rank; none: up to what fits, in steps of about 9 %.
        chunks: prompt tokens of a mixed step; none: powers of two and whole prompts.
    """
    question = steps.question
    shape, room = question.shape, room_of(question, split)
    if batches is None:
        most = min(room.most_requests(1.0), MOST_BATCH)
        batches = sorted({*sizes_up_to(most), *([most] if most else [])})
    given = [
        (batch, chunk)
        for batch in batches
        for chunk in (tried_chunks(shape) if chunks is None else chunks)
        # somebody has to decode meanwhile
        if -(-chunk // shape.prompt) <= max(batch - 1, 1)
    ]
    batch, chunk = np.array(given, float).reshape(-1, 2).T
    fixes = corrections_of(steps.db)
    plan = plan_of(question, batch, chunk, fixes)
    used = room.used(batch, np.maximum(plan.decode + chunk, batch))
    fits = used <= room.allowed
    least = float(np.min(used, initial=np.inf))
    if not len(used):
        least = float(room.used(np.ones(()), np.ones(())))
    reach = Reach() if fits.any() else Reach(memory=least, room=room.allowed)
    plan, chunk = plan.where(fits), chunk[fits]
    mixed = steps.seconds(split, mixed_load(shape, plan.decode, chunk))
    plain = steps.seconds(split, plain_load(shape, plan.batch))
    # where every step carries a chunk, plain ones don't matter
    plain = np.where(plan.plain > 0, plain, 0.0)
    replicas = max(1, question.gpus // split.gpus)
    ttft, tpot, rate = outcome(question, plan, mixed, plain, fixes)
    return Evaluated(split, replicas, plan, chunk, ttft, tpot, rate * replicas * split.dp, reach)


def tried_chunks(shape: Shape) -> list[int]:
    """Prompt tokens of a mixed step: powers of two, and one, two, four ... whole prompts."""
    chunks = set(chunks_of(shape))
    most = max(max(chunks), 2 * shape.prompt)
    return sorted(chunks | {n * shape.prompt for n in (1, 2, 4, 8, 16) if n * shape.prompt <= most})


def corrections_of(db: KernelDB) -> Corrections:
    """Those of the backend whose kernels they are, if any."""
    return CORRECTIONS.get(getattr(db, "backend", ""), Corrections())


def mixed_load(shape: Shape, decode: Array, chunk: Array) -> Load:
    """A step that carries prompt tokens: pieces of as many prompts as they fill. A piece finds the
    prefix and, on average, half of the rest of its prompt in the cache."""
    prompts = np.maximum(chunk / shape.prompt, 1.0)
    past = shape.prefix + (shape.prompt - chunk / prompts) / 2
    return Load(decode, np.full_like(decode, shape.context), chunk, past, prompts)


def plain_load(shape: Shape, batch: Array) -> Load:
    """A step of decode alone."""
    nothing = np.zeros_like(batch)
    return Load(batch, np.full_like(batch, shape.context), nothing, nothing, nothing + 1.0)


def point_of(steps: Steps, found: Evaluated, row: int) -> Point:
    """A row with all that is to be said about it."""
    shape, split = steps.question.shape, found.split
    one = slice(row, row + 1)
    batch, chunk, decode = found.plan.batch[one], found.chunk[one], found.plan.decode[one]
    mixed = steps.times(split, mixed_load(shape, decode, chunk))
    counts = float(found.plan.mixed[row]), float(found.plan.plain[row])
    # without a step of decode alone, those that carry prompts stand for it
    plain = steps.times(split, plain_load(shape, batch)) if counts[1] else mixed
    tokens = max(float(decode[0] + chunk[0]), float(batch[0]))
    return Point(
        mode=Mode.AGGREGATED,
        groups=(
            group_of(steps.question, split, "worker", found.replicas, float(batch[0]), tokens),
        ),
        batch=int(batch[0]),
        concurrency=float(batch[0]) * split.dp * found.replicas,
        ttft=float(found.ttft[row]),
        tpot=float(found.tpot[row]),
        tokens_per_s=float(found.rate[row]),
        chunk=int(chunk[0]),
        tpot_paper=float(found.tpot[row]),
        tpot_safe=float(found.tpot[row]),
        parts={name: float(time.seconds[0]) for name, time in plain.items()},
        shares=shares_of(
            [(counts[0], time) for time in mixed.values()]
            + [(counts[1], time) for time in plain.values()]
        ),
    )


def plan_of(question: Question, batch: Array, chunk: Array, fixes: Corrections) -> Chunked:
    """The schedule as an engine has it; with AFD too."""
    plan = chunked(question.shape, batch, chunk)
    if fixes.one_prompt:
        decoding = np.maximum(batch - np.ceil(chunk / question.shape.prompt), 1.0)
        plan = replace(
            plan,
            decode=np.where(batch > 1, decoding, 0.0),
            queue=np.minimum(1.0 + np.log2(np.maximum(batch, 1.0)) / 8.0, 2.0),
        )
    if not question.options.queueing:
        plan = replace(plan, queue=np.ones_like(plan.queue))
    return plan


def outcome(
    question: Question, plan: Chunked, mixed: Array, plain: Array, fixes: Corrections
) -> tuple[Array, Array, Array]:
    """What a schedule comes to on one attention rank; with AFD too.

    Args:
        mixed, plain: seconds of its steps with and without prompt tokens.

    Returns:
        TTFT and TPOT in seconds, output tokens per second.
    """
    ttft = (mixed * plan.passes + fixes.per_layer * question.model.layers) * plan.queue
    tpot, rate = _tpot(plan, mixed, plain, fixes.drain), plan.rate(mixed, plain)
    if fixes.littles_law:
        latency = ttft + tpot * plan.tokens
        rate = np.minimum(rate, plan.batch * plan.tokens / latency)
    return ttft, tpot, rate


def _tpot(plan: Chunked, mixed: Array, plain: Array, drain: int) -> Array:
    """Seconds per token after the first: the mean over the steps that count."""
    # where plain steps follow, the first tokens after the last chunk come without new prompts
    riding = np.where(plan.plain > 0, np.maximum(plan.mixed - drain, 1.0), plan.mixed)
    riding = np.where(plan.batch > 1, riding, 0.0)
    counted = riding + plan.plain
    return np.where(
        counted > 0, (mixed * riding + plain * plan.plain) / np.maximum(counted, 1.0), 0.0
    )
