"""``afflux scale``, ``retire``, ``flip``, ``rebalance`` and ``changes``: who serves what.

Words in, the change's outcome out. Exit code 0: it is so now, or was so already; 1: refused, rolled
back, or not over in time.
"""

import re
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.errors import AffluxError
from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from cluster.status import ChangeReport, Role

FORM = "afflux scale attention=N ffn=M (either may be left out)"

Actor = Annotated[str, typer.Argument(metavar="ACTOR", help="As in ffn-1; see afflux status.")]
Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Wait until the change has ended, or only ask.")
]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.1, metavar="SECONDS", help="Wait no longer; the change goes on."),
]


class RoleName(StrEnum):
    """The two roles as words of the command line."""

    attention = "attention"
    ffn = "ffn"


def scale(
    counts: Annotated[
        list[str], typer.Argument(metavar="ROLE=N", help="As in attention=2 ffn=3; one is enough.")
    ],
    wait: Wait = True,
    timeout: Timeout = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Set the number of attention actors, of FFN actors, or both, while serving."""
    try:
        wanted = parse_counts(counts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    from cluster import verbs

    _carry_out(verbs.scale, name, wait=wait, timeout_s=timeout, address=address, **wanted)


def retire(
    actor: Actor,
    replace: Annotated[
        bool, typer.Option("--replace", help="Start another in its place first.")
    ] = False,
    wait: Wait = True,
    timeout: Timeout = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Take any one actor out of service; its requests and experts go to others."""
    from cluster import verbs

    _carry_out(
        verbs.retire, name, actor, replace=replace, wait=wait, timeout_s=timeout, address=address
    )


def flip(
    actor: Actor,
    to: Annotated[RoleName, typer.Option("--to", help="The role it gets.")],
    wait: Wait = True,
    timeout: Timeout = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Turn an attention actor into an FFN actor or back; their sum stays."""
    from cluster import verbs

    _carry_out(verbs.flip, name, actor, to=to.value, wait=wait, timeout_s=timeout, address=address)


def rebalance(
    wait: Wait = True,
    timeout: Timeout = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Place the experts anew, from their measured load."""
    from cluster import verbs

    _carry_out(verbs.rebalance, name, wait=wait, timeout_s=timeout, address=address)


def changes(
    name: Name = DEFAULT_NAME,
    address: Address = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest last.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Show what has changed, how long each phase took, and what failed."""
    from cluster import verbs

    reports = verbs.changes(name, limit=limit, address=address)
    if as_json:
        import json

        typer.echo(json.dumps([report.model_dump(mode="json") for report in reports], indent=2))
        return
    from rich.console import Console

    from afflux.tables import print_changes

    print_changes(Console(), reports)


def parse_counts(words: Sequence[str]) -> "dict[Role, int]":
    """``attention=2 ffn=3``, in any order, at least one, as numbers by role.

    Raises:
        ValueError: anything else; the text shows the word and the form.
    """
    roles: dict[str, Role] = {"attention": "attention", "ffn": "ffn"}
    counts: dict[Role, int] = {}
    for word in words:
        key, equals, number = word.partition("=")
        role = roles.get(key.strip().lower())
        if not equals or role is None:
            raise ValueError(f"cannot read {word!r}; expected {FORM}")
        if not re.fullmatch(r"[0-9]+", number.strip()):
            raise ValueError(f"{number!r} in {word!r} is no number of actors; expected {FORM}")
        if role in counts:
            raise ValueError(f"{role} is given twice; expected {FORM}")
        counts[role] = int(number)
    if not counts:
        raise ValueError(f"nothing to scale; expected {FORM}")
    return counts


def _carry_out(
    verb: "Callable[..., ChangeReport]", *words: str, wait: bool, **options: Any
) -> None:
    """Have a verb done, show how it goes, and end with its outcome's text and exit code."""
    from rich.console import Console

    from afflux.progress import ChangeProgress

    console = Console()
    progress = ChangeProgress(console)
    try:
        with progress:
            report = verb(*words, wait=wait, on_change=progress, **options)
    except KeyboardInterrupt:
        goes_on = "; the change goes on (afflux changes)" if progress.report else ""
        typer.echo(f"no longer waiting{goes_on}", err=True)
        raise typer.Exit(130) from None
    if not report.ended and wait:
        text = f"{what(report)} is in phase {report.phase} still; it goes on (afflux changes)"
        raise AffluxError(text, "not_ended")
    if report.phase == "rolled_back":
        raise AffluxError(f"{what(report)} was rolled back: {report.error}", "rolled_back")
    console.print(outcome(report), highlight=False, markup=False, soft_wrap=True)


def what(report: "ChangeReport") -> str:
    """The change in words: ``change 3 (scale attention 1 -> 2)``."""
    return f"change {report.number} ({report.verb} {report.text})"


def outcome(report: "ChangeReport") -> str:
    """What a change that went well has come to, on one line."""
    if report.phase == "noop":
        balanced = "no move of experts is worth its cost"
        return f"nothing to do: {balanced if report.verb == 'rebalance' else report.text}"
    if not report.ended:
        return f"under way: {what(report)}; see afflux changes"
    from afflux.tables import phases

    parts = [f"done: {what(report)} in {phases(report)}"]
    if report.started:
        parts.append(f"started {', '.join(report.started)}")
    if report.retired:
        parts.append(f"retired {', '.join(report.retired)}")
    if report.moved_experts:
        parts.append(f"moved {report.moved_experts} experts")
    if report.epoch is not None:
        parts.append(f"epoch {report.epoch}")
    return "; ".join(parts)
