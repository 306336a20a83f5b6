"""Prefill and decode workers and their systems, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.explore.model import read_model
from planner.explore.pd import (
    decode_workers,
    describe_plain,
    pd_points,
    plain_pools,
    prefill_workers,
)
from planner.explore.points import Mode, Shape, Targets
from planner.explore.pools import found_of
from planner.explore.question import Question
from planner.explore.split import Split, splits
from planner.explore.system import find_system
from planner.explore.whole import Steps
from tests.planner.explore.linear_db import LinearDB

PREFILL, DECODE = Split(2, 1, 1, 2), Split(1, 4, 1, 4)
ASKED = Question(
    model=read_model("qwen3-30b-a3b"),
    system=find_system("h200"),
    gpus=16,
    shape=Shape("test", 100, 1000, 201),
    targets=Targets(1.0, 0.02),
)


def test_prefill_by_hand() -> None:
    found = prefill_workers(ASKED, LinearDB(), PREFILL)
    # two prompts behind 100 cached tokens each
    attention = 1e-3 + 10e-6 * 2000 + 2e-9 * 2000 * (100 + 500)
    seconds = attention / 2 + 2e-3 + 5e-6 * 2000 / 2 + 3e-6 * 2000
    two = next(one for one in found if one.batch == 2)
    assert two.seconds == pytest.approx(seconds)
    assert two.requests_per_s == pytest.approx(2 / seconds)
    assert [one.batch for one in found] == list(range(1, 17))  # 16,384 tokens
    assert two.gpus == 2
    assert not two.afd


def test_decode_by_hand() -> None:
    found = decode_workers(ASKED, LinearDB(), DECODE, batches=[8, 64])
    seconds = 1e-3 + 10e-6 * 8 + 1e-9 * 8 * 1200.5 + 2e-3 + 5e-6 * 32 / 4 + 3e-6 * 8
    assert found[0].seconds == pytest.approx(seconds)
    # 200 tokens each: the first came with the prompt
    assert found[0].requests_per_s == pytest.approx(4 * 8 / (200 * seconds))
    assert found[0].concurrency == 32


def test_factors_are_on_the_time() -> None:
    plain = decode_workers(ASKED, LinearDB(), DECODE, batches=[8])[0]
    slower = decode_workers(ASKED, LinearDB(), DECODE, batches=[8], factor=1.08)[0]
    assert slower.seconds == pytest.approx(1.08 * plain.seconds)
    assert slower.requests_per_s == pytest.approx(plain.requests_per_s / 1.08)


def test_systems_use_the_counts_that_serve_most() -> None:
    db = LinearDB()
    prefills = prefill_workers(ASKED, db, PREFILL, batches=[1, 4])
    decodes = decode_workers(ASKED, db, DECODE, batches=[16, 256])
    points = pd_points(ASKED, db, prefills, decodes, kv_transfer=0.05)
    assert len(points) == 4
    for point in points:
        assert point.mode is Mode.PD
        assert point.gpus <= 16
        prefill, decode = point.groups
        p = next(one for one in prefills if 1.8 * one.seconds + 0.05 == pytest.approx(point.ttft))
        d = next(one for one in decodes if one.seconds == point.tpot)
        best = max(
            min(0.9 * n * p.requests_per_s, 0.92 * m * d.requests_per_s)
            for n in range(1, 8)
            for m in range(1, 4)
            if 2 * n + 4 * m <= 16
        )
        assert point.tokens_per_s == pytest.approx(201 * best)
        assert (prefill.role, decode.role) == ("prefill", "decode")
        assert prefill.gpus * prefill.replicas + decode.gpus * decode.replicas == point.gpus


def test_no_workers_no_points() -> None:
    db = LinearDB()
    assert pd_points(ASKED, db, [], decode_workers(ASKED, db, DECODE)) == []


def test_pools_feed_the_search() -> None:
    db = LinearDB()
    steps = Steps(ASKED, db)
    pools = plain_pools(ASKED, db, splits(ASKED.model, 4, 8), steps)
    assert pools.evaluated == len(pools.prefills) + len(pools.decodes)
    assert pools.reach.ttft == pytest.approx(min(one.seconds for one in pools.prefills))
    assert pools.reach.tpot == pytest.approx(min(one.seconds for one in pools.decodes))
    found = found_of(ASKED, Mode.PD, pools, lambda one, role: describe_plain(steps, one, role))
    assert found.best is not None
    assert found.best.meets(ASKED.targets)
    assert sum(found.best.shares.values()) == pytest.approx(1.0)


def test_both_kinds_need_gpus() -> None:
    asked = replace(ASKED, gpus=4)
    assert decode_workers(asked, LinearDB(), DECODE) == []


def test_models_that_do_not_fit_say_what_they_lack() -> None:
    asked = replace(ASKED, model=read_model("deepseek-v3"))
    pools = plain_pools(asked, LinearDB(), [Split(1, 1, 1, 1)])
    assert pools.prefills == pools.decodes == ()
    assert pools.reach.memory > pools.reach.room
