"""How each kind of panel is drawn with matplotlib: lines, areas, bars, numbers, heatmaps.

Given answers, draws them into cells of a grid that is Grafana's. Asks nobody.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from actors.errors import AffluxError
from dashboards.ask import Line
from dashboards.picture import COLUMNS, Panel, Placed, Query, legend
from dashboards.units import formatter

COLOURS = {
    "text": "#555555",
    "green": "#3a8f4d",
    "red": "#b3202c",
    "blue": "#2f6db5",
    "yellow": "#c79a1b",
    "orange": "#d9772b",
    "purple": "#7a4fa3",
    "transparent": "none",
}
"""Grafana's words for colours, as they look in all our pictures."""

ATTENTION, FFN = ("#2f6db5", "#7fb0de", "#1c4472"), ("#d9772b", "#efb27f", "#8f4712")
"""In every picture of the project attention is blue and the FFN side orange; actors take turns."""

_OTHERS = ("#2a8c7c", "#7a4fa3", "#b3202c", "#8a6d3b", "#6b6b6b", "#c79a1b", "#77b5a8", "#b294c7")
_CHANGE, _LOSS = "#7a4fa3", "#b3202c"
_CELL_W, _CELL_H = 0.62, 0.30  # inches
_MOST_NAMES = 9  # series that a legend names
_MOST_BARS = 16
_MOST_TEXTS = 12  # events with a text
_WIDE = 12  # cells of a panel with room for such texts
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


class NothingToDraw(AffluxError):
    """There is no value for any panel, or the file can't be written."""

    code = "nothing_to_draw"


@dataclass(frozen=True)
class Span:
    """What a picture is of: Unix seconds, and how far two values are apart."""

    start: float
    end: float
    step: float


@dataclass(frozen=True)
class Mark:
    """An event at ``at`` (Unix seconds)."""

    at: float
    text: str
    loss: bool = False


Answer = list[tuple[Query, list[Line]]]
"""What each query of a panel gave."""

Box = Callable[[int, int, int, int, tuple[float, float, float, float]], tuple[float, ...]]
"""From x, y, width, height in cells and margins (left, below, right, above) in inches to a
rectangle of a figure."""


