"""``afflux policy``: what decides how many actors there are, and why it decided as it did."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from afflux import policy_replay
from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from rich.console import Console

    from autoscaler.journal import DecisionReport

app = typer.Typer(
    no_args_is_help=True,
    help="Who decides how many actors there are: look, change, try, replay, tune.",
)

Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the policy; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
POLL_S = 1.0


class ModeName(StrEnum):
    """Whether the controller acts."""

    on = "on"
    advise = "advise"


@app.command("list")
def list_(
    policy: Annotated[
        str | None, typer.Argument(help="One of them, with what its parameters mean.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the policies that are installed and their parameters."""
    import json

    from rich.console import Console
    from rich.table import Table

    from autoscaler import registry

    known = registry.names() if policy is None else {policy: policy}
    if as_json:
        schemas = {name: registry.find(name).Parameters.model_json_schema() for name in known}
        typer.echo(json.dumps(schemas, indent=2))
        return
    console = Console()
    table = Table("policy", "parameter", "default", *(["meaning"] if policy else []))
    for name in known:
        kind = registry.find(name)
        if policy is not None:
            console.print((kind.__doc__ or "").strip(), markup=False)
        fields = kind.Parameters.model_fields
        for place, (key, field) in enumerate(fields.items()):
            default = (
                "(required)"
                if field.is_required()
                else str(field.get_default(call_default_factory=False))
            )
            meaning = [" ".join((field.description or "").split())] if policy else []
            table.add_row("" if place else name, key, default, *meaning)
        if not fields:
            table.add_row(name, "", "")
        table.add_section()
    console.print(table)


@app.command()
def get(name: Name = DEFAULT_NAME, address: Address = None, as_json: Json = False) -> None:
    """Show the policy in force, its parameters and limits, and its last decision."""
    import json

    from autoscaler import launch

    state = launch.state(name, address=address)
    if as_json:
        typer.echo(json.dumps(state, indent=2))
        return
    _print_state(state)


@app.command("set")
def set_(
    policy: Annotated[
        str | None, typer.Argument(help="Policy to decide from now on; the same one if left out.")
    ] = None,
    sets: Sets = None,
    mode: Annotated[
        ModeName | None, typer.Option(help="on acts; advise only says what it would do.")
    ] = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Change policy, parameters or mode while serving. Parameters left out get their defaults."""
    if policy is None and sets is None and mode is None:
        raise typer.BadParameter("name a policy, or give --set or --mode")
    parameters = None if sets is None and policy is None else parse_sets(sets or [])
    from autoscaler import launch

    state = launch.set_policy(
        name, policy, parameters, None if mode is None else mode.value, address=address
    )
    _print_state(state)


@app.command("try")
def try_(
    policy: Annotated[str, typer.Argument(help="What to ask.")],
    sets: Sets = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
    as_json: Json = False,
) -> None:
    """Ask a policy what it would do now, on what the controller sees. Nothing is changed."""
    from rich.console import Console

    from autoscaler import launch

    report = launch.try_policy(name, policy, parse_sets(sets or []), address=address)
    if as_json:
        typer.echo(report.model_dump_json(indent=2))
        return
    print_decisions(Console(), [report], title=f"{policy} would do")


@app.command()
def pause(name: Name = DEFAULT_NAME, address: Address = None) -> None:
    """Change nothing from now on; decisions are still made and shown."""
    from autoscaler import launch

    launch.pause(name, address=address)
    typer.echo(f"the controller of {name} is paused; go on with: afflux policy resume")


@app.command()
def resume(name: Name = DEFAULT_NAME, address: Address = None) -> None:
    """Act again."""
    from autoscaler import launch

    launch.resume(name, address=address)
    typer.echo(f"the controller of {name} acts again")


@app.command()
def log(
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="The newest so many.")] = 20,
    acted: Annotated[
        bool, typer.Option("--acted", help="Only those that changed something.")
    ] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    name: Name = DEFAULT_NAME,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON, a line each.")] = False,
) -> None:
    """Show what the controller decided and why."""
    from rich.console import Console

    from autoscaler import launch
    from cluster.connection import manager_of

    console = Console()
    with manager_of(name, address):  # one connection for all looks
        seen = 0
        while True:
            found = launch.decisions(name, since=seen, limit=limit, acted=acted, address=address)
            seen = max([seen, *(report.number for report in found)])
            if as_json:
                for report in found:
                    typer.echo(report.model_dump_json())
            elif found:
                print_decisions(console, found)
            if not follow:
                return
            time.sleep(POLL_S)


app.command("replay", epilog=policy_replay.REPLAY_EPILOG)(policy_replay.replay)
app.command("tune", epilog=policy_replay.TUNE_EPILOG)(policy_replay.tune)


def parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    """Texts ``a.b=c`` as nested parameters; values are read as YAML.

    Raises:
        typer.BadParameter: a text that is none.
    """
    from cluster.spec_text import parse_override, with_override

    data: dict[str, Any] = {}
    for text in sets:
        try:
            key, value = parse_override(text)
            data = with_override(data, key, value)
        except ValueError as error:
            raise typer.BadParameter(f"--set {text}: {error}") from None
    return data


def print_decisions(
    console: Console, reports: Sequence[DecisionReport], title: str | None = None
) -> None:
    """A table of decisions, newest last."""
    from rich.table import Table

    table = Table("time", "there", "wants", "does", "reasons", "detail", title=title)
    for report in reports:
        does = report.target or ("rebalance" if report.rebalance else "-")
        if report.outcome and report.acted:
            does += f" ({report.outcome})"
        table.add_row(
            time.strftime("%H:%M:%S", time.localtime(report.time)),
            report.there,
            report.proposed or "-",
            does,
            ", ".join(report.reasons),
            report.detail,
        )
    console.print(table)


def _print_state(state: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from autoscaler.journal import DecisionReport

    console = Console()
    table = Table("what", "value", show_header=False)
    mode = "paused" if state["paused"] else state["mode"]
    table.add_row("policy", state["policy"])
    table.add_row("mode", mode)
    given = state["parameters"]
    table.add_row(
        "parameters", "\n".join(f"{k}={v}" for k, v in given.items()) or "all at their defaults"
    )
    limits, timing = state["limits"], state["timing"]
    for role in ("attention", "ffn"):
        table.add_row(f"{role} actors", "{}..{}".format(*limits[role]))
    total = [limits["min_total"], limits["max_total"]]
    table.add_row("both together", "..".join("" if n is None else str(n) for n in total) or "-")
    table.add_row("most at a time", str(limits["max_step"]))
    table.add_row("targets", f"TTFT {state['slo']['ttft']:g} s, TPOT {state['slo']['tpot']:g} s")
    table.add_row("looks every", f"{timing['interval']:g} s")
    table.add_row(
        "cool-down", f"{timing['cooldown']:g} s, {timing['shrink_cooldown']:g} s to shrink"
    )
    console.print(table)
    if state["last"] is not None:
        print_decisions(console, [DecisionReport.model_validate(state["last"])], "last decision")
