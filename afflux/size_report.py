"""How ``afflux size`` shows what it found: tables, JSON, and the lines of the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from afflux.planning import IDLE, many, number, one, percent, print_rows, say

if TYPE_CHECKING:
    from rich.console import Console

    from planner.budget import Plan, PrefillFront
    from planner.plots import Best, RatioLine
    from planner.points import Form, Point
    from planner.records import Result
    from planner.sensitivity import Effect, NaiveCost
    from planner.sizing import Optimum, Setting, Sizing
    from planner.workload import Workload

V1, MEAN_FIELD, BARRIER, PAPER = "v1", "mean field", "barrier", "barrier, paper"


@dataclass(frozen=True)
class Answer:
    """Everything that one ``afflux size`` found.

    Attributes:
        sizing: with the lanes' round trip as a bound on the step.
        ideal: without it, as in the papers.
        form: v1, mean-field or barrier: what ``chosen`` was chosen by.
        chosen: whole numbers of workers, judged by the barrier-aware form with the round trip.
        kept: r* that ``effects`` are about.
        separate: whole deployments of the best size in the budget, their GPUs and throughput; None
            without a budget, or where fewer than two fit.
        simulated: at some numbers of attention workers, ascending; empty without ``--simulate``.
    """

    workload: Workload
    sizing: Sizing
    ideal: Sizing
    ffn: int
    form: str
    chosen: Point
    kept: float
    effects: Sequence[Effect]
    naive: NaiveCost
    plan: Plan | None = None
    separate: tuple[int, int, float] | None = None
    front: PrefillFront | None = None
    simulated: Sequence[Result] = field(default_factory=tuple)

    @property
    def setting(self) -> Setting:
        """What was given."""
        return self.sizing.setting

    @property
    def unit(self) -> str:
        """Of every time."""
        return self.setting.latencies.unit

    @property
    def loss(self) -> float:
        """Share of the best whole choice's throughput per price that the chosen one loses."""
        return max(0.0, 1.0 - self.chosen.per_cost / self.sizing.whole.per_cost)


def choose(sizing: Sizing, ideal: Sizing, form: str, ffn: int) -> Point:
    """Whole numbers of workers nearest to the r* of a form; barrier aware: the best ones.

    Raises:
        PlannerError: v1 without linear latencies.
    """
    from planner.errors import PlannerError
    from planner.points import point, points

    if form == "barrier":
        return sizing.whole
    if form == "v1":
        if sizing.v1 is None:
            raise PlannerError(
                "--form v1 needs linear latencies (a, b per stage); take mean-field or barrier"
            )
        return point(sizing.setting, max(1, round(sizing.v1.ratio * ffn)), ffn)
    real = ideal.mean_field.ratio * ffn
    near = np.array([max(1, np.floor(real)), max(1, np.ceil(real))])
    better = int(np.argmax(points(ideal.setting, near, ffn, "mean-field").per_cost))
    return point(sizing.setting, float(near[better]), ffn)


def show(console: Console, answer: Answer) -> None:
    """All tables."""
    _forms(console, answer)
    _whole(console, answer)
    if answer.simulated:
        _simulated(console, answer)
    if answer.plan is not None:
        _plan(console, answer, answer.plan)
    _effects(console, answer)


def _forms(console: Console, answer: Answer) -> None:
    setting, sizing = answer.setting, answer.sizing
    extra = f", imbalance {setting.imbalance:g}" if setting.imbalance > 1 else ""
    say(
        console,
        f"{'size':<10}{setting.batch} slots per lane and attention worker, {_lanes(answer)}, "
        f"{many(answer.ffn, 'FFN worker')}{extra}",
    )
    rows = []
    if sizing.v1 is not None:
        rows.append((V1, number(sizing.v1.ratio), "-", "-", "-", "-", sizing.v1.regime))
    for name, best in _optima(answer):
        point = best.point
        rows.append(
            (
                name,
                number(best.ratio),
                number(point.per_instance),
                percent(point.idle_attention),
                percent(point.idle_ffn),
                number(point.tau),
                point.bound_by,
            )
        )
    print_rows(
        console,
        "Best ratio r* of attention to FFN workers",
        (
            "form",
            "r*",
            _rate(answer),
            *IDLE,
            f"step,\n{answer.unit}",
            "bound by",
        ),
        rows,
        bold=[row[0] for row in rows].index(_name(answer)),
        left=("bound by",),
    )


def _optima(answer: Answer) -> list[tuple[str, Optimum]]:
    return [
        (MEAN_FIELD, answer.ideal.mean_field),
        (PAPER, answer.ideal.barrier),
        (_real(answer), answer.sizing.barrier),
    ]


def _name(answer: Answer) -> str:
    """The row of the form that chose."""
    return {"v1": V1, "mean-field": MEAN_FIELD}.get(answer.form) or _real(answer)


def _real(answer: Answer) -> str:
    return f"{BARRIER}, {_lanes(answer)}"


def _lanes(answer: Answer) -> str:
    return many(answer.setting.lanes_or_two, "lane")


