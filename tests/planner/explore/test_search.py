"""The search: what brute force finds, nothing lost by pruning, and work that isn't done twice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.explore.kernels.roofline import RooflineDB
from planner.explore.model import read_model
from planner.explore.points import Mode, Point, Shape, Targets
from planner.explore.question import Exploration, Options, Question
from planner.explore.search import explore
from planner.explore.system import find_system
from tests.planner.explore.brute import afd_point

SYSTEM = find_system("h200_sxm")
DB = RooflineDB(SYSTEM)
SHAPE = Shape("short", 256, 512, 64)
QUESTION = Question(
    read_model("qwen3-30b-a3b"),
    SYSTEM,
    4,
    SHAPE,
    Targets(0.060, 0.005),
    options=Options(lanes=(1, 2)),
)


def search(question: Question, **options: object) -> Exploration:
    return explore(question, DB, jobs=1, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def found() -> Exploration:
    return search(QUESTION)


def test_every_mode_answers(found: Exploration) -> None:
    assert set(found.best) == set(Mode) == set(found.frontier)
    for mode, best in found.best.items():
        assert (best is None) == (mode in found.refusals)
        if best is not None:
            assert best.mode is mode
            assert best.meets(QUESTION.targets)
            assert best.gpus <= QUESTION.gpus
            assert all(group.memory <= group.room for group in best.groups)
    assert found.evaluated > 1000
    assert found.winner is not None


def test_fronts_rise_for_users_and_fall_for_gpus(found: Exploration) -> None:
    for points in found.frontier.values():
        users = [point.tokens_per_s_user for point in points]
        rates = [point.tokens_per_s_gpu for point in points]
        assert users == sorted(users)
        assert rates == sorted(rates, reverse=True)
        assert len(points) > 3


def test_no_best_is_beyond_its_front(found: Exploration) -> None:
    for mode, best in found.best.items():
        if best is not None:
            same = [
                p for p in found.frontier[mode] if p.tokens_per_s_user >= best.tokens_per_s_user
            ]
            assert max(p.tokens_per_s_gpu for p in same) >= best.tokens_per_s_gpu * (1 - 1e-9)


def test_afd_is_what_brute_force_finds(found: Exploration) -> None:
    """Every split of 2 and 4 GPUs, every batch up to 16 per micro-batch: with plain arithmetic."""
    points = list(brute_force())
    held = [p for p in points if p[1] <= QUESTION.targets.ttft and p[2] <= QUESTION.targets.tpot]
    best = found.best[Mode.AFD]
    assert best is not None
    assert best.batch < 16 * best.lanes
    assert best.tokens_per_s == pytest.approx(max(p[0] for p in held), rel=1e-9)
    fastest = min(p[2] for p in points)
    assert found.frontier[Mode.AFD][-1].tpot == pytest.approx(fastest, rel=1e-9)


def brute_force() -> Iterator[tuple[float, float, float]]:
    """tokens/s, TTFT and TPOT of every setting that ``search`` has on its grid."""
    chunks = [64 << i for i in range(8)]
    for size in (2, 4):
        for attention in range(1, size):
            for tp, moe_tp in product((1, 2), (1, 2)):
                if attention % tp or (size - attention) % moe_tp:
                    continue
                split = tp, attention // tp, moe_tp, (size - attention) // moe_tp
                for lanes, per_lane, chunk in product((1, 2), range(1, 17), chunks):
                    batch = lanes * per_lane
                    if -(-chunk // SHAPE.prompt) <= max(batch - 1, 1):
                        given = (QUESTION, DB, split, batch, lanes, chunk)
                        yield afd_point(*given, replicas=QUESTION.gpus // size)


def test_pruning_loses_nothing(found: Exploration) -> None:
    everything = search(QUESTION, prune=False)
    assert everything.evaluated > found.evaluated
    for mode in Mode:
        kept, expected = numbers(found.frontier[mode]), numbers(everything.frontier[mode])
        assert kept == [pytest.approx(pair) for pair in expected]
        best, other = everything.best[mode], found.best[mode]
        assert (best is None) == (other is None)
        if best is not None and other is not None:
            assert best.tokens_per_s == pytest.approx(other.tokens_per_s)


def test_pruning_keeps_reasons() -> None:
    hard = replace(QUESTION, targets=Targets(0.001, 0.0001))
    kept, all_of_it = search(hard), search(hard, prune=False)
    assert kept.winner is None
    for mode in Mode:
        assert kept.refusals[mode].limit == all_of_it.refusals[mode].limit
        assert kept.refusals[mode].needed == pytest.approx(all_of_it.refusals[mode].needed)


def numbers(points: tuple[Point, ...]) -> list[tuple[float, float]]:
    return [(point.tokens_per_s_user, point.tokens_per_s_gpu) for point in points]


def test_processes_find_the_same(found: Exploration) -> None:
    again = explore(replace(QUESTION, modes=(Mode.AFD, Mode.PD_AFD)), DB, jobs=2)
    for mode in again.best:
        assert again.best[mode] == found.best[mode]
        assert again.frontier[mode] == found.frontier[mode]


def test_resume_goes_on_without_evaluating_again(tmp_path: Path, found: Exploration) -> None:
    path = tmp_path / "work.jsonl"
    seen: list[tuple[str, float]] = []
    first = search(QUESTION, resume=path, progress=lambda *step: seen.append(step))
    units = len(seen)
    assert [share for _, share in seen] == pytest.approx([(i + 1) / units for i in range(units)])
    lines = path.read_text().splitlines()
    assert len(lines) == units
    # as if it had been stopped in the middle of writing the third line
    path.write_text("\n".join([*lines[:2], lines[2][:40]]))
    seen.clear()
    second = search(QUESTION, resume=path, progress=lambda *step: seen.append(step))
    assert len(seen) == units - 2
    assert second.best == first.best == found.best
    assert second.frontier == first.frontier
    seen.clear()
    third = search(QUESTION, resume=path, progress=lambda *step: seen.append(step))
    assert not seen
    assert third.best == first.best


def test_resume_knows_another_question(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    seen: list[str] = []
    small = replace(QUESTION, modes=(Mode.AFD,), gpus=2)
    search(small, resume=path, progress=lambda name, _: seen.append(name))
    search(
        replace(small, targets=Targets(1.0, 1.0)), resume=path, progress=lambda n, _: seen.append(n)
    )
    assert len(seen) == 2
    assert len({json.loads(line)["key"] for line in path.read_text().splitlines()}) == 2


def test_a_file_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="can't hold the finished work"):
        search(QUESTION, resume=tmp_path / "nowhere" / "work.jsonl")


def test_why_there_is_none() -> None:
    model = read_model("deepseek-v3")
    two = replace(QUESTION, model=model, gpus=2)
    memory = search(two).refusals
    assert memory[Mode.AFD].limit == "memory"
    assert memory[Mode.AFD].needed > memory[Mode.AFD].allowed
    assert "GiB" in memory[Mode.AFD].text
    slow = search(replace(QUESTION, targets=Targets(10.0, 1e-5))).refusals[Mode.AFD]
    assert slow.limit == "tpot"
    assert slow.needed > slow.allowed == 1e-5
    late = search(replace(QUESTION, targets=Targets(1e-4, 10.0))).refusals[Mode.PD_AFD]
    assert late.limit == "ttft"
    assert "100 times" in late.text or f"{late.needed / 1e-4:.3g} times" in late.text


def test_each_but_not_both() -> None:
    reached = search(replace(QUESTION, modes=(Mode.AFD,), targets=Targets(1e-9, 1e-9)))
    text = reached.refusals[Mode.AFD]
    assert text.limit in ("ttft", "tpot")
    # a target for each that only the configuration best at it holds
    fastest = reached.frontier[Mode.AFD][-1].tpot
    least = min(p[1] for p in brute_force())
    both = replace(QUESTION, modes=(Mode.AFD,), targets=Targets(least * 1.0001, fastest * 1.0001))
    refused = search(both).refusals
    if refused:
        assert refused[Mode.AFD].limit == "ttft and tpot"
        assert math.isnan(refused[Mode.AFD].needed)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"gpus": 1}, "nothing to divide"),
        ({"modes": ()}, "no modes"),
        ({"targets": Targets(0.0, 1.0)}, "TTFT"),
        ({"targets": Targets(1.0, math.nan)}, "TPOT"),
        ({"options": Options(memory_share=1.5)}, "memory_share"),
        ({"options": Options(lanes=(0,))}, "lanes"),
        ({"options": Options(pd_ttft=0.5)}, "pd_ttft"),
        ({"options": Options(wire_bytes=0)}, "wire_bytes"),
    ],
)
def test_nonsense_is_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(PlannerError, match=text):
        search(replace(QUESTION, **change))  # type: ignore[arg-type]


def test_gpus_that_do_not_divide() -> None:
    odd = search(replace(QUESTION, gpus=7, modes=(Mode.AFD,)))
    best = odd.best[Mode.AFD]
    assert best is not None
    assert best.gpus <= 7
    sizes = {sum(g.gpus for g in point.groups) for point in odd.frontier[Mode.AFD]}
    assert sizes <= {2, 4, 7}
