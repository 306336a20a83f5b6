"""``afflux status --watch``: the status again and again, in place on a terminal."""

from collections.abc import Iterator

import typer
from rich.console import Console
from rich.live import Live

from afflux.tables import status_view
from cluster.status import ClusterStatus


def show(reports: Iterator[ClusterStatus], console: Console, *, as_json: bool) -> None:
    """Show every report until there are no more or Ctrl-C, which is the usual end.

    Where nobody can redraw, every report is printed below the one before; as JSON, one line each.
    """
    try:
        if as_json:
            for report in reports:
                typer.echo(report.model_dump_json())
        elif console.is_terminal:
            with Live(console=console, auto_refresh=False, screen=False) as live:
                for report in reports:
                    live.update(status_view(report), refresh=True)
        else:
            for report in reports:
                console.print(status_view(report), crop=False)
                console.print()
    except KeyboardInterrupt:
        pass
