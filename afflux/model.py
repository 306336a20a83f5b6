"""``afflux model``: the latency model that policies decide with, and how far to trust it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afflux.planning import ModelName, curve_text, number, print_rows, say
from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from rich.console import Console

    from autoscaler.benchmarked import Benchmarked

app = typer.Typer(
    no_args_is_help=True,
    help="The latency model that policies decide with, and how far to trust it.",
)

LOADS = {
    "attention": "tokens of a lane",
    "ffn": "requests",
    "transfer": "tokens of a frame",
    "prefill": "prompt tokens",
    "outside": "requests of a step",
}
MOMENTS: tuple[tuple[str, str, float | None], ...] = (
    ("theta", "context of a running request", None),
    ("prompt_mean", "prompt", None),
    ("output_mean", "output tokens", None),
    ("prefix_hit", "share of prompts cached", 0.0),
    ("imbalance", "imbalance of the experts", 1.0),
)
"""Of the load: key, words, and the value that goes without saying."""

BenchmarkFile = Annotated[
    Path | None,
    typer.Option(
        "--benchmark",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Of the JSON of 'afflux bench decode' instead.",
    ),
]
RecordingFile = Annotated[
    Path | None,
    typer.Option(
        "--telemetry",
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="Of a recording of 'afflux telemetry record' instead.",
    ),
]


@app.command()
def show(
    benchmark: BenchmarkFile = None,
    telemetry: RecordingFile = None,
    model: ModelName = None,
    layers: Annotated[
        int | None,
        typer.Option(min=1, help="Of the benchmark's model, where its JSON does not say."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Show coefficients, confidence, and predicted against observed TPOT.

    Of the running deployment, or of what was measured or recorded earlier.
    """
    if benchmark is not None and telemetry is not None:
        raise typer.BadParameter("expected --benchmark or --telemetry, not both")
    from rich.console import Console

    console = Console()
    if benchmark is not None:
        _of_benchmark(console, benchmark, model, layers, as_json)
        return
    from autoscaler.journal import describe

    if telemetry is not None:
        from autoscaler.recorded import model_of

        data = describe(model_of(telemetry))
    else:
        from autoscaler import launch

        data = launch.model(name, address=address)
    if as_json:
        _print_json(data)
    elif data is None:
        typer.echo("there is no model yet: nothing was measured under load")
        raise typer.Exit(1)
    else:
        print_model(console, data)
        print_checks(console, data.get("checks") or ())


def print_model(console: "Console", data: Mapping[str, Any]) -> None:
    """Whether to trust it, its coefficients and its moments; ``data`` as ``describe`` makes it."""
    from planner.curves import read_curve

    latencies = data["latencies"]
    trust = "reliable" if data["reliable"] else f"NOT RELIABLE: {data['why']}"
    say(console, f"{trust}; stage times from {latencies.get('source') or 'a file'}")
    say(
        console,
        f"time per step of one lane through {data['layers']} layers, in {latencies['unit']}:",
    )
    for stage, load in LOADS.items():
        if stage not in latencies:
            continue
        text = curve_text(read_curve(stage, latencies[stage]), load)
        each = latencies.get("attention_per_request") if stage == "attention" else 0
        text += f" + {number(each)} × requests" if each else ""
        say(console, f"  {stage:<10}{text}")
        notes = [
            f"{what} {number(ends[0])} to {number(ends[1])}"
            for what, key in (("slope", "a"), ("intercept", "b"))
            if (ends := data["intervals"].get(f"{stage}.{key}"))
        ]
        if stage in data["samples"]:
            notes.append(f"{data['samples'][stage]} samples")
        if notes:
            say(
                console,
                f"  {'':<10}95 %: {', '.join(notes)}"
                if len(notes) > 1
                else f"  {'':<10}{notes[0]}",
            )
    load_text = ", ".join(
        f"{text} {number(data[key])}"
        for key, text, usual in MOMENTS
        if data.get(key) is not None and data[key] != usual
    )
    if load_text:
        say(console, f"the load: {load_text}")
    if data.get("level", 1.0) != 1.0:
        say(console, f"stage times: as measured, times {data['level']:.3g} by observed TPOT")
    if data.get("error") is not None:
        say(console, f"predicted TPOT is off by {data['error']:.1%} in the median")


