"""The lines that ``afflux plan --reproduce 2605.28302`` prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from planner.explore.paper_2605 import (
    BINDING,
    FIGURE_2,
    MODELS,
    OURS,
    PAPER,
    RATIOS,
    ROOFLINE,
    WORKLOADS,
    moves,
)
from planner.explore.points import Mode
from planner.explore.reproduce_cells import Cell

if TYPE_CHECKING:
    from planner.explore.reproduce_2605 import Outcome

ORDER = (Mode.AGGREGATED, Mode.AFD, Mode.PD, Mode.PD_AFD)
"""The figure's."""
CLOSE = 0.05
"""Levels that are nearer to each other than this are told as level."""


def lines(outcome: Outcome) -> list[str]:
    """All of them."""
    return [
        "arXiv 2605.28302, Figure 2: DeepSeek-V3.2 on 128 B200, strict targets, tokens/s of the "
        "whole system",
        f"kernels: {outcome.source}; beyond what was measured too",
        "",
        *_figure(outcome),
        "",
        *_limits(outcome),
        "",
        *_ratios(outcome),
        *_account(outcome),
        "",
        *_ends(outcome),
    ]


def _figure(outcome: Outcome) -> list[str]:
    names = [OURS.name, PAPER.name, ROOFLINE.name]
    by = {name: {(c.workload, c.mode): c for c in outcome.of(name)} for name in names}
    heads = ["workload", "level", "paper", "ours", "its conventions", "and roofline kernels"]
    rows = [
        [key[0], key[1].value, _rate(theirs), *(_cell(by[name][key]) for name in names)]
        for workload in WORKLOADS
        for mode in ORDER
        for key, theirs in [((workload, mode), FIGURE_2[workload, mode])]
    ]
    found = _table(heads, rows)
    for name in names:
        cells = list(by[name].values())
        right = sum(c.right for c in cells if c.theirs is None)
        worst = max(abs(c.error) for c in cells if c.theirs is not None)
        met = sum(c.right for c in cells if c.theirs is not None)
        found.append(
            f"{name}: {right} of 6 infeasible cells infeasible; {met} of 6 feasible ones within "
            f"15 %, largest error {100 * worst:.0f} %"
        )
    return found


def _limits(outcome: Outcome) -> list[str]:
    """Which limit binds in the cells that the paper has infeasible."""
    found = ["What binds in the cells that are infeasible in the paper, our conventions:"]
    for cell in outcome.of(OURS.name):
        if cell.theirs is None:
            known = BINDING.get(cell.workload)
            said = f" (known of the paper's: {known.upper()})" if known else ""
            found.append(f"  {cell.workload}, {cell.mode.value}: {_why(cell)}{said}")
    return found


def _ratios(outcome: Outcome) -> list[str]:
    """A:F at the latency end of the front."""
    found = []
    for workload, (attention, ffn) in RATIOS.items():
        ours = " and ".join(
            f"{cell.latency_end[0]}A+{cell.latency_end[1]}F by {label} conventions"
            for name, label in ((OURS.name, "our"), (PAPER.name, "its"))
            for cell in outcome.of(name)
            if cell.workload == workload and cell.mode is Mode.AFD
        )
        found.append(f"Latency end, {workload}: {attention}A+{ffn}F in the paper, {ours}")
    return found


def _account(outcome: Outcome) -> list[str]:
    """What each input does to the cells that are feasible in the paper, moved alone."""
    if not outcome.account:
        return []
    keys = [key for key, theirs in FIGURE_2.items() if theirs is not None]
    heads = ["input", *(f"{workload} {mode.value}" for workload, mode in keys)]
    rows = [["in the paper", *(_rate(FIGURE_2[key]) for key in keys)]]
    for name in (PAPER.name, *(move.name for move in moves(PAPER))):
        cells = {(c.workload, c.mode): c for c in outcome.of(name)}
        label = "paper's conventions" if name == PAPER.name else name
        rows.append([label, *(_cell(cells[key]) for key in keys)])
    found = [
        "",
        "Which input explains the difference: the paper's conventions, one moved at a time",
    ]
    found += _table(heads, rows)
    return found + _explained(outcome)


