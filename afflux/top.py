"""``afflux top``: what every actor does right now, again and again, in a terminal.

Numbers come from the processes' own metrics, so no Prometheus is needed; the last changes from the
manager. Text and JSON only, so it works over SSH.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from actors.errors import AffluxError
from afflux.up import DEFAULT_NAME, Address, Name

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.status import ChangeReport
    from dashboards.scrape import Scraper
    from dashboards.top import History, View

    Frame = tuple[View, list[ChangeReport], str]
    """What is shown at one time: metrics, changes (newest last), a note."""

EVENTS = 6

MetricsUrl = Annotated[
    str | None,
    typer.Option(
        "--metrics-url",
        metavar="URL",
        help="The manager's metrics, as in http://host:9464 (see afflux status); without it the "
        "manager is asked over Ray.",
    ),
]


def top(
    once: Annotated[
        bool, typer.Option("--once", help="Look once, one interval long, and end.")
    ] = False,
    interval: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="How often; rates are of it.")
    ] = 1.0,
    window: Annotated[
        float, typer.Option(min=1.0, metavar="SECONDS", help="What percentiles are of.")
    ] = 60.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="JSON, one line each time; seconds and shares.")
    ] = False,
    metrics_url: MetricsUrl = None,
    name: Name = DEFAULT_NAME,
    address: Address = None,
) -> None:
    """Watch actors, lanes, hops, tokens and latencies live.

    With --once percentiles are of everything since the processes began. With --metrics-url nobody
    asks Ray, so changes are not shown.
    """
    from rich.console import Console

    from dashboards.scrape import Scraper
    from dashboards.top import History

    if metrics_url is None:
        with _asked(name, address, interval) as (url, changes):
            frames = _frames(Scraper(url), History(window), interval, changes, once=once)
            _show(frames, Console(), as_json=as_json, once=once)
    else:
        frames = _frames(Scraper(metrics_url), History(window), interval, _nothing, once=once)
        _show(frames, Console(), as_json=as_json, once=once)


def metrics_url_of(name: str, address: str | None) -> str:
    """Where a deployment's manager serves metrics and service discovery.

    Raises:
        AffluxError: it is not running, or its metrics are off.
    """
    from cluster import verbs

    url = verbs.status(name, address=address).metrics_url
    if url is None:
        raise AffluxError(
            f"{name} runs without metrics; set metrics.enabled: true in its spec", "no_metrics"
        )
    return url


@contextmanager
def _asked(
    name: str, address: str | None, interval: float
) -> "Iterator[tuple[str, Callable[[], tuple[list[ChangeReport], str]]]]":
    """Inside, connected to the deployment: its metrics' URL, and its newest changes at any time.

    A thread asks for the changes, because a manager that hangs must not stop the display.
    """
    from cluster.connection import manager_of

    with manager_of(name, address):
        url = metrics_url_of(name, address)
        newest = _Newest(name, address, interval)
        newest.ask()
        newest.start()
        try:
            yield url, newest
        finally:
            newest.end()


class _Newest(threading.Thread):
    """Knows the last changes, and what went wrong when they were last asked for."""

    def __init__(self, name: str, address: str | None, interval: float):
        super().__init__(name="afflux-top-changes", daemon=True)
        self._deployment, self._address, self._interval = name, address, interval
        self._answer: tuple[list[ChangeReport], str] = ([], "")
        self._over = threading.Event()

    def __call__(self) -> "tuple[list[ChangeReport], str]":
        return self._answer

    def ask(self) -> None:
        """Ask once, now."""
        from cluster import verbs

        try:
            found = verbs.changes(self._deployment, limit=EVENTS, address=self._address)
            self._answer = (found, "")
        except Exception as error:  # whatever it is, the metrics are shown without
            self._answer = (self._answer[0], f"changes may be old: {error}")

    def run(self) -> None:
        while not self._over.wait(self._interval):
            self.ask()

    def end(self) -> None:
        """Stop asking; an answer that hangs is not waited for."""
        self._over.set()
        self.join(timeout=1.0)


def _nothing() -> "tuple[list[ChangeReport], str]":
    return [], ""


def _frames(
    scraper: "Scraper",
    history: "History",
    interval: float,
    changes: "Callable[[], tuple[list[ChangeReport], str]]",
    *,
    once: bool,
) -> "Iterator[Frame]":
    """What to show, one interval apart; with ``once`` a single frame, of one interval."""
    from dashboards.top import view

    if once:
        first = scraper.scrape()
        time.sleep(interval)
        yield view(scraper.scrape(), first), *changes()
        return
    while True:
        began = time.monotonic()
        yield history.add(scraper.scrape()), *changes()
        time.sleep(max(0.0, began + interval - time.monotonic()))


def _show(frames: "Iterator[Frame]", console: "Console", *, as_json: bool, once: bool) -> None:
    """Show every frame until there are no more or Ctrl-C, which is the usual end."""
    from rich.live import Live

    from afflux.top_view import top_view

    try:
        if as_json:
            for view, changes, note in frames:
                typer.echo(json.dumps(_data(view, changes, note), indent=2 if once else None))
        elif console.is_terminal and not once:
            with Live(console=console, auto_refresh=False, screen=True) as live:
                for frame in frames:
                    live.update(top_view(*frame), refresh=True)
        else:
            for frame in frames:
                console.print(top_view(*frame), crop=False)
                if not once:
                    console.print()
    except KeyboardInterrupt:
        pass


def _data(view: "View", changes: "list[ChangeReport]", note: str) -> dict[str, object]:
    found = [report.model_dump(mode="json") for report in changes]
    return {**view.as_dict(), "changes": found, "note": note}
