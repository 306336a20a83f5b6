"""``afflux plan``: which level of disaggregation pays for a model, some GPUs and a workload.

Words in, a verdict, tables, pictures and a spec out; the numbers come from ``planner.explore``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afflux.planning import OUTPUT, JsonFile, PngFile, require, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from afflux.plan_given import Asked, Given
    from afflux.plan_report import Answered
    from planner.explore.question import Exploration
    from planner.explore.winner_sensitivity import Moved

EPILOG = (
    "For example: afflux plan --model deepseek-ai/DeepSeek-V3.2 --system b200_sxm --gpus 128 "
    "--workload coding --ttft 100ms --tpot 15ms. What each number means: docs/plan.md."
)
PAPER = "2605.28302"
KERNELS, MODES, LISTS = "Kernels", "How the levels are evaluated", "Lists and checks"
"""Panels of the help."""


class Overlap(StrEnum):
    """Which form of AFD's step counts."""

    safe = "safe"
    paper = "paper"


class Fan(StrEnum):
    """How copies of a token are counted."""

    distinct = "distinct"
    paper = "paper"


class SideName(StrEnum):
    """The two sides of a layer."""

    attention = "attention"
    ffn = "ffn"


def plan(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="NAME|PATH",
            help="A bundled name (--list-models), or a folder with a Hugging Face config.json.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", metavar="NAME|FILE", help="The GPUs and what joins them (--list-systems)."
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="All of them.")] = None,
    workload: Annotated[
        str | None,
        typer.Option(
            "--workload",
            metavar="TEXT",
            help="chat, coding, agentic, or PREFIX:PROMPT:OUTPUT in tokens, as in 4096:512:256.",
        ),
    ] = None,
    ttft: Annotated[
        str | None,
        typer.Option(
            "--ttft",
            metavar="TIME",
            help="Time to first token at most: 50ms, 0.05s; a plain number is milliseconds. By "
            "default the strict target of the named workload.",
        ),
    ] = None,
    tpot: Annotated[
        str | None,
        typer.Option("--tpot", metavar="TIME", help="Time per output token at most; likewise."),
    ] = None,
    ffn_system: Annotated[
        str | None,
        typer.Option(
            "--ffn-system", metavar="NAME|FILE", help="GPUs of AFD's FFN side, where they differ."
        ),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            "--network",
            metavar="TIER=GB/s[,LATENCY]",
            help="Another link, per GPU and direction, as in cluster=50,10us. Repeatable.",
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="LIST",
            help="Levels to compare, of aggregated,pd,afd,pd+afd; by default all.",
        ),
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(
            "--kernels",
            metavar="aic|roofline|FILE",
            help="Times of kernels: aiconfigurator's measured ones, data sheets alone, or the JSON "
            "of 'afflux bench kernels'.",
            rich_help_panel=KERNELS,
        ),
    ] = "aic",
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            metavar="trtllm|vllm|sglang",
            help="Whose kernels were measured.",
            rich_help_panel=KERNELS,
        ),
    ] = "trtllm",
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="fp8|bf16",
            help="Of the weights; by default the config's.",
            rich_help_panel=KERNELS,
        ),
    ] = None,
    kv_precision: Annotated[
        str | None,
        typer.Option(
            "--kv-precision",
            metavar="fp8|bf16",
            help="Of the KV cache; by default that of the weights' format.",
            rich_help_panel=KERNELS,
        ),
    ] = None,
    allow_extrapolation: Annotated[
        bool,
        typer.Option(
            "--allow-extrapolation",
            help="Go on outside of what was measured, and say so.",
            rich_help_panel=KERNELS,
        ),
    ] = False,
    overlap: Annotated[
        Overlap,
        typer.Option(
            "--overlap",
            help="AFD's step that has to hold the target: the paper's formula, or the safe bound.",
            rich_help_panel=MODES,
        ),
    ] = Overlap.safe,
    fan: Annotated[
        Fan,
        typer.Option(
            "--fan",
            help="Copies of a token: expected distinct ranks, or the paper's (1 + min(k, N)) / 2.",
            rich_help_panel=MODES,
        ),
    ] = Fan.distinct,
    lanes: Annotated[
        list[int] | None,
        typer.Option(
            "--lanes",
            min=1,
            help="Micro-batches of AFD to try. Repeatable; by default 1, 2, and 4 (half duplex: "
            "3).",
            rich_help_panel=MODES,
        ),
    ] = None,
    full_duplex: Annotated[
        bool,
        typer.Option(
            "--full-duplex/--half-duplex",
            help="Links send and receive at once (up to 4 micro-batches), or don't (3).",
            rich_help_panel=MODES,
        ),
    ] = True,
    router_on: Annotated[
        SideName,
        typer.Option("--router-on", help="Side of the router.", rich_help_panel=MODES),
    ] = SideName.attention,
    shared_on: Annotated[
        SideName,
        typer.Option("--shared-on", help="Side of the shared experts.", rich_help_panel=MODES),
    ] = SideName.attention,
    p99: Annotated[
        bool,
        typer.Option("--p99", help="The network's 99th percentile.", rich_help_panel=MODES),
    ] = False,
    wire_bytes: Annotated[
        float,
        typer.Option(
            "--wire-bytes", help="Per element of hidden states that travel.", rich_help_panel=MODES
        ),
    ] = 2.0,
    prefill_rate: Annotated[
        float,
        typer.Option(
            "--prefill-rate",
            help="Share of its rate that a prefill pool keeps beside decode.",
            rich_help_panel=MODES,
        ),
    ] = 0.9,
    decode_rate: Annotated[
        float,
        typer.Option(
            "--decode-rate",
            help="Share of its rate that a decode pool keeps beside prefill.",
            rich_help_panel=MODES,
        ),
    ] = 0.92,
    pd_ttft: Annotated[
        float,
        typer.Option("--pd-ttft", help="Factor on TTFT of P/D.", rich_help_panel=MODES),
    ] = 1.8,
    memory_share: Annotated[
        float,
        typer.Option(
            "--memory-share", help="Of a GPU's memory that may be used.", rich_help_panel=MODES
        ),
    ] = 0.9,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Processes that search; by default one per core."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            metavar="FILE",
            dir_okay=False,
            help="Keep finished work here, and go on from what is there.",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="KEY=VALUE",
            help="The same question with one thing changed, side by side: system=h200_sxm, "
            "workload=coding, network=cluster=50, gpus=64. Repeatable.",
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Which inputs would make another level win."),
    ] = False,
    json_file: JsonFile = None,
    png_file: PngFile = None,
    html_file: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            dir_okay=False,
            help="Also an interactive page that needs no network.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    emit_spec: Annotated[
        Path | None,
        typer.Option(
            "--emit-spec",
            metavar="FILE",
            dir_okay=False,
            help="Also a cluster spec for 'afflux up', where AFD pays.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    reproduce: Annotated[
        str | None,
        typer.Option(
            "--reproduce",
            metavar="PAPER",
            help=f"{PAPER}: its Figure 2 beside ours. Takes minutes.",
            rich_help_panel=LISTS,
        ),
    ] = None,
    list_models: Annotated[
        bool, typer.Option("--list-models", help="Bundled models.", rich_help_panel=LISTS)
    ] = False,
    list_systems: Annotated[
        bool, typer.Option("--list-systems", help="Known systems.", rich_help_panel=LISTS)
    ] = False,
) -> None:
    """Find out when disaggregation pays: aggregated, P/D, AFD or both, for a model and workload."""
    if list_models or list_systems:
        from afflux import plan_lists

        plan_lists.show(models=list_models, systems=list_systems)
        return
    if reproduce is not None:
        _reproduce(reproduce, json_file, jobs)
        return

    from afflux.plan_given import Given, make_options

    given = Given(
        model=require(model, "--model", "deepseek-ai/DeepSeek-V3.2"),
        system=require(system, "--system", "b200_sxm"),
        gpus=require(gpus, "--gpus", "128"),
        workload=require(workload, "--workload", "chat"),
        ttft=ttft,
        tpot=tpot,
        options=make_options(
            router_on=router_on.value,
            shared_on=shared_on.value,
            fan=fan.value,
            overlap=overlap.value,
            full_duplex=full_duplex,
            lanes=tuple(lanes or ()),
            percentile="p99" if p99 else "p50",
            wire_bytes=wire_bytes,
            prefill_rate=prefill_rate,
            decode_rate=decode_rate,
            pd_ttft=pd_ttft,
            memory_share=memory_share,
            allow_extrapolation=allow_extrapolation,
        ),
        ffn_system=ffn_system,
        network=tuple(network or ()),
        modes=modes,
        kernels=kernels,
        backend=backend,
        precision=precision,
        kv_precision=kv_precision,
    )
    _plan(
        given, compare or [], sensitivity, jobs, resume, json_file, png_file, html_file, emit_spec
    )