@contextmanager
def canvas(path: Path, title: str, rows: int) -> Iterator[tuple[Any, Box]]:
    """A figure of so many rows of cells, written to ``path`` at the end.

    Raises:
        NothingToDraw: the file can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    head = 0.4 if title else 0.05
    width, height = COLUMNS * _CELL_W, rows * _CELL_H + head

    def box(
        x: int, y: int, w: int, h: int, margin: tuple[float, float, float, float]
    ) -> tuple[float, ...]:
        left, below, right, above = margin
        return (
            (x * _CELL_W + left) / width,
            (height - head - (y + h) * _CELL_H + below) / height,
            (w * _CELL_W - left - right) / width,
            (h * _CELL_H - below - above) / height,
        )

    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(width, height))
        try:
            if title:
                figure.text(0.1 / width, 1 - 0.3 / height, title, weight="bold", fontsize=14)
            yield figure, box
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=110, facecolor="white")
            except OSError as error:
                raise NothingToDraw(f"cannot write the picture {path}: {error}") from None
        finally:
            pyplot.close(figure)


def draw_panel(
    figure: Any, box: Box, one: Placed, answer: Answer, span: Span, marks: Sequence[Mark]
) -> None:
    """Draw a panel, or a heading, into its cells."""
    panel = one.panel
    if panel is None:
        left, below, _, _ = box(one.x, one.y, COLUMNS, 1, (0.1, 0.08, 0, 0))
        figure.text(left, below, one.title, weight="bold", fontsize=10, color="#333333")
        return
    lines = [(legend(query, line.labels), query, line) for query, found in answer for line in found]
    if panel.stacked:  # what is 0 all the time adds nothing but a name
        lines = [line for line in lines if any(value > 0 for value in line[2].values)] or lines[:1]
    axis = _axis(figure, box, one, panel, names=len(lines))
    if not any(math.isfinite(value) for _, _, line in lines for value in line.values):
        axis.text(0.5, 0.5, "no data", ha="center", va="center", color="#999999",
                  transform=axis.transAxes)  # fmt: skip
        axis.set_xticks([])
        axis.set_yticks([])
    elif panel.kind == "stat":
        _numbers(axis, panel, lines)
    elif panel.kind == "bargauge":
        _bars(axis, panel, lines)
    else:
        (_heat if panel.kind == "heatmap" else _lines)(axis, panel, lines, span)
        _events(axis, marks, texts=panel.width >= _WIDE and panel.kind == "timeseries")
        _times(axis, span)


Named = Sequence[tuple[str, Query, Line]]


def _lines(axis: Any, panel: Panel, lines: Named, span: Span) -> None:
    floor = {at: 0.0 for _, _, line in lines for at in line.times}
    floor = dict(sorted(floor.items()))
    colours = colours_of([name for name, _, _ in lines])
    for name, query, line in lines:
        colour = colour_of(query.colour) if query.colour else colours[name]
        if panel.stacked and not query.dashed:
            _area(axis, panel, span, line, floor, colour, name or panel.title)
            continue
        times, values = gaps(line, span.step)
        axis.plot(times, values, color=colour, label=name or panel.title, lw=1.4,
                  ls="--" if query.dashed else "-",
                  ds="steps-post" if panel.stepped else "default")  # fmt: skip
    for value, word in panel.limits:
        axis.axhline(value, color=colour_of(word), lw=0.9, ls=(0, (4, 3)))
    axis.yaxis.set_major_formatter(_ticks(panel))
    if panel.lowest is not None:
        axis.set_ylim(bottom=panel.lowest)
    if panel.highest is not None:
        axis.set_ylim(top=panel.highest)
    if len(lines) <= _MOST_NAMES:
        axis.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=_below(axis),
                    ncols=_columns(panel), fontsize=7, handlelength=1.2, columnspacing=1.0,
                    borderaxespad=0)  # fmt: skip
    else:
        axis.set_title(f"{len(lines)} series", loc="right", fontsize=7, color="#777777")


def _area(
    axis: Any,
    panel: Panel,
    span: Span,
    line: Line,
    floor: dict[float, float],
    colour: str,
    name: str,
) -> None:
    """On top of what is there; ``floor`` is that, by time, and grows. What is missing counts 0."""
    heights = dict(zip(line.times, np.nan_to_num(line.values).tolist(), strict=True))
    below = list(floor.values())
    for at, height in heights.items():
        floor[at] += height
    above, times = list(floor.values()), list(floor)
    if panel.bars:
        tall = [high - low for low, high in zip(below, above, strict=True)]
        axis.bar(times, tall, 2 * span.step, below, color=colour, label=name)
    else:
        axis.fill_between(times, below, above, color=colour, alpha=0.8, lw=0, label=name,
                          step="post" if panel.stepped else None)  # fmt: skip


def _heat(axis: Any, panel: Panel, lines: Named, span: Span) -> None:
    rows = sorted(((name, line) for name, _, line in lines), key=lambda row: _edge(row[0]))
    columns = sorted({at for _, line in rows for at in line.times})
    place = {at: n for n, at in enumerate(columns)}
    grid = np.zeros((len(rows), len(columns)))
    for row, (_, line) in enumerate(rows):
        grid[row, [place[at] for at in line.times]] = np.nan_to_num(line.values)
    if panel.cumulative:
        grid = np.diff(grid, axis=0, prepend=0.0)
    shown = np.ma.masked_less_equal(np.sqrt(np.maximum(grid, 0.0)), 0.0)
    edges = [*columns, columns[-1] + span.step]
    axis.pcolormesh(edges, range(len(rows) + 1), shown, cmap="Oranges", vmin=0)
    ticks = range(0, len(rows), max(1, math.ceil(len(rows) / 9)))
    at = 1.0 if panel.cumulative else 0.5  # a bucket's edge is its upper one
    names = [_edge_text(rows[tick][0], panel) for tick in ticks]
    axis.set_yticks([tick + at for tick in ticks], names)
    axis.grid(visible=False)


def _numbers(axis: Any, panel: Panel, lines: Named) -> None:
    shown = lines[:4]
    for row, (name, _, line) in enumerate(shown):
        value = line.values[-1]
        text, colour = panel.words.get(f"{value:g}") or (
            formatter(panel.unit)(value),
            _step_colour(panel, value),
        )
        alone = len(shown) == 1
        height = 1 - (row + 0.5) / len(shown)
        axis.text(0.5 if alone else 0.98, height, text, fontsize=15 if alone else 9,
                  weight="bold", color=colour_of(colour), va="center",
                  ha="center" if alone else "right", transform=axis.transAxes)  # fmt: skip
        if not alone:
            axis.text(0.02, height, name[:20], fontsize=7, va="center", transform=axis.transAxes)


def _bars(axis: Any, panel: Panel, lines: Named) -> None:
    latest = sorted(((line.values[-1], name) for name, _, line in lines), reverse=True)
    latest = latest[:_MOST_BARS][::-1]
    words = [_step_colour(panel, value) for value, _ in latest]
    axis.barh([name for _, name in latest], [value for value, _ in latest],
              color=[colour_of(word) for word in words])  # fmt: skip
    axis.xaxis.set_major_formatter(_ticks(panel))
    axis.set_xlim(0, panel.highest)
    axis.grid(axis="y", visible=False)


def gaps(line: Line, step: float) -> tuple[list[float], list[float]]:
    """Times and values of a line, with NaN where values are missing, so that nothing joins them."""
    times, values = list(line.times[:1]), list(line.values[:1])
    for (before, _), (at, value) in pairwise(zip(line.times, line.values, strict=True)):
        if at - before > 1.5 * step:
            times.append(before + step)
            values.append(math.nan)
        times.append(at)
        values.append(value)
    return times, values


def colour_of(word: str) -> str:
    """One of Grafana's words (``semi-dark-red``) or ``#rrggbb`` as a colour for matplotlib."""
    if word.startswith("#"):
        return word
    return COLOURS.get(word.rpartition("-")[2], COLOURS["text"])