def _whole(console: Console, answer: Answer) -> None:
    chosen = answer.chosen
    points = {p.attention: (p, loss) for p, loss in _neighbours(answer)}
    points.setdefault(chosen.attention, (chosen, answer.loss))
    order = sorted(points)
    rows = [
        (
            _workers(p),
            number(p.throughput),
            number(p.per_instance),
            percent(p.idle_attention),
            percent(p.idle_ffn),
            number(p.tpot),
            p.bound_by,
            "best" if p.attention == answer.sizing.whole.attention else percent(loss),
        )
        for p, loss in (points[count] for count in order)
    ]
    unit = answer.unit
    print_rows(
        console,
        f"Whole workers: {_workers(chosen)}"
        + (f", by {_name(answer)}" if answer.form != "barrier" else ""),
        (
            "workers",
            f"tokens/{one(unit)}",
            "per\ninstance",
            *IDLE,
            f"TPOT,\n{unit}",
            "bound by",
            "lost",
        ),
        rows,
        bold=order.index(chosen.attention),
        left=("bound by",),
    )
    if answer.front is not None:
        front = answer.front
        say(
            console,
            f"in front: {many(front.workers, 'prefill worker')} for {number(front.request_rate)} "
            f"requests/{one(unit)} that take {number(front.prefill_time)} {unit} each",
        )
    if answer.sizing.barrier.ratio * answer.ffn < 1:
        say(
            console,
            f"r* is less than one attention worker for {many(answer.ffn, 'FFN worker')}: "
            "try a larger --ffn",
        )


def _neighbours(answer: Answer) -> list[tuple[Point, float]]:
    return [(one.point, one.loss) for one in answer.sizing.neighbours]


def _simulated(console: Console, answer: Answer) -> None:
    from planner.points import point

    rows = []
    for result in answer.simulated:
        theory = point(answer.setting, result.attention, result.ffn)
        rows.append(
            (
                f"{result.attention}A{result.ffn}F",
                number(theory.per_instance),
                number(result.per_instance),
                f"{100 * (result.per_instance / theory.per_instance - 1):+.1f} %",
                _both(theory.idle_attention, result.idle_attention),
                _both(theory.idle_ffn, result.idle_ffn),
                f"{number(theory.tpot)} / {number(result.step_time)}",
            )
        )
    best = int(np.argmax([result.per_instance for result in answer.simulated]))
    print_rows(
        console,
        f"Theory ({_real(answer)}) / simulation, tokens/{one(answer.unit)} per instance",
        ("workers", "theory", "simulated", "off", *IDLE, f"TPOT,\n{answer.unit}"),
        rows,
        bold=best,
    )


def _both(theory: float, simulated: float) -> str:
    return f"{100 * theory:.0f} / {percent(simulated)}"


def _plan(console: Console, answer: Answer, plan: Plan) -> None:
    unit = answer.unit
    choices = [plan.best, *plan.alternatives]
    rows = [
        (
            _workers(choice.point),
            str(choice.gpus),
            number(choice.point.throughput),
            number(choice.per_gpu),
            number(choice.cost),
            percent(choice.point.idle_attention),
            percent(choice.point.idle_ffn),
            number(choice.point.tpot),
            "best" if choice is plan.best else percent(choice.loss),
        )
        for choice in choices
    ]
    rate, tpot = f"tokens/{one(unit)}", f"TPOT,\n{unit}"
    columns = ("workers", "GPUs", rate, "per\nGPU", "cost", *IDLE, tpot, "lost")
    print_rows(console, "Within the budget", columns, rows, bold=0)
    refused = ", ".join(f"{count} by {reason}" for reason, count in plan.refused.items() if count)
    say(
        console,
        f"{plan.considered} choices considered" + (f"; ruled out: {refused}" if refused else ""),
    )
    if answer.separate is not None:
        count, gpus, throughput = answer.separate
        gain = throughput / plan.best.point.throughput - 1
        say(
            console,
            f"{count} separate deployments of {_workers(answer.sizing.whole)}, {gpus} GPUs: "
            f"{number(throughput)} tokens/{one(unit)} ({100 * gain:+.1f} %)",
        )


def _effects(console: Console, answer: Answer) -> None:
    by_name: dict[str, dict[bool, Effect]] = {}
    for effect in answer.effects:
        by_name.setdefault(effect.name, {})[effect.change > 0] = effect
    rows = []
    for name, pair in by_name.items():
        cells = [name]
        for up in (False, True):
            found = pair.get(up)
            cells += (number(found.ratio), percent(found.loss)) if found else ("-", "-")
        rows.append(tuple(cells))
    error = max((abs(effect.change) for effect in answer.effects), default=0.1)
    print_rows(
        console,
        f"If an input is {100 * error:.0f} % off: the r* it would take, and what keeping "
        f"{number(answer.kept)} loses",
        ("input", "r* if less", "lost", "r* if more", "lost"),
        rows,
    )
    naive = answer.naive
    say(
        console,
        f"the naive load mu_P + mu_D = {number(naive.naive_load)} instead of theta = "
        f"{number(naive.theta)} would choose r = {number(naive.naive_ratio)} and lose "
        f"{percent(naive.loss)}",
    )


