"""Pictures of a sizing and of a simulated run: throughput and idle shares by ratio, and steps.

Everything here draws what it is given; nothing is computed but positions. Attention is blue and the
FFN side orange in every picture of the project.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from planner.errors import PlannerError

ATTENTION, FFN, TRANSFER, WAIT = "#2f6db5", "#d9772b", "#2a8c7c", "#dedede"
SIMULATION, OTHER, CHOSEN, EVENT = "#222222", "#7a4fa3", "#b3202c", "#555555"
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}
_MOST_WORKERS = 8  # attention workers with a row of their own


@dataclass(frozen=True)
class RatioLine:
    """What one way of calculating says at each ratio.

    Attributes:
        name: as in the legend.
        ratios: attention workers per FFN worker, ascending.
        throughput: tokens per unit of time and instance, one per ratio.
        idle_attention, idle_ffn: shares of time, 0..1, one per ratio; None: not known.
        simulated: drawn as points instead of a line.
    """

    name: str
    ratios: Sequence[float]
    throughput: Sequence[float]
    idle_attention: Sequence[float] | None = None
    idle_ffn: Sequence[float] | None = None
    simulated: bool = False


@dataclass(frozen=True)
class Best:
    """A ratio that is marked, r* or the chosen one, in the colour of the line called ``line``."""

    name: str
    ratio: float
    throughput: float
    line: str = ""


@dataclass(frozen=True)
class Series:
    """One panel over time: ``lines`` by name share the ``times``, in the run's unit.

    Attributes:
        steps: values hold until the next time (counts) instead of being joined (rates).
    """

    label: str
    times: Sequence[float]
    lines: Mapping[str, Sequence[float]]
    steps: bool = False


class Bar(Protocol):
    """A stretch of time that a lane spent in one phase; ``spans.Span`` is one.

    ``worker`` is "A3" for attention worker 3, "F" for the FFN side, "A" for all attention workers
    together; ``phase`` is attention, a2f, wait, ffn or f2a.
    """

    @property
    def worker(self) -> str: ...
    @property
    def lane(self) -> int: ...
    @property
    def phase(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def duration(self) -> float: ...


def draw_sizing(
    path: Path,
    title: str,
    lines: Sequence[RatioLine],
    marks: Sequence[Best] = (),
    bars: Sequence[Bar] = (),
    *,
    unit: str = "s",
    steps_title: str = "",
) -> None:
    """Throughput and idle shares against r side by side; below them a few steps, if given.

    Args:
        path: PNG, SVG or PDF by its ending; parent folders are made.
        lines: at least one, in the order of the legend; the first is drawn boldest.
        bars: any order; empty leaves the lower panel out.
        unit: of time.
        steps_title: what the lower panel shows.

    Raises:
        PlannerError: there is no line to draw, or the file cannot be written.
    """
    if not lines or not any(len(line.ratios) for line in lines):
        raise PlannerError("nothing to draw: give at least one line with one ratio")
    with picture(path, title, 4.4 + (_height(bars) if bars else 0.0)) as figure:
        above = figure
        if bars:
            above, below = figure.subfigures(2, 1, height_ratios=(4.4, _height(bars)))
            _steps(below, bars, unit, steps_title)
        left, right = above.subplots(1, 2, width_ratios=(1.35, 1))
        _throughput(left, lines, marks, unit)
        _idle(right, lines, marks)


def draw_run(
    path: Path,
    title: str,
    series: Sequence[Series] = (),
    bars: Sequence[Bar] = (),
    events: Sequence[tuple[float, str]] = (),
    *,
    unit: str = "s",
    steps_title: str = "",
) -> None:
    """What happened in one run: panels over time, and a few steps below.

    Args:
        path: PNG, SVG or PDF by its ending; parent folders are made.
        events: (time, text), drawn through every panel.

    Raises:
        PlannerError: nothing to draw, or the file cannot be written.
    """
    if not series and not bars:
        raise PlannerError("nothing to draw: the run has neither a series nor steps")
    upper = 1.75 * len(series) + 0.5 if series else 0.0
    with picture(path, title, upper + (_height(bars) if bars else 0.0)) as figure:
        above = below = figure
        if series and bars:
            above, below = figure.subfigures(2, 1, height_ratios=(upper, _height(bars)))
        if bars:
            _steps(below, bars, unit, steps_title)
        if series:
            axes = above.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
            for axis, one in zip(axes, series, strict=True):
                _over_time(axis, one, events)
            last = max((one.times[-1] for one in series if len(one.times)), default=0.0) or 1.0
            _event_texts(axes[0], [event for event in events if event[0] <= last], last)
            axes[-1].set_xlim(0, last)
            axes[-1].set_xlabel(f"time, {unit}")


@contextmanager
def picture(path: Path, title: str, height: float) -> Iterator[Any]:
    """A figure in the project's style, written to ``path`` when the block ends.

    Args:
        path: PNG, SVG or PDF by its ending; parent folders are made.
        height: in inches; the width is 12.

    Raises:
        PlannerError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(12, height + 0.4), layout="constrained")
        try:
            figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
            yield figure
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=150, facecolor="white")
            except (OSError, ValueError) as error:
                raise PlannerError(f"cannot write the picture {path}: {error}") from None
        finally:
            pyplot.close(figure)


