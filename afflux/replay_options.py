"""The options that ``afflux policy replay`` and ``tune`` share. What becomes of them:
``replay_given``."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from afflux.planning import LatencyName, ModelName, TraceFile

TelemetryFile = Annotated[
    Path | None,
    typer.Option(
        "--telemetry",
        metavar="FILE",
        help="A recording (afflux telemetry record): its requests, stage times and targets.",
    ),
]
SpecFile = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        metavar="FILE",
        help="A deployment's spec: its policy, targets, bounds and timing.",
    ),
]
TARGETS, ACTORS, TIMES, SYSTEM = "Targets", "Actors", "Timing", "System"
"""Panels of the help."""


def _option(name: str, text: str, panel: str | None = None, **more: Any) -> Any:
    option = typer.Option(name, help=text, rich_help_panel=panel, show_default=False, **more)
    return field(default=None, metadata={"option": option})


@dataclass(frozen=True, kw_only=True)
class Given:
    """The options that both commands have."""

    trace: TraceFile = None
    telemetry: TelemetryFile = None
    latency: LatencyName = None
    model: ModelName = None
    spec: SpecFile = None
    rate: float | None = _option("--rate", "Requests per second; the trace's own without it.")
    requests: int | None = _option(
        "--requests", "Only so many of the first rows of --trace.", min=1
    )
    slo_ttft: float | None = _option("--slo-ttft", "Time to first token, seconds.", TARGETS)
    slo_tpot: float | None = _option("--slo-tpot", "Time per output token, seconds.", TARGETS)
    percentile: float | None = _option(
        "--percentile", "Share of requests that must meet both.", TARGETS
    )
    attention: int | None = _option("--attention", "Attention actors at the start.", ACTORS, min=1)
    ffn: int | None = _option("--ffn", "FFN actors at the start.", ACTORS, min=1)
    attention_min: int | None = _option("--attention-min", "The fewest.", ACTORS, min=1)
    attention_max: int | None = _option("--attention-max", "The most.", ACTORS, min=1)
    ffn_min: int | None = _option("--ffn-min", "The fewest.", ACTORS, min=1)
    ffn_max: int | None = _option("--ffn-max", "The most.", ACTORS, min=1)
    min_total: int | None = _option("--min-total", "The fewest of both together.", ACTORS, min=2)
    max_total: int | None = _option(
        "--max-total", "The most; with the same --min-total a fixed budget.", ACTORS, min=2
    )
    max_step: int | None = _option(
        "--max-step", "The most of a role that one decision moves.", ACTORS, min=1
    )
    interval: float | None = _option("--interval", "Seconds between decisions.", TIMES)
    window: float | None = _option("--window", "Seconds that a decision looks at.", TIMES)
    cooldown: float | None = _option("--cooldown", "Seconds between changes.", TIMES)
    shrink_cooldown: float | None = _option(
        "--shrink-cooldown", "Seconds until anything shrinks.", TIMES
    )
    prepare: float | None = _option("--prepare", "Seconds until a started actor serves.", TIMES)
    drain: float | None = _option(
        "--drain", "Seconds that a retiring attention actor may go on.", TIMES
    )
    slots: int | None = _option("--slots", "Requests that one attention actor runs.", SYSTEM, min=1)
    lanes: int | None = _option("--lanes", "Lanes of a step.", SYSTEM, min=1)
    layers: int | None = _option(
        "--layers", "Rounds to the FFN actors in a step; 1 is quick.", SYSTEM, min=1
    )
    kv_tokens: int | None = _option(
        "--kv-tokens", "Context tokens of an attention actor.", SYSTEM, min=1
    )
    prefill_chunk: int | None = _option(
        "--prefill-chunk", "Prompt tokens in a step.", SYSTEM, min=1
    )
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same run.")] = 0


def with_given(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose first argument is a ``Given``, with its options in the place of it.

    Typer reads signatures; writing thirty options into each command would be the other way.
    """
    hints = get_type_hints(command, include_extras=True)
    own = [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(command).parameters.values())[1:]
    ]
    shared = [
        inspect.Parameter(
            entry.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=entry.default,
            annotation=Annotated[entry.type, entry.metadata["option"]]
            if entry.metadata
            else entry.type,
        )
        for entry in fields(Given)
    ]
    names = {parameter.name for parameter in shared}

    def wrapped(**options: Any) -> None:
        given = Given(**{name: options.pop(name) for name in names})
        command(given, **options)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*own, *shared]
    )
    wrapped.__annotations__ = {
        **{parameter.name: parameter.annotation for parameter in (*own, *shared)},
        "return": None,
    }
    return wrapped
