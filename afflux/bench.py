"""``afflux bench``: the measurements that the README quotes. They live in ``benchmarks/``."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure; every figure in the README comes from here.")

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
PngFile = Annotated[
    Path | None,
    typer.Option(
        "--png", metavar="FILE", help="The timeline; without it, beside the JSON, else here."
    ),
]
Concurrency = Annotated[int, typer.Option(min=1, help="Streams at a time.")]
Warm = Annotated[int, typer.Option("--warm-workers", min=0, help="As in the spec.")]
Emulate = Annotated[
    bool,
    typer.Option(
        "--emulate", help="Emulated devices: shows ratios on a small machine; results say so."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable."),
]


@app.command()
def dataplane(json_file: JsonFile = None) -> None:
    """Round trips and bandwidth of the data plane, beside raw NIXL and memcpy."""
    from benchmarks import dataplane as benchmark

    benchmark.run(json_path=json_file)


@app.command()
def decode(
    json_file: JsonFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two batches, to see it work.")] = False,
    split_only: Annotated[
        bool,
        typer.Option(
            "--split-only", help="Without plain vLLM: what the planner needs, and its check."
        ),
    ] = False,
    eager: Annotated[bool, typer.Option("--eager", help="Compile nothing.")] = False,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=256, help="Requests decoded together; repeatable.  [default: all]"),
    ] = None,
) -> None:
    """Decode with attention and experts apart, beside plain vLLM on the same cores.

    Also records stage times for 'afflux fit', and replays runs in the planner's simulator.
    """
    from benchmarks import decode as benchmark

    benchmark.run(
        json_path=json_file,
        batches=sorted(set(batch or benchmark.BATCHES)),
        quick=quick,
        plain=not split_only,
        eager_only=eager,
    )


@app.command(
    epilog="One thread: attention and experts at once, a core each; then what handing over costs. "
    "Two threads: each by itself on both cores. 'python -m benchmarks.planner_two_cores' predicts "
    "from what it writes whether AFD pays on two cores. All models take about six minutes; "
    "needs no deployment."
)
def kernels(
    json_file: JsonFile = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Of the bench models; repeatable.  [default: all]")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="For each of four parts of a model.")
    ] = 15.0,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Engines compile their models, as vLLM's default.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few settings, to see it work.")] = False,
) -> None:
    """Step times of attention and of experts by batch, context, tokens and experts held."""
    from benchmarks import kernels as benchmark

    effort = benchmark.QUICK if quick else benchmark.Effort(seconds=seconds)
    try:
        benchmark.run(json_file, models=model or (), effort=effort, compiled=compiled)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command(
    epilog="Starts a deployment of the embedded model in float32, runs every request once "
    "undisturbed, then 1A1F -> 2A1F -> 2A3F -> 1A2F -> 3A1F -> 1A1F and a flip each way under "
    "load, and compares every token. Takes the deployment down. Exit code 1 when a request failed, "
    "a token was wrong or a change was rolled back."
)
def elastic(
    json_file: JsonFile = None,
    png_file: PngFile = None,
    concurrency: Concurrency = 8,
    hold: Annotated[
        float, typer.Option(min=0.0, help="Seconds that each ratio serves before the next.")
    ] = 4.0,
    warm_workers: Warm = 1,
    cycles: Annotated[
        int,
        typer.Option(
            min=0, help="Then scale up and down this often, serve as long without, see what grows."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(help="Draws the requests.")] = 0,
    emulate: Emulate = False,
    set_: Overrides = None,
) -> None:
    """Change the numbers of actors on a script while requests stream."""
    from benchmarks import elastic as benchmark

    report = benchmark.run(
        json_file,
        png_file,
        concurrency=concurrency,
        hold_s=hold,
        warm_workers=warm_workers,
        cycles=cycles,
        seed=seed,
        emulate=emulate,
        overrides=set_ or (),
    )
    raise typer.Exit(0 if report["summary"]["clean"] else 1)


@app.command(
    epilog="Starts 2 attention and 3 FFN actors of the embedded model in float32 and runs every "
    "request once undisturbed. Scenarios: an attention actor killed; an FFN actor killed, with and "
    "without another holder of its experts; one frozen. Then random blows at actors and the "
    "manager, SIGSTOP included. Compares every token and takes the deployment down. Exit code 1 "
    "when a request failed, a token was wrong or the deployment did not become whole again."
)
def chaos(
    kills: Annotated[int, typer.Option(min=0, help="Random blows; 0 leaves them out.")] = 20,
    seed: Annotated[int, typer.Option(help="Draws requests, victims and moments.")] = 1,
    requests: Annotated[int, typer.Option(min=1, help="Requests to send at least.")] = 300,
    repeats: Annotated[
        int, typer.Option(min=0, help="Repetitions of each scenario; 0 leaves them out.")
    ] = 3,
    json_file: JsonFile = None,
    png_file: PngFile = None,
    concurrency: Concurrency = 8,
    warm_workers: Warm = 1,
    timeout: Annotated[
        float, typer.Option(min=0.1, help="The spec's transport.timeout_s, in seconds.")
    ] = 2.0,
    frontend: Annotated[
        bool,
        typer.Option("--frontend", help="Kill HTTP replicas too; what they carried is cut."),
    ] = False,
    emulate: Emulate = False,
    set_: Overrides = None,
) -> None:
    """Kill and freeze processes while requests stream."""
    from benchmarks import chaos as benchmark

    report = benchmark.run(
        json_file,
        png_file,
        kills=kills,
        seed=seed,
        requests=requests,
        repeats=repeats,
        concurrency=concurrency,
        warm_workers=warm_workers,
        timeout_s=timeout,
        frontend=frontend,
        emulate=emulate,
        overrides=set_ or (),
    )
    raise typer.Exit(0 if report["summary"]["clean"] else 1)


@app.command(
    epilog="The published cases of arXiv 2601.21351 beside ours, then the best ratio by theory and "
    "by simulation over a grid of workloads. The recorded traces take part if they are in "
    "../shared/data. Takes minutes; needs no deployment."
)
def sizing(
    json_file: JsonFile = None,
    png_file: Annotated[
        Path | None, typer.Option("--png", metavar="FILE", help="Also draw the grid.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A fifth of the work, to see it work.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; without it one per core.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the requests.")] = 0,
) -> None:
    """Theory of the attention/FFN ratio against the simulator and the published figures."""
    from afflux.progress import WorkProgress
    from benchmarks import sizing as benchmark

    with WorkProgress() as progress:
        benchmark.run(json_file, png_file, quick=quick, jobs=jobs, seed=seed, progress=progress)


@app.command(
    epilog="One attention and one FFN process on a core each, decoding; both are scraped every "
    "second while metrics are on. What counts is the median ratio of the pairs. Exit code 1 when "
    "metrics cost 2 % or more."
)
def metrics(
    json_file: JsonFile = None,
    batch: Annotated[int, typer.Option(min=1, max=256, help="Requests decoded together.")] = 64,
    tokens: Annotated[int, typer.Option(min=8, max=900, help="Tokens of each request.")] = 120,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 5,
) -> None:
    """Decode throughput with metrics on and off."""
    from benchmarks import metrics_cost as benchmark

    report = benchmark.run(json_file, batch=batch, tokens=tokens, count=pairs)
    raise typer.Exit(0 if report["summary"]["within_target"] else 1)


@app.command(
    epilog="Starts a deployment of 8 emulated devices. Every policy begins with 4 attention and 4 "
    "FFN actors; then the scenario is repeated with each split of the budget fixed. shift: chat, "
    "then long contexts, then chat; mix: five phases; steady: one kind; trace: --trace FILE. "
    "Emulated: stage times are modelled, everything else is real. Nine runs take about 75 minutes; "
    "--only optimal_ratio --only 4A4F takes 20. Takes the deployment down. Exit "
    "code 1 when a policy lost a request, changed more than twice in a phase, went back and forth, "
    "or held the targets for fewer requests than the best static split."
)
def slo(
    scenario: Annotated[str, typer.Option(help="shift, mix, steady or trace.")] = "shift",
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", metavar="POLICY|SPLIT", help="Run this alone: a policy, 3A5F, or static."
        ),
    ] = None,
    duration: Annotated[
        float, typer.Option(min=1.0, help="Seconds of steady; the most of a trace.")
    ] = 600.0,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Azure CSV or Mooncake JSONL, for --scenario trace."),
    ] = None,
    speed: Annotated[float, typer.Option(help="Times faster than the trace was recorded.")] = 1.0,
    quick: Annotated[bool, typer.Option("--quick", help="Phases of a third, for a look.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Draws the requests.")] = 0,
    json_file: JsonFile = None,
    png_file: PngFile = None,
    warm_workers: Warm = 3,
    set_: Overrides = None,
) -> None:
    """Hold the targets while the load shifts: policies beside every static split."""
    from benchmarks import scenarios, slo_runs
    from benchmarks import slo as benchmark
    from planner.errors import PlannerError
    from planner.traces import read_trace

    try:
        slo_runs.plan(only or ())
        if scenario == scenarios.TRACE:
            if trace is None:
                raise typer.BadParameter("give the file with --trace", param_hint="'--scenario'")
            drawn = scenarios.from_trace(
                read_trace(trace), speed=speed, room=benchmark.ROOM, limit_s=duration
            )
        else:
            phases = scenarios.phases_of(scenario, quick=quick, duration=duration)
            drawn = scenarios.draw(scenario, phases, seed=seed, room=benchmark.ROOM)
    except (ValueError, PlannerError) as error:
        raise typer.BadParameter(str(error)) from None
    report = benchmark.run(
        drawn,
        json_file,
        png_file,
        only=only or (),
        warm_workers=warm_workers,
        overrides=set_ or (),
    )
    raise typer.Exit(0 if report["summary"].get("holds", True) else 1)


@app.command(
    name="slo-replay",
    epilog="Every run of the file is simulated with its own requests, changes and fitted stage "
    "times, and with these a little shorter and longer. Takes seconds; needs no deployment.",
)
def slo_replay(
    recorded: Annotated[Path, typer.Argument(metavar="FILE", help="Written by bench slo --json.")],
    percent: Annotated[
        float, typer.Option(min=0.1, max=50.0, help="Of stage times, less and more.")
    ] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="The recorded run's.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Repeat a recorded bench slo in the simulator, beside what was measured."""
    from afflux.progress import WorkProgress
    from benchmarks import slo_replay as benchmark

    try:
        with WorkProgress() as progress:
            benchmark.run(recorded, json_file, percent=percent, seed=seed, progress=progress)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="FILE") from None


