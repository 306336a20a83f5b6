"""What commands show while one waits: in place on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.status import ActorEvent, ChangeReport

STEPS = ("placed", "importing", "loading", "connected", "ready")


class StartProgress:
    """Give it to the launcher as ``on_event``; use it as a context manager.

    On a terminal the newest event of every actor is one row of a table that is redrawn in place.
    Elsewhere every event is a line as it comes, so that logs of a build show where time went.
    """

    def __init__(self, console: Console):
        self._console = console
        self._newest: dict[str, ActorEvent] = {}
        self._note = ""
        self._live = Live(console=console, refresh_per_second=8, get_renderable=self._table)

    def __enter__(self) -> StartProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, event: ActorEvent) -> None:
        if event.actor:
            self._newest[event.actor] = event
        else:
            self._note = event.detail or event.state
        if not self._console.is_terminal:
            what = f"{event.actor:<14} {event.state:<10}" if event.actor else f"{'cluster':<14}"
            line = f"{event.seconds:6.1f}s  {what} {event.detail}".rstrip()
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = Table(box=None, pad_edge=False, caption=self._note or None, caption_justify="left")
        for title in ("actor", *STEPS, "seconds", ""):
            table.add_column(title, justify="right" if title == "seconds" else "left", no_wrap=True)
        for name in sorted(self._newest):
            event = self._newest[name]
            table.add_row(name, *_ticks(event.state), f"{event.seconds:.1f}", event.detail)
        return table


def _ticks(state: str) -> list[str]:
    """One cell per step: done, under way, or still to come."""
    if state in ("failed", "stopped"):
        return [f"[red]{state}[/]", *[""] * (len(STEPS) - 1)]
    if state in ("warm", "draining", "retired"):  # a worker without a role, or one that leaves
        return [f"[green]{state}[/]", *[""] * (len(STEPS) - 1)]
    state = "importing" if state == "starting" else state
    if state not in STEPS:  # waiting for a place
        return ["[yellow]…[/]", *["[dim]·[/]"] * (len(STEPS) - 1)]
    reached = STEPS.index(state)
    cells = ["[green]✓[/]"] * reached + ["[dim]·[/]"] * (len(STEPS) - reached)
    # "placed", "connected" and "ready" are done when they are reported; the others just began.
    cells[reached] = "[yellow]…[/]" if state in ("importing", "loading") else "[green]✓[/]"
    return cells


class ChangeProgress:
    """Give it to a verb as ``on_change``; use it as a context manager.

    On a terminal the change's phase and its age are one line that is redrawn in place; elsewhere
    every new phase is a line. ``report`` is the newest one.
    """

    def __init__(self, console: Console):
        self._console = console
        self.report: ChangeReport | None = None
        self._live = Live(
            console=console, refresh_per_second=8, transient=True, get_renderable=self._line
        )

    def __enter__(self) -> ChangeProgress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, report: ChangeReport) -> None:
        news = self.report is None or self.report.phase != report.phase
        self.report = report
        if news and not report.ended and not self._console.is_terminal:
            self._console.print(self._line(), soft_wrap=True)

    def _line(self) -> Text:
        report = self.report
        if report is None:
            return Text("asking the manager")
        age = max(0.0, time.time() - report.started_at)
        text = f"{age:6.1f}s  change {report.number}  {report.verb} {report.text}: {report.phase}"
        return Text(text, no_wrap=True, overflow="ellipsis")


class WorkProgress:
    """For work that knows how far it is: call it with what is being done and the share done.

    On a terminal a bar with the time left, gone when the work is over; elsewhere a line when ten
    seconds have passed since the last one, so that quick work prints nothing. It writes to stderr,
    for stdout is the result's.
    """

    EVERY_S = 10.0

    def __init__(self, console: Console | None = None):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=1.0)
        self._said = time.monotonic()

    def __enter__(self) -> WorkProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, text: str, share: float) -> None:
        """Say what is being done and the share of the work, 0..1, that is over."""
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, completed=share)
        elif time.monotonic() - self._said >= self.EVERY_S:
            self._said = time.monotonic()
            line = f"{100 * share:3.0f} %  {text}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)
