"""Draws dashboards as PNG from what a Prometheus has: for the README, and to look at them here.

The panels, their queries, units and limits are those that Grafana gets (``picture.py``), so a
picture shows what a reader's own Grafana would. Tables are left out. Ended changes and lost actors
are vertical lines, from the manager's counters. How things look is ``plots.py``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from dashboards.ask import Line, over_time, scrape_interval_s
from dashboards.picture import Panel, Placed, choose, panels_of, place, variables
from dashboards.plots import Answer, Mark, NothingToDraw, Span, canvas, draw_panel
from dashboards.promql import substitute

POINTS = 240
"""Values of a line, at most."""


def draw(
    url: str,
    boards: Sequence[Mapping[str, Any]],
    start: float,
    end: float,
    folder: Path,
    *,
    titles: Sequence[str] = (),
) -> list[Path]:
    """Write one picture per dashboard, ``UID.png``; or one of chosen panels, ``panels.png``.

    Args:
        url: of the Prometheus, ``http://host:port``.
        boards: built dashboards, as Grafana's JSON.
        start, end: Unix seconds.
        folder: is made if it is not there.
        titles: of the panels to draw, in order; empty: every dashboard whole.

    Raises:
        ValueError: a panel that there is not; the text has those that there are.
        NoAnswer: Prometheus does not answer or refuses an expression.
        NothingToDraw: it has nothing of that time, or a file can't be written.
    """
    chosen = choose(boards, titles) if titles else []
    scrape_s = scrape_interval_s(url)
    span = Span(start, end, max((end - start) / POINTS, min(1.0, scrape_s)))
    marks = events(url, span)
    values = [
        variables(board, interval_s=span.step, scrape_s=scrape_s, range_s=end - start)
        for board in boards
    ]
    if titles:
        every = {name: value for known in values for name, value in known.items()}
        return [_picture(folder / "panels.png", url, "", chosen, every, span, marks)]
    return [
        _picture(folder / f"{board['uid']}.png", url, board["title"], panels_of(board), known,
                 span, marks)
        for board, known in zip(boards, values, strict=True)
    ]  # fmt: skip


def events(url: str, span: Span) -> list[Mark]:
    """Ended changes and lost actors, to within a step; oldest first.

    Raises:
        NoAnswer: Prometheus does not answer.
    """

    def grew(metric: str, *by: str, loss: bool) -> list[Mark]:
        expression = f"sum by ({', '.join(by)}) ({metric})"
        return [
            Mark(at, " ".join([*(line.labels.get(label, "") for label in by), *["lost"] * loss]),
                 loss)
            for line in over_time(url, expression, span.start, span.end, span.step)
            for at in increments(line)
        ]  # fmt: skip

    found = grew("afd_scale_events_total", "verb", "outcome", loss=False)
    found += grew("afd_actors_lost_total", "role", loss=True)
    return sorted(found, key=lambda mark: mark.at)


def increments(line: Line) -> list[float]:
    """When a counter grew. One that fell began anew, and its first value is no event."""
    steps = pairwise(zip(line.times, line.values, strict=True))
    return [at for (_, before), (at, value) in steps if value > before]


def _picture(
    path: Path,
    url: str,
    title: str,
    parts: Sequence[Panel | str],
    values: Mapping[str, str],
    span: Span,
    marks: Sequence[Mark],
) -> Path:
    placed, height = place(parts)
    answers = [_answer(url, one, values, span) for one in placed]
    if not any(lines for answer in answers for _, lines in answer):
        begin, end = (f"{datetime.fromtimestamp(at):%Y-%m-%d %H:%M:%S}"
                      for at in (span.start, span.end))  # fmt: skip
        raise NothingToDraw(
            f"Prometheus at {url} has no value for any panel from {begin} to {end}; expected a "
            "time in which it scraped the deployment"
        )
    with canvas(path, title, height) as (figure, box):
        for one, answer in zip(placed, answers, strict=True):
            draw_panel(figure, box, one, answer, span, marks)
    return path


def _answer(url: str, one: Placed, values: Mapping[str, str], span: Span) -> Answer:
    def ask(expression: str) -> list[Line]:
        filled = substitute(expression, values)
        return over_time(url, filled, span.start, span.end, span.step)

    queries = () if one.panel is None else one.panel.queries
    return [(query, ask(query.expression)) for query in queries]
