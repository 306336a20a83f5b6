"""What ``afflux size``, ``simulate`` and ``fit`` share: options that name a workload or latencies,
tables, and files. Words in, objects of ``planner`` out; plans nothing itself.
"""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from planner.fitting import FitReport
    from planner.latency import Curve, Latencies
    from planner.traces import Trace
    from planner.workload import Moments, Workload

OUTPUT = "Output"
"""A panel of the help."""
PICTURES = (".png", ".svg", ".pdf")
IDLE = ("attention\nidle", "FFN\nidle")
"""Heads of two columns; on two lines so that tables fit 80 columns."""


def _picture(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in PICTURES:
        raise typer.BadParameter(f"{path} is no picture; expected a name in {', '.join(PICTURES)}")
    return path


TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        metavar="FILE",
        help="Recorded requests: Azure's CSV or Mooncake's JSONL, told apart by content.",
    ),
]
WorkloadText = Annotated[
    str | None,
    typer.Option(
        "--workload",
        metavar="TEXT",
        help="chat, coding, agentic, or lengths of prompt and output, as in "
        "fixed:100,geometric:500.",
    ),
]
LatencyName = Annotated[
    str | None,
    typer.Option(
        "--latency",
        metavar="FILE|PRESET",
        help="Stage times: deepseek-v3-npu, what 'afflux fit' wrote, the JSON of 'afflux bench "
        "decode', or telemetry as JSONL.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Which model of a benchmark's JSON."),
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Slots of one lane on one attention worker."),
]
JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        dir_okay=False,
        help="Also write the result as JSON.",
        rich_help_panel=OUTPUT,
    ),
]
PngFile = Annotated[
    Path | None,
    typer.Option(
        "--png",
        metavar="FILE",
        dir_okay=False,
        callback=_picture,
        help="Also draw the result.",
        rich_help_panel=OUTPUT,
    ),
]


def read_requests(trace_file: Path | None, text: str | None) -> "tuple[Workload, Trace | None]":
    """The workload that was named, and the trace if it is one.

    Raises:
        typer.BadParameter: both or neither were given.
        PlannerError: there is no such workload, or the trace cannot be read.
    """
    if (trace_file is None) == (text is None):
        both = "both were given" if text is not None else "neither was given"
        raise typer.BadParameter(
            f"expected either --trace FILE or --workload TEXT; {both}", param_hint="'--workload'"
        )
    if trace_file is not None:
        from planner.traces import read_trace

        trace = read_trace(trace_file)
        return trace.workload(), trace
    from planner.workload import workload

    return workload(str(text)), None


def read_latencies(
    name: str | None, model: str | None = None, lanes: int | None = 2
) -> "Latencies":
    """Latencies by whatever name: a preset, a file of latencies, or measurements to fit.

    Args:
        model: which of a benchmark's models.
        lanes: that share what a step takes outside of its layers; None keeps that time apart, for
            a simulation of joint steps.

    Raises:
        typer.BadParameter: no name.
        PlannerError: neither a preset nor a file that holds any of these.
    """
    from planner.latency import PRESETS, load_latencies

    if name is None:
        raise typer.BadParameter(
            f"expected a file or a preset ({', '.join(PRESETS)})", param_hint="'--latency'"
        )
    if name in PRESETS or not Path(name).is_file() or _kind(Path(name)) == "latencies":
        latencies = load_latencies(name)
    else:
        report = fit_files([Path(name)], model=model)
        latencies = report.joint
        worst = "" if report.step_error is None else f", steps within {percent(report.step_error)}"
        command = f"afflux fit {name}" + (f" --model {model}" if model else "")
        typer.echo(f"fitted to {report.source}{worst}; '{command}' shows how well", err=True)
    # Where there is nothing to share there is nothing to fold, whatever the curves are
    if lanes is None or latencies.outside(1.0) == 0:
        return latencies
    return latencies.folded(lanes)


def fit_files(
    files: Sequence[Path], *, model: str | None = None, layers: int | None = None
) -> "FitReport":
    """A fit to one JSON of ``afflux bench decode``, or to telemetry of any files.

    Args:
        layers: of the benchmark's model, if its file does not say.

    Raises:
        PlannerError: a file cannot be read or is malformed, or there is too little in them.
    """
    from planner.errors import PlannerError
    from planner.fitting import latencies_from_benchmark, latencies_from_telemetry, read_telemetry

    kinds = [_kind(file) for file in files]
    if "latencies" in kinds:
        done = files[kinds.index("latencies")]
        raise PlannerError(f"{done} holds latencies already; give it to --latency as it is")
    if "benchmark" not in kinds:
        if model is not None:
            raise PlannerError("--model is for the JSON of 'afflux bench decode'; leave it out")
        rows = itertools.chain.from_iterable(read_telemetry(file) for file in files)
        source = ", ".join(file.name for file in files)
        return latencies_from_telemetry(rows, source=source)[1]
    if len(files) > 1:
        raise PlannerError(
            f"{len(files)} files with a benchmark's JSON among them; expected one such file, or "
            "any number of telemetry files"
        )
    if model is None and len(found := _models(files[0])) > 1:
        raise PlannerError(
            f"{files[0]} holds models {', '.join(found)}; choose one, as in --model {found[0]}"
        )
    return latencies_from_benchmark(files[0], model, layers=layers or _layers(model))[1]