def _throughput(axis: Any, lines: Sequence[RatioLine], marks: Sequence[Best], unit: str) -> None:
    colours = _colours(lines)
    for index, line in enumerate(lines):
        points = {"marker": "o", "ms": 6, "mec": "white", "mew": 0.8}
        style = (
            {"ls": "none", "zorder": 5, **points}
            if line.simulated
            else {"lw": 2.4 if index == 0 else 1.5, "ls": "-" if index == 0 else "--"}
        )
        axis.plot(line.ratios, line.throughput, color=colours[index], label=line.name, **style)
    top = max(float(np.max(line.throughput)) for line in lines if len(line.throughput))
    axis.set_ylim(0, top * (1.08 + 0.08 * len(marks)))
    by_name = {line.name: colour for line, colour in zip(lines, colours, strict=True)}
    for index, mark in enumerate(sorted(marks, key=lambda mark: mark.ratio)):
        colour = by_name.get(mark.line, CHOSEN)
        # Marks lie close together near the top, so their texts hang at different heights above
        height = 0.985 - 0.065 * index
        axis.axvline(mark.ratio, 0, height, color=colour, lw=0.9, ls=":")
        axis.plot(mark.ratio, mark.throughput, "v", color=colour, ms=7.5, zorder=6, mec="white")
        axis.annotate(
            f"{mark.name} {_number(mark.ratio)}",
            xy=(mark.ratio, height),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            va="top",
            color=colour,
            fontsize=8.5,
        )
    axis.set_title("Throughput per instance")
    axis.set_ylabel(f"tokens per {_one(unit)} and instance")
    axis.legend(loc="lower right")
    _ratio_axis(axis, lines)


def _idle(axis: Any, lines: Sequence[RatioLine], marks: Sequence[Best]) -> None:
    from matplotlib.lines import Line2D

    first = True
    handles = [Line2D([], [], color=c, lw=3, label=n) for n, c in _SIDES]
    for line in lines:
        for values, (_, colour) in zip((line.idle_attention, line.idle_ffn), _SIDES, strict=True):
            if values is None:
                continue
            percent = 100 * np.asarray(values, float)
            if line.simulated:
                axis.plot(line.ratios, percent, "o", color=colour, ms=5.5, mec="white", mew=0.8)
                continue
            axis.plot(line.ratios, percent, color=colour, lw=2 if first else 1.2, ls=_dash(first))
            if first:
                axis.fill_between(line.ratios, percent, color=colour, alpha=0.10, lw=0)
        if line.idle_attention is not None:
            style: dict[str, Any] = (
                {"ls": "none", "marker": "o", "ms": 5} if line.simulated else {"ls": _dash(first)}
            )
            handles.append(Line2D([], [], color="#555555", label=line.name, **style))
            first = first and line.simulated
    for mark in marks:
        axis.axvline(mark.ratio, color="#777777", lw=0.9, ls=":")
    axis.set_ylim(0, 100)
    axis.set_title("Idle share of each side")
    axis.set_ylabel("idle, % of time")
    axis.legend(handles=handles, loc="upper center", fontsize=8, ncols=2)
    _ratio_axis(axis, lines)