def _workers(point: Point) -> str:
    """``7A1F``."""
    return f"{point.attention:.0f}A{point.ffn:.0f}F"


def summary(answer: Answer) -> dict[str, Any]:
    """The flat figures of the JSON."""
    sizing, chosen, moments = answer.sizing, answer.chosen, answer.setting.moments
    figures: dict[str, Any] = {
        "workload": answer.workload.name,
        "latencies": answer.setting.latencies.source,
        "unit": answer.unit,
        "batch": answer.setting.batch,
        "theta": moments.theta,
        "nu2": moments.nu2,
        "naive_load": moments.naive,
        "form": answer.form,
        "r_star_v1": None if sizing.v1 is None else sizing.v1.ratio,
        "r_star_mean_field": answer.ideal.mean_field.ratio,
        "r_star_barrier": answer.ideal.barrier.ratio,
        "r_star": answer.kept if answer.form != "v1" else (sizing.v1 and sizing.v1.ratio),
        "r_star_barrier_lanes": sizing.barrier.ratio,
        "attention": int(chosen.attention),
        "ffn": int(chosen.ffn),
        "throughput": chosen.throughput,
        "per_instance": chosen.per_instance,
        "idle_attention": chosen.idle_attention,
        "idle_ffn": chosen.idle_ffn,
        "tpot": chosen.tpot,
        "bound_by": chosen.bound_by,
        "loss": answer.loss,
        "naive_ratio": answer.naive.naive_ratio,
        "naive_loss": answer.naive.loss,
    }
    if answer.plan is not None:
        best = answer.plan.best
        figures |= {
            "budget_attention": int(best.point.attention),
            "budget_ffn": int(best.point.ffn),
            "budget_gpus": best.gpus,
            "budget_throughput": best.point.throughput,
        }
    if answer.simulated:
        best_result = max(answer.simulated, key=lambda result: result.per_instance)
        figures["simulated_best_ratio"] = best_result.attention / best_result.ffn
        figures["simulated_best_per_instance"] = best_result.per_instance
    return figures


def details(answer: Answer) -> dict[str, Any]:
    """All the rest of the JSON."""
    from dataclasses import asdict

    return {
        "sizing": answer.sizing.to_dict(),
        "as_in_the_papers": answer.ideal.to_dict(),
        "sensitivity": [asdict(one) for one in answer.effects],
        "naive": asdict(answer.naive),
        "plan": None if answer.plan is None else answer.plan.to_dict(),
        "separate": answer.separate,
        "prefill": None if answer.front is None else asdict(answer.front),
        "simulated": [
            {
                "attention": result.attention,
                "ffn": result.ffn,
                "throughput": result.throughput,
                "per_instance": result.per_instance,
                "idle_attention": result.idle_attention,
                "idle_ffn": result.idle_ffn,
                "step_time": result.step_time,
                "completed": result.completed,
            }
            for result in answer.simulated
        ],
    }


def picture_lines(answer: Answer) -> tuple[list[RatioLine], list[Best]]:
    """Curves over the ratio, what to believe first, and the marks of their r*."""
    from planner.plots import Best, RatioLine
    from planner.points import points

    sizing, ffn = answer.sizing, answer.ffn
    ratios = [result.attention / result.ffn for result in answer.simulated]
    seen = [*ratios, answer.chosen.ratio, *(best.ratio for _, best in _optima(answer))]
    margin = 1.15 if ratios else 4.0
    grid = np.geomspace(min(seen) / margin, max(seen) * margin, 240)
    lines, marks = [], []
    forms: list[tuple[str, Setting, Form, Optimum]] = [
        (_real(answer), answer.setting, "barrier", sizing.barrier),
        (PAPER, answer.ideal.setting, "barrier", answer.ideal.barrier),
        (MEAN_FIELD, answer.ideal.setting, "mean-field", answer.ideal.mean_field),
    ]
    for name, setting, form, best in forms:
        at = points(setting, grid * ffn, ffn, form)
        idle = at.idle_attention.tolist(), at.idle_ffn.tolist()
        lines.append(RatioLine(name, grid.tolist(), at.per_instance.tolist(), *idle))
        marks.append(Best("r* =", best.ratio, best.point.per_instance, name))
    if answer.form == "v1" and sizing.v1 is not None:
        marks.append(Best("v1 r* =", sizing.v1.ratio, answer.chosen.per_instance))
    if answer.simulated:
        lines.append(
            RatioLine(
                "simulation",
                ratios,
                [result.per_instance for result in answer.simulated],
                [result.idle_attention for result in answer.simulated],
                [result.idle_ffn for result in answer.simulated],
                simulated=True,
            )
        )
    return lines, marks


def _rate(answer: Answer) -> str:
    return f"tokens/{one(answer.unit)}\nper instance"
