"""A shard that grows and shrinks: equal, bit for bit, to one built with the same experts."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.checkpoint import Checkpoint
from actors.errors import FrameError
from tests.actors.test_shard import FAMILIES

Experts = Mapping[int, Sequence[int]]


def make_shard(folder: Path, experts: Experts, dtype: str = "float32") -> Any:
    from actors.shard import ExpertShard

    return ExpertShard(str(folder), experts, dtype=dtype, threads=1)


def answers(shard: Any) -> dict[int, torch.Tensor]:
    """What each layer makes of random pairs of all its experts, computed in both layouts."""
    found = {}
    generator = torch.Generator().manual_seed(1)
    for layer in shard.layers:
        held = torch.tensor(sorted(shard.experts[layer]), dtype=torch.int32)
        picks = torch.randint(len(held), (24,), generator=generator)
        rows = torch.randint(9, (24,), generator=generator, dtype=torch.int32)
        x = torch.randn(9, shard.hidden, generator=generator).to(shard.dtype)
        weights = torch.rand(24, generator=generator)
        with torch.inference_mode():
            sparse = shard.compute(layer, x, held[picks], weights, rows)
            top = torch.stack([held[torch.randperm(len(held), generator=generator)][:1]] * 9)
            dense = shard.compute(layer, x, top, weights[:9, None])
        found[layer] = torch.cat([sparse, dense])
    return found


def differences(shard: Any, folder: Path, dtype: str) -> list[int]:
    """Layers that a shard built anew with the same experts computes differently."""
    fresh = make_shard(folder, shard.experts, dtype)
    assert fresh.experts == shard.experts
    assert fresh.allocated_bytes == shard.allocated_bytes
    mine, theirs = answers(shard), answers(fresh)
    assert mine.keys() == theirs.keys()
    return [layer for layer in mine if not torch.equal(mine[layer], theirs[layer])]


def grow_and_keep(folder: Path, dtype: str, by_row: bool) -> tuple[list[list[int]], int]:
    """Differences after every change of a shard, and how many layers had to be built anew."""
    from actors import shard as module
    from actors.expert_rows import NotByRow

    def refuse(*_: Any) -> Any:
        raise NotByRow("for the test")

    first, *later = Checkpoint.open(folder).moe_layers
    every = range(Checkpoint.open(folder).num_experts)
    shard = make_shard(folder, {first: [4, 1]}, dtype)
    builds: list[Experts] = []
    build, rows_of = shard._build, module.rows_of
    shard._build = lambda experts: builds.append(experts) or build(experts)
    if not by_row:
        module.rows_of = refuse  # type: ignore[assignment]
    try:
        found = []
        changes: list[tuple[Callable[[Experts], int], Experts]] = [
            (shard.grow, {first: [0, 1, 6], **{layer: [3] for layer in later}}),
            (shard.keep, {first: [6, 4], **{layer: [3] for layer in later}}),
            (shard.keep, {first: [4]}),
            (shard.grow, dict.fromkeys((first, *later), every)),
            (shard.keep, {layer: [7, 2, 5] for layer in (first, *later)}),
        ]
        for change, experts in changes:
            before = shard.allocated_bytes
            moved = change(experts)
            assert abs(shard.allocated_bytes - before) == moved
            found.append(differences(shard, folder, dtype))
        loads = 2  # the grows themselves; what comes on top was built because rows did not do
        return found, len(builds) - loads
    finally:
        module.rows_of = rows_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_changed_shard_equals_a_new_one(vllm_process, moe_checkpoint, family):
    folder = moe_checkpoint(family)
    found, rebuilt = vllm_process(grow_and_keep, folder, "float32", True)
    assert found == [[]] * 5
    assert rebuilt == 0


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_changed_shard_in_bfloat16(vllm_process, moe_checkpoint, family):
    folder = moe_checkpoint(family, torch.bfloat16)
    assert vllm_process(grow_and_keep, folder, "bfloat16", True) == ([[]] * 5, 0)


def test_layers_that_do_not_change_by_row_are_built_anew(vllm_process, moe_checkpoint):
    found, rebuilt = vllm_process(grow_and_keep, moe_checkpoint("gpt_oss"), "float32", False)
    assert found == [[]] * 5
    assert rebuilt > 0


def odd_kernels(folder: Path) -> list[str]:
    """Why layers are not changed by row, for kernels with something of their own."""
    from actors.expert_rows import NotByRow, rows_of

    reasons = []
    for damage in ("packed", "hidden", "scalar"):
        shard = make_shard(folder, {0: [0, 1]})
        layer = shard._layers[0].module
        if damage == "packed":
            layer.w2_weight.data = layer.w2_weight.data.reshape(4, -1)
        elif damage == "hidden":
            layer.quant_method.moe_kernel.fused_experts.scales = [torch.ones(2)]
        else:
            layer.register_parameter("scale", torch.nn.Parameter(torch.tensor(1.0)))
        with pytest.raises(NotByRow) as caught:
            rows_of(layer)
        reasons.append(str(caught.value))
    return reasons


def test_layers_with_something_else_per_expert(vllm_process, moe_checkpoint):
    packed, hidden, scalar = vllm_process(odd_kernels, moe_checkpoint("qwen3_moe"))
    assert "w2_weight has shape (4, " in packed
    assert "scales is a tensor" in hidden
    assert "scale has shape ()" in scalar


def a_layer_that_lies(folder: Path) -> bool:
    """Whether a layer whose rows turn out to be something else is built anew."""
    from actors import shard as module

    shard = make_shard(folder, {0: [0, 1, 2]})
    real = module.chosen
    module.chosen = lambda rows, places: {  # type: ignore[assignment]
        name: tensor.flip(0) for name, tensor in real(rows, places).items()
    }
    try:
        shard.keep({0: [1, 2]})
    finally:
        module.chosen = real
    return not differences(shard, folder, "float32")


def test_a_change_by_row_is_checked(vllm_process, moe_checkpoint):
    assert vllm_process(a_layer_that_lies, moe_checkpoint("qwen3_moe"))


def idempotent(folder: Path) -> dict[str, Any]:
    shard = make_shard(folder, {0: [1]})
    found: dict[str, Any] = {"grown": [shard.grow({0: [1, 2]}), shard.grow({0: [2, 1]})]}
    with pytest.raises(ValueError, match=r"\{0: \[5\]\} .* grow it first") as caught:
        shard.keep({0: [1, 5]})
    found["refused"] = str(caught.value)
    with pytest.raises(ValueError, match="expected distinct ids"):
        shard.grow({0: [99]})
    found["held"] = shard.experts
    found["kept"] = [shard.keep({0: [2]}), shard.keep({0: [2]})]
    found["emptied"] = [shard.keep({}), shard.keep({})]
    found["left"] = (shard.experts, shard.allocated_bytes, shard.layers)
    with pytest.raises(FrameError) as caught_frame:
        shard.compute(0, torch.ones(1, shard.hidden), torch.zeros(1, 1).int(), torch.ones(1, 1))
    found["code"] = caught_frame.value.code
    shard.grow({2: [7]})
    found["again"] = shard.experts
    found["same"] = not differences(shard, folder, "float32")
    return found


def test_changes_are_idempotent_and_may_empty_a_shard(vllm_process, moe_checkpoint):
    folder = moe_checkpoint("qwen3_moe")
    found = vllm_process(idempotent, folder)
    expert = Checkpoint.open(folder).expert_bytes(0, 0)
    assert found["grown"] == [expert, 0]
    assert found["held"] == {0: (1, 2), 1: (), 2: ()}
    assert found["kept"] == [expert, 0]
    assert found["emptied"] == [expert, 0]
    assert found["left"] == ({0: (), 1: (), 2: ()}, 0, ())
    assert found["code"] == "unknown_layer"
    assert found["again"] == {0: (), 1: (), 2: (7,)}
    assert found["same"]


def compute_while_changing(folder: Path, changes: int) -> tuple[int, int]:
    """Calls and wrong answers of a thread that computes while another one changes the shard.

    The model's dtype is not torch's default: a tensor made in the default dtype or on the default
    device of the loader's thread would show.
    """
    every = Checkpoint.open(folder).moe_layers
    shard = make_shard(folder, {layer: [0, 1] for layer in every}, "bfloat16")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, shard.hidden, generator=generator).bfloat16()
    ids = torch.tensor([0, 1] * 4, dtype=torch.int32)
    rows = torch.arange(8, dtype=torch.int32)
    weights = torch.rand(8, generator=generator)
    with torch.inference_mode():
        expected = [shard.compute(layer, x, ids, weights, rows) for layer in every]
    calls, wrong, over = [0], [0], threading.Event()

    def compute() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            while not over.is_set():
                for layer, right in zip(every, expected, strict=True):
                    got = shard.compute(layer, x, ids, weights, rows)
                    calls[0] += 1
                    wrong[0] += not torch.equal(got, right)

    thread = threading.Thread(target=compute)
    thread.start()
    try:
        for _ in range(changes):
            shard.grow({layer: range(8) for layer in every})
            shard.keep({layer: [0, 1] for layer in every})
    finally:
        over.set()
        thread.join()
    return calls[0], wrong[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4"])  # the bare kernel, and vLLM's own way
def test_answers_stay_right_while_the_shard_changes(vllm_process, moe_checkpoint, family):
    folder = moe_checkpoint(family, torch.bfloat16)
    calls, wrong = vllm_process(compute_while_changing, folder, 10)
    assert calls > 30
    assert wrong == 0


def memory_of_many_changes(folder: Path) -> dict[str, Any]:
    shard = make_shard(folder, {0: [0], 1: [0]})
    before = shard.allocated_bytes

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cycles(number: int) -> None:
        for _ in range(number):
            shard.grow({layer: range(8) for layer in range(3)})
            shard.keep({0: [0], 1: [0]})

    cycles(5)
    gc.collect()
    start = resident()
    gc.disable()  # weights must be given back without its help
    try:
        cycles(50)
        without_collector = resident() - start
    finally:
        gc.enable()
    gc.collect()
    return {
        "allocated": (before, shard.allocated_bytes),
        "grown": resident() - start,
        "grown_without_collector": without_collector,
        "files": [str(file) for file in Path("/tmp").glob("expert-shard-*") if _mine(file)],
    }


def _mine(file: Path) -> bool:
    """Made since this process began."""
    return file.stat().st_mtime > Path(f"/proc/{os.getpid()}").stat().st_mtime


def test_fifty_changes_leave_nothing_behind(vllm_process, tmp_path):
    from tests.models import make_moe

    # 22 experts of 1.5 MB come and go each time: one set kept would show.
    folder = make_moe("qwen3_moe", tmp_path / "wide", moe_intermediate_size=1024)
    found = vllm_process(memory_of_many_changes, folder)
    first, last = found["allocated"]
    assert last == first
    assert found["grown"] < 60e6
    assert found["grown_without_collector"] < 400e6
    assert found["files"] == []
