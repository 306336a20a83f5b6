"""Placements: where GPUs end up, which is faster, and the KV transfer of the paper's appendix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.explore.calibration import NOMINAL
from planner.explore.network import Traffic, kv_transfer
from planner.explore.placement import (
    best_placement,
    domains_used,
    paired,
    placements,
    segregated,
    striped,
)
from planner.explore.system import Gpu, System, Tier, find_system

GPU = Gpu("test", 80e9, 1e12, {"bf16": 1e15}, "made up")
NODES = System("t", GPU, 8, (Tier("t0", 8, 0.0, 450e9), Tier("t1", None, 0.0, 25e9)))
DEEPSEEK = Traffic(7168, 256, 8)
QUICK = settings(max_examples=30, deadline=None)


def per_node(gpus: tuple[int, ...], nodes: int) -> list[int]:
    return np.bincount([gpu // 8 for gpu in gpus], minlength=nodes).tolist()


@QUICK
@given(st.integers(1, 60), st.integers(1, 60))
def test_every_gpu_has_one_side(attention, ffn):
    for placement in placements(NODES, attention, ffn):
        assert len(placement.attention) == attention
        assert len(placement.ffn) == ffn
        assert len(set(placement.attention + placement.ffn)) == attention + ffn


@QUICK
@given(st.integers(1, 60), st.integers(1, 60))
def test_paired_and_striped_keep_the_proportion_in_every_node(attention, ffn):
    total = attention + ffn
    for placement in (paired(NODES, attention, ffn), striped(NODES, attention, ffn)):
        every = per_node(tuple(range(total)), -(-total // 8))
        for here, size in zip(per_node(placement.attention, len(every)), every, strict=True):
            # dealing gives a node that is not full its cards first
            loose = 1 if placement.name == "paired" else 8 - every[-1] + 1
            assert abs(here - size * attention / total) <= loose


@QUICK
@given(st.integers(1, 60), st.integers(1, 60))
def test_segregated_sides_share_no_node(attention, ffn):
    placement = segregated(NODES, attention, ffn)
    assert not {g // 8 for g in placement.attention} & {g // 8 for g in placement.ffn}
    assert domains_used(NODES, placement.attention) == -(-attention // 8)
    assert domains_used(NODES, placement.ffn) == -(-ffn // 8)


def test_two_nodes_by_hand():
    assert paired(NODES, 4, 12).attention == (0, 1, 8, 9)
    assert striped(NODES, 4, 12).attention == (0, 8, 1, 9)
    assert segregated(NODES, 4, 12).attention == (0, 1, 2, 3)
    assert segregated(NODES, 4, 12).ffn == tuple(range(8, 20))


def test_kv_of_pairs_on_a_node_is_18_times_faster_than_across():
    # arXiv 2605.28302, appendix: 450 GB/s on the node against 25 GB/s between nodes
    size = 4096 * 61 * 576 * 2.0
    times = {}
    for place in (paired(NODES, 8, 8), segregated(NODES, 8, 8)):
        pairs = zip(place.attention, place.ffn, strict=True)
        times[place.name] = [
            kv_transfer(NODES, size, [prefill], [decode], calibration=NOMINAL)
            for prefill, decode in pairs
        ]
    assert times["paired"] == pytest.approx([size / 450e9] * 8)
    ratios = np.array(times["segregated"]) / np.array(times["paired"])
    assert ratios == pytest.approx(18.0)


def test_one_node_beats_two():
    best = best_placement(NODES, 4, 4, 64, DEEPSEEK)
    assert best.placement.name == "paired"
    times = {one.placement.name: one.a2f + one.f2a for one in best.compared}
    assert times["segregated"] > 5 * times["paired"]


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1, 512))
def test_the_best_is_the_least_of_all_and_deterministic(attention, ffn, tokens):
    system = find_system("b200_sxm")
    best = best_placement(system, attention, ffn, tokens, DEEPSEEK)
    assert best.a2f + best.f2a == min(one.a2f + one.f2a for one in best.compared)
    assert best == best_placement(system, attention, ffn, tokens, DEEPSEEK)


def test_pairing_beats_segregation_where_nvlink_is_faster():
    best = best_placement(find_system("b200_sxm"), 64, 64, 64, DEEPSEEK)
    times = {one.placement.name: one.a2f + one.f2a for one in best.compared}
    assert best.placement.name == "paired"
    assert times["paired"] < times["segregated"]


def test_sides_on_other_systems_have_one_placement():
    best = best_placement(
        NODES, 8, 4, 64, DEEPSEEK, ffn_system=find_system("b200_sxm"), calibration=NOMINAL
    )
    assert [one.placement.name for one in best.compared] == ["segregated"]


def test_a_side_without_gpus_is_refused():
    with pytest.raises(PlannerError, match="0 attention and 4 FFN GPUs"):
        placements(NODES, 0, 4)