def colours_of(names: Iterable[str]) -> Mapping[str, str]:
    """A colour for each name: blues for attention, oranges for FFN, others for the rest."""
    used = {ATTENTION: 0, FFN: 0, _OTHERS: 0}
    found: dict[str, str] = {}
    for name in names:
        family = ATTENTION if "attention" in name.lower() else FFN if "ffn" in name.lower() else (
            _OTHERS
        )  # fmt: skip
        if name not in found:
            found[name] = family[used[family] % len(family)]
            used[family] += 1
    return found


def _axis(figure: Any, box: Box, one: Placed, panel: Panel, *, names: int) -> Any:
    """Axes under the panel's title, with room for the legend of its series."""
    width, height = panel.width, panel.height
    if panel.kind == "stat":
        margin = (0.1, 0.1, 0.1, 0.32)
    else:
        legend_below = panel.kind == "timeseries" and names <= _MOST_NAMES
        rows = math.ceil(names / _columns(panel)) if legend_below else 0
        left = 1.1 if panel.kind == "bargauge" else 0.72
        margin = (left, 0.3 + 0.15 * rows, 0.35, 0.32)
    axis = figure.add_axes(box(one.x, one.y, width, height, margin))
    left, below, _, high = box(one.x, one.y, width, height, (0.1, 0, 0, 0.22))
    figure.text(left, below + high, one.title, fontsize=8.5, weight="bold", color="#333333")
    if panel.kind == "stat":
        axis.set_axis_off()
    return axis


def _events(axis: Any, marks: Sequence[Mark], *, texts: bool) -> None:
    for mark in marks:
        colour = _LOSS if mark.loss else _CHANGE
        axis.axvline(mark.at, color=colour, lw=0.9, ls=":")
        if texts and len(marks) <= _MOST_TEXTS:
            axis.text(mark.at, 1, f"{mark.text} ", rotation=90, fontsize=5.5, color=colour,
                      ha="right", va="top", transform=axis.get_xaxis_transform())  # fmt: skip


def _times(axis: Any, span: Span) -> None:
    from matplotlib.ticker import FuncFormatter, LinearLocator

    form = "%H:%M:%S" if span.end - span.start < 900 else "%H:%M"
    axis.set_xlim(span.start, span.end)
    axis.xaxis.set_major_locator(LinearLocator(4))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: datetime.fromtimestamp(value).strftime(form))
    )


def _ticks(panel: Panel) -> Any:
    from matplotlib.ticker import FuncFormatter

    write = formatter(panel.unit)
    return FuncFormatter(lambda value, _: write(value))


def _below(axis: Any) -> Any:
    """Coordinates whose origin is a little below the axis, under the texts of the times."""
    from matplotlib.transforms import ScaledTranslation

    return axis.transAxes + ScaledTranslation(0, -0.22, axis.figure.dpi_scale_trans)


def _columns(panel: Panel) -> int:
    """Of a legend."""
    return max(1, panel.width // 4)


def _step_colour(panel: Panel, value: float) -> str:
    found = "text"
    for begin, colour in panel.steps:
        if begin is None or value >= begin:
            found = colour
    return found


def _edge(name: str) -> tuple[int, float, str]:
    """Sorts the buckets' edges by value, and other names after them."""
    try:
        return (0, float(name), "")
    except ValueError:
        return (1, 0.0, name)


def _edge_text(name: str, panel: Panel) -> str:
    other, value, _ = _edge(name)
    return name if other else "above" if math.isinf(value) else formatter(panel.unit)(value)