def _plan(
    given: Given,
    compare: Sequence[str],
    sensitivity: bool,
    jobs: int | None,
    resume: Path | None,
    json_file: Path | None,
    png_file: Path | None,
    html_file: Path | None,
    emit_spec: Path | None,
) -> None:
    from rich.console import Console

    from afflux import plan_report
    from afflux.plan_given import ask
    from afflux.progress import WorkProgress
    from planner.explore.verdict import judge

    # All questions are looked up before the first is searched, so that a mistake costs no wait
    givens = [given, *(given.but(text) for text in compare)]
    asked = [ask(one) for one in givens]
    names = [_name(given), *compare] if compare else [""]
    answers: list[Answered] = []
    effects: Sequence[Moved] | None = None
    with WorkProgress() as progress:
        work = len(asked) + (1 if sensitivity else 0)
        for index, (name, one) in enumerate(zip(names, asked, strict=True)):
            found = _search(one, jobs, resume, _part(progress, index, work, name))
            answers.append(plan_report.Answered(name, found, judge(found)))
        if sensitivity:
            part = _part(progress, work - 1, work, "other inputs")
            effects = _sensitivity(asked[0], answers[0].found, jobs, part)
            verdict = judge(answers[0].found, plan_report.flips(effects))
            answers[0] = plan_report.Answered(names[0], answers[0].found, verdict)
    console = Console()
    plan_report.show(console, answers)
    if effects is not None:
        plan_report.show_sensitivity(console, effects)
    write_json(
        json_file, "plan", plan_report.summary(answers), plan_report.details(answers, effects)
    )
    _draw(given, answers, png_file, html_file)
    if emit_spec is not None:
        _emit(console, emit_spec, given, answers[0].found)


