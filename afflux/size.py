"""``afflux size``: how many attention workers per FFN worker, and what another ratio costs.

Words in, tables, JSON and a picture out; the numbers come from ``planner``.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afflux.planning import (
    Batch,
    JsonFile,
    LatencyName,
    ModelName,
    PngFile,
    TraceFile,
    WorkloadText,
    enough_requests,
    print_given,
    read_latencies,
    read_requests,
    require,
    write_json,
)

if TYPE_CHECKING:
    from afflux.size_report import Answer
    from planner.budget import Budget
    from planner.points import Form, Point
    from planner.records import RequestRecord, Result
    from planner.sizing import Setting
    from planner.workload import Workload

EPILOG = (
    "For example: afflux size --workload fixed:100,geometric:500 --latency deepseek-v3-npu "
    "--batch 256 --png size.png. What each number means: docs/planner.md."
)
PAPER = "2601.21351"
MONEY, CHECK = "Budget and prices", "Checks by simulation"
"""Panels of the help."""
MOST_SIMULATED = 256
"""Attention workers in one run: each takes its share of the time."""


class FormName(StrEnum):
    """The three forms of the theory as words of the command line."""

    v1 = "v1"
    mean_field = "mean-field"
    barrier = "barrier"


class Objective(StrEnum):
    """What the best choice within a budget has most of."""

    throughput = "throughput"
    cost = "cost"


def size(
    trace: TraceFile = None,
    workload: WorkloadText = None,
    latency: LatencyName = None,
    model: ModelName = None,
    batch: Batch = None,
    ffn: Annotated[
        int, typer.Option("--ffn", min=1, help="FFN workers that share the experts.")
    ] = 1,
    form: Annotated[
        FormName, typer.Option("--form", help="The form of the theory that chooses.")
    ] = FormName.barrier,
    lanes: Annotated[
        int,
        typer.Option("--lanes", min=1, help="Lanes in flight, whose round trip bounds a step."),
    ] = 2,
    imbalance: Annotated[
        float,
        typer.Option(min=1.0, help="Load of the busiest FFN worker over the mean."),
    ] = 1.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Experts per token, for the fan-out.")
    ] = None,
    attention_price: Annotated[
        float,
        typer.Option(
            "--attention-price", help="Of an attention worker, in any unit.", rich_help_panel=MONEY
        ),
    ] = 1.0,
    ffn_price: Annotated[
        float,
        typer.Option(
            "--ffn-price", help="Of an FFN worker, in the same unit.", rich_help_panel=MONEY
        ),
    ] = 1.0,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget", min=1, help="GPUs at most: choose A and F within it.", rich_help_panel=MONEY
        ),
    ] = None,
    attention_gpus: Annotated[
        int,
        typer.Option(
            "--attention-gpus", min=1, help="GPUs of an attention worker.", rich_help_panel=MONEY
        ),
    ] = 1,
    ffn_gpus: Annotated[
        int, typer.Option("--ffn-gpus", min=1, help="GPUs of an FFN worker.", rich_help_panel=MONEY)
    ] = 1,
    max_tpot: Annotated[
        float | None,
        typer.Option(
            "--max-tpot",
            help="Time per token at most, in the unit of the latencies.",
            rich_help_panel=MONEY,
        ),
    ] = None,
    min_throughput: Annotated[
        float | None,
        typer.Option(
            "--min-throughput", help="Tokens per unit of time at least.", rich_help_panel=MONEY
        ),
    ] = None,
    kv_tokens: Annotated[
        float | None,
        typer.Option(
            "--kv-tokens",
            help="Tokens of KV cache that an attention worker holds.",
            rich_help_panel=MONEY,
        ),
    ] = None,
    min_ffn: Annotated[
        int,
        typer.Option(
            "--min-ffn",
            min=1,
            help="FFN workers that it takes to hold the experts; for a budget.",
            rich_help_panel=MONEY,
        ),
    ] = 1,
    objective: Annotated[
        Objective,
        typer.Option(
            help="Most tokens within the budget, or most tokens per price.", rich_help_panel=MONEY
        ),
    ] = Objective.throughput,
    simulated: Annotated[
        bool,
        typer.Option(
            "--simulate", help="Check the theory with the simulator.", rich_help_panel=CHECK
        ),
    ] = False,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Simulated requests per attention worker; by default 8 a slot.",
            rich_help_panel=CHECK,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Draws the simulated requests.", rich_help_panel=CHECK)
    ] = 0,
    json_file: JsonFile = None,
    png_file: PngFile = None,
    reproduce: Annotated[
        str | None,
        typer.Option(
            "--reproduce",
            metavar="PAPER",
            help=f"{PAPER}: the paper's figures beside ours, and theory against simulator over a "
            "grid of workloads. Takes minutes.",
            rich_help_panel=CHECK,
        ),
    ] = None,
) -> None:
    """Find the best ratio of attention to FFN workers, and what is lost by another."""
    if reproduce is not None:
        _reproduce(reproduce, json_file, png_file, seed)
        return
    limits = {"--max-tpot": max_tpot, "--min-throughput": min_throughput, "--kv-tokens": kv_tokens}
    given = [option for option, value in limits.items() if value is not None]
    if given and budget is None:
        raise typer.BadParameter(
            f"{', '.join(given)} chooses among what a budget allows; give --budget too",
            param_hint="'--budget'",
        )
    lengths, _ = read_requests(trace, workload)
    latencies = read_latencies(latency, model, lanes)
    slots = require(batch, "--batch", "256")

    from rich.console import Console

    from afflux import size_report
    from planner.budget import Budget
    from planner.sizing import Setting
    from planner.skewness import load_skewness

    console = Console()
    setting = Setting(
        lengths.moments(),
        latencies,
        slots,
        lanes=lanes,
        imbalance=imbalance,
        top_k=top_k,
        price_attention=attention_price,
        price_ffn=ffn_price,
        skewness=load_skewness(lengths),
    )
    room = None
    if budget is not None:
        room = Budget(
            budget,
            attention_gpus,
            ffn_gpus,
            max_tpot=max_tpot,
            min_throughput=min_throughput,
            kv_tokens=kv_tokens,
            min_ffn=min_ffn,
        )
    answer = _answer(lengths, setting, ffn, form, room, objective)
    print_given(console, lengths, latencies)
    if simulated:
        answer = replace(answer, simulated=_simulate(answer, requests, seed))
    size_report.show(console, answer)
    write_json(json_file, "size", size_report.summary(answer), size_report.details(answer))
    if png_file is not None:
        _draw(png_file, answer, seed)


def _answer(
    lengths: "Workload",
    setting: "Setting",
    ffn: int,
    form: FormName,
    budget: "Budget | None",
    objective: Objective,
) -> "Answer":
    """All that follows from the theory."""
    from afflux.size_report import Answer, choose
    from planner.budget import plan_budget, prefill_front
    from planner.sensitivity import naive_cost, sensitivity
    from planner.sizing import size as size_it

    # The paper leaves the round trip of a lane out, and takes loads for normal
    ideal = size_it(replace(setting, lanes=None, skewness=0.0), ffn)
    sizing = size_it(setting, ffn)
    chosen = choose(sizing, ideal, form.value, ffn)
    theory: Form = "mean-field" if form is FormName.mean_field else "barrier"
    basis = ideal.setting if form is FormName.mean_field else setting
    prefills = setting.latencies.t_prefill(1000.0) > 0
    return Answer(
        workload=lengths,
        sizing=sizing,
        ideal=ideal,
        ffn=ffn,
        form=form.value,
        chosen=chosen,
        kept=ideal.mean_field.ratio if form is FormName.mean_field else sizing.barrier.ratio,
        effects=sensitivity(basis, form=theory, ffn=ffn),
        naive=naive_cost(basis, form=theory, ffn=ffn),
        plan=plan_budget(basis, budget, theory, objective.value) if budget else None,
        separate=_separate(sizing.whole, budget) if budget else None,
        front=prefill_front(chosen.throughput, lengths, setting.latencies) if prefills else None,
    )


def _separate(whole: "Point", budget: "Budget") -> tuple[int, int, float] | None:
    """How many deployments of the best size fit, their GPUs and their throughput together."""
    gpus = round(whole.attention * budget.gpus_per_attention + whole.ffn * budget.gpus_per_ffn)
    count = budget.gpus // gpus
    fits = whole.ffn >= budget.min_ffn and whole.tpot <= (budget.max_tpot or whole.tpot)
    return (count, count * gpus, count * whole.throughput) if count > 1 and fits else None


def _simulate(answer: "Answer", requests: int | None, seed: int) -> "list[Result]":
    """Closed-loop runs at numbers of attention workers around the best one."""
    from afflux.progress import WorkProgress

    counts = simulated_counts(answer.sizing.barrier.ratio * answer.ffn, answer.chosen.attention)
    work = sum(counts)  # a run takes about as long as it has workers
    results: list[Result] = []
    with WorkProgress() as progress:

        def part(count: int) -> Callable[[float], None]:
            before = sum(result.attention for result in results)
            text = f"simulating {count}A{answer.ffn}F"
            return lambda share: progress(text, (before + share * count) / work)

        for count in counts:
            results.append(_run(answer, count, requests, seed, progress=part(count)))
    return results


def simulated_counts(best: float, chosen: float) -> list[int]:
    """Whole numbers of attention workers from an eighth to four times the best one, ascending; less
    where that would be more than ``MOST_SIMULATED``."""
    factors = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0, 4 / 3, 2.0, 4.0)
    top = min(best, MOST_SIMULATED / 4)
    counts = {max(1, round(top * factor)) for factor in factors}
    return sorted(counts | {min(round(chosen), MOST_SIMULATED)})


def _run(
    answer: "Answer",
    attention: int,
    requests: int | None,
    seed: int,
    *,
    spans: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> "Result":
    """One run that starts in the middle, as the theory is about the long run."""
    from planner.loads import Closed
    from planner.simulator import Cluster, simulate

    setting = answer.setting
    lanes = setting.lanes_or_two
    each = requests or enough_requests(setting.batch * lanes, answer.workload.mean_output)
    cluster = Cluster(
        setting.latencies,
        attention,
        answer.ffn,
        setting.batch,
        lanes,
        imbalance=setting.imbalance,
    )
    done = itertools.count(1)

    def completed(_: "RequestRecord") -> None:
        number = next(done)
        if number % 256 == 0:
            progress(number / (each * attention))

    load = Closed(answer.workload, each, stationary=True)
    if not spans:
        return simulate(cluster, load, seed=seed, sink=completed)
    # A few steps from when the lanes have fallen into turn, and no more than that
    step = answer.chosen.tau * lanes
    endless = replace(load, requests=None)
    return simulate(
        cluster, endless, seed=seed, until=40 * step, spans=spans * lanes, spans_since=10 * step
    )


def _draw(path: Path, answer: "Answer", seed: int) -> None:
    from afflux.size_report import picture_lines
    from planner.plots import draw_sizing

    attention = min(round(answer.chosen.attention), MOST_SIMULATED)
    lines, marks = picture_lines(answer)
    setting = answer.setting
    draw_sizing(
        path,
        f"{answer.workload.name} on {setting.latencies.source or 'unnamed latencies'}   ·   "
        f"B = {setting.batch}, {setting.lanes_or_two} lanes",
        lines,
        marks,
        _run(answer, attention, None, seed, spans=6).spans,
        unit=answer.unit,
        steps_title=f"Steps of {attention}A{answer.ffn}F, simulated",
    )


def _reproduce(paper: str, json_file: Path | None, png_file: Path | None, seed: int) -> None:
    """The paper's figures beside ours; the same as ``afflux bench sizing``."""
    if paper.removeprefix("arXiv:").strip() != PAPER:
        raise typer.BadParameter(
            f"{paper!r} cannot be reproduced; expected {PAPER}", param_hint="'--reproduce'"
        )
    from afflux.progress import WorkProgress
    from benchmarks import sizing as benchmark

    with WorkProgress() as progress:
        benchmark.run(json_file, png_file, seed=seed, progress=progress)
