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
        int, typer.Option(min=0, help="Then scale up and down this often and see what grows.")
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
