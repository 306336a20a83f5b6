"""Pareto fronts of explorations: a picture, and a page that shows each configuration on hover.

Draws what it is given; a panel for every exploration. Upright is the throughput of a GPU, to the
right is what one user gets, as in arXiv 2605.28302: further up and further right is better. plotly,
for the page, is part of the extra ``plan``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from planner.errors import PlannerError
from planner.explore.points import Mode, Point
from planner.explore.question import Exploration
from planner.explore.verdict import NAMES, counts, limit, seconds
from planner.plots import CHOSEN, EVENT, FFN, OTHER, SIMULATION, TRANSFER, picture

COLOURS: Mapping[Mode, str] = {
    Mode.AGGREGATED: SIMULATION,
    Mode.PD: OTHER,
    Mode.AFD: FFN,
    Mode.PD_AFD: TRANSFER,
}
_X, _Y = "output tokens/s of one user (1/TPOT)", "output tokens/s per GPU"
_HIDDEN = 0.35
"""Opacity of points that miss a target."""


def draw_fronts(path: Path, title: str, found: Mapping[str, Exploration]) -> None:
    """The fronts as a picture.

    Args:
        path: PNG, SVG or PDF by its ending; parent folders are made.
        title: above all of it.
        found: explorations by the title of their panel.

    Raises:
        PlannerError: there is no point in any of them, or the file cannot be written.
    """
    _something(found)
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    with picture(path, title, 4.8 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis, (name, one) in zip(panels, found.items(), strict=False):
            _panel(axis, one)
            axis.set_title(name)
            axis.set_xlabel(_X)
            axis.set_ylabel(_Y)
        for axis in panels[len(found) :]:
            axis.set_axis_off()


def write_page(path: Path, title: str, found: Mapping[str, Exploration]) -> None:
    """The fronts as one HTML file that needs no network: hover shows a configuration, a click on
    the legend hides a level.

    Raises:
        PlannerError: plotly is missing, there is no point, or the file cannot be written.
    """
    _something(found)
    try:
        from plotly import subplots
    except ImportError:
        raise PlannerError(
            "the interactive page needs plotly, which is not installed; install it with: "
            "pip install 'afflux[plan]'"
        ) from None
    figure = subplots.make_subplots(1, len(found), subplot_titles=list(found))
    for column, one in enumerate(found.values(), 1):
        _traces(figure, one, column)
    figure.update_xaxes(title_text=_X, rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title_text=_Y, col=1)
    figure.update_layout(
        title={"text": _html(title), "x": 0.01},
        template="plotly_white",
        hovermode="closest",
        legend={"title": {"text": "level"}},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path, include_plotlyjs=True, full_html=True)
    except OSError as error:
        raise PlannerError(f"cannot write the page {path}: {error.strerror or error}") from None


def describe(point: Point) -> list[str]:
    """A configuration in some lines, as the page shows it."""
    lines = [f"{NAMES[point.mode]}: {counts(point)}, {point.gpus} GPUs"]
    for group in point.groups:
        parallel = _parallel(group.tp, group.dp, group.moe_tp, group.ep)
        lines.append(f"{group.replicas} x {group.role}: {group.gpus} GPUs, {parallel}")
    each = f"batch {point.batch} per attention rank, {point.concurrency:,.0f} requests in decode"
    if point.lanes > 1:
        each += f", {point.lanes} lanes"
    if point.chunk:
        each += f", chunks of {point.chunk} tokens"
    lines.append(each)
    other = ""
    if point.tpot_safe > point.tpot:
        other = f" (safe bound {seconds(point.tpot_safe)})"
    elif point.tpot_paper < point.tpot:
        other = f" (the paper's formula {seconds(point.tpot_paper)})"
    lines.append(f"TTFT {seconds(point.ttft)}, TPOT {seconds(point.tpot)}{other}")
    lines.append(f"{point.tokens_per_s:,.0f} tokens/s, {point.tokens_per_s_gpu:,.4g} per GPU")
    return lines


def _panel(axis: Any, found: Exploration) -> None:
    targets = found.question.targets
    if not _fronts(found):
        axis.text(0.5, 0.5, "no level has a configuration that fits", ha="center", color=EVENT)
        axis.set_axis_off()
        return
    for mode, points in _fronts(found):
        xs = [point.tokens_per_s_user for point in points]
        ys = [point.tokens_per_s_gpu for point in points]
        colour = COLOURS[mode]
        axis.plot(xs, ys, color=colour, lw=1.4, alpha=0.7, label=NAMES[mode])
        for meets in (False, True):
            some = [i for i, point in enumerate(points) if point.meets(targets) is meets]
            style = {"alpha": 1.0} if meets else {"alpha": _HIDDEN, "mfc": "white"}
            axis.plot(
                [xs[i] for i in some],
                [ys[i] for i in some],
                **{"marker": "o", "ls": "none", "color": colour, "ms": 4, **style},
            )
    if math.isfinite(targets.tpot):
        text = f"TPOT {seconds(targets.tpot)}"
        axis.axvline(1.0 / targets.tpot, color=EVENT, lw=1.0, ls="--", label=text)
    if math.isfinite(targets.ttft):
        axis.plot(
            [],
            [],
            "o",
            color=EVENT,
            ms=4,
            label=f"filled: within TTFT {seconds(targets.ttft)} too",
        )
    best = _best(found)
    if best is not None:
        axis.plot(
            best.tokens_per_s_user,
            best.tokens_per_s_gpu,
            "*",
            color=CHOSEN,
            ms=15,
            mec="white",
            zorder=6,
            label=f"best within targets: {counts(best)}",
        )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right")


def _traces(figure: Any, found: Exploration, column: int) -> None:
    from plotly import graph_objects

    targets = found.question.targets
    for mode, points in _fronts(found):
        opacity = [1.0 if point.meets(targets) else _HIDDEN for point in points]
        figure.add_trace(
            graph_objects.Scatter(
                x=[point.tokens_per_s_user for point in points],
                y=[point.tokens_per_s_gpu for point in points],
                mode="lines+markers",
                name=NAMES[mode],
                legendgroup=mode.value,
                showlegend=column == 1,
                line={"color": COLOURS[mode]},
                marker={"size": 8, "opacity": opacity},
                text=[_hover(point, found) for point in points],
                hovertemplate="%{text}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    if math.isfinite(targets.tpot):
        figure.add_vline(
            x=1.0 / targets.tpot,
            line={"color": EVENT, "dash": "dash", "width": 1},
            annotation_text=f"TPOT {seconds(targets.tpot)}",
            row=1,
            col=column,
        )
    best = _best(found)
    if best is not None:
        figure.add_trace(
            graph_objects.Scatter(
                x=[best.tokens_per_s_user],
                y=[best.tokens_per_s_gpu],
                mode="markers",
                name="best within targets",
                legendgroup="best",
                showlegend=column == 1,
                marker={"symbol": "star", "size": 16, "color": CHOSEN},
                text=[_hover(best, found)],
                hovertemplate="%{text}<extra></extra>",
            ),
            row=1,
            col=column,
        )


def _hover(point: Point, found: Exploration) -> str:
    targets = found.question.targets
    lines = describe(point)
    why = limit(point, targets)
    if why:
        lines.append(f"limited by {why}")
    missed = [
        name
        for name, got, allowed in (
            ("TTFT", point.ttft, targets.ttft),
            ("TPOT", point.tpot, targets.tpot),
        )
        if got > allowed
    ]
    if missed:
        lines.append(f"misses {' and '.join(missed)}")
    return "<br>".join(_html(line) for line in lines)


def _html(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _fronts(found: Exploration) -> list[tuple[Mode, tuple[Point, ...]]]:
    """Those with a point, in the order in which they were asked for."""
    modes = found.question.modes
    return [(mode, found.frontier[mode]) for mode in modes if found.frontier.get(mode)]


def _best(found: Exploration) -> Point | None:
    return None if found.winner is None else found.best[found.winner]


def _something(found: Mapping[str, Exploration]) -> None:
    if not any(_fronts(one) for one in found.values()):
        raise PlannerError(
            "nothing to draw: no level has a configuration that fits; the refusals say why"
        )


def _parallel(tp: int, dp: int, moe_tp: int, ep: int) -> str:
    """``TP 2, DP 8, EP 16``: what is more than 1."""
    names: Sequence[tuple[str, int]] = (("TP", tp), ("DP", dp), ("MoE TP", moe_tp), ("EP", ep))
    return ", ".join(f"{name} {count}" for name, count in names if count > 1) or "no parallelism"
