"""How ``afflux plan`` shows what it found: the verdict, tables, and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from afflux.planning import number, percent, print_rows, say

if TYPE_CHECKING:
    from rich.console import Console

    from planner.explore.points import Mode, Point
    from planner.explore.question import Exploration, Question
    from planner.explore.verdict import Verdict
    from planner.explore.winner_sensitivity import Moved


@dataclass(frozen=True)
class Answered:
    """One question with its answer.

    Args:
        name: what is different about it, "" where there is but one.
    """

    name: str
    found: Exploration
    verdict: Verdict


def show(console: Console, answers: Sequence[Answered]) -> None:
    """The first answer in full; the others beside it."""
    first = answers[0]
    print_question(console, first.found.question, first.found.source)
    say(
        console,
        f"{'search':<10}{first.found.evaluated:,} configurations in {first.found.seconds:.1f} s",
    )
    console.print()
    say(console, first.verdict.text)
    if any(first.found.best.values()):
        _best(console, first.found)
        _groups(console, first.found)
    _refused(console, first.found)
    if len(answers) > 1:
        _beside(console, answers)


def print_question(console: Console, question: Question, source: str) -> None:
    """What the answer rests on."""
    from planner.explore.verdict import seconds

    model, shape, options = question.model, question.shape, question.options
    targets = question.targets
    gpus = f"{question.gpus} x {question.system.gpu.name} ({question.system.name})"
    if question.ffn_system is not None:
        gpus += f", FFN on {question.ffn_system.gpu.name} ({question.ffn_system.name})"
    tiers = ", ".join(
        f"{tier.name} {tier.bandwidth / 1e9:g} GB/s {1e6 * tier.latency:g} us"
        for tier in question.system.tiers
    )
    lines = [
        (
            "model",
            f"{model.name}: {model.layers} layers, {model.experts} experts, top {model.top_k}, "
            f"{model.attention.kind.upper()}",
        ),
        ("GPUs", gpus),
        ("network", f"{tiers}, {options.percentile.upper()}"),
        (
            "workload",
            f"{shape.name}: {shape.prefix:,} tokens cached, {shape.prompt:,} of prompt, "
            f"{shape.output:,} of output",
        ),
        ("targets", f"TTFT {seconds(targets.ttft)}, TPOT {seconds(targets.tpot)}"),
        (
            "inputs",
            f"overlap {options.overlap}, fan-out {options.fan}, router on "
            f"{options.sides.router.value}, shared experts on {options.sides.shared.value}; P/D "
            f"keeps {options.prefill_rate:g} / {options.decode_rate:g} of its rates, TTFT x"
            f"{options.pd_ttft:g}",
        ),
        ("kernels", source),
    ]
    for name, text in lines:
        say(console, f"{name:<10}{text}")


def _best(console: Console, found: Exploration) -> None:
    from planner.explore.verdict import NAMES, counts

    rows, winner = [], found.winner
    order = _held(found)
    for mode, point in order:
        rows.append(
            (
                NAMES[mode],
                counts(point),
                number(point.batch),
                str(point.lanes) if point.lanes > 1 else "-",
                _ms(point.ttft),
                _ms(point.tpot),
                number(point.tokens_per_s),
                number(point.tokens_per_s_gpu),
                number(point.tokens_per_s_user),
            )
        )
    columns = (
        "level",
        "GPUs",
        "batch",
        "lanes",
        "TTFT,\nms",
        "TPOT,\nms",
        "tokens\n/s",
        "per\nGPU",
        "per\nuser",
    )
    bold = [mode for mode, _ in order].index(winner) if winner is not None else None
    print_rows(
        console,
        "Best of each level within the targets",
        columns,
        rows,
        bold=bold,
        left=("GPUs",),
    )
    for mode, point in order:
        if not math.isclose(point.tpot_safe, point.tpot_paper, rel_tol=1e-3):
            say(
                console,
                f"{NAMES[mode]}: TPOT is {_ms(point.tpot_paper)} ms by the paper's formula of the "
                f"overlap, {_ms(point.tpot_safe)} ms by the safe bound",
            )


def _groups(console: Console, found: Exploration) -> None:
    from planner.explore.verdict import NAMES

    rows = []
    for mode, point in _held(found):
        for index, group in enumerate(point.groups):
            rows.append(
                (
                    NAMES[mode] if index == 0 else "",
                    group.role,
                    f"{group.replicas} x {group.gpus}",
                    *(str(each) for each in (group.tp, group.dp, group.moe_tp, group.ep)),
                    f"{_gib(group.memory)} / {_gib(group.room)}",
                )
            )
    columns = ("level", "part", "GPUs", "TP", "DP", "MoE\nTP", "EP", "GiB used\n/ there")
    print_rows(console, "What the GPUs do", columns, rows, left=("part",))
    for mode, point in _held(found):
        say(console, f"{NAMES[mode]}: times {provenance(point)}{_placed(point)}")


def _placed(point: Point) -> str:
    return f"; placed {point.placement}" if point.placement else ""


def _refused(console: Console, found: Exploration) -> None:
    from planner.explore.verdict import NAMES

    if not found.refusals:
        return
    rows = [
        (NAMES[mode], refusal.text.removeprefix(f"{mode.value}: "))
        for mode, refusal in found.refusals.items()
    ]
    console.print()
    console.print("Levels that do not hold the targets", style="bold", highlight=False)
    for name, text in rows:
        say(console, f"{name:<14}{text}")


def _beside(console: Console, answers: Sequence[Answered]) -> None:
    from planner.explore.verdict import NAMES

    modes = list(dict.fromkeys(mode for one in answers for mode in one.found.question.modes))
    rows = [
        (
            one.name,
            *(_rate(one.found, mode) for mode in modes),
            NAMES[one.verdict.winner] if one.verdict.winner else "none",
            "-" if not math.isfinite(one.verdict.lead) else percent(one.verdict.lead),
        )
        for one in answers
    ]
    columns = ("question", *(NAMES[mode].replace(" ", "\n", 1) for mode in modes), "best", "lead")
    print_rows(console, "Side by side, tokens/s within the targets", columns, rows, left=("best",))
    for one in answers[1:]:
        console.print()
        say(console, f"{one.name}: {one.verdict.text}")


def _rate(found: Exploration, mode: Mode) -> str:
    point = found.best.get(mode)
    if point is not None:
        return number(point.tokens_per_s)
    return f"no: {found.refusals[mode].limit}" if mode in found.refusals else "-"


def _held(found: Exploration) -> list[tuple[Mode, Point]]:
    """Levels with a best, in the order asked for."""
    held = ((mode, found.best.get(mode)) for mode in found.question.modes)
    return [(mode, point) for mode, point in held if point is not None]


def provenance(point: Point) -> str:
    """``82 % measured, 18 % interpolated``"""
    known = sorted(point.shares.items(), key=lambda pair: -pair[1])
    parts = [f"{100 * share:.0f} % {key.value}" for key, share in known if share >= 0.005]
    return ", ".join(parts) or "of unknown sources"


def _ms(value: float) -> str:
    return number(1e3 * value)


def _gib(value: float) -> str:
    return f"{value / 2**30:.0f}"


def summary(answers: Sequence[Answered]) -> dict[str, Any]:
    """The flat figures of the JSON, of the first question."""
    found, verdict = answers[0].found, answers[0].verdict
    question = found.question
    figures: dict[str, Any] = {
        "model": question.model.name,
        "system": question.system.name,
        "gpus": question.gpus,
        "workload": question.shape.name,
        "ttft": question.targets.ttft,
        "tpot": question.targets.tpot,
        "verdict": verdict.text,
        "winner": verdict.winner.value if verdict.winner else None,
        "disaggregation_pays": verdict.pays,
        "lead": verdict.lead,
        "confidence": verdict.confidence,
        "evaluated": found.evaluated,
        "seconds": found.seconds,
        "kernels": found.source,
    }
    for mode in question.modes:
        point = found.best.get(mode)
        name = mode.value.replace("+", "_")
        figures[f"{name}_tokens_per_s"] = None if point is None else point.tokens_per_s
        figures[f"{name}_refused"] = found.refusals[mode].limit if mode in found.refusals else None
    return figures


def details(
    answers: Sequence[Answered], sensitivity: Sequence[Moved] | None = None
) -> dict[str, Any]:
    """All the rest of the JSON: every answer whole."""
    return {
        "answers": [_answer(one) for one in answers],
        "sensitivity": None if sensitivity is None else [asdict(one) for one in sensitivity],
    }


def _answer(one: Answered) -> dict[str, Any]:
    found, question = one.found, one.found.question
    return {
        "name": one.name,
        "verdict": asdict(one.verdict),
        "question": {
            "model": _without_config(question),
            "system": asdict(question.system),
            "ffn_system": None if question.ffn_system is None else asdict(question.ffn_system),
            "gpus": question.gpus,
            "shape": asdict(question.shape),
            "targets": asdict(question.targets),
            "modes": [mode.value for mode in question.modes],
            "options": asdict(question.options),
        },
        "source": found.source,
        "evaluated": found.evaluated,
        "seconds": found.seconds,
        "best": {
            mode.value: None if point is None else point_data(point)
            for mode, point in found.best.items()
        },
        "frontier": {
            mode.value: [point_data(point) for point in points]
            for mode, points in found.frontier.items()
        },
        "refusals": {mode.value: asdict(refusal) for mode, refusal in found.refusals.items()},
    }


def point_data(point: Point) -> dict[str, Any]:
    """A configuration as plain data, with what follows from it."""
    from planner.explore.verdict import counts

    return {
        **asdict(point),
        "gpus": point.gpus,
        "counts": counts(point),
        "tokens_per_s_gpu": point.tokens_per_s_gpu,
        "tokens_per_s_user": point.tokens_per_s_user,
    }


def _without_config(question: Question) -> Mapping[str, Any]:
    data = asdict(question.model)
    data.pop("config")
    return data


def show_sensitivity(console: Console, effects: Sequence[Moved]) -> None:
    """Who wins when an input is another."""
    from planner.explore.verdict import NAMES

    rows = [
        (
            moved_text(one),
            NAMES[one.winner] if one.winner else "none",
            number(one.tokens_per_s) if one.winner else "-",
            f"{100 * one.change:+.1f} %" if math.isfinite(one.change) else "-",
            "another" if one.flips else "the same",
        )
        for one in effects
    ]
    columns = ("input", "best", "tokens/s", "change", "winner")
    print_rows(console, "If an input is another", columns, rows, left=("best", "winner"))


def flips(effects: Sequence[Moved]) -> list[str]:
    """Changes of inputs under which another level wins, for ``verdict.judge``."""
    return [moved_text(one) for one in effects if one.flips]


def moved_text(moved: Moved) -> str:
    """``network x0.8``; a convention has no factor."""
    return moved.input if math.isnan(moved.factor) else f"{moved.input} x{moved.factor:g}"
