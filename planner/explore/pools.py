"""Prefill and decode pools, and how many replicas of each a system should have.

A pool's replica is known by its GPUs, its time and its requests per second; whether attention and
experts are apart inside doesn't matter here. Rates are matched as in aiconfigurator 0.12 and
arXiv 2605.28302: requests/s = min(0.9 prefill, 0.92 decode), both factors visible in ``Options``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from planner.explore.found import Found, Reach
from planner.explore.kernels.base import Array, Provenance
from planner.explore.pareto import front_indices
from planner.explore.points import Group, Mode, Point
from planner.explore.question import Question


@dataclass(frozen=True)
class Replica:
    """One replica of a prefill or a decode pool, evaluated.

    Args:
        groups: its GPUs.
        seconds: prefill: of a batch of prompts; decode: TPOT.
        requests_per_s: that it brings through, alone.
        batch, lanes: of an attention rank.
        concurrency: requests in decode; 0 for prefill.
        afd: attention and experts are apart.
        safe: decode: TPOT by the safe bound.
        parts, shares, placement: see ``Point``.
    """

    groups: tuple[Group, ...]
    seconds: float
    requests_per_s: float
    batch: int
    lanes: int = 1
    concurrency: float = 0.0
    afd: bool = True
    safe: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    shares: Mapping[Provenance, float] = field(default_factory=dict)
    placement: str = ""

    @property
    def gpus(self) -> int:
        return sum(group.replicas * group.gpus for group in self.groups)

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"shares": {k.value: v for k, v in self.shares.items()}}

    @staticmethod
    def read(data: Mapping[str, Any]) -> Replica:
        """What ``data`` gave."""
        changed = {
            "groups": tuple(Group(**group) for group in data["groups"]),
            "shares": {Provenance(key): value for key, value in data["shares"].items()},
        }
        return Replica(**{**data, **changed})


def pool_sizes(gpus: int, node: int) -> list[int]:
    """GPUs of a pool's replica that are tried: all in small systems, else divisors, powers of two
    and whole nodes; the other pool needs some too."""
    if gpus <= 4 * node:
        return list(range(1, gpus))
    divisors = {size for size in range(1, gpus) if gpus % size == 0}
    powers = {1 << i for i in range(gpus.bit_length()) if 1 << i < gpus}
    return sorted(divisors | powers | set(range(node, gpus, node)))


def prefills_that_matter(replicas: Sequence[Replica], most_seconds: float) -> list[Replica]:
    """Of as many GPUs and the same kind: the one with the highest rate, and the one with the
    highest rate within a time. TTFT is no axis of the front, so no match needs another."""
    kept: dict[tuple[int, bool, bool], Replica] = {}
    for one in replicas:
        for held in {False, one.seconds <= most_seconds}:
            key = (one.gpus, one.afd, held)
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
    found = []
    for p in range(len(prefills)):
        counts = np.arange(1, (gpus - 1) // p_gpus[p] + 1)[:, None]
        room = (gpus - counts * p_gpus[p]) // d_gpus
        enough = np.maximum(np.ceil(counts * p_rate[p] / d_rate - 1e-9), 1).astype(int)
        n, d = np.nonzero(room >= 1)
        many = room[n, d]
        fewer = np.minimum(enough[n, d], many)
        tight = fewer < many
        found.append((np.full(len(n), p), d, n + 1, many))
        found.append((np.full(tight.sum(), p), d[tight], n[tight] + 1, fewer[tight]))
    if not found:
        found.append(tuple(np.zeros((4, 0), int)))
    p, d, n_p, n_d = (np.concatenate(column) for column in zip(*found, strict=True))
    rate = np.minimum(n_p * p_rate[p], n_d * d_rate[d]) if len(p) else np.zeros(0)
    return Matched(p, d, n_p, n_d, rate, n_p * p_gpus[p] + n_d * d_gpus[d])


def found_of(
    question: Question,
    mode: Mode,
    prefills: Sequence[Replica],
    decodes: Sequence[Replica],
    reach: Reach = Reach(),
    evaluated: int = 0,
) -> Found:
    """Best and front over all matches of two lists of replicas.

    Args:
        mode: PD_AFD takes matches with AFD in at least one pool only.
        reach, evaluated: of the replicas; its TTFT is prefill's time, before any factor.
    """
    targets = question.targets
    prefills = prefills_that_matter(prefills, targets.ttft / question.options.pd_ttft)
    decodes = decodes_that_matter(decodes)
    reach = replace(reach, ttft=reach.ttft * question.options.pd_ttft)
    if not prefills or not decodes:
        return Found(reach=reach, evaluated=evaluated)
    found = match(question, prefills, decodes)
    if mode is Mode.PD_AFD:
        p_afd = np.array([one.afd for one in prefills])
        d_afd = np.array([one.afd for one in decodes])
        found = found.where(p_afd[found.prefill] | d_afd[found.decode])
    tpots = np.array([one.seconds for one in decodes])[found.decode]
    ttfts = np.array([ttft_of(question, one) for one in prefills])[found.prefill]

    def make(row: int) -> Point:
        pair = prefills[found.prefill[row]], decodes[found.decode[row]]
        counts = int(found.prefills[row]), int(found.decodes[row])
        return system_of(question, mode, *pair, counts, float(ttfts[row]))

    held = np.flatnonzero((ttfts <= targets.ttft) & (tpots <= targets.tpot))
    best = None
    if len(held):
        # of equals the one on fewer GPUs
        order = np.lexsort((tpots[held], found.gpus[held], -found.requests_per_s[held]))
        best = make(int(held[order[0]]))
    kept = front_indices(1.0 / tpots, found.requests_per_s / found.gpus)
    return Found(best, tuple(make(row) for row in kept), reach, evaluated)


def ttft_of(question: Question, prefill: Replica) -> float:
    """Seconds to the first token: prefill with its factor for queueing and hand-over."""
    return prefill.seconds * question.options.pd_ttft


def system_of(
    question: Question,
    mode: Mode,
    prefill: Replica,
    decode: Replica,
    counts: tuple[int, int],
    ttft: float,
) -> Point:
    """The point of matched pools.

    Args:
        counts: replicas of prefill and decode.
        ttft: seconds, all factors in.
    """
    options = question.options
    supply = counts[0] * prefill.requests_per_s * options.prefill_rate
    drain = counts[1] * decode.requests_per_s * options.decode_rate
    requests = min(supply, drain)
    groups = tuple(
        replace(group, replicas=count * group.replicas)
        for one, count in zip((prefill, decode), counts, strict=True)
        for group in one.groups
    )
    return Point(
        mode=mode,
        groups=groups,
        batch=decode.batch,
        concurrency=counts[1] * decode.concurrency,
        ttft=ttft,
        tpot=decode.seconds,
        tokens_per_s=requests * question.shape.output,
        lanes=decode.lanes,
        tpot_safe=decode.safe or decode.seconds,
        parts=decode.parts,
        shares=decode.shares,
        placement=decode.placement,
    )


