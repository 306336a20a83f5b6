"""Figure 2's bookkeeping: what counts as right, and that cells are searches."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from planner.explore.kernels.roofline import RooflineDB
from planner.explore.paper_2605 import (
    FIGURE_2,
    MODELS,
    OURS,
    PAPER,
    RATIOS,
    ROOFLINE,
    WORKLOADS,
    moves,
)
from planner.explore.points import SHAPES, Mode
from planner.explore.question import Options
from planner.explore.reproduce_2605 import (
    Cell,
    Outcome,
    Task,
    cells_of,
    gpus_text,
    system_of,
    tasks_of,
)
from planner.explore.reproduce_text import leaders
from planner.explore.system import find_system
from tests.planner.explore.explorations import point

LIMIT = ("ttft", 0.090, 0.050)


def cell(convention: str, workload: str, mode: Mode, rate: float, model: str = MODELS[0]) -> Cell:
    limit, reached, allowed = ("", math.nan, math.nan) if rate else LIMIT
    return Cell(
        convention=convention,
        model=model,
        workload=workload,
        mode=mode,
        tokens_per_s=rate,
        limit=limit,
        reached=reached,
        allowed=allowed,
        ttft=0.04 if rate else math.nan,
        tpot=0.01 if rate else math.nan,
        gpus="",
        latency_end=(16, 112) if mode is Mode.AFD else (0, 0),
        most_per_gpu=1000.0 + len(mode),
        theirs=FIGURE_2[workload, mode] if model == MODELS[0] else None,
    )


def outcome(factor: float, infeasible: float = 0.0) -> Outcome:
    """As if feasible cells came out ``factor`` times the paper's, and others ``infeasible``."""

    def every(name: str) -> list[Cell]:
        return [
            cell(name, workload, mode, infeasible if theirs is None else factor * theirs)
            for (workload, mode), theirs in FIGURE_2.items()
        ]

    cells = [c for name in (OURS.name, PAPER.name, ROOFLINE.name) for c in every(name)]
    account = [c for move in moves(PAPER) for c in every(move.name)]
    ends = [
        cell(OURS.name, workload, mode, 1.0, model)
        for model in MODELS
        for workload, mode in FIGURE_2
    ]
    return Outcome(tuple(cells), tuple(account), tuple(ends), "kernels of a test")


def test_figure_2_is_whole() -> None:
    assert len(FIGURE_2) == 12
    assert sum(theirs is None for theirs in FIGURE_2.values()) == 6
    assert set(WORKLOADS) == set(SHAPES) == {"chat", "coding", "agentic"}
    assert all(sum(ratio) == 128 for ratio in RATIOS.values())


def test_summary_of_a_perfect_and_of_a_poor_one() -> None:
    perfect = outcome(1.0).summary()
    assert perfect["infeasible_cells_right"] == 6
    assert perfect["feasible_max_error"] == 0.0
    assert perfect["cells"] == 12
    near = outcome(1.1).summary()
    assert near["feasible_max_error"] == pytest.approx(0.1)
    poor = outcome(0.0, infeasible=500.0).summary()
    assert poor["infeasible_cells_right"] == 0
    assert poor["feasible_max_error"] == 1.0


def test_what_is_right() -> None:
    key = ("chat", Mode.AFD)
    assert cell("", *key, 3970.0 * 1.14).right
    assert not cell("", *key, 3970.0 * 1.16).right
    missing = cell("", *key, 0.0)
    assert missing.error == -1.0
    assert not missing.right
    assert cell("", "chat", Mode.PD, 0.0).right
    found = cell("", "chat", Mode.PD, 100.0)
    assert not found.right
    assert math.isnan(found.error)


def test_lines_say_it_all() -> None:
    text = "\n".join(outcome(1.05).lines())
    for workload in WORKLOADS:
        assert workload in text
    for move in moves(PAPER):
        assert move.name in text
    assert "6 of 6 infeasible cells infeasible; 6 of 6 feasible ones within 15 %" in text
    assert "TTFT, 90 ms at best, 50 ms allowed (known of the paper's: TTFT)" in text
    assert "16A+112F in the paper, 16A+112F by our conventions" in text
    assert "(+5 %)" in text
    poor = "\n".join(outcome(0.0, infeasible=500.0).lines())
    assert "0 of 6 infeasible cells infeasible; 0 of 6 feasible" in poor
    assert "feasible here, 500 tokens/s" in poor
    assert "ttft x1.80" in poor


def test_details_are_json() -> None:
    data = json.loads(json.dumps(outcome(0.0).details(), allow_nan=False))
    assert len(data["figure_2"]) == 36
    assert data["figure_2"][0]["mode"] == "aggregated"
    assert data["figure_2"][0]["right"] is True


def test_moves_move_one_input_each() -> None:
    for moved in moves(PAPER):
        changed = [
            name
            for name in ("kernels", "attention", "experts", "cluster")
            if getattr(moved, name) != getattr(PAPER, name)
        ]
        own = [
            name
            for name in Options.__dataclass_fields__
            if getattr(moved.options, name) != getattr(PAPER.options, name)
        ]
        # half duplex is one input that two options say, and so is the factor on TTFT
        assert (len(changed), len(own)) in {(1, 0), (0, 1), (0, 2)}
        assert moved.name != PAPER.name
    assert len({moved.name for moved in moves(PAPER)}) == len(moves(PAPER))


def test_tasks() -> None:
    few, all_of_them = list(tasks_of(False)), list(tasks_of(True))
    assert len(few) == 15
    assert len(all_of_them) == 15 + 3 * len(moves(PAPER))
    assert len(set(all_of_them)) == len(all_of_them)


def test_a_cell_is_a_search() -> None:
    task = Task(ROOFLINE, "chat", "qwen3-30b-a3b", (Mode.AGGREGATED, Mode.AFD), gpus=4)
    cells = cells_of(task, RooflineDB(find_system("b200_sxm")))
    assert [one.mode for one in cells] == [Mode.AGGREGATED, Mode.AFD]
    for one in cells:
        assert one.theirs is None
        if one.feasible:
            assert one.ttft <= SHAPES["chat"][1].ttft
            assert one.tpot <= SHAPES["chat"][1].tpot
            assert one.gpus
        else:
            assert one.limit
            assert one.reached > one.allowed
        assert one.most_per_gpu > 0
    assert sum(cells[1].latency_end) in (2, 4)


def test_conventions_network() -> None:
    half = replace(PAPER, cluster=50e9)
    assert system_of(half).tier("cluster").bandwidth == 50e9
    assert system_of(PAPER).tier("cluster").bandwidth == 100e9


def test_leaders() -> None:
    rates = {
        Mode.AGGREGATED: 96.0,
        Mode.AFD: 94.0,
        Mode.PD: 100.0,
        Mode.PD_AFD: 50.0,
    }

    def of(mode: Mode) -> Cell:
        return replace(cell("", "chat", mode, 1.0), most_per_gpu=rates[mode])

    assert leaders(of) == [Mode.PD, Mode.AGGREGATED]
    rates.update(dict.fromkeys(Mode, 0.0))
    assert leaders(of) == []


def test_gpus_in_words() -> None:
    text = gpus_text(point(Mode.AFD, 1.0))
    assert "attention" in text
    assert "ffn" in text
