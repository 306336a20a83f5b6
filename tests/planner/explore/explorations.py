"""Explorations by hand, for tests of what is said about them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planner.explore.kernels.base import Provenance
from planner.explore.model import read_model
from planner.explore.points import SHAPES, Group, Mode, Point
from planner.explore.question import Exploration, Options, Question, Refusal
from planner.explore.system import find_system

GIB = 2.0**30
MEASURED = {Provenance.MEASURED: 0.9, Provenance.INTERPOLATED: 0.1}


def group(role: str, gpus: int, replicas: int = 1, **given: Any) -> Group:
    """One part: data-parallel attention, expert-parallel FFN."""
    experts = "ffn" in role
    facts: dict[str, Any] = {
        "tp": 1,
        "dp": 1 if experts else gpus,
        "moe_tp": 1,
        "ep": gpus if experts else 1,
        "memory": 90 * GIB,
        "room": 162 * GIB,
    }
    return Group(role, replicas, gpus=gpus, **{**facts, **given})


GROUPS = {
    Mode.AGGREGATED: (group("worker", 32, 4, ep=32),),
    Mode.PD: (group("prefill", 4, 16, ep=4), group("decode", 16, 4, ep=16)),
    Mode.AFD: (group("attention", 16), group("ffn", 112)),
    Mode.PD_AFD: (
        group("prefill", 8, 8, ep=8),
        group("decode attention", 8),
        group("decode ffn", 56),
    ),
}


def point(mode: Mode, tokens_per_s: float, **given: Any) -> Point:
    """A configuration of 128 GPUs that holds chat's targets, but for what is given."""
    afd = mode in (Mode.AFD, Mode.PD_AFD)
    facts: dict[str, Any] = {
        "groups": GROUPS[mode],
        "batch": 64,
        "concurrency": 1024.0,
        "ttft": 0.040,
        "tpot": 0.010,
        "lanes": 3 if afd else 1,
        "parts": {"attention": 0.002, "a2f": 0.001, "ffn": 0.006, "f2a": 0.001}
        if afd
        else {"attention": 0.004, "experts": 0.003, "exchange": 0.003},
        "shares": MEASURED,
    }
    facts = {**facts, **given}
    facts = {"tpot_paper": facts["tpot"], "tpot_safe": facts["tpot"]} | facts
    return Point(mode=mode, tokens_per_s=tokens_per_s, **facts)


def refusal(limit: str = "ttft", needed: float = 0.093, allowed: float = 0.050) -> Refusal:
    """That TTFT cannot be held, or what is given."""
    text = f"{limit}: {needed:g} at best, {allowed:g} allowed"
    return Refusal(limit, needed, allowed, text)


def exploration(
    best: Mapping[Mode, Point | Refusal],
    workload: str = "chat",
    options: Options | None = None,
    **given: Any,
) -> Exploration:
    """An answer about DeepSeek-V3.2 on 128 B200 with these bests and refusals; each best has two
    neighbours on the front, one of which misses TPOT."""
    shape, targets = SHAPES[workload]
    question = Question(
        read_model("deepseek-ai/DeepSeek-V3.2"),
        find_system("b200_sxm"),
        128,
        shape,
        targets,
        modes=tuple(best),
        options=options or Options(),
    )
    points = {mode: one for mode, one in best.items() if isinstance(one, Point)}
    facts: dict[str, Any] = {
        "best": {mode: points.get(mode) for mode in best},
        "frontier": {mode: _front(one) for mode, one in points.items()},
        "refusals": {mode: one for mode, one in best.items() if isinstance(one, Refusal)},
        "evaluated": 12_345,
        "seconds": 6.7,
        "source": "by hand",
    }
    return Exploration(question, **{**facts, **given})


def _front(best: Point) -> tuple[Point, ...]:
    slow = replace(best, tpot=best.tpot * 3, tokens_per_s=best.tokens_per_s * 2)
    fast = replace(best, tpot=best.tpot * 0.7, tokens_per_s=best.tokens_per_s * 0.6)
    return (slow, best, fast)


AFD_WINS = {
    Mode.AGGREGATED: refusal(),
    Mode.PD: refusal("tpot", 0.0182, 0.015),
    Mode.AFD: point(Mode.AFD, 3970.0),
    Mode.PD_AFD: point(Mode.PD_AFD, 763.0),
}
"""Figure 2 of arXiv 2605.28302, chat; times are made up."""

NOTHING = {
    Mode.AGGREGATED: refusal(),
    Mode.AFD: refusal("ttft", 0.055),
    Mode.PD: Refusal("kernels", math.nan, math.nan, "nothing measured for EP 7"),
}
