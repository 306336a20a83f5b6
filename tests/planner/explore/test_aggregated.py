"""Aggregation: chunks of prompts that ride with decode, against arithmetic by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from planner.explore.aggregated import (
    CORRECTIONS,
    aggregated_points,
    evaluate,
    explore_aggregated,
    tried_chunks,
)
from planner.explore.kernels.base import Provenance
from planner.explore.model import read_model
from planner.explore.points import Mode, Shape, Targets
from planner.explore.question import Question
from planner.explore.split import Split, splits
from planner.explore.system import find_system
from planner.explore.whole import Steps, room_of
from tests.planner.explore.linear_db import LinearDB

SHAPE = Shape("test", 100, 1000, 201)
SPLIT = Split(2, 4, 1, 8)


def question(gpus: int = 20, shape: Shape = SHAPE) -> Question:
    return Question(
        model=read_model("qwen3-30b-a3b"),
        system=find_system("h200"),
        gpus=gpus,
        shape=shape,
        targets=Targets(1.0, 0.02),
    )


def steps_by_hand(decode: float, chunk: float, prompts: float, past: float) -> float:
    """Seconds of a step on SPLIT; context 100 + 1000 + 201 / 2."""
    tokens = decode + chunk
    seen = past + chunk / prompts / 2
    attention = 1e-3 + 10e-6 * tokens + 1e-9 * decode * 1200.5 + 2e-9 * chunk * seen
    return attention / 2 + 2e-3 + 5e-6 * (4 * tokens) / 8 + 3e-6 * tokens


def test_one_configuration_by_hand() -> None:
    found = evaluate(Steps(question(), LinearDB()), SPLIT, batches=[16], chunks=[500])
    # 16 prompts of 1000 in chunks of 500: 32 mixed steps, 201 - 32 of decode alone; in a mixed one
    # a slot computes its prompt and 15 decode; a chunk finds 100 + 500 / 2 tokens in the cache
    mixed, plain = steps_by_hand(15, 500, 1, 350), steps_by_hand(16, 0, 1, 0)
    total = 32 * mixed + 169 * plain
    assert found.tpot[0] == pytest.approx(total / 201)
    assert found.ttft[0] == pytest.approx(mixed * 2 * (2 + (32 - 3) / 20))
    # 20 GPUs hold two replicas of 8 with 4 ranks each; the first of 201 tokens isn't decoded
    assert found.rate[0] == pytest.approx(2 * 4 * 16 * 200 / total)


def test_chunks_of_several_prompts() -> None:
    found = evaluate(Steps(question(), LinearDB()), SPLIT, batches=[16], chunks=[4000])
    mixed, plain = steps_by_hand(12, 4000, 4, 100), steps_by_hand(16, 0, 1, 0)
    assert found.tpot[0] == pytest.approx((4 * mixed + 197 * plain) / 201)


def test_a_pool_that_only_computes_prompts() -> None:
    # 400 prompts of 1000 in chunks of 500 are 800 steps, more than the 201 of a request: a quarter
    # of the slots decode in each
    found = evaluate(Steps(question(), LinearDB()), SPLIT, batches=[400], chunks=[500])
    mixed = steps_by_hand(math.floor(400 / (800 / 201)), 500, 1, 350)
    assert found.tpot[0] == pytest.approx(mixed)
    assert found.rate[0] == pytest.approx(2 * 4 * 400 * 200 / (800 * mixed))


def test_corrections_of_trtllm_leave_the_drained_steps_out() -> None:
    plain_db = evaluate(Steps(question(), LinearDB()), SPLIT, [16], [500])
    found = evaluate(Steps(question(), LinearDB(backend="trtllm")), SPLIT, [16], [500])
    mixed, plain = steps_by_hand(15, 500, 1, 350), steps_by_hand(16, 0, 1, 0)
    assert found.tpot[0] == pytest.approx((29 * mixed + 169 * plain) / (29 + 169))
    assert found.rate[0] == plain_db.rate[0]
    assert found.ttft[0] == plain_db.ttft[0]


def test_corrections_of_vllm() -> None:
    found = evaluate(Steps(question(), LinearDB(backend="vllm")), SPLIT, [16], [500])
    mixed, plain = steps_by_hand(15, 500, 1, 350), steps_by_hand(16, 0, 1, 0)
    ttft = (2 * mixed + 0.0008 * 48) * (1 + 4 / 8)
    tpot = (32 * mixed + 169 * plain) / 201
    assert found.ttft[0] == pytest.approx(ttft)
    by_steps = 16 * 200 / (32 * mixed + 169 * plain)
    by_latency = 16 * 200 / (ttft + 200 * tpot)
    assert found.rate[0] == pytest.approx(8 * min(by_steps, by_latency))
    assert set(CORRECTIONS) == {"trtllm", "vllm", "sglang"}


def test_points_say_all() -> None:
    asked = question()
    points = aggregated_points(asked, LinearDB(), SPLIT)
    room = room_of(asked, SPLIT)
    assert points
    for point in points[:: max(1, len(points) // 20)]:
        assert point.mode is Mode.AGGREGATED
        assert point.gpus == 16
        assert point.concurrency == 2 * 4 * point.batch
        group = point.groups[0]
        assert (group.tp, group.dp, group.moe_tp, group.ep) == (2, 4, 1, 8)
        assert group.memory <= group.room == pytest.approx(0.9 * asked.system.gpu.memory)
        assert group.memory >= room.fixed + point.batch * room.per_request
        assert sum(point.shares.values()) == pytest.approx(1.0)
        assert set(point.parts) == {"attention", "ffn", "exchange"}
        assert point.tpot_safe == point.tpot


def test_shares_are_of_all_steps_of_a_request() -> None:
    points = aggregated_points(question(), LinearDB(), SPLIT)
    point = next(p for p in points if (p.batch, p.chunk) == (16, 512))
    tokens = 32 * (15 + 512) + 169 * 16
    exchange = 3e-6 * tokens
    mixed, plain = steps_by_hand(15, 512, 1, 344), steps_by_hand(16, 0, 1, 0)
    assert point.shares[Provenance.ROOFLINE] == pytest.approx(exchange / (32 * mixed + 169 * plain))


def test_search_finds_what_listing_finds() -> None:
    asked, db = question(8), LinearDB()
    some = [split for split in splits(asked.model, 8, 8) if split.tp <= 2][:4]
    listed = [point for split in some for point in aggregated_points(asked, db, split)]
    found = explore_aggregated(asked, db, some)
    held = [point for point in listed if point.meets(asked.targets)]
    assert found.evaluated == len(listed)
    assert found.best is not None
    assert found.best.tokens_per_s == pytest.approx(max(point.tokens_per_s for point in held))
    assert found.reach.ttft == pytest.approx(min(point.ttft for point in listed))
    assert found.reach.tpot == pytest.approx(min(point.tpot for point in listed))
    users = [point.tokens_per_s_user for point in found.front]
    rates = [point.tokens_per_s_gpu for point in found.front]
    assert users == sorted(users)
    assert rates == sorted(rates, reverse=True)


def test_what_is_not_covered_is_left_out_and_counted() -> None:
    asked = question(8)
    found = explore_aggregated(asked, LinearDB(most_tokens=600), [SPLIT])
    everything = explore_aggregated(asked, LinearDB(), [SPLIT])
    assert 0 < found.evaluated < everything.evaluated
    assert found.evaluated + found.reach.uncovered == everything.evaluated
    assert found.reach.missing == "too many tokens"
    assert all(point.chunk <= 600 for point in found.front)


def test_a_model_that_does_not_fit_says_what_it_lacks() -> None:
    asked = replace(question(1), model=read_model("deepseek-v3"))
    found = explore_aggregated(asked, LinearDB(), [Split(1, 1, 1, 1)])
    assert found.best is None
    assert found.front == ()
    assert found.reach.memory > found.reach.room > 0


def test_splits_of_more_gpus_than_there_are_are_left_out() -> None:
    assert explore_aggregated(question(4), LinearDB(), [SPLIT]).evaluated == 0


def test_attention_is_asked_once_per_rank() -> None:
    asked, db = question(8), LinearDB()
    same_rank = [Split(2, 4, 1, 8), Split(2, 4, 2, 4), Split(2, 4, 1, 8)]
    steps = Steps(asked, db)
    for split in same_rank:
        evaluate(steps, split, [4, 8], [500])
    assert db.calls == 2  # mixed and plain


def test_chunks_are_powers_of_two_and_whole_prompts() -> None:
    chunks = tried_chunks(SHAPE)
    assert {64, 128, 512, 1000, 2000, 8000, 8192} <= set(chunks)
    assert tried_chunks(Shape("long", 0, 20_000, 10))[-2:] == [20_000, 40_000]
    assert np.all(np.diff(chunks) > 0)
