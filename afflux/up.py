"""``afflux up``, ``down`` and ``status``: the life of a deployment."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

DEFAULT_NAME = "afflux"
PIPE_COLUMNS = 140

Address = Annotated[
    str | None,
    typer.Option(
        envvar="RAY_ADDRESS",
        help="Ray cluster: HOST:PORT; auto: the one on this machine; local: always a new one. "
        "Without it: auto if there is one, else local.",
    ),
]
Name = Annotated[str, typer.Option(help="Name of the deployment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the spec; repeatable."),
]
SpecFile = Annotated[
    Path | None,
    typer.Argument(metavar="[SPEC]", help="Spec in YAML; without it, the embedded model's."),
]


def up(
    spec: SpecFile = None,
    set_: Overrides = None,
    address: Address = None,
    name: Annotated[str | None, typer.Option(help="Override the spec's name.")] = None,
    timeout: Annotated[
        float | None, typer.Option(min=1.0, help="Seconds to wait, in place of the spec's.")
    ] = None,
) -> None:
    """Start a deployment and wait until it answers."""
    from rich.console import Console

    from afflux.progress import StartProgress
    from cluster import preflight
    from cluster.spec import load_spec

    overrides = list(set_ or [])
    if name is not None:
        overrides.append(f"name={json.dumps(name)}")
    if timeout is not None:
        overrides.append(f"startup_timeout_s={timeout}")
    wanted = load_spec(spec, overrides)
    preflight.check_engine_args(wanted)
    checkpoint = preflight.check_model(wanted, spec)

    from cluster import launcher  # Ray is imported only once the spec is known to be good

    console = Console()
    console.print(
        f"[bold]{wanted.name}[/]: {wanted.served_name}, {len(checkpoint.moe_layers)} MoE layers "
        f"x {checkpoint.num_experts} experts on {wanted.attention.count} attention and "
        f"{wanted.ffn.count} FFN actors",
        highlight=False,
    )
    with StartProgress(console) as progress:
        handle = launcher.up(wanted, address=address, on_event=progress)
    if handle.already_running:
        console.print(f"{handle.name} was running already")
    console.print(f"ready: [bold]{handle.url}[/] (model {wanted.served_name})", highlight=False)
    flags = "" if handle.name == DEFAULT_NAME else f" --name {handle.name}"
    console.print(f"next:  afflux status{flags}; afflux down{flags}", highlight=False, style="dim")


def down(name: Name = DEFAULT_NAME, address: Address = None) -> None:
    """Stop a deployment, and Ray too if afflux started it."""
    from cluster import launcher

    report = launcher.down(name, address=address)
    if not report.found:
        typer.echo(f"{name} is not running")
    else:
        ray_too = ", and Ray with it" if report.stopped_ray else ""
        typer.echo(f"{name} is down: {len(report.actors)} actors stopped{ray_too}")
    if report.left:
        pids = ", ".join(str(pid) for pid in report.left)
        typer.echo(f"error: these processes did not end: {pids}", err=True)
        raise typer.Exit(1)


def status(
    name: Name = DEFAULT_NAME,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it again and again until Ctrl-C.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="How often with --watch.")
    ] = 1.0,
    topology: Annotated[
        bool,
        typer.Option("--topology", help="How far apart actors are, and what that costs, instead."),
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="With --topology: measure the links between nodes first (seconds)."
        ),
    ] = False,
) -> None:
    """Show a deployment's actors, their place, their experts and their health."""
    from cluster import verbs

    if probe and not topology:
        raise typer.BadParameter("only together with --topology", param_hint="--probe")
    if topology:
        if watch:
            raise typer.BadParameter("not together with --watch", param_hint="--topology")
        _topology(name, address, as_json=as_json, probe=probe)
        return
    if watch:
        from rich.console import Console

        from afflux import watch as watching

        reports = verbs.watch(name, interval_s=interval, address=address)
        watching.show(reports, Console(), as_json=as_json)
        return
    report = verbs.status(name, address=address)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    from rich.console import Console

    from afflux.tables import print_status

    print_status(Console(), report)


def _topology(name: str, address: str | None, *, as_json: bool, probe: bool) -> None:
    from rich.console import Console

    from afflux.tables import print_topology
    from cluster import verbs

    found = verbs.topology(name, probe=probe, address=address)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        # a file or a pipe has no width of its own, and half an address is none
        print_topology(Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS), found)
