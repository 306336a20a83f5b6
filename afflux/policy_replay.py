"""``afflux policy replay`` and ``afflux policy tune``: policies on recorded requests, simulated.

Words in, tables, JSON and pictures out; the numbers come from ``autoscaler.replay`` and ``tune``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afflux.planning import JsonFile, PngFile, say, write_json
from afflux.replay_given import prepare
from afflux.replay_options import Given, with_given
from afflux.replay_report import (
    print_outcomes,
    print_scenario,
    print_tuning,
    print_worst,
    replay_json,
    tuning_json,
)

if TYPE_CHECKING:
    from autoscaler.hindsight import Hindsight
    from autoscaler.replay import Outcome

REPLAY_EPILOG = (
    "For example: afflux policy replay --telemetry rec.jsonl --policy slo_feedback --set low=0.6 "
    "--png replay.png. Requests are simulated with the recording's stage times; nothing is served."
)
TUNE_EPILOG = (
    "Searches the policy's parameters within their bounds and the timing of the controller; "
    "--range NAME=LEAST:MOST narrows or adds, --set NAME=VALUE fixes. Prints the autoscaler "
    "section of the chosen point, to be pasted into a spec."
)
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="What decides; repeatable, to compare.  [default: the spec's, or slo_feedback]",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option("--policy", help="What to tune.  [default: the spec's, or slo_feedback]"),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the policy; repeatable."),
]
Ranges = Annotated[
    list[str] | None,
    typer.Option("--range", metavar="NAME=LEAST:MOST", help="What to search; repeatable."),
]


@with_given
def replay(
    given: Given,
    policy: Policies = None,
    sets: Sets = None,
    hindsight: Annotated[
        bool,
        typer.Option(
            "--hindsight", help="Also find the best fixed numbers of actors; takes many runs."
        ),
    ] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes for --hindsight.")] = None,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Replay recorded requests under a policy: what it holds, costs and changes."""
    from rich.console import Console

    from autoscaler import registry
    from autoscaler.hindsight import best_static
    from autoscaler.replay import run

    ready = prepare(given)
    asked = _policies(policy, sets, ready.spec)
    made = {name: registry.make(name, parameters) for name, parameters in asked.items()}
    console = Console()
    print_scenario(console, ready.scenario, ready.notes)
    outcomes: dict[str, Outcome] = {}
    best: Hindsight | None = None
    from afflux.progress import WorkProgress

    with WorkProgress() as progress:
        for index, (name, one) in enumerate(made.items()):
            progress(name, index / len(made))
            outcomes[name] = run(ready.scenario, one, seed=given.seed)
        if hindsight:
            best = best_static(ready.scenario, jobs=jobs, seed=given.seed, progress=progress)
    print_outcomes(console, outcomes, best)
    last = next(reversed(outcomes))
    print_worst(console, last, outcomes[last])
    summary, details = replay_json(ready.scenario, outcomes, best)
    write_json(json_file, "policy replay", summary, details)
    if png_file is not None:
        from autoscaler.replay_plots import draw_replay

        for name, outcome in outcomes.items():
            path = png_file
            if len(outcomes) > 1:
                path = png_file.with_stem(f"{png_file.stem}-{name.replace(':', '-')}")
            title = f"{name}: {ready.scenario.trace.source}, simulated"
            draw_replay(path, title, outcome, ready.scenario.slo)
            say(console, f"drawn: {path}")


@with_given
def tune(
    given: Given,
    policy: Policy = None,
    sets: Sets = None,
    ranges: Ranges = None,
    trials: Annotated[int, typer.Option(min=2, help="Replays in all.")] = 40,
    attainment: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Choose the cheapest with so much.  [default: the share in the targets]",
        ),
    ] = None,
    jobs: Annotated[
        int, typer.Option(min=1, help="Replays at a time; the search depends on it.")
    ] = 2,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Search a policy's parameters: attainment against actor-seconds, and a section to paste."""
    from rich.console import Console

    from afflux.progress import WorkProgress
    from autoscaler.knobs import knobs
    from autoscaler.tune import tune as search

    ready = prepare(given)
    default = "slo_feedback" if ready.spec is None else ready.spec.autoscaler.policy
    asked = _policies([policy or default], sets, ready.spec)
    (name, base), *_ = asked.items()
    try:
        bounds = dict(parse_range(text) for text in ranges or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--range'") from None
    turned = knobs(name, bounds, [text.partition("=")[0] for text in sets or ()])
    console = Console()
    print_scenario(console, ready.scenario, ready.notes)
    with WorkProgress() as progress:
        found = search(
            ready.scenario,
            name,
            turned,
            base=base,
            trials=trials,
            seed=given.seed,
            jobs=jobs,
            progress=progress,
        )
    goal = ready.scenario.slo.percentile if attainment is None else attainment
    chosen = found.chosen(goal)
    print_tuning(console, found, chosen, goal)
    write_json(json_file, "policy tune", *tuning_json(found, chosen, goal))
    if png_file is not None:
        from autoscaler.replay_plots import draw_front

        draw_front(png_file, f"{name}: {ready.scenario.trace.source}", found.trials, chosen)
        say(console, f"drawn: {png_file}")


def parse_range(text: str) -> tuple[str, tuple[float, float]]:
    """``low=0.4:0.8`` as a name and its bounds.

    Raises:
        ValueError: it is none.
    """
    name, _, bounds = text.partition("=")
    low, colon, high = bounds.partition(":")
    try:
        if name and colon:
            return name, (float(low), float(high))
    except ValueError:
        pass
    raise ValueError(f"{text!r} is no range; write NAME=LEAST:MOST, as in low=0.4:0.8")


def _policies(
    names: Sequence[str] | None, sets: Sequence[str] | None, spec: Any
) -> dict[str, dict[str, Any]]:
    """Policies and their parameters: those of the spec for the spec's own, else what was set."""
    from afflux.policy import parse_sets
    from autoscaler.knobs import nested

    own = {} if spec is None else {spec.autoscaler.policy: spec.autoscaler.parameters}
    chosen = list(names or own or ["slo_feedback"])
    given = parse_sets(sets or [])
    if given and len(chosen) > 1:
        raise typer.BadParameter(
            "--set is about one policy; replay them one by one to set parameters",
            param_hint="'--set'",
        )
    return {name: _merged(nested(own.get(name, {}), {}), given) for name in chosen}


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        old = base.get(key)
        base[key] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return base
