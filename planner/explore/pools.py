"""Prefill and decode pools, and how many replicas of each a system should have.

A pool's replica is known by its GPUs, its time and its requests per second; whether attention and
experts are apart inside doesn't matter here. Rates are matched as in aiconfigurator 0.12 and
arXiv 2605.28302: requests/s = min(0.9 prefill, 0.92 decode), both factors visible in ``Options``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from planner.explore.found import NOWHERE, Found, Reach
from planner.explore.handover import TPS, kv_seconds
from planner.explore.kernels.base import Array, Provenance
from planner.explore.pareto import front_indices
from planner.explore.points import Group, Mode, Point
from planner.explore.question import Question


@dataclass(frozen=True)
class Replica:
    """One replica of a prefill or a decode pool, evaluated.

    Args:
        split: tp, dp, moe_tp, ep.
        gpus: of it.
        seconds: prefill: of a batch of prompts; decode: TPOT.
        requests_per_s: that it brings through, alone.
        batch, lanes: of an attention rank.
        afd: attention and experts are apart.
        paper, safe: TPOT by both forms of the overlap; ``seconds`` where nothing overlaps.
    """

    split: tuple[int, int, int, int]
    gpus: int
    seconds: float
    requests_per_s: float
    batch: int
    lanes: int
    afd: bool
    paper: float
    safe: float

    @property
    def concurrency(self) -> float:
        """Requests in it."""
        return float(self.batch * self.split[1])

    @staticmethod
    def read(data: Mapping[str, Any]) -> Replica:
        """From its fields as plain data."""
        return Replica(**{**data, "split": tuple(data["split"])})


@dataclass(frozen=True)
class Details:
    """What a reader wants to know of a replica besides; see ``Point``."""

    groups: tuple[Group, ...]
    parts: Mapping[str, float]
    shares: Mapping[Provenance, float]
    placement: str = ""


Describe = Callable[[Replica, str], Details]
"""Of a replica and its role, "prefill" or "decode"."""


@dataclass(frozen=True)
class Pools:
    """Replicas of prefill and decode pools, and how near they came to the targets.

    Args:
        prefills, decodes: worth to be matched.
        reach: its TTFT is the least time of a prefill that fits memory, its TPOT the least of a
            decode; before any factor.
        evaluated: configurations whose time was computed.
    """

    prefills: tuple[Replica, ...] = ()
    decodes: tuple[Replica, ...] = ()
    reach: Reach = NOWHERE
    evaluated: int = 0

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "prefills": [vars(one) for one in self.prefills],
            "decodes": [vars(one) for one in self.decodes],
            "reach": vars(self.reach),
            "evaluated": self.evaluated,
        }

    @staticmethod
    def read(data: Mapping[str, Any]) -> Pools:
        """What ``data`` gave."""
        return Pools(
            tuple(Replica.read(one) for one in data["prefills"]),
            tuple(Replica.read(one) for one in data["decodes"]),
            Reach(**data["reach"]),
            data["evaluated"],
        )


def merged_pools(parts: Iterable[Pools]) -> Pools:
    """All of them as one."""
    parts = list(parts)
    reach = NOWHERE
    for part in parts:
        reach |= part.reach
    return Pools(
        tuple(one for part in parts for one in part.prefills),
        tuple(one for part in parts for one in part.decodes),
        reach,
        sum(part.evaluated for part in parts),
    )


def pool_sizes(gpus: int, node: int) -> list[int]:
    """GPUs of a pool's replica that are tried: all in small systems, else divisors, powers of two
    and whole nodes; the other pool needs some too."""
    if gpus <= 4 * node:
        return list(range(1, gpus))
    divisors = {size for size in range(1, gpus) if gpus % size == 0}
    powers = {1 << i for i in range(gpus.bit_length()) if 1 << i < gpus}
    return sorted(divisors | powers | set(range(node, gpus, node)))


def prefills_that_matter(question: Question, replicas: Sequence[Replica]) -> list[Replica]:
    """Of as many GPUs, the same TP and kind: the one with the highest rate, and the one with the
    highest rate that leaves time for the KV cache's way within TTFT. TTFT is no axis of the front,
    so no match needs another."""
    allowed, factor = question.targets.ttft, question.options.pd_ttft
    ways = {tp: max(kv_seconds(question, tp, other) for other in TPS) for tp in TPS}
    kept: dict[tuple[int, int, bool, bool], Replica] = {}
    for one in replicas:
        tp = one.split[0]
        for held in {False, factor * one.seconds + ways[tp] <= allowed}:
            key = (one.gpus, tp, one.afd, held)
            if key not in kept or one.requests_per_s > kept[key].requests_per_s:
                kept[key] = one
    return list({id(one): one for one in kept.values()}.values())


def decodes_that_matter(replicas: Sequence[Replica]) -> list[Replica]:
    """Of as many GPUs and the same kind: those that no other beats in both TPOT and rate."""
    kept: list[Replica] = []
    for kind in sorted({(one.gpus, one.afd) for one in replicas}):
        own = [one for one in replicas if (one.gpus, one.afd) == kind]
        speed = np.array([1.0 / one.seconds for one in own])
        rate = np.array([one.requests_per_s for one in own])
        kept += [own[i] for i in front_indices(speed, rate)]
    return kept


@dataclass(frozen=True)
class Matched:
    """Numbers of replicas for every pair of prefill and decode replica; arrays of one length.

    Args:
        prefill, decode: index of the replica.
        prefills, decodes: how many of each.
        requests_per_s: of the system.
        gpus: in use.
    """

    prefill: np.ndarray
    decode: np.ndarray
    prefills: np.ndarray
    decodes: np.ndarray
    requests_per_s: Array
    gpus: np.ndarray

    def where(self, mask: np.ndarray) -> Matched:
        """Those that are chosen."""
        return Matched(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))


def match(question: Question, prefills: Sequence[Replica], decodes: Sequence[Replica]) -> Matched:
    """All ways to fill the GPUs: for every number of prefill replicas as many decode replicas as
    there is room for, and as few as keep up with prefill."""
    gpus, options = question.gpus, question.options
    p_gpus = np.array([one.gpus for one in prefills], int)
    d_gpus = np.array([one.gpus for one in decodes], int)
    p_rate = options.prefill_rate * np.array([one.requests_per_s for one in prefills])
    d_rate = options.decode_rate * np.array([one.requests_per_s for one in decodes])
    found: list[tuple[np.ndarray, ...]] = []
    for one in range(len(prefills)):
        counts = np.arange(1, (gpus - 1) // p_gpus[one] + 1)[:, None]
        room = (gpus - counts * p_gpus[one]) // d_gpus
        enough = np.maximum(np.ceil(counts * p_rate[one] / d_rate - 1e-9), 1).astype(int)
        count, other = np.nonzero(room >= 1)
        most = room[count, other]
        least = np.minimum(enough[count, other], most)
        fewer = least < most
        found.append((np.full(len(count), one), other, count + 1, most))
        found.append((np.full(fewer.sum(), one), other[fewer], count[fewer] + 1, least[fewer]))
    p, d, n_p, n_d = (
        np.concatenate([row[column] for row in found] or [np.zeros(0, int)]) for column in range(4)
    )
    rate = np.minimum(n_p * p_rate[p], n_d * d_rate[d])
    return Matched(p, d, n_p, n_d, rate, n_p * p_gpus[p] + n_d * d_gpus[d])


def found_of(question: Question, mode: Mode, pools: Pools, describe: Describe) -> Found:
    """Best and front over all matches.

    Args:
        mode: P/D+AFD takes matches with AFD in at least one pool only.
        pools: plain ones for P/D; for P/D+AFD also AFD ones, or only these
            (``Options.pd_afd``).
        describe: gives the details of those that end up in points.
    """
    options, targets = question.options, question.targets
    prefills, decodes = list(pools.prefills), list(pools.decodes)
    reach = replace(pools.reach, ttft=pools.reach.ttft * options.pd_ttft)
    prefills = prefills_that_matter(question, prefills)
    decodes = decodes_that_matter(decodes)
    if not prefills or not decodes:
        return Found(reach=reach, evaluated=pools.evaluated)
    found = match(question, prefills, decodes)
    if mode is Mode.PD_AFD:
        p_afd = np.array([one.afd for one in prefills])
        d_afd = np.array([one.afd for one in decodes])
        found = found.where(p_afd[found.prefill] | d_afd[found.decode])
    tpots = np.array([one.seconds for one in decodes])[found.decode]
    tp_of = [np.array([one.split[0] for one in side], int) for side in (prefills, decodes)]
    ways = np.zeros((max(TPS) + 1, max(TPS) + 1))
    for one, other in product(TPS, TPS):
        ways[one, other] = kv_seconds(question, one, other)
    ttfts = np.array([ttft_of(question, one) for one in prefills])[found.prefill]
    ttfts = ttfts + ways[tp_of[0][found.prefill], tp_of[1][found.decode]]

    def make(row: int) -> Point:
        pair = prefills[found.prefill[row]], decodes[found.decode[row]]
        counts = int(found.prefills[row]), int(found.decodes[row])
        details = describe(pair[0], "prefill"), describe(pair[1], "decode")
        return system_of(question, mode, pair, details, counts, float(ttfts[row]))

    held = np.flatnonzero((ttfts <= targets.ttft) & (tpots <= targets.tpot))
    best = None
    if len(held):
        # of equals the one on fewer GPUs
        order = np.lexsort((tpots[held], found.gpus[held], -found.requests_per_s[held]))
        best = make(int(held[order[0]]))
    kept = front_indices(1.0 / tpots, found.requests_per_s / found.gpus)
    return Found(best, tuple(make(row) for row in kept), reach, pools.evaluated)


def ttft_of(question: Question, prefill: Replica) -> float:
    """Seconds to the first token: prefill with its factor for queueing and hand-over.

    Without the KV cache's way, see ``kv_seconds``.
    """
    return prefill.seconds * question.options.pd_ttft


def system_of(
    question: Question,
    mode: Mode,
    pair: tuple[Replica, Replica],
    details: tuple[Details, Details],
    counts: tuple[int, int],
    ttft: float,
) -> Point:
    """The point of matched pools.

    Args:
        pair, details, counts: of prefill and decode.
        ttft: seconds, all factors in.
    """
    options = question.options
    prefill, decode = pair
    supply = counts[0] * prefill.requests_per_s * options.prefill_rate
    drain = counts[1] * decode.requests_per_s * options.decode_rate
    groups = tuple(
        replace(group, replicas=count * group.replicas)
        for one, count in zip(details, counts, strict=True)
        for group in one.groups
    )
    return Point(
        mode=mode,
        groups=groups,
        batch=decode.batch,
        concurrency=counts[1] * decode.concurrency,
        ttft=ttft,
        tpot=decode.seconds,
        tokens_per_s=min(supply, drain) * question.shape.output,
        lanes=decode.lanes,
        tpot_paper=decode.paper,
        tpot_safe=decode.safe,
        parts=details[1].parts,
        shares=details[1].shares,
        placement=details[1].placement,
    )