def _explained(outcome: Outcome) -> list[str]:
    """What fails in the cells that should be feasible, and which moves make up for it."""

    def alike(name: str) -> int:
        return sum(c.feasible == (c.theirs is not None) for c in outcome.of(name))

    missing = [c for c in outcome.of(PAPER.name) if c.theirs is not None and not c.feasible]
    found = []
    if missing:
        limits = sorted({cell.limit.upper() for cell in missing})
        found.append(f"Of 6 feasible cells {len(missing)} fail here, all by {' or '.join(limits)}.")
    base = alike(PAPER.name)
    ranked = sorted(((alike(m.name), m.name) for m in moves(PAPER)), reverse=True)
    better = [f"{name} ({count})" for count, name in ranked if count > base]
    found.append(
        f"By the paper's conventions {base} of 12 cells are feasible or not as in the paper; "
        + (f"more with {', '.join(better)}." if better else "no input moved alone makes it more.")
    )
    return found


def _ends(outcome: Outcome) -> list[str]:
    """The throughput end: which level has the most tokens/s/GPU."""
    heads = ["model", "workload", *(mode.value for mode in ORDER), "most"]
    rows, wins = [], 0
    for model in MODELS:
        for workload in WORKLOADS:
            cells = {c.mode: c for c in outcome.ends if (c.model, c.workload) == (model, workload)}
            leading = leaders(cells.__getitem__)
            wins += Mode.AGGREGATED in leading
            rates = [f"{cells[mode].most_per_gpu:,.0f}" for mode in ORDER]
            rows.append([model, workload, *rates, ", ".join(mode.value for mode in leading)])
    return [
        "Throughput end, tokens/s/GPU whatever the targets, our conventions; levels within 5 % of "
        "the most are level",
        *_table(heads, rows),
        f"Aggregation is first or level in {wins} of {len(rows)} panels (the paper: wins most; "
        "P/D wins DeepSeek coding)",
    ]


def leaders(cell: Callable[[Mode], Cell]) -> list[Mode]:
    """Levels within ``CLOSE`` of the most tokens/s/GPU, the first of them first; none without."""
    most = max(cell(mode).most_per_gpu for mode in ORDER)
    near = [mode for mode in ORDER if most > 0 and cell(mode).most_per_gpu >= (1 - CLOSE) * most]
    return sorted(near, key=lambda mode: -cell(mode).most_per_gpu)


def _cell(cell: Cell) -> str:
    if not cell.feasible:
        return f"- {_short(cell)}"
    if cell.theirs is None:
        return f"{cell.tokens_per_s:,.0f}"
    return f"{cell.tokens_per_s:,.0f} ({100 * cell.error:+.0f} %)"


def _short(cell: Cell) -> str:
    """The limit and the factor that it is missed by."""
    if math.isfinite(cell.reached) and cell.allowed > 0:
        return f"{cell.limit} x{cell.reached / cell.allowed:.2f}"
    return cell.limit


def _why(cell: Cell) -> str:
    if cell.feasible:
        return f"feasible here, {cell.tokens_per_s:,.0f} tokens/s"
    if cell.limit in ("ttft", "tpot"):
        return (
            f"{cell.limit.upper()}, {1e3 * cell.reached:.0f} ms at best, "
            f"{1e3 * cell.allowed:.0f} ms allowed"
        )
    return cell.limit


def _rate(theirs: float | None) -> str:
    return "-" if theirs is None else f"{theirs:,.0f}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, the first ones left, the others right."""
    every = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(heads))]
    left = 2 if heads[1] in ("level", "workload") else 1
    return [
        "  ".join(
            text.ljust(width) if i < left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in every
    ]