_SIDES = (("attention", ATTENTION), ("FFN", FFN))


def _ratio_axis(axis: Any, lines: Sequence[RatioLine]) -> None:
    """r in powers of two, written as plain numbers."""
    ratios = np.concatenate([np.asarray(line.ratios, float) for line in lines])
    low, high = float(ratios.min()), float(ratios.max())
    axis.set_xscale("log", base=2)
    if high > low:
        axis.set_xlim(low / 1.08, high * 1.08)
    axis.xaxis.set_major_formatter(lambda value, _: _number(value))
    axis.set_xlabel("r, attention workers per FFN worker")


def _steps(figure: Any, bars: Sequence[Bar], unit: str, title: str) -> None:
    """Attention workers above, what is under way in the middle, the FFN side below."""
    axis = figure.subplots()
    bars = _without_own_waits(bars)
    rows = _rows(bars)
    zero = min(bar.start for bar in bars)
    # What follows the last attention is the end of the recording, not idleness
    ends = [bar.start + bar.duration for bar in bars if bar.phase == "attention"]
    last = max(ends or [bar.start + bar.duration for bar in bars]) - zero
    for key, (at, height) in rows.items():
        if key[1] is None:  # a server: what no bar covers is idle, from its first bar on
            first = min(bar.start for bar in bars if _row(bar) == key) - zero
            axis.barh(at, last - first, height, left=first, color=_IDLE, lw=0, zorder=1)
    for bar in bars:
        place = rows.get(_row(bar))
        if place is None or bar.duration <= 0:
            continue
        at, height = place
        busy = bar.phase in ("attention", "ffn")
        colour = _PHASES.get(bar.phase, WAIT)
        axis.barh(
            at,
            bar.duration,
            height,
            left=bar.start - zero,
            color=_tint(colour, 0.3 * min(bar.lane, 2)) if busy else colour,
            edgecolor="white",
            linewidth=0.5,
            zorder=2,
        )
        if busy and bar.duration > last * 0.012:
            middle = bar.start - zero + bar.duration / 2
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
            axis.text(middle, at, f"{bar.lane}", color="white", clip_on=True, zorder=3, **style)
    axis.set_yticks([at for at, _ in rows.values()], [_row_name(key) for key in rows])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlim(0, last)
    axis.set_xlabel(f"time, {unit}")
    left_out = len(_attention_workers(bars)) - _MOST_WORKERS
    note = f" ({left_out} more attention workers not drawn)" if left_out > 0 else ""
    axis.set_title((title or "A few steps") + note)
    _phase_legend(figure, bars)


_IDLE = "#f3f3f3"
_PHASES = {"attention": ATTENTION, "ffn": FFN, "a2f": TRANSFER, "f2a": TRANSFER, "wait": WAIT}
_Row = tuple[
    str, int | None
]  # (worker, None): the worker itself; (worker, lane): what is under way


def _without_own_waits(bars: Sequence[Bar]) -> list[Bar]:
    """Where lanes go together, a lane that waits for its own worker shows in the worker's row."""
    together = any(bar.worker == "A" for bar in bars)
    return [bar for bar in bars if not (together and bar.phase == "wait" and bar.worker != "A")]


def _row(bar: Bar) -> _Row:
    return bar.worker, None if bar.phase in ("attention", "ffn") else bar.lane


def _row_name(row: _Row) -> str:
    worker, lane = row
    name = {"A": "", "F": "FFN"}.get(worker, f"attention {worker[1:]}")
    return name if lane is None else f"{name} lane {lane} under way".strip()


def _attention_workers(bars: Sequence[Bar]) -> list[str]:
    found = {bar.worker for bar in bars if bar.worker[:1] == "A" and len(bar.worker) > 1}
    return sorted(found, key=lambda worker: int(worker[1:]))


