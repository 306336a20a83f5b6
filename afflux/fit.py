"""``afflux fit``: stage times measured somewhere become the coefficients that planning needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afflux.planning import (
    ModelName,
    curve_text,
    fit_files,
    number,
    percent,
    print_rows,
    say,
    write_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from planner.fitting import FitReport

LOADS = {"attention": "tokens", "ffn": "requests", "transfer": "requests", "prefill": "tokens"}

EPILOG = (
    "For example: afflux fit benchmarks/results/decode.json --model balanced --json latency.json, "
    "then afflux size --latency latency.json. The form of telemetry: docs/planner.md."
)


def fit(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="The JSON of 'afflux bench decode', or telemetry as JSONL, any number of files.",
        ),
    ],
    model: ModelName = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Of the benchmark's model, where its JSON does not say."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", dir_okay=False, help="Write them, for --latency."),
    ] = None,
) -> None:
    """Fit latency coefficients to measurements, and show how well they fit."""
    report = fit_files(files, model=model, layers=layers)

    from rich.console import Console

    console = Console()
    _show(console, report)
    if json_file is not None:
        write_text(json_file, report.joint.to_json())
        say(console, f"written to {json_file}; use it as --latency {json_file}")


def _show(console: "Console", report: "FitReport") -> None:
    say(console, f"fitted to {report.source}; times in {report.unit} per step of one lane")
    rows = []
    for stage, fit in report.stages.items():
        each = f" + {fit.per_request:.3g} × requests" if fit.per_request else ""
        say(console, f"{stage:<10}{curve_text(fit.curve, LOADS[stage])}{each}")
        rows.append(
            (
                stage,
                str(fit.n),
                str(fit.outliers),
                percent(fit.median_relative_error),
                percent(fit.max_relative_error),
                f"{fit.r2:.3f}",
                f"× {report.factors[stage]:.2f}",
            )
        )
    print_rows(
        console,
        "How well the stages fit their points, and what whole steps corrected them by",
        ("stage", "points", "outliers", "median error", "most", "r2", "corrected"),
        rows,
    )
    if report.steps:
        once, each_request = report.overhead
        print_rows(
            console,
            "Whole steps of one attention and one FFN worker",
            ("requests", "lanes", "measured", "predicted", "off", "off, left out of the fit"),
            [
                (
                    number(step.requests),
                    str(step.lanes),
                    number(step.measured),
                    number(step.predicted),
                    f"{100 * step.error:+.1f} %",
                    "-"
                    if step.held_out is None
                    else f"{100 * (step.held_out / step.measured - 1):+.1f} %",
                )
                for step in report.steps
            ],
        )
        say(
            console,
            f"outside of the layers: {number(once)} per step of all lanes, {number(each_request)} "
            "per request",
        )
    for note in report.notes:
        say(console, f"note: {note}")
