"""Draws a run as a picture: tokens per second, actors by role, longest token gap, and events.

Everything shares one time axis, in seconds from the first token. Not for finding things out: what
is drawn comes from ``gaps.py`` and from what the benchmark noted.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.gaps import token_gaps, token_rate
from benchmarks.load import Stream

MarkKind = Literal["change", "kill", "freeze", "hiccup", "wake"]

ATTENTION, FFN, TOKENS, GAPS = "#2f6db5", "#d9772b", "#2a8c7c", "#6b6b6b"
_MARKS: dict[MarkKind, str] = {
    "change": "#7a4fa3",
    "kill": "#b3202c",
    "freeze": "#3f7fbf",
    "hiccup": "#8a8a8a",
    "wake": "#8a8a8a",
}
_KEYS: dict[MarkKind, str] = {
    "change": "commit (shaded: from the command on)",
    "kill": "SIGKILL (shaded: until whole again)",
    "freeze": "SIGSTOP (shaded: until whole again)",
    "hiccup": "SIGSTOP, short",
    "wake": "SIGCONT",
}


@dataclass(frozen=True)
class Mark:
    """An event at ``at`` (Unix seconds); ``begin`` to ``end`` is shaded."""

    kind: MarkKind
    at: float
    text: str
    begin: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Count:
    """Actors that serve at ``at`` (Unix seconds)."""

    at: float
    attention: int
    ffn: int


def draw(
    path: Path,
    title: str,
    streams: Sequence[Stream],
    counts: Sequence[Count],
    marks: Sequence[Mark],
    *,
    emulated: bool = False,
    step_s: float = 0.5,
) -> None:
    """Write the picture; parent folders are made.

    Args:
        counts: in order of time; each holds until the next.
        step_s: width of a step of the rate, in seconds.

    Raises:
        ValueError: no token came, so there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    middles, rates = token_rate(streams, step_s)
    if not len(middles):
        raise ValueError("no token came, so there is no timeline to draw")
    zero = middles[0] - step_s / 2
    last = max([middles[-1] + step_s / 2, *(mark.end or mark.at for mark in marks)])
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#999999",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e6e6e6",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
    }
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            3, 1, figsize=(12, 6.6), sharex=True, height_ratios=(3, 2, 1.6), layout="constrained"
        )
        _rate(axes[0], middles - zero, rates)
        _actors(axes[1], counts, zero, last - zero)
        _gaps(axes[2], streams, zero, step_s)
        for axis in axes:
            _marks(axis, marks, zero)
        _labels(axes[0], marks, zero, last - zero)
        axes[2].set_xlim(0.0, last - zero)
        axes[2].set_xlabel("seconds")
        note = "   ·   emulated devices: stage times are modelled, tokens are real"
        figure.suptitle(
            title + (note if emulated else ""), x=0.01, ha="left", weight="bold", fontsize=11
        )
        _legend(figure, marks)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, facecolor="white")
        pyplot.close(figure)


