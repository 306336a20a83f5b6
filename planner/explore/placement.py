"""On which GPUs of which nodes attention and experts run, and what that does to their transfers.

Three ways, compared by the time of the exchange: A2F and F2A cross in every layer and want to stay
within an NVLink domain; the KV cache crosses once per request and may go further (arXiv
2605.28302, appendix). The same ways serve for prefill and decode GPUs, read as ``attention`` and
``ffn``. For ratios between pools see ``search``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.errors import PlannerError
from planner.explore.calibration import Calibration
from planner.explore.network import Placement, Traffic, a2f, f2a
from planner.explore.system import System
from planner.explore.transfers import Percentile

__all__ = ["Best", "Compared", "Placement", "best_placement", "paired", "placements", "segregated"]


@dataclass(frozen=True)
class Compared:
    """A placement and its times.

    Args:
        placement: of all GPUs.
        a2f, f2a: seconds of one layer's transfers.
    """

    placement: Placement
    a2f: float
    f2a: float


@dataclass(frozen=True)
class Best:
    """The placement with the least A2F + F2A; of equals the first of ``compared``.

    Args:
        placement: it.
        a2f, f2a: seconds of one layer's transfers.
        compared: all that were tried.
    """

    placement: Placement
    a2f: float
    f2a: float
    compared: tuple[Compared, ...]


def placements(system: System, attention_gpus: int, ffn_gpus: int) -> list[Placement]:
    """Paired, striped and segregated, without those that are the same as an earlier one.

    Args:
        system: whose innermost tier says what a domain is.
        attention_gpus, ffn_gpus: 1 or more each.

    Raises:
        PlannerError: no GPUs on a side.
    """
    ways = [way(system, attention_gpus, ffn_gpus) for way in (paired, striped, segregated)]
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], Placement] = {}
    for way in ways:
        seen.setdefault((way.attention, way.ffn), way)
    return list(seen.values())


def paired(system: System, attention_gpus: int, ffn_gpus: int) -> Placement:
    """Every innermost domain has both sides in the proportion of the whole, neighbours in number
    next to each other."""
    _check(attention_gpus, ffn_gpus)
    total = attention_gpus + ffn_gpus
    size = _domain(system, total)
    attention: list[int] = []
    for start in range(0, total, size):
        end = min(start + size, total)
        # floor of the exact share up to here: never more than the domain has, never one lost
        share = attention_gpus * end // total - attention_gpus * start // total
        attention.extend(range(start, start + share))
    return _filled("paired", attention, total)


def striped(system: System, attention_gpus: int, ffn_gpus: int) -> Placement:
    """GPUs are dealt to the domains like cards, attention first: rank i of a side is not in the
    domain of rank i + 1. As fast as paired for an exchange of all with all where the domains come
    out alike, but not for ranks that talk one to one."""
    _check(attention_gpus, ffn_gpus)
    total = attention_gpus + ffn_gpus
    size = _domain(system, total)
    dealt = sorted(range(total), key=lambda gpu: (gpu % size, gpu // size))
    return Placement("striped", tuple(dealt[:attention_gpus]), tuple(dealt[attention_gpus:]))


def segregated(system: System, attention_gpus: int, ffn_gpus: int) -> Placement:
    """Domains are all attention or all FFN; where the last one of attention is not full, its rest
    stays free for others."""
    _check(attention_gpus, ffn_gpus)
    size = _domain(system, attention_gpus + ffn_gpus)
    first = -(-attention_gpus // size) * size
    return Placement(
        "segregated", tuple(range(attention_gpus)), tuple(range(first, first + ffn_gpus))
    )


def best_placement(
    system: System,
    attention_gpus: int,
    ffn_gpus: int,
    tokens: float,
    traffic: Traffic,
    *,
    ffn_tp: int = 1,
    ffn_system: System | None = None,
    percentile: Percentile = "p50",
    calibration: Calibration | None = None,
) -> Best:
    """The placement whose two transfers per layer take least, and what the others take.

    Args:
        system: of attention; with ``ffn_system`` there is one placement, sides apart.
        attention_gpus, ffn_gpus: 1 or more each.
        tokens: of one attention GPU.
        traffic, ffn_tp, percentile, calibration: see ``network.a2f``.

    Raises:
        PlannerError: as ``network.a2f``.
    """
    apart = ffn_system is not None and ffn_system != system
    tried = [segregated(system, attention_gpus, ffn_gpus)]
    if not apart:
        tried = placements(system, attention_gpus, ffn_gpus)
    compared = []
    for placement in tried:
        there, back = (
            float(
                transfer(
                    system, placement, tokens, traffic, ffn_tp=ffn_tp, ffn_system=ffn_system,
                    percentile=percentile, calibration=calibration,
                )
            )
            for transfer in (a2f, f2a)
        )  # fmt: skip
        compared.append(Compared(placement, there, back))
    best = min(compared, key=lambda one: one.a2f + one.f2a)
    return Best(best.placement, best.a2f, best.f2a, tuple(compared))


def domains_used(system: System, gpus: Sequence[int]) -> int:
    """Innermost domains that these GPUs are in."""
    size = system.tiers[0].gpus
    return len(np.unique([0 if size is None else gpu // size for gpu in gpus]))


def _filled(name: str, attention: list[int], total: int) -> Placement:
    taken = set(attention)
    rest = tuple(gpu for gpu in range(total) if gpu not in taken)
    return Placement(name, tuple(attention), rest)


def _domain(system: System, total: int) -> int:
    return system.tiers[0].gpus or total


def _check(attention_gpus: int, ffn_gpus: int) -> None:
    if attention_gpus < 1 or ffn_gpus < 1:
        raise PlannerError(
            f"{attention_gpus} attention and {ffn_gpus} FFN GPUs, expected 1 or more each"
        )
