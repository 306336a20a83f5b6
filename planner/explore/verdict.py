"""What an exploration says, in a sentence or two: which level pays, by how much, why, how surely.

Words only: every number is read from the exploration. Confidence is a rule that can be read here,
not a probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from planner.explore.kernels.base import Provenance
from planner.explore.points import Mode, Point, Targets
from planner.explore.question import Exploration, Refusal

Confidence = Literal["high", "medium", "low"]
NAMES: dict[Mode, str] = {
    Mode.AGGREGATED: "aggregation",
    Mode.PD: "P/D",
    Mode.AFD: "AFD",
    Mode.PD_AFD: "P/D with AFD",
}
"""Of the levels, in sentences and tables."""
DOUBT = 0.15
"""A lead below this says little: models like this one are off by as much."""
TRUSTED = frozenset({Provenance.MEASURED, Provenance.INTERPOLATED})
MOST_TRUSTED, LEAST_TRUSTED = 0.8, 0.5
"""Share of time that rests on measurements: high confidence takes the first, below the second it is
low."""
NEAR = 0.97
"""Share of a target from which on it counts as what limits."""


@dataclass(frozen=True)
class Verdict:
    """Which level of disaggregation pays.

    Args:
        winner: the level that serves most within the targets; None where none does.
        pays: whether disaggregation does: the winner is no aggregation.
        lead: of the winner over the second best, as a share of the second; inf where no other
            level holds the targets, nan without a winner.
        second: best of the others that hold the targets; None where there is none.
        confidence: see ``doubts``.
        doubts: what speaks against confidence, for people.
        text: all of it in a few sentences.
    """

    winner: Mode | None
    pays: bool
    lead: float
    second: Mode | None
    confidence: Confidence
    doubts: tuple[str, ...]
    text: str


def judge(found: Exploration, flips: Sequence[str] | None = None) -> Verdict:
    """The verdict.

    Args:
        found: any exploration, of one mode too.
        flips: changes of inputs under which another level wins, for people ("network 10 %
            slower"); empty: none of those tried; None: none was tried.
    """
    held = sorted(
        (point for point in found.best.values() if point is not None),
        key=lambda point: -point.tokens_per_s,
    )
    if not held:
        return _nothing(found)
    best = held[0]
    second = held[1] if len(held) > 1 else None
    lead = best.tokens_per_s / second.tokens_per_s - 1.0 if second else math.inf
    confidence, doubts = _confidence(found, best, lead, flips)
    sentences = [_headline(found, best, second, lead), *_reasons(found, best)]
    sentences.append(_surely(confidence, doubts))
    return Verdict(
        best.mode,
        best.mode is not Mode.AGGREGATED,
        lead,
        second.mode if second else None,
        confidence,
        doubts,
        " ".join(sentences),
    )


def counts(point: Point) -> str:
    """GPUs by what they do: ``16A+112F``, ``2x(8A+56F)``, ``4x32``, ``6x4P+5x16D``."""
    groups = point.groups
    replicas = {group.replicas for group in groups}
    if len(groups) == 1:
        return f"{groups[0].replicas}x{groups[0].gpus}"
    times = groups[0].replicas if len(replicas) == 1 else 0
    parts = []
    for group in groups:
        own = f"{group.replicas}x" if not times and group.replicas > 1 else ""
        letters = "".join(word[0].upper() for word in group.role.split())
        parts.append(f"{own}{group.gpus}{letters}")
    joined = "+".join(parts)
    return f"{times}x({joined})" if times > 1 else joined


def limit(point: Point, targets: Targets) -> str:
    """What keeps a configuration from serving more: a target that it is close to, else the stage
    that takes longest."""
    near = [
        f"{name} ({seconds(got)} of {seconds(allowed)})"
        for name, got, allowed in (
            ("TTFT", point.ttft, targets.ttft),
            ("TPOT", point.tpot, targets.tpot),
        )
        if math.isfinite(allowed) and got >= NEAR * allowed
    ]
    total = sum(point.parts.values())
    if total > 0:
        stage = max(point.parts, key=lambda name: point.parts[name])
        near.append(f"{_stage(stage)}, {point.parts[stage] / total:.0%} of its stages' time")
    return " and ".join(near)


def seconds(value: float) -> str:
    """``15.2 ms``, ``1.20 s``."""
    if math.isinf(value):
        return "any"
    return f"{1e3 * value:.4g} ms" if abs(value) < 1 else f"{value:.3g} s"


def trusted(point: Point) -> float:
    """Share of a point's time that was measured, or lies between measurements."""
    return sum(share for source, share in point.shares.items() if source in TRUSTED)


def _headline(found: Exploration, best: Point, second: Point | None, lead: float) -> str:
    rate = f"{best.tokens_per_s:,.0f} tokens/s on {best.gpus} GPUs ({counts(best)})"
    name = NAMES[best.mode]
    if len(found.best) == 1:
        return f"{_first(name)}, the one level asked for, holds the targets: {rate}."
    if best.mode is Mode.AGGREGATED:
        return f"Disaggregation does not pay: {name} serves most, {rate}{_over(second, lead)}."
    if Mode.AGGREGATED not in found.best:
        return f"{_first(name)} serves most of the levels asked for, {rate}{_over(second, lead)}."
    tied = "hardly pays" if lead < DOUBT else "pays"
    return f"{_first(name)} {tied}: {rate}{_over(second, lead)}."


def _over(second: Point | None, lead: float) -> str:
    if second is None:
        return ", the only level that holds the targets"
    much = f"{lead:.0%} more than" if lead < 1 else f"{1 + lead:.1f} times"
    return f", {much} {NAMES[second.mode]} ({second.tokens_per_s:,.0f})"


def _reasons(found: Exploration, best: Point) -> list[str]:
    """Why it is not one of the others: what limits each, those that hold the targets first."""
    targets = found.question.targets
    texts = []
    for mode in found.question.modes:
        point = found.best.get(mode)
        if mode is best.mode or point is None:
            continue
        why = limit(point, targets)
        texts.append(f"{NAMES[mode]} is limited by {why}" if why else "")
    texts += [
        f"{NAMES[mode]} is out by {_refused(found.refusals[mode])}"
        for mode in found.question.modes
        if mode in found.refusals and mode is not best.mode
    ]
    said = [text for text in texts if text]
    return [f"{_first('; '.join(said))}."] if said else []


def _refused(refusal: Refusal) -> str:
    """``ttft (93 ms at best, 50 ms allowed)``."""
    name = {"ttft": "TTFT", "tpot": "TPOT", "ttft and tpot": "TTFT and TPOT together"}.get(
        refusal.limit, refusal.limit
    )
    if not (math.isfinite(refusal.needed) and math.isfinite(refusal.allowed)):
        return name
    if refusal.limit == "memory":
        gib = (refusal.needed / 2**30, refusal.allowed / 2**30)
        return f"{name} ({gib[0]:,.0f} GiB a GPU needed, {gib[1]:,.0f} there)"
    if refusal.limit == "gpus":
        return f"{name} ({refusal.needed:,.0f} needed, {refusal.allowed:,.0f} there)"
    return f"{name} ({seconds(refusal.needed)} at best, {seconds(refusal.allowed)} allowed)"


def _confidence(
    found: Exploration, best: Point, lead: float, flips: Sequence[str] | None
) -> tuple[Confidence, tuple[str, ...]]:
    """High: nothing to say against it. Low: one grave doubt, or three of the others."""
    targets = found.question.targets
    grave: list[str] = []
    light: list[str] = []
    share = min(trusted(point) for point in found.best.values() if point is not None)
    if share < MOST_TRUSTED:
        text = f"{share:.0%} of the time rests on measurements"
        (grave if share < LEAST_TRUSTED else light).append(text)
    if lead < DOUBT:
        light.append(f"a lead below {DOUBT:.0%} is within what the model is off by")
    if best.tpot_safe > targets.tpot:
        grave.append(
            f"by the safe bound of the overlap TPOT is {seconds(best.tpot_safe)}, above the target"
        )
    elif best.tpot_safe > best.tpot * (1.0 + DOUBT):
        light.append(
            f"by the safe bound of the overlap TPOT is {best.tpot_safe / best.tpot - 1:.0%} longer"
        )
    light += _only_unmeasured(found)
    if flips:
        grave.append(f"another level wins with {_listed(flips)}")
    elif flips is None and not math.isinf(lead) and lead < 2 * DOUBT:
        light.append("whether another level wins with other inputs was not looked at")
    doubts = (*grave, *light)
    if grave or len(light) > 2:
        return "low", doubts
    return ("medium", doubts) if light else ("high", doubts)


def _only_unmeasured(found: Exploration) -> list[str]:
    """A level that is out for want of measurements may be the better one."""
    names = [NAMES[mode] for mode, one in found.refusals.items() if one.limit == "kernels"]
    return [f"nothing is measured for {_listed(names)}"] if names else []


def _nothing(found: Exploration) -> Verdict:
    targets, asked = found.question.targets, found.question.modes
    what = "No level holds" if len(asked) > 1 else f"{_first(NAMES[asked[0]])} does not hold"
    reasons = [
        f"{NAMES[mode]}: {_refused(found.refusals[mode])}"
        for mode in asked
        if mode in found.refusals
    ]
    near = _nearest(found)
    text = (
        f"{what} TTFT {seconds(targets.ttft)} and TPOT {seconds(targets.tpot)} on "
        f"{found.question.gpus} GPUs. {_first('; '.join(reasons))}."
    )
    if near:
        text += f" {near}"
    doubts = tuple(_only_unmeasured(found))
    return Verdict(None, False, math.nan, None, "low" if doubts else "medium", doubts, text)


def _nearest(found: Exploration) -> str:
    """The level that misses least, by the ratio of what it reaches to what is allowed."""
    misses = {
        mode: refusal.needed / refusal.allowed
        for mode, refusal in found.refusals.items()
        if refusal.allowed > 0 and math.isfinite(refusal.needed) and refusal.limit != "gpus"
    }
    misses = {mode: ratio for mode, ratio in misses.items() if ratio > 1}
    if len(misses) < 2:
        return ""
    mode = min(misses, key=lambda one: misses[one])
    return f"Nearest is {NAMES[mode]}, over by {misses[mode] - 1:.0%}."


def _surely(confidence: Confidence, doubts: Sequence[str]) -> str:
    return f"Confidence: {confidence}" + (f" ({'; '.join(doubts)})." if doubts else ".")


def _stage(name: str) -> str:
    """A part's name as people say it."""
    return {"a2f": "dispatch (A2F)", "f2a": "combine (F2A)", "ffn": "FFN"}.get(name, name)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _first(text: str) -> str:
    """With a capital first letter."""
    return text[:1].upper() + text[1:]