def _rate(axis: Any, seconds: np.ndarray, rates: np.ndarray) -> None:
    axis.fill_between(seconds, rates, step="mid", color=TOKENS, alpha=0.18, linewidth=0)
    axis.step(seconds, rates, where="mid", color=TOKENS, linewidth=0.8, alpha=0.6)
    width = min(len(rates), 5)
    smooth = np.convolve(np.pad(rates, width // 2, mode="edge"), np.ones(width) / width, "same")
    axis.plot(seconds, smooth[width // 2 :][: len(rates)], color=TOKENS, linewidth=1.8)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens/s")


def _actors(axis: Any, counts: Sequence[Count], zero: float, last: float) -> None:
    inside = [count for count in counts if count.at - zero <= last]
    if not inside:
        return
    times = np.clip([count.at - zero for count in inside] + [last], 0.0, last)
    times[0] = 0.0  # what is first known held from the beginning
    for name, colour, shift in (("attention", ATTENTION, 0.03), ("FFN", FFN, -0.03)):
        values = [count.attention if name == "attention" else count.ffn for count in inside]
        # A little apart, so that equal counts do not hide one of the lines
        steps = np.array([*values, values[-1]]) + shift
        axis.step(times, steps, where="post", color=colour, linewidth=2.2, label=name)
    most = max(max(count.attention, count.ffn) for count in inside)
    axis.set_ylim(0, most + 0.5)
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.set_ylabel("actors that serve")
    axis.legend(
        loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1, ncols=2, frameon=False
    )


def _gaps(axis: Any, streams: Sequence[Stream], zero: float, step_s: float) -> None:
    """The longest gap among those that were open in each step, in milliseconds."""
    gaps = token_gaps(streams)
    if not len(gaps):
        return
    steps = int((gaps[:, 1].max() - zero) / step_s) + 1
    longest = np.zeros(steps)
    for begin, end in gaps:
        first = max(0, int((begin - zero) / step_s))
        span = slice(first, int((end - zero) / step_s) + 1)
        longest[span] = np.maximum(longest[span], (end - begin) * 1e3)
    seconds = (np.arange(steps) + 0.5) * step_s
    shown = np.where(longest > 0, longest, np.nan)
    axis.step(seconds, shown, where="mid", color=GAPS, linewidth=1.2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: "")
    axis.set_ylim(min(10.0, float(np.nanmin(shown))), float(np.nanmax(shown)) * 2)
    axis.set_ylabel("longest token\ngap, ms")


def _marks(axis: Any, marks: Sequence[Mark], zero: float) -> None:
    for mark in marks:
        colour = _MARKS[mark.kind]
        begin = mark.at if mark.begin is None else mark.begin
        end = mark.at if mark.end is None else mark.end
        if end > begin:
            axis.axvspan(begin - zero, end - zero, color=colour, alpha=0.08, linewidth=0)
        dotted = mark.kind in ("wake", "hiccup")
        axis.axvline(mark.at - zero, color=colour, linewidth=1.0, ls=":" if dotted else "-")


def _labels(axis: Any, marks: Sequence[Mark], zero: float, last: float) -> None:
    """Texts above the panel; upright when there is no room for them side by side."""
    named = sorted((mark for mark in marks if mark.text), key=lambda mark: mark.at)
    wished = [mark.at - zero for mark in named]
    widest = max((len(mark.text) for mark in named), default=0) * last * 0.0075
    upright = any(right - left < widest for left, right in itertools.pairwise(wished))
    places = spread(wished, last * 0.0125, last) if upright else wished
    for mark, at in zip(named, places, strict=True):
        axis.annotate(
            mark.text,
            xy=(at, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            rotation=90 if upright else 0,
            ha="center",
            va="bottom",
            fontsize=7.5 if upright else 8.5,
            color=_MARKS[mark.kind],
            annotation_clip=False,
        )


def spread(wished: Sequence[float], apart: float, last: float) -> list[float]:
    """Ordered places near the ``wished`` ones, ``apart`` from each other and at most ``last``, as
    far as there is room for that."""
    places: list[float] = []
    for place in wished:
        places.append(max(place, places[-1] + apart) if places else place)
    limit = last
    for index in reversed(range(len(places))):
        places[index] = max(0.0, min(places[index], limit))
        limit = places[index] - apart
    return places


def _legend(figure: Any, marks: Sequence[Mark]) -> None:
    from matplotlib.lines import Line2D

    kinds = [kind for kind in _KEYS if any(mark.kind == kind for mark in marks)]
    lines = [
        Line2D([], [], color=_MARKS[k], lw=1.4, ls=":" if k in ("wake", "hiccup") else "-")
        for k in kinds
    ]
    if lines:
        labels = [_KEYS[kind] for kind in kinds]
        figure.legend(lines, labels, loc="outside lower center", ncols=len(lines), frameon=False)