def _search(
    asked: Asked,
    jobs: int | None,
    resume: Path | None,
    progress: Callable[[str, float], None],
) -> Exploration:
    from planner.explore.search import explore

    return explore(
        asked.question,
        asked.db,
        ffn_db=asked.ffn_db,
        jobs=jobs,
        progress=progress,
        resume=resume,
    )


def _part(
    progress: Callable[[str, float], None], index: int, work: int, name: str
) -> Callable[[str, float], None]:
    """The share of one question in the share of all."""

    def say(text: str, share: float) -> None:
        progress(f"{name}: {text}" if name else text, (index + share) / work)

    return say


def _name(given: Given) -> str:
    """Of the first question beside others."""
    return f"{given.system}, {given.workload}"


def _draw(
    given: Given, answers: Sequence[Answered], png_file: Path | None, html_file: Path | None
) -> None:
    if png_file is None and html_file is None:
        return
    from planner.explore.plots import draw_fronts, write_page

    found = {one.name or _name(given): one.found for one in answers}
    question = answers[0].found.question
    title = f"{question.model.name} on {question.gpus} x {question.system.name}"
    if png_file is not None:
        draw_fronts(png_file, title, found)
    if html_file is not None:
        write_page(html_file, title, found)


def _emit(console: Console, path: Path, given: Given, found: Exploration) -> None:
    from afflux.plan_spec import emit
    from afflux.planning import say, write_text

    text, notes = emit(found, given.model)
    write_text(path, text)
    console.print()
    for note in notes:
        say(console, note)
    say(console, f"{path}: check it with 'afflux spec check {path}', start it with 'afflux up'")


def _sensitivity(
    asked: Asked, found: Exploration, jobs: int | None, progress: Callable[[str, float], None]
) -> Sequence[Moved]:
    from planner.explore.winner_sensitivity import winner_sensitivity

    return winner_sensitivity(found, asked.db, ffn_db=asked.ffn_db, jobs=jobs, progress=progress)


def _reproduce(paper: str, json_file: Path | None, jobs: int | None) -> None:
    """The paper's Figure 2 beside ours."""
    if paper.removeprefix("arXiv:").strip() != PAPER:
        raise typer.BadParameter(
            f"{paper!r} cannot be reproduced; expected {PAPER}", param_hint="'--reproduce'"
        )
    from rich.console import Console

    from afflux.planning import say
    from afflux.progress import WorkProgress
    from planner.explore.reproduce_2605 import reproduce

    with WorkProgress() as progress:
        outcome = reproduce(jobs=jobs, progress=progress)
    console = Console()
    for line in outcome.lines():
        say(console, line)
    write_json(json_file, f"plan-{PAPER}", outcome.summary(), outcome.details())
