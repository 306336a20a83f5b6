"""P/D: prefill on GPUs of its own, decode on others, each with a split of its own.

Workers are those of aiconfigurator 0.12 (``static_ctx`` and ``static_gen``): prefill computes whole
prompts in batches, decode gives every request its tokens at the mean context. How many of each a
system has is ``pools``'s business, and so are the factors for matching them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from planner.explore.afd_split import sizes_up_to
from planner.explore.aggregated import MOST_BATCH, plain_load
from planner.explore.found import Reach
from planner.explore.kernels.base import Array, KernelDB, Load
from planner.explore.points import Mode, Point
from planner.explore.pools import (
    Details,
    Pools,
    Replica,
    decodes_that_matter,
    match,
    merged_pools,
    system_of,
    ttft_of,
)
from planner.explore.question import Question
from planner.explore.split import Split
from planner.explore.whole import Room, Steps, group_of, room_of, shares_of

Role = Literal["prefill", "decode"]
MOST_PROMPT_TOKENS = 16_384
"""Prompt tokens of a prefill batch on an attention rank, or one prompt (as in aiconfigurator)."""


def prefill_workers(
    question: Question,
    db: KernelDB,
    split: Split,
    steps: Steps | None = None,
    *,
    batches: Sequence[int] | None = None,
    factor: float = 1.0,
) -> list[Replica]:
    """Prefill replicas of one split, by batches of prompts; those that fit and are covered.

    Args:
        steps: of the same question, to share what attention ranks take; none: new ones.
        batches: prompts of an attention rank; none: up to 16,384 tokens together.
        factor: on their time. aiconfigurator's tasks take 1.1, arXiv 2605.28302 names none.
    """
    steps = steps or Steps(question, db)
    return list(_workers(steps, split, "prefill", batches, factor).prefills)


def decode_workers(
    question: Question,
    db: KernelDB,
    split: Split,
    steps: Steps | None = None,
    *,
    batches: Sequence[int] | None = None,
    factor: float = 1.0,
) -> list[Replica]:
    """Decode replicas of one split, by requests per attention rank; see ``prefill_workers``.

    Args:
        factor: on their time. aiconfigurator's tasks take 1.08.
    """
    steps = steps or Steps(question, db)
    return list(_workers(steps, split, "decode", batches, factor).decodes)


def plain_pools(
    question: Question, db: KernelDB, splits: Iterable[Split], steps: Steps | None = None
) -> Pools:
    """Both kinds of replicas over splits, and how near those came that don't fit."""
    steps = Steps(question, db) if steps is None else steps
    roles: tuple[Role, ...] = ("prefill", "decode")
    parts = [_workers(steps, split, role) for split in splits for role in roles]
    pools = merged_pools(parts)
    return replace(pools, reach=pools.reach | Reach(missing=steps.missing))


def pd_points(
    question: Question,
    db: KernelDB,
    prefill: Sequence[Replica],
    decode: Sequence[Replica],
    kv_transfer: float = 0.0,
) -> list[Point]:
    """Systems of the given replicas: for every pair the numbers of both that serve most requests.

    Args:
        prefill, decode: of any splits; of the latter only those that none beats in TPOT and rate.
        kv_transfer: seconds that a request's KV cache takes from one to the other; counts for TTFT
            after all factors.
    """
    prefill, decode = list(prefill), decodes_that_matter(decode)
    if not prefill or not decode:
        return []
    found = match(question, prefill, decode)
    pairs: dict[tuple[int, int], int] = {}
    order = np.lexsort((found.gpus, -found.requests_per_s))
    for row in order.tolist():
        pairs.setdefault((int(found.prefill[row]), int(found.decode[row])), row)
    steps, details = Steps(question, db), {}
    points = []
    for (p, d), row in pairs.items():
        for one, role in ((prefill[p], "prefill"), (decode[d], "decode")):
            if (one, role) not in details:
                details[one, role] = describe_plain(steps, one, role)
        points.append(
            system_of(
                question,
                Mode.PD,
                (prefill[p], decode[d]),
                (details[prefill[p], "prefill"], details[decode[d], "decode"]),
                (int(found.prefills[row]), int(found.decodes[row])),
                ttft_of(question, prefill[p]) + kv_transfer,
            )
        )
    return points


def describe_plain(steps: Steps, replica: Replica, role: str) -> Details:
    """What is to be said of a replica.

    Args:
        role: "prefill" or "decode".
    """
    question, split = steps.question, Split(*replica.split)
    batch = np.array([float(replica.batch)])
    prompts = role == "prefill"
    load = prompt_load(question, batch) if prompts else plain_load(question.shape, batch)
    times = steps.times(split, load)
    tokens = float(load.tokens[0])
    length = question.shape.prefix + question.shape.prompt if prompts else None
    return Details(
        groups=(group_of(question, split, role, 1, float(batch[0]), tokens, length),),
        parts={name: float(time.seconds[0]) for name, time in times.items()},
        shares=shares_of([(1.0, time) for time in times.values()]),
    )


def prompt_load(question: Question, batch: Array) -> Load:
    """A step that computes whole prompts behind their prefixes."""
    nothing, shape = np.zeros_like(batch), question.shape
    return Load(nothing, nothing, batch * shape.prompt, nothing + shape.prefix, batch)


def _workers(
    steps: Steps,
    split: Split,
    role: Role,
    batches: Sequence[int] | None = None,
    factor: float = 1.0,
) -> Pools:
    """Replicas of one kind and split; none where they would leave no GPUs for the others."""
    question = steps.question
    shape = question.shape
    if split.gpus >= question.gpus:
        return Pools()
    if role == "prefill":
        room = room_of(question, split, shape.prefix + shape.prompt)
        given = batches or range(1, max(1, MOST_PROMPT_TOKENS // shape.prompt) + 1)
        # the first token comes with the prompt
        count, per_request = 1, shape.prompt
    else:
        room = room_of(question, split)
        given = batches or _batches(room)
        count, per_request = max(shape.output - 1, 1), 1
    batch = np.array(given, float)
    tokens = batch * per_request
    load = prompt_load(question, batch) if role == "prefill" else plain_load(shape, batch)
    used = room.used(batch, tokens)
    fits = used <= room.allowed
    if not fits.any():
        return Pools(reach=Reach(memory=float(used.min()), room=room.allowed))
    seconds = factor * steps.seconds(split, _where(load, fits))
    known = np.isfinite(seconds)
    found = tuple(
        Replica(
            split=(split.tp, split.dp, split.moe_tp, split.ep),
            gpus=split.gpus,
            seconds=float(took),
            requests_per_s=float(size * split.dp / (took * count)),
            batch=int(size),
            lanes=1,
            afd=False,
            paper=float(took),
            safe=float(took),
        )
        for size, took in zip(batch[fits][known], seconds[known], strict=True)
    )
    least = float(np.min(seconds[known], initial=np.inf))
    reach = Reach(ttft=least) if role == "prefill" else Reach(tpot=least)
    reach |= Reach(uncovered=int((~known).sum()))
    if role == "prefill":
        return Pools(prefills=found, reach=reach, evaluated=len(found))
    return Pools(decodes=found, reach=reach, evaluated=len(found))


def _batches(room: Room) -> list[int]:
    """Requests of an attention rank: in steps of about 9 %, and as many as fit."""
    most = min(room.most_requests(1.0), MOST_BATCH)
    return sorted({*sizes_up_to(most), max(most, 1)})


def _where(load: Load, mask: NDArray[np.bool_]) -> Load:
    return Load(*(getattr(load, field.name)[mask] for field in fields(load)))