def _kind(file: Path) -> Literal["latencies", "benchmark", "telemetry"]:
    """What a file of stage times holds; telemetry is what is none of the others."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "telemetry"  # JSON lines; whoever reads it names what is wrong with it
    if isinstance(data, dict) and "details" in data:
        return "benchmark"
    return "telemetry" if isinstance(data, dict) and "stage" in data else "latencies"


def _models(file: Path) -> list[str]:
    """Names of the models in a benchmark's JSON that were measured."""
    details = json.loads(file.read_text(encoding="utf-8"))["details"]
    entries = details.items() if isinstance(details, dict) else ()
    return [name for name, entry in entries if isinstance(entry, dict) and "rows" in entry]


def _layers(model: str | None) -> int | None:
    """Of a model that our own benchmarks make; their older files don't say."""
    from benchmarks import models

    shape = {"balanced": models.BALANCED, "ffn_heavy": models.FFN_HEAVY}.get(model or "")
    return shape["num_hidden_layers"] if shape else None


def enough_requests(slots: int, mean_output: float) -> int:
    """Requests per attention worker of a closed loop: eight lives of a slot, and 2,000 steps."""
    return math.ceil(slots * max(8.0, 2000.0 / mean_output))


def require(value: Any, option: str, example: str) -> Any:
    """The value; a usage error that names the option if it was not given."""
    if value is None:
        raise typer.BadParameter(f"missing; as in {option} {example}", param_hint=f"'{option}'")
    return value


def number(value: float | None) -> str:
    """Four figures or so, ``-`` for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def many(count: int, what: str) -> str:
    """``1 lane``, ``2 lanes``."""
    return f"{count} {what}" + ("" if count == 1 else "s")


def one(unit: str) -> str:
    """One of a unit: ``cycles`` becomes ``cycle``."""
    return unit[:-1] if len(unit) > 2 and unit.endswith("s") else unit


def percent(share: float | None) -> str:
    """A share as ``12.3 %``."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def curve_text(curve: "Curve", load: str) -> str:
    """``0.00165 × tokens + 50``, or some points of a curve of another kind."""
    from planner.latency import Linear

    if isinstance(curve, Linear):
        return f"{curve.a:.4g} × {load} + {curve.b:.4g}"
    points = getattr(curve, "points", ())
    if not points:
        return type(curve).__name__
    shown = points if len(points) <= 4 else (points[0], points[-1])
    between = "" if len(points) <= 4 else f" and {len(points) - 2} points between"
    return ", ".join(f"{y:.3g} at {number(x)}" for x, y in shown) + f" {load}{between}"


def print_given(console: "Console", workload: "Workload", latencies: "Latencies") -> None:
    """What a plan rests on: the requests and the stage times."""
    moments = workload.moments()
    lines = [
        (
            "workload",
            f"{workload.name}: prompt {number(moments.prompt_mean)}, "
            f"output {number(moments.output_mean)} tokens on average"
            + (f", {moments.samples:,} requests" if moments.samples else "")
            + (f", {percent(workload.reuse)} of the prompts cached" if workload.reuse else ""),
        ),
        (
            "load",
            f"theta {number(moments.theta)}{_interval(moments)} tokens per slot, "
            f"nu {number(moments.nu)}; the naive mu_P + mu_D is {number(moments.naive)}",
        ),
        ("latencies", f"{latencies.source or 'unnamed'}, in {latencies.unit}"),
        (
            "",
            f"attention {curve_text(latencies.attention, 'tokens')}"
            + (
                f" + {latencies.attention_per_request:.4g} × requests"
                if latencies.attention_per_request
                else ""
            )
            + f"; FFN {curve_text(latencies.ffn, 'requests')}"
            + f"; transfer {curve_text(latencies.transfer, 'requests')}",
        ),
    ]
    for name, text in lines:
        say(console, f"{name:<10}{text}")
    if latencies.attention.slope(moments.theta) == 0:
        say(
            console,
            "note: attention does not grow with context in these latencies; measured at one prompt "
            "length they hold for contexts like those only",
        )


def _interval(moments: "Moments") -> str:
    if moments.theta_low is None or moments.theta_high is None:
        return ""
    return (
        f" ({number(moments.theta_low)} to {number(moments.theta_high)} with "
        f"{moments.confidence:.0%} confidence)"
    )


def say(console: "Console", text: str) -> None:
    """A line of text as it is: no markup, no colours for numbers, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_rows(
    console: "Console",
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    bold: int | None = None,
    left: Sequence[str] = (),
) -> None:
    """A plain table below a title; numbers to the right, the columns in ``left`` to the left.

    Args:
        bold: index of the row that stands out.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        justify: Any = "left" if index == 0 or column in left else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(*row, style="bold" if index == bold else None)
    console.print()
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table, crop=False)


def write_json(
    path: Path | None, command: str, summary: Mapping[str, Any], details: Mapping[str, Any]
) -> None:
    """The same form as a benchmark's: a flat ``summary`` and ``details``; None writes nothing.

    Raises:
        PlannerError: the file cannot be written.
    """
    if path is None:
        return
    from benchmarks.report import make_report

    report = make_report(command, plain(summary), plain(details))
    write_text(path, json.dumps(report, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file; parent folders are made.

    Raises:
        PlannerError: it cannot be written.
    """
    from planner.errors import PlannerError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlannerError(f"cannot write {path}: {error.strerror or error}") from None


def plain(value: Any) -> Any:
    """Nothing but what JSON has: infinities and not-a-numbers become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if hasattr(value, "tolist"):  # numpy's scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