@app.command(
    epilog="Needs the recorded traces in ../shared/data, or in --traces. Every trace's hour is "
    "made into a day: how the rate moves over it is assumed, and said with the result. All fixed "
    "numbers of actors are simulated until the best is found, for the day and for every hour by "
    "itself, then the policies. A day takes tens of minutes to an hour; needs no deployment. Exit "
    "code 1: a trace has no policy within a point of the best fixed numbers at 30 % fewer "
    "actor-seconds."
)
def autoscale(
    trace: Annotated[
        list[str] | None, typer.Option("--trace", help="azure, azure4x or mooncake; repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", help="What to try; repeatable.")
    ] = None,
    hours: Annotated[
        float, typer.Option(min=0.01, max=24.0, help="Of the day, from midnight.")
    ] = 24.0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; without it one per core.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the day.")] = 0,
    traces: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where the recorded traces are.")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Go on from the simulations in this file, and add to it. Simulations of another "
            "day are left alone; delete it when simulator or policy have changed.",
        ),
    ] = None,
    json_file: JsonFile = None,
    png_file: PngFile = None,
) -> None:
    """Policies over a simulated day, beside the best fixed numbers of actors in hindsight."""
    from afflux.progress import WorkProgress
    from benchmarks import autoscale as benchmark

    with WorkProgress() as progress:
        report = benchmark.run_days(
            json_file,
            png_file,
            cases=trace or (),
            policies=policy or (),
            hours=hours,
            jobs=jobs,
            seed=seed,
            traces=traces,
            resume=resume,
            progress=progress,
        )
    raise typer.Exit(0 if report["summary"]["met"] else 1)