def print_checks(console: "Console", checks: Sequence[Mapping[str, Any]]) -> None:
    """Recent windows: what was predicted for them before, and what was observed."""
    if not checks:
        say(console, "no window was compared with a prediction yet")
        return
    newest = checks[-1]["at"]
    print_rows(
        console,
        "Predicted against observed TPOT of the last windows, newest last",
        ("s ago", "actors", "requests", "context", "predicted s", "observed s", "off"),
        [
            (
                f"{newest - check['at']:.0f}",
                f"{check['attention']}A{check['ffn']}F",
                f"{check['running']:.1f}",
                f"{check['context']:.0f}",
                number(check["predicted"]),
                number(check["observed"]),
                f"{100 * (check['predicted'] / check['observed'] - 1):+.1f} %",
            )
            for check in checks
        ],
    )


def print_settings(console: "Console", found: "Benchmarked") -> None:
    """The benchmark's settings, predicted and observed, and the medians."""
    print_rows(
        console,
        "Predicted against observed TPOT, one attention and one FFN worker",
        ("batch", "lanes", "context", "observed s", "predicted s", "off", "left out of the fit"),
        [
            (
                f"{setting.requests:g}",
                str(setting.lanes),
                "-" if math.isnan(setting.context) else f"{setting.context:.0f}",
                number(setting.observed),
                number(setting.predicted),
                f"{100 * setting.error:+.1f} %",
                "-" if math.isnan(setting.held_out) else f"{100 * setting.held_out_error:+.1f} %",
            )
            for setting in found.settings
        ],
    )
    text = f"median error {found.model.error:.1%} over {len(found.settings)} settings"
    if math.isfinite(found.held_out_error):
        text += f"; {found.held_out_error:.1%} for settings left out of the fit"
    say(console, text)


def _of_benchmark(
    console: "Console", path: Path, name: str | None, layers: int | None, as_json: bool
) -> None:
    from autoscaler.benchmarked import model_of
    from autoscaler.journal import describe

    names = [name] if name is not None else _names(path)
    found = {one: model_of(path, one, layers=layers) for one in names}
    if as_json:
        _print_json(
            {
                one: {
                    **(describe(entry.model) or {}),
                    "held_out_error": entry.held_out_error,
                    "settings": [vars(setting) for setting in entry.settings],
                }
                for one, entry in found.items()
            }
        )
        return
    for one, entry in found.items():
        say(console, f"{path.name}, model {one}")
        print_model(console, describe(entry.model) or {})
        print_settings(console, entry)
    errors = [abs(setting.error) for entry in found.values() for setting in entry.settings]
    if errors and len(found) > 1:
        say(console, f"median error over all models {median(errors):.1%}")


def _names(path: Path) -> list[str]:
    """Models of a benchmark's JSON; [None] leaves it to the reader to say what is wrong."""
    import json

    from planner.errors import PlannerError

    try:
        details = json.loads(path.read_text(encoding="utf-8"))["details"]
        names = [name for name, entry in details.items() if "rows" in entry]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlannerError(
            f"{path}: expected the JSON that 'afflux bench decode' writes ({error!r})"
        ) from error
    if not names:
        raise PlannerError(f"{path} holds no model; make it anew: afflux bench decode")
    return names


def _print_json(data: Any) -> None:
    import json

    typer.echo(json.dumps(_plain(data), indent=2))


def _plain(data: Any) -> Any:
    """Without nan and infinity, which JSON has not."""
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list | tuple) else data
