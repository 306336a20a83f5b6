"""Checkpoint: what is read from headers, and what is refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from actors.checkpoint import Checkpoint, ExpertTensor
from actors.errors import CheckpointError
from tests.models import make_moe

SHAPES = {  # family: experts, top-k, MoE layers
    "qwen3_moe": (8, 2, (0, 1, 2)),
    "stacked": (8, 2, (0, 1, 2)),
    "deepseek_v3": (16, 4, (1, 2)),
    "mixtral": (8, 2, (0, 1, 2)),
    "olmoe": (8, 2, (0, 1, 2)),
    "granitemoe": (8, 2, (0, 1, 2)),
    "llama4": (8, 1, (1, 3)),
    "gpt_oss": (8, 2, (0, 1)),
}


@pytest.fixture
def copy(moe_checkpoint, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(moe_checkpoint("qwen3_moe"), folder)
    return folder


def refusal(folder: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(folder) in caught.value.message
    return caught.value


@pytest.mark.parametrize("family", SHAPES)
def test_routed_experts_are_told_from_the_rest(moe_checkpoint, family):
    checkpoint = Checkpoint.open(moe_checkpoint(family))
    experts, top_k, layers = SHAPES[family]
    assert (checkpoint.num_experts, checkpoint.top_k) == (experts, top_k)
    assert checkpoint.moe_layers == layers
    assert checkpoint.hidden == 128
    for name in checkpoint.tensors:
        if any(part in name for part in ("shared", "gate.", "router", "self_attn", "norm")):
            assert checkpoint.routed(name) is None, name
    routed = sum(checkpoint.tensors[name].nbytes for name in checkpoint.experts)
    per_expert = [checkpoint.expert_bytes(layer, e) for layer in layers for e in range(experts)]
    assert sum(per_expert) == routed
    assert len(set(per_expert)) == 1


def test_a_tensor_knows_its_expert(moe_checkpoint):
    single = Checkpoint.open(moe_checkpoint("mixtral"))
    name = "model.layers.2.block_sparse_moe.experts.5.w1.weight"
    assert single.routed(name) == ExpertTensor(2, 5)
    stacked = Checkpoint.open(moe_checkpoint("stacked"))
    assert stacked.routed("model.layers.1.mlp.experts.down_proj") == ExpertTensor(1, None)


def test_layers_for_speculative_decoding_are_left_out(copy):
    tensors = load_file(copy / "model.safetensors")
    extra = {
        name.replace("model.layers.0.", new): tensor.clone()
        for name, tensor in tensors.items()
        for new in ("model.layers.3.", "draft.layers.0.")
        if ".layers.0." in name
    }
    save_file(tensors | extra, copy / "model.safetensors")
    checkpoint = Checkpoint.open(copy)
    assert checkpoint.moe_layers == (0, 1, 2)
    assert checkpoint.routed("draft.layers.0.mlp.experts.0.up_proj.weight") is None


def test_digest_tells_models_apart(moe_checkpoint, copy, tmp_path):
    original = Checkpoint.open(moe_checkpoint("qwen3_moe")).digest
    assert Checkpoint.open(copy).digest == original
    retrained = make_moe("qwen3_moe", tmp_path / "retrained", seed=1)
    assert Checkpoint.open(retrained).digest != original
    config = copy / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000', '"rope_theta": 20000'))
    assert Checkpoint.open(copy).digest != original


def test_missing_folder(tmp_path):
    assert refusal(tmp_path / "nowhere").code == "missing_checkpoint"


def test_missing_configuration(copy):
    (copy / "config.json").unlink()
    assert "config.json" in refusal(copy).message


def test_broken_configuration(copy):
    (copy / "config.json").write_text('{"num_experts": ')
    assert refusal(copy).code == "truncated_checkpoint"


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    error = refusal(copy)
    assert error.code == "missing_checkpoint"
    assert "convert it to safetensors" in error.message


def shard(folder: Path) -> None:
    """Split the weights into two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_checkpoint(moe_checkpoint, copy):
    shard(copy)
    assert Checkpoint.open(copy).experts == Checkpoint.open(moe_checkpoint("qwen3_moe")).experts


def test_missing_shard(copy):
    shard(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    error = refusal(copy)
    assert error.code == "missing_checkpoint"
    assert "model-00002-of-00002.safetensors" in error.message


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    error = refusal(copy)
    assert error.code == "truncated_checkpoint"
    assert "download the checkpoint again" in error.message


def test_git_lfs_pointer(copy):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (copy / "model.safetensors").write_text(pointer)
    assert "git-lfs pointer" in refusal(copy).message


@pytest.mark.parametrize("header", [b"[]", b"{{", b'{"a": 1}', b'{"a": {"shape": [1]}}'])
def test_unreadable_header(copy, header):
    (copy / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert refusal(copy).code == "truncated_checkpoint"


@pytest.mark.parametrize("expert", [3, 7])
def test_missing_expert(copy, expert):
    tensors = load_file(copy / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if f"layers.1.mlp.experts.{expert}." not in n}
    save_file(kept, copy / "model.safetensors")
    error = refusal(copy)
    assert error.code == "missing_tensors"
    assert f"layer 1 has no tensors for experts [{expert}]" in error.message


def test_dense_model(dense_checkpoint):
    error = refusal(dense_checkpoint)
    assert error.code == "dense_model"
    assert "dense model" in error.message
