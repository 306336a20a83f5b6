"""``afflux telemetry``: record what a deployment measures, and say what a recording holds.

Recordings are what policies are replayed and tuned on. What the commands do lives in
``autoscaler/``.
"""

import asyncio
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bar

    from autoscaler.record import Progress
    from autoscaler.summary import Summary

app = typer.Typer(no_args_is_help=True, help="Record what a deployment measures, and look at it.")

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Seconds of a text like 90, 90s, 5m, 1.5h or 1d.

    Raises:
        ValueError: it is none, or not above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is no duration; write it as in 90s, 5m, 1.5h or 1d")
    return seconds


@app.command()
def record(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON lines; one that is there is continued.")
    ],
    how_long: Annotated[
        str, typer.Option("--duration", metavar="TIME", help="As in 90s, 5m, 1.5h or 1d.")
    ] = "5m",
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Record steps, rides, requests, changes and decisions while serving. Ctrl-C ends it early."""
    try:
        seconds = duration(how_long)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--duration") from None
    from rich.console import Console

    from autoscaler.collect import Cursors, collect
    from autoscaler.record import header_of
    from autoscaler.record import record as run
    from autoscaler.recording import Recorder
    from cluster import companion
    from cluster.connection import ASK_S, get, manager_of
    from cluster.spec import ClusterSpec

    console = Console(stderr=True)
    with manager_of(name, address) as manager:
        spec = ClusterSpec.model_validate(get(manager.spec_data.remote(), ASK_S))
        actors = asyncio.run(collect(manager, Cursors()))
        with Recorder(file, header_of(spec, actors)) as recorder, _bar(console) as bar:
            task = bar.add_task("", total=seconds, told="")
            newest: list[Progress] = []

            def show(progress: "Progress") -> None:
                newest[:] = [progress]
                bar.update(task, completed=min(progress.seconds, seconds), told=_words(progress))

            controller = companion.find(name)
            try:
                asyncio.run(run(manager, recorder, seconds, controller=controller, on_round=show))
            except KeyboardInterrupt:
                console.print("ended early; what was recorded is whole", highlight=False)
    progress = newest[-1] if newest else None
    if progress is not None and progress.missed:
        console.print(
            f"{progress.missed} records were written over before they were read: the recorder was "
            "held up; record on a machine with time to spare",
            highlight=False,
            soft_wrap=True,
        )
    typer.echo(f"{file}: {'nothing' if progress is None else _words(progress)}")
    typer.echo(f"next:  afflux telemetry show {file}")


@app.command()
def show(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="As afflux telemetry record made it.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """What a recording holds: load, latencies, how busy the actors were, changes."""
    from autoscaler.summary import summarise

    summary = summarise(file)
    if as_json:
        typer.echo(summary.model_dump_json(indent=2))
        return
    from rich.console import Console

    _print(Console(soft_wrap=True, highlight=False), summary)


def _bar(console: "Console") -> "Bar":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("recording"),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[told]}"),
        console=console,
        transient=True,
    )


def _words(progress: "Progress") -> str:
    """What has been recorded, on one line."""
    parts = [
        f"{progress.steps} steps",
        f"{progress.rides} kernel calls",
        f"{progress.requests} requests",
    ]
    if progress.changes:
        parts.append(f"{progress.changes} changes")
    if progress.decisions:
        parts.append(f"{progress.decisions} decisions")
    if progress.away:
        parts.append("the manager is away")
    elif progress.silent:
        parts.append(f"silent: {', '.join(sorted(progress.silent))}")
    return ", ".join(parts)


def _print(console: "Console", summary: "Summary") -> None:
    from rich.table import Table

    from afflux.top_view import amount, seconds

    emulated = ", emulated devices" if summary.emulated else ""
    console.print(
        f"{summary.file}: {summary.model}{emulated}, {summary.seconds:.0f} s, {summary.changes} "
        f"changes, {summary.decisions} decisions"
    )
    load = Table(box=None, pad_edge=False)
    for title in ("requests", "/s", "failed", "prompt", "output", "prefix hits"):
        load.add_column(title, justify="right")
    load.add_row(
        str(summary.requests),
        f"{summary.rate:.2f}",
        str(summary.failed),
        amount(summary.prompt_mean),
        amount(summary.output_mean),
        "-" if summary.prefix_hit is None else f"{summary.prefix_hit:.0%}",
    )
    console.print(load)
    times = Table(box=None, pad_edge=False)
    for title in ("", "count", "mean", "p50", "p90", "p99", "target"):
        times.add_column(title, justify="left" if not title else "right")
    for label, row, target in (
        ("TTFT", summary.ttft, summary.ttft_target),
        ("TPOT", summary.tpot, summary.tpot_target),
    ):
        figures = (row.mean, row.p50, row.p90, row.p99, target)
        times.add_row(label, str(row.count), *(seconds(figure) for figure in figures))
    console.print(times)
    actors = Table(box=None, pad_edge=False)
    for title in ("actor", "busy", "steps or calls", "mean", "requests", "context", "missed"):
        actors.add_column(title, justify="left" if title == "actor" else "right")
    for actor in summary.actors:
        actors.add_row(
            actor.name,
            "-" if actor.busy is None else f"{actor.busy:.0%}",
            str(actor.count),
            seconds(actor.mean),
            amount(actor.requests),
            amount(actor.context),
            str(actor.missed),
        )
    console.print(actors)
