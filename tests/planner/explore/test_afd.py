"""AFD on tiny questions against plain arithmetic, and the pools that are made of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from planner.errors import PlannerError
from planner.explore import memory
from planner.explore.afd import Rank, evaluate, explore_afd
from planner.explore.afd_split import (
    AfdSplit,
    chunks_of,
    lanes_of,
    replica_sizes,
    settings,
    sizes_up_to,
    splits_of,
)
from planner.explore.afd_table import found_of_rows
from planner.explore.check import afd_of, simulate_point
from planner.explore.handover import kv_seconds
from planner.explore.kernels.base import Sides
from planner.explore.kernels.roofline import RooflineDB
from planner.explore.model import read_model
from planner.explore.pd_afd import afd_replicas, describe_afd
from planner.explore.points import Mode, Point, Shape, Targets
from planner.explore.pools import Pools, found_of, match
from planner.explore.question import Options, Question
from planner.explore.stages import Stages
from planner.explore.system import find_system
from tests.planner.explore.brute import afd_point, step

SYSTEM = find_system("b200_sxm")
DB = RooflineDB(SYSTEM)
DEEPSEEK = read_model("deepseek-v3.2")
CHAT = Shape("chat", 4096, 512, 256)
QUESTION = Question(DEEPSEEK, SYSTEM, 128, CHAT, Targets(0.05, 0.015))
SMALL = replace(QUESTION, model=read_model("qwen3-30b-a3b"), gpus=8)


def test_every_setting_of_a_split_by_plain_arithmetic() -> None:
    stages = Stages(QUESTION, DB)
    split = AfdSplit(2, 8, 1, 112)
    table = evaluate(stages, Rank(stages, 2), split, replicas=1)
    assert table is not None
    assert len(table.rate) > 500
    for row in range(0, len(table.rate), 37):
        batch, lanes, chunk = (
            int(column[row]) for column in (table.given.batch, table.given.lanes, table.given.chunk)
        )
        rate, ttft, tpot = afd_point(QUESTION, DB, (2, 8, 1, 112), batch, lanes, chunk, 1)
        assert table.rate[row] == pytest.approx(rate)
        assert table.ttft[row] == pytest.approx(ttft)
        assert table.tpot[row] == pytest.approx(tpot) == pytest.approx(table.tpot_safe[row])
        assert table.tpot_paper[row] <= table.tpot_safe[row] * (1 + 1e-12)


def test_the_paper_s_overlap_counts_where_asked() -> None:
    stages = Stages(replace(QUESTION, options=Options(overlap="paper")), DB)
    table = evaluate(stages, Rank(stages, 1), AfdSplit(1, 16, 1, 112), replicas=1)
    assert table is not None
    assert np.all(table.tpot == table.tpot_paper)
    assert np.all(table.tpot <= table.tpot_safe * (1 + 1e-12))
    assert np.any(table.tpot < 0.9 * table.tpot_safe)


@pytest.mark.parametrize("split", [(1, 2, 1, 126), (1, 16, 1, 112), (8, 2, 1, 112)])
def test_lopsided_splits_are_reached(split: tuple[int, int, int, int]) -> None:
    assert AfdSplit(*split) in set(splits_of(DEEPSEEK, 128, SYSTEM, SYSTEM))


def test_splits_use_all_gpus_and_divide_heads() -> None:
    found = list(splits_of(DEEPSEEK, 24, SYSTEM, SYSTEM))
    assert len(found) == len(set(found))
    assert {split.attention for split in found} == set(range(1, 24))
    for split in found:
        assert split.gpus == 24
        assert DEEPSEEK.attention.heads % split.tp == 0
        assert DEEPSEEK.expert_inter % (split.moe_tp * 128) == 0


def test_no_more_expert_groups_than_experts() -> None:
    mixtral = read_model("mixtral-8x7b-v0.1")
    found = list(splits_of(mixtral, 32, SYSTEM, SYSTEM))
    assert found
    assert all(split.ep <= 8 for split in found)


def test_what_is_tried() -> None:
    assert replica_sizes(12) == [2, 3, 4, 6, 8, 12]
    assert replica_sizes(7) == [2, 4, 7]
    assert lanes_of(Options()) == (1, 2, 4)
    assert lanes_of(Options(full_duplex=False)) == (1, 2, 3)
    assert lanes_of(Options(lanes=(5,))) == (5,)
    assert 512 in chunks_of(CHAT)
    assert 300 in chunks_of(replace(CHAT, prompt=300))
    sizes = sizes_up_to(1024)
    assert sizes[:16] == list(range(1, 17))
    assert all(b / a < 1.13 for a, b in pairwise(sizes[8:]))


def test_micro_batches_fall_to_the_batch() -> None:
    given = settings(Options(lanes=(4,)), 9, [0])
    assert list(zip(given.batch, given.lanes, strict=True)) == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (8, 4),
    ]


def best_of(question: Question, split: AfdSplit) -> Point:
    stages = Stages(question, DB)
    rows = explore_afd(stages, [split], question.gpus)
    best = found_of_rows(stages, [rows]).best
    assert best is not None
    return best


def test_a_point_says_what_it_is_made_of() -> None:
    point = best_of(replace(SMALL, gpus=16), AfdSplit(2, 1, 1, 6))
    attention, ffn = point.groups
    assert (attention.role, ffn.role) == ("attention", "ffn")
    assert (attention.gpus, ffn.gpus, point.gpus) == (2, 6, 16)
    assert attention.replicas == ffn.replicas == 2
    assert point.concurrency == 2 * point.batch
    assert set(point.parts) == {"attention", "a2f", "ffn", "f2a"}
    assert sum(point.shares.values()) == pytest.approx(1.0)
    # a plain step of one micro-batch after the other
    assert point.tpot >= max(point.parts.values()) * 0.999
    assert point.placement


def test_memory_of_both_sides() -> None:
    question = SMALL
    point = best_of(question, AfdSplit(1, 4, 1, 4))
    attention, ffn = point.groups
    model, sides = question.model, Sides()
    tokens = point.batch + point.chunk
    expected = memory.attention_side(
        model, tp=1, sides=sides, tokens=tokens, requests=point.batch, longest=CHAT.longest
    )
    assert attention.memory == pytest.approx(expected.total)
    other = memory.ffn_side(model, tp=1, ep=4, sides=sides, tokens=4 * tokens)
    assert ffn.memory == pytest.approx(other.total)
    assert attention.room == pytest.approx(0.9 * SYSTEM.gpu.memory)


def test_kv_bounds_the_batch() -> None:
    long = replace(SMALL, shape=Shape("long", 500_000, 64, 64), targets=Targets(1e9, 1e9))
    stages = Stages(long, DB)
    rank = Rank(stages, 1)
    most = rank.given.batch.max()
    kv = memory.kv_per_request(long.model, 1, long.shape.longest)
    assert most * kv < 0.9 * SYSTEM.gpu.memory < (most + 3) * kv + 20e9


def test_unequal_gpus() -> None:
    """Slower GPUs for the experts cost time, and their memory counts on their side."""
    other = find_system("h100_sxm")
    stages = Stages(replace(SMALL, ffn_system=other), DB, RooflineDB(other))
    rank = Rank(stages, 1)
    split = AfdSplit(1, 4, 1, 4)
    mixed = evaluate(stages, rank, split, 1)
    alike = evaluate(Stages(SMALL, DB), rank, split, 1)
    assert mixed is not None
    assert alike is not None
    assert np.all(mixed.tpot > alike.tpot)
    rows = explore_afd(stages, [split], 8)
    found = found_of_rows(stages, [rows]).front[0]
    assert found.groups[1].room == pytest.approx(0.9 * other.gpu.memory)
    assert found.placement == "segregated"


# -- pools ---------------------------------------------------------------------------------------


def test_a_prefill_replica_by_plain_arithmetic() -> None:
    question = replace(SMALL, options=Options(lanes=(2,)))
    stages = Stages(question, DB)
    pools = afd_replicas(stages, [AfdSplit(1, 2, 1, 2)], "prefill")
    assert not pools.decodes
    for one in pools.prefills:
        seconds = step(question, DB, (1, 2, 1, 2), 0, one.batch * CHAT.prompt, 2)
        assert one.seconds == pytest.approx(seconds)
        assert one.requests_per_s == pytest.approx(2 * one.batch / seconds)
    assert pools.reach.ttft == pytest.approx(min(one.seconds for one in pools.prefills))


def test_a_decode_replica_by_plain_arithmetic() -> None:
    stages = Stages(SMALL, DB)
    pools = afd_replicas(stages, [AfdSplit(2, 1, 1, 2)], "decode")
    assert len(pools.decodes) > 10
    for one in pools.decodes:
        seconds = step(SMALL, DB, (2, 1, 1, 2), one.batch, 0, one.lanes)
        assert one.seconds == pytest.approx(seconds)
        assert one.requests_per_s == pytest.approx(one.batch / seconds / (CHAT.output - 1))


def test_pruned_pools_are_the_same() -> None:
    splits = [split for size in (2, 4) for split in splits_of(SMALL.model, size, SYSTEM, SYSTEM)]
    for role in ("prefill", "decode"):
        one, other = (
            afd_replicas(Stages(SMALL, DB), splits, role, prune=prune)  # type: ignore[arg-type]
            for prune in (True, False)
        )
        assert one.prefills == other.prefills
        assert one.decodes == other.decodes
        assert one.evaluated <= other.evaluated


def test_rates_are_matched() -> None:
    stages = Stages(SMALL, DB)
    prefills = afd_replicas(stages, [AfdSplit(1, 1, 1, 1)], "prefill").prefills
    decodes = afd_replicas(stages, [AfdSplit(1, 1, 1, 1)], "decode").decodes
    found = found_of(
        replace(SMALL, targets=Targets(1e9, 1e9)),
        Mode.PD_AFD,
        Pools(prefills, decodes),
        partial(describe_afd, stages),
    )
    best = found.best
    assert best is not None
    # 2 GPUs each, 8 together: all ways by hand
    rates = [
        min(0.9 * p.requests_per_s * n, 0.92 * d.requests_per_s * (4 - n))
        for p in prefills
        for d in decodes
        for n in (1, 2, 3)
    ]
    assert best.tokens_per_s == pytest.approx(max(rates) * CHAT.output)
    assert best.gpus <= 8
    assert {group.role for group in best.groups} == {
        "prefill attention", "prefill ffn", "decode attention", "decode ffn"
    }  # fmt: skip


def test_the_kv_cache_s_way_counts_for_ttft() -> None:
    stages = Stages(SMALL, DB)
    prefills = afd_replicas(stages, [AfdSplit(2, 1, 1, 1)], "prefill").prefills
    decodes = afd_replicas(stages, [AfdSplit(1, 1, 1, 1)], "decode").decodes
    found = found_of(
        SMALL,
        Mode.PD_AFD,
        Pools(prefills, decodes),
        partial(describe_afd, stages),
    )
    way = kv_seconds(SMALL, 2, 1)
    least = 512 * memory.kv_per_request(SMALL.model, 1, 1)
    # from two GPUs to one on another node: no faster than that one's link
    assert way >= least / SYSTEM.tier("cluster").bandwidth
    assert found.front
    ttfts = {point.ttft - way for point in found.front}
    assert all(any(t == pytest.approx(1.8 * one.seconds) for one in prefills) for t in ttfts)


def test_both_pools_where_asked() -> None:
    stages = Stages(SMALL, DB)
    split = [AfdSplit(1, 1, 1, 1)]
    prefills = afd_replicas(stages, split, "prefill").prefills
    plain = tuple(replace(one, afd=False) for one in prefills)
    decodes = tuple(
        replace(one, afd=False) for one in afd_replicas(stages, split, "decode").decodes
    )

    def none_of(pools: Pools) -> bool:
        found = found_of(SMALL, Mode.PD_AFD, pools, partial(describe_afd, stages))
        return found.best is None and not found.front

    assert none_of(Pools(plain, decodes))
    assert not none_of(Pools(prefills, decodes))


def test_gpus_that_share_an_expert_add_up() -> None:
    stages = Stages(SMALL, DB)
    tokens = np.array([1.0, 100.0, 10_000.0])
    alone, four = stages.reduction(1, 4, tokens), stages.reduction(4, 1, tokens)
    assert np.all(alone == 0)
    assert np.all(np.diff(four) > 0)
    # each of the others sends a quarter of every token's state
    moved = SMALL.model.moe_layers * 1e4 / 4 * SMALL.model.hidden * 2
    assert four[2] > 3 * moved / SYSTEM.tier("nvlink").bandwidth


def test_matches_never_take_more_gpus_than_there_are() -> None:
    stages = Stages(SMALL, DB)
    splits = [AfdSplit(1, 1, 1, 1), AfdSplit(1, 1, 1, 4)]
    prefills = afd_replicas(stages, splits, "prefill").prefills
    decodes = afd_replicas(stages, splits, "decode").decodes
    found = match(SMALL, prefills, decodes)
    assert len(found.gpus) > 0
    assert found.gpus.max() <= 8
    assert found.prefills.min() >= 1
    assert found.decodes.min() >= 1
    none = match(replace(SMALL, gpus=3), prefills, decodes)
    assert len(none.gpus) == 0


# -- discrete events -----------------------------------------------------------------------------


def test_simulated_steps_are_near_the_safe_bound() -> None:
    question = SMALL
    point = best_of(question, AfdSplit(1, 4, 1, 4))
    found = simulate_point(question, point, DB)
    assert found.safe == pytest.approx(
        step(question, DB, (1, 4, 1, 4), point.batch, 0, point.lanes)
    )
    # contexts differ between requests, so that the slowest rank counts: a little over the mean's
    assert 0.98 * found.safe < found.tpot < 1.15 * found.safe
    assert found.tokens_per_s == pytest.approx(point.concurrency / found.tpot)
    assert found.ranks == 4


def test_only_afd_is_simulated() -> None:
    point = best_of(SMALL, AfdSplit(1, 4, 1, 4))
    assert afd_of(point) == (AfdSplit(1, 4, 1, 4), 1)
    plain = replace(point, groups=(replace(point.groups[0], role="worker"),))
    with pytest.raises(PlannerError, match="isn't AFD"):
        simulate_point(SMALL, plain, DB)
