"""``afflux dashboards``: Grafana dashboards, rules and alerts: build, check, push, annotate."""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from actors.errors import AffluxError
from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from dashboards.annotate import Annotation

app = typer.Typer(
    help="Grafana dashboards: build their JSON, check it, push it, annotate changes.",
    no_args_is_help=True,
)

_TOKEN = "GRAFANA_TOKEN"
_HISTORY = 100

Url = Annotated[
    str, typer.Option(envvar="GRAFANA_URL", help=f"Grafana; its token is read from {_TOKEN}.")
]


@app.command()
def build(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")
    ] = Path("dashboards-json"),
) -> None:
    """Write the dashboards as JSON files, for Grafana's import or provisioning."""
    from dashboards.build import write

    for file in write(output):
        typer.echo(str(file))


@app.command()
def check() -> None:
    """Check dashboards, rules and alerts: schema, linter's rules, metrics, PromQL, alert tests."""
    from dashboards import coverage, lint, promtool, rules, schema
    from dashboards.build import build_all
    from dashboards.expressions import expressions

    pages, found = build_all(), []
    for uid, page in pages.items():
        found += [f"{uid}: {problem}" for problem in (*schema.problems(page), *lint.problems(page))]
    asked = expressions()
    found += coverage.problems(asked)
    with_promtool = promtool.find() is not None
    if with_promtool:
        found += promtool.problems(one.expr for one in asked)
    else:
        typer.echo(f"left out: {promtool.HOW_TO_GET_IT}", err=True)
    for problem in found:
        typer.echo(problem, err=True)
    if found:
        raise AffluxError(f"{len(found)} problems in dashboards and rules", "bad_dashboards")
    alerts = sum(rule.alert for rule in rules.load())
    tried = ", alert tests run" if with_promtool else ""
    typer.echo(f"{len(pages)} dashboards, {alerts} alerts, {len(asked)} expressions: ok{tried}")


@app.command()
def push(
    url: Url = "http://127.0.0.1:3000",
    folder: Annotated[str, typer.Option(help="Grafana's folder; made if needed.")] = "afflux",
) -> None:
    """Make the dashboards in a Grafana what they should be; what is so already is left alone."""
    from dashboards.build import build_all
    from dashboards.push import push as push_all

    for one in push_all(url, os.environ.get(_TOKEN, ""), folder, build_all()):
        typer.echo(f"{one.outcome}: {one.title}  {one.url}")


@app.command()
def annotate(
    url: Url = "http://127.0.0.1:3000",
    once: Annotated[
        bool, typer.Option("--once", help="Write what has changed so far, and end.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.2, metavar="SECONDS", help="How often to look.")
    ] = 2.0,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Mark every change, decision and failure of a deployment on the dashboards, until Ctrl-C."""
    from dashboards.annotate import Annotator, follow

    annotator = Annotator(url, os.environ.get(_TOKEN, ""))
    try:
        follow(name, _looks(name, address, once, interval), annotator, time.time, _say)
    except KeyboardInterrupt:
        pass


def _say(annotation: "Annotation", written: str) -> None:
    typer.echo(f"{written}: {annotation.text}")


_Reports = Iterable[Mapping[str, Any]]


def _looks(
    name: str, address: str | None, once: bool, interval: float
) -> Iterator[tuple[_Reports, _Reports, _Reports]]:
    """Changes, new events and decisions, again and again over one connection.

    A manager or controller that is away is waited for.
    """
    from cluster import companion
    from cluster.connection import ASK_S, ManagerAway, get, manager_of

    with manager_of(name, address) as manager:
        # events carry no time of day, so those from before can't be placed
        seen = max((event.number for event in get(manager.events.remote(), ASK_S)), default=0)
        while True:
            try:
                changes = get(manager.history.remote(_HISTORY), ASK_S)
                events = get(manager.events.remote(seen), ASK_S)
            except ManagerAway:
                if once:
                    raise
                changes, events, seen = [], [], 0  # a new manager counts its events anew
            seen = max((event.number for event in events), default=seen)
            decisions = []
            controller = companion.find(name)
            if controller is not None:
                with suppress(ManagerAway):
                    decisions = get(controller.decisions.remote(0, _HISTORY, True), ASK_S)
            dumped = ([one.model_dump() for one in part] for part in (changes, events, decisions))
            yield tuple(dumped)  # type: ignore[misc]
            if once:
                return
            time.sleep(interval)