def _rows(bars: Sequence[Bar]) -> dict[_Row, tuple[float, float]]:
    """Middle and height of every row, from the top."""
    shown = [*_attention_workers(bars)[:_MOST_WORKERS], "A", "F"]
    present = {_row(bar) for bar in bars}
    rows: dict[_Row, tuple[float, float]] = {}
    at = 0.0
    for worker in shown:
        for row in sorted(
            (r for r in present if r[0] == worker), key=lambda r: (r[1] or 0, r[1] is not None)
        ):
            height = 0.8 if row[1] is None else 0.42
            rows[row] = (at + height / 2, height)
            at += height + 0.12
    return rows


def _height(bars: Sequence[Bar]) -> float:
    """Inches for the steps panel."""
    rows = _rows(_without_own_waits(bars))
    return 1.2 + 0.36 * sum(height + 0.12 for _, height in rows.values())


def _phase_legend(figure: Any, bars: Sequence[Bar]) -> None:
    from matplotlib.patches import Patch

    keys = (
        ("attention", "attention (number: lane)", ATTENTION),
        ("ffn", "FFN", FFN),
        ("a2f", "transfer", TRANSFER),
        ("wait", "waiting for the FFN side", WAIT),
        ("", "idle", _IDLE),
    )
    phases = {bar.phase for bar in bars} | {""}
    handles = [Patch(color=colour, label=name) for phase, name, colour in keys if phase in phases]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _over_time(axis: Any, series: Series, events: Sequence[tuple[float, str]]) -> None:
    from itertools import cycle

    others = cycle((TRANSFER, OTHER, "#6b6b6b", CHOSEN))
    known = {"attention": ATTENTION, "ffn": FFN, "ffn side": FFN}
    top = 0.0
    for name, values in series.lines.items():
        colour = known.get(name.lower()) or next(others)
        shown = np.asarray(values, float)
        if series.steps:
            # A little apart, so that equal counts do not hide one of the lines
            shift = {ATTENTION: 0.03, FFN: -0.03}.get(colour, 0.0)
            axis.step(series.times, shown + shift, where="post", color=colour, lw=2, label=name)
        else:
            axis.plot(series.times, shown, color=colour, lw=1.6, label=name)
        finite = shown[np.isfinite(shown)]
        top = max(top, float(finite.max()) if finite.size else 0.0)
    if len(series.lines) == 1 and not series.steps:
        axis.fill_between(series.times, shown, color=colour, alpha=0.15, lw=0)
    axis.set_ylim(0, top * 1.15 or 1.0)
    axis.set_ylabel(series.label)
    if len(series.lines) > 1:
        axis.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            borderaxespad=0.1,
            ncols=len(series.lines),
            fontsize=8,
        )
    for at, _ in events:
        axis.axvline(at, color=EVENT, lw=0.9, ls="--")


def _event_texts(axis: Any, events: Sequence[tuple[float, str]], last: float) -> None:
    """Above the panel, one over the other where they would touch."""
    ends: list[float] = []  # of what stands in each line of texts, the lowest first
    for at, text in sorted(events):
        level = next((i for i, end in enumerate(ends) if end <= at), len(ends))
        ends[level:] = [at + last * (0.0062 * len(text) + 0.008), *ends[level + 1 :]]
        axis.annotate(
            text,
            xy=(at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3 + 11 * level),
            textcoords="offset points",
            fontsize=8,
            color=EVENT,
            annotation_clip=False,
        )


def _colours(lines: Sequence[RatioLine]) -> list[str]:
    """Theory in distinct hues, simulation nearly black."""
    theory = iter((TRANSFER, OTHER, "#8a8a8a", "#3f7fbf"))
    return [SIMULATION if line.simulated else next(theory, "#8a8a8a") for line in lines]


def _dash(first: bool) -> str:
    return "-" if first else "--"


def _tint(colour: str, share: float) -> str:
    """The colour mixed with white."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(part + (255 - part) * share):02x}" for part in parts)


def _one(unit: str) -> str:
    """One of the unit: ``cycles`` -> ``cycle``, ``s`` stays."""
    return unit[:-1] if len(unit) > 2 and unit.endswith("s") else unit


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 5e-3 else f"{value:.3g}"
