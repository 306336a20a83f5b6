"""Splits of a replica whose GPUs do both sides."""

from __future__ import annotations

import pytest

from planner.errors import PlannerError
from planner.explore.model import read_model
from planner.explore.split import Split, replica_gpus, splits


def test_all_of_eight_gpus_for_mixtral() -> None:
    model = read_model("mixtral-8x7b-v0.1")  # 32 heads, 8 experts, bf16
    found = splits(model, 8, 8)
    assert set(found) == {
        Split(tp, 8 // tp, moe_tp, 8 // moe_tp) for tp in (1, 2, 4, 8) for moe_tp in (1, 2, 4, 8)
    }
    assert len(found) == len(set(found))


def test_tensor_parallelism_stays_on_a_node() -> None:
    model = read_model("deepseek-v3")
    found = splits(model, 64, 8)
    assert max(split.tp for split in found) == 8
    assert max(split.moe_tp for split in found) == 8
    assert all(split.gpus == 64 == split.moe_tp * split.ep for split in found)


def test_shares_of_fp8_experts_hold_whole_blocks() -> None:
    # 1536 columns are 12 blocks of 128: 1, 2, 4 divide them, 8 doesn't
    found = splits(read_model("qwen3-235b-a22b-fp8"), 8, 8)
    assert {split.moe_tp for split in found} == {1, 2, 4}


def test_no_more_groups_than_experts() -> None:
    found = splits(read_model("mixtral-8x7b-v0.1"), 16, 8)
    assert {split.ep for split in found} == {2, 4, 8}


def test_sizes_are_powers_of_two() -> None:
    assert replica_gpus(100) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("numbers", [(2, 4, 1, 4), (0, 1, 1, 1), (1, 1, -1, -1)])
def test_sides_that_do_not_match_are_refused(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(PlannerError, match="expected the same GPUs"):
        Split(*numbers)
