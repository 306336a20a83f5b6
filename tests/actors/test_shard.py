"""Shards on vLLM's real kernels: any subset of any family's experts, and their sums.

The reference is computed in float64 straight from the checkpoint's tensors, see
``tests.models.ReferenceExperts``. Everything that imports vLLM runs in the ``vllm_process``.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint import Checkpoint
from actors.errors import AffluxError, CheckpointError, FrameError, UnsupportedModel
from tests.models import ReferenceExperts, make_moe

Experts = Mapping[int, Sequence[int]]

# granitemoe to gpt_oss: single names or stacked tensors, own loaders, biases, scaled inputs,
# shared experts. Nothing in actors/ was written for one of them.
FAMILIES = (
    "qwen3_moe",
    "deepseek_v3",
    "mixtral",
    "olmoe",
    "stacked",
    "granitemoe",
    "qwen2_moe",
    "glm4_moe",
    "llama4",
    "gpt_oss",
    "ernie4_5_moe",
    "flex_olmo",
)


def split(folder: Path, parts: int) -> list[dict[int, list[int]]]:
    """All experts dealt to ``parts`` shards, unevenly and out of order."""
    checkpoint = Checkpoint.open(folder)
    dealt: list[dict[int, list[int]]] = [
        {layer: [] for layer in checkpoint.moe_layers} for _ in range(parts)
    ]
    for layer in checkpoint.moe_layers:
        for expert in reversed(range(checkpoint.num_experts)):
            dealt[(expert * 7 + layer) % 5 % parts][layer].append(expert)
    return dealt


def routing(checkpoint: Checkpoint, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random distinct experts [T, K] int32 and weights [T, K] float32."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, checkpoint.num_experts, generator=generator)
    weights, ids = scores.topk(checkpoint.top_k)
    return ids.int(), weights


def errors_of_split(folder: Path, shards: Iterable[Experts], dtype: str, tokens: int) -> list:
    """Relative error of the shards' sum per layer, and each shard's allocated bytes."""
    from actors.shard import ExpertShard

    checkpoint = Checkpoint.open(folder)
    built = [ExpertShard(str(folder), experts, dtype=dtype, threads=1) for experts in shards]
    ids, weights = routing(checkpoint, tokens)
    errors = []
    for layer in checkpoint.moe_layers:
        x = torch.randn(tokens, checkpoint.hidden, dtype=built[0].dtype)
        total = torch.zeros(tokens, checkpoint.hidden)
        for shard in built:
            local = torch.isin(ids, torch.tensor(shard.experts[layer], dtype=torch.int32))
            rows = local.nonzero()[:, 0].int()
            with torch.inference_mode():
                if len(rows) == ids.numel():
                    total += shard.compute(layer, x, ids, weights)
                elif len(rows):
                    out = torch.full_like(x, torch.nan)
                    total += shard.compute(layer, x, ids[local], weights[local], rows, out)
        expected = ReferenceExperts(folder, layer)(x, ids, weights)
        errors.append(float((total - expected).norm() / expected.norm()))
    return [errors, [shard.allocated_bytes for shard in built]]


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up(vllm_process, moe_checkpoint, family):
    folder = moe_checkpoint(family)
    checkpoint = Checkpoint.open(folder)
    for parts in (1, 2, 3):
        shards = split(folder, parts)
        errors, allocated = vllm_process(errors_of_split, folder, shards, "float32", 7)
        assert max(errors) < 2e-6
        assert allocated == [
            sum(checkpoint.expert_bytes(layer, e) for layer in held for e in held[layer])
            for held in shards
        ]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_parts_add_up_in_bfloat16(vllm_process, moe_checkpoint, family):
    folder = moe_checkpoint(family, torch.bfloat16)
    errors, _ = vllm_process(errors_of_split, folder, split(folder, 2), "bfloat16", 33)
    assert max(errors) < 0.01


def test_layers_may_hold_different_subsets_or_none(vllm_process, moe_checkpoint):
    folder = moe_checkpoint("qwen3_moe")
    shards = [
        {0: range(8), 1: [6], 2: []},
        {0: [], 1: [0, 1, 2, 3, 4, 5, 7], 2: [7, 3]},
        {0: [], 1: [], 2: [0, 1, 2, 4, 5, 6]},
    ]
    errors, allocated = vllm_process(errors_of_split, folder, shards, "float32", 7)
    assert max(errors) < 2e-6
    expert = Checkpoint.open(folder).expert_bytes(0, 0)
    assert allocated == [9 * expert, 9 * expert, 6 * expert]


def test_padded_kernels(vllm_process, tmp_path):
    """An intermediate size that the CPU kernels round up."""
    folder = make_moe("qwen3_moe", tmp_path / "odd", moe_intermediate_size=48)
    errors, _ = vllm_process(errors_of_split, folder, split(folder, 2), "float32", 7)
    assert max(errors) < 2e-6


def tensors_read(folder: Path, experts: Experts) -> set[tuple[str, int | None]]:
    """What a shard reads of the weights: (tensor, row of a stacked tensor or None)."""
    from actors import local_experts

    read: set[tuple[str, int | None]] = set()
    real = local_experts.safe_open

    class Spy:
        def __init__(self, *args: Any, **options: Any):
            self._file = real(*args, **options)

        def __enter__(self) -> Spy:
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def get_tensor(self, name: str) -> torch.Tensor:
            read.add((name, None))
            return self._file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            part = self._file.get_slice(name)

            class SpySlice:
                get_shape = staticmethod(part.get_shape)

                def __getitem__(self, rows: slice) -> torch.Tensor:
                    read.update((name, row) for row in range(rows.start, rows.stop))
                    return part[rows]

            return SpySlice()

    local_experts.safe_open = Spy  # type: ignore[misc,assignment]
    try:
        local_experts_shard(folder, experts)
    finally:
        local_experts.safe_open = real  # type: ignore[misc]
    return read


def local_experts_shard(folder: Path, experts: Experts, **options: Any) -> Any:
    from actors.shard import ExpertShard

    return ExpertShard(str(folder), experts, dtype="float32", **options)


def test_only_local_experts_are_read(vllm_process, moe_checkpoint):
    held = {0: [1, 6], 2: [3]}
    read = vllm_process(tensors_read, moe_checkpoint("qwen3_moe"), held)
    assert read == {
        (f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight", None)
        for layer, experts in held.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }
    read = vllm_process(tensors_read, moe_checkpoint("stacked"), held)
    assert read == {
        (f"model.layers.{layer}.mlp.experts.{part}_proj", expert)
        for layer, experts in held.items()
        for expert in experts
        for part in ("gate_up", "down")
    }


def live_tensor_bytes(folder: Path, experts: Experts) -> tuple[int, int]:
    """Bytes of all tensors alive because of a shard, and what the shard says of itself."""

    def alive() -> int:
        gc.collect()
        storages = {}
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        return sum(storages.values())

    before = alive()
    shard = local_experts_shard(folder, experts)
    return alive() - before, shard.allocated_bytes


def test_nothing_else_stays_in_memory(vllm_process, moe_checkpoint):
    folder = moe_checkpoint("deepseek_v3")
    held = {1: [0, 5, 9], 2: [15]}
    alive, allocated = vllm_process(live_tensor_bytes, folder, held)
    assert allocated == 4 * Checkpoint.open(folder).expert_bytes(1, 0)
    assert abs(alive - allocated) < 4096  # id maps and the like


def compute(folder: Path, layer: int, change: dict[str, Any]) -> torch.Tensor:
    shard = local_experts_shard(folder, {1: [2, 4], 2: []})
    question = {
        "x": torch.ones(3, shard.hidden),
        "ids": torch.tensor([2, 4], dtype=torch.int32),
        "weights": torch.ones(2),
        "rows": torch.tensor([0, 2], dtype=torch.int32),
    }
    return shard.compute(layer, **(question | change))


def test_tokens_without_pairs_get_zero(vllm_process, moe_checkpoint):
    folder = moe_checkpoint("qwen3_moe")
    out = vllm_process(compute, folder, 1, {})
    assert out[1].count_nonzero() == 0
    assert out[0].count_nonzero() > 0
    no_pairs = {name: torch.empty(0, dtype=torch.int32) for name in ("ids", "rows")}
    out = vllm_process(compute, folder, 1, no_pairs | {"weights": torch.empty(0)})
    assert out.count_nonzero() == 0


@pytest.mark.parametrize(
    ("layer", "change", "code", "text"),
    [
        (2, {}, "unknown_layer", r"layer 2 .* holds layers \[1\]"),
        (7, {}, "unknown_layer", "layer 7"),
        (1, {"ids": torch.tensor([2, 3], dtype=torch.int32)}, "unknown_expert", r"\[3\].*\[2, 4\]"),
        (1, {"ids": torch.tensor([2, 99], dtype=torch.int32)}, "unknown_expert", r"\[99\]"),
        (1, {"ids": torch.tensor([2, -1], dtype=torch.int32)}, "unknown_expert", r"\[-1\]"),
        (1, {"x": torch.ones(3, 64)}, "bad_shape", "64"),
        (1, {"x": torch.ones(3, 128, dtype=torch.bfloat16)}, "bad_shape", "bfloat16"),
        (1, {"rows": torch.tensor([0, 9], dtype=torch.int32)}, "bad_shape", "rows"),
    ],
)
def test_questions_that_make_no_sense(vllm_process, moe_checkpoint, layer, change, code, text):
    with pytest.raises(FrameError, match=text) as caught:
        vllm_process(compute, moe_checkpoint("qwen3_moe"), layer, change)
    assert caught.value.code == code


def registered_after_a_build(folder: Path) -> bool:
    from vllm.model_executor import custom_op

    class Other(custom_op.PluggableLayer):
        pass

    custom_op.op_registry_oot["RoutedExperts"] = Other
    try:
        local_experts_shard(folder, {0: [0]})
        return custom_op.op_registry_oot == {"RoutedExperts": Other}
    finally:
        custom_op.op_registry_oot.clear()


def test_registrations_of_others_survive(vllm_process, moe_checkpoint):
    assert vllm_process(registered_after_a_build, moe_checkpoint("gpt_oss"))


@pytest.mark.parametrize(
    ("experts", "text"),
    [
        ({9: [0]}, "layer 9 .* no routed experts"),
        ({0: [8]}, r"experts \[8\] were given; expected distinct ids from 0 to 7"),
        ({0: [1, 1]}, "expected distinct"),
    ],
)
def test_experts_that_the_model_lacks(vllm_process, moe_checkpoint, experts, text):
    with pytest.raises(ValueError, match=text):
        vllm_process(build_and_forget, moe_checkpoint("qwen3_moe"), experts)


def build_and_forget(folder: Path, experts: Experts, **options: Any) -> None:
    local_experts_shard(folder, experts, **options)


def build_with(folder: Path, options: dict[str, Any]) -> None:
    build_and_forget(folder, {0: [0]}, **options)


def test_engine_arguments_that_vllm_refuses(vllm_process, moe_checkpoint):
    folder = moe_checkpoint("qwen3_moe")
    with pytest.raises(AffluxError, match="no_such_thing") as caught:
        vllm_process(build_with, folder, {"engine_args": {"no_such_thing": 1}})
    assert caught.value.code == "bad_engine_args"
    with pytest.raises(UnsupportedModel, match="max_model_len"):
        vllm_process(build_with, folder, {"engine_args": {"max_model_len": 10**9}})


def test_dense_and_missing_checkpoints(vllm_process, dense_checkpoint, tmp_path):
    for folder, code in (
        (dense_checkpoint, "dense_model"),
        (tmp_path / "nowhere", "missing_checkpoint"),
    ):
        with pytest.raises(CheckpointError) as caught:
            vllm_process(build_and_forget, folder, {0: [0]})
        assert caught.value.code == code


@pytest.mark.parametrize("damage", ["nan", "shape"])
def test_experts_that_do_not_load(vllm_process, moe_checkpoint, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(moe_checkpoint("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors[name] = tensors[name] * torch.nan if damage == "nan" else tensors[name][:, :100].clone()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expert 0 in layer 0|refused") as caught:
        vllm_process(build_and_forget, folder, {0: [0]})
    assert str(folder) in caught.value.message
