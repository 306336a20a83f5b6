"""The embedded verse model: its files are small, whole and agree, and it writes English.

How well it writes is no matter of these tests; they catch a folder half written, a tokenizer
that does not fit the weights, a router that starves experts.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

FOLDER = Path(__file__).parents[2] / "deploy" / "models" / "verse"
LIMIT = 25_000_000
# Jonah is one of the books held out of the training.
HELD_OUT = (
    "But the LORD sent out a great wind into the sea, and there was a mighty tempest in the sea, "
    "so that the ship was like to be broken."
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((FOLDER / "training.json").read_text())


def loss_per_token(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids, labels=ids, output_router_logits=False).loss.item()


def test_folder_is_small_and_complete() -> None:
    files = {f.name: f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()}
    assert sum(files.values()) < LIMIT
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "loss.png",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    } <= set(files)


def test_config_is_a_mixture_of_experts() -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    assert config.architectures == ["Qwen3MoeForCausalLM"]
    assert config.num_experts >= 8
    assert config.num_experts_per_tok == 2
    assert config.norm_topk_prob
    assert config.head_dim == 64
    assert config.hidden_size % 64 == config.moe_intermediate_size % 64 == 0
    fields = json.loads((FOLDER / "config.json").read_text())
    assert fields["num_experts"] == fields["num_local_experts"] == config.num_experts


def test_weights_are_bfloat16_and_complete() -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert {file.get_slice(key).get_dtype() for key in keys} == {"BF16"}
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        expected |= {f"{at}.{n}_layernorm.weight" for n in ("input", "post_attention")}
        expected |= {f"{at}.self_attn.{n}_proj.weight" for n in "qkvo"}
        expected |= {f"{at}.self_attn.{n}_norm.weight" for n in "qk"}
        expected.add(f"{at}.mlp.gate.weight")
        expected |= {
            f"{at}.mlp.experts.{e}.{n}_proj.weight"
            for e in range(config.num_experts)
            for n in ("gate", "up", "down")
        }
    assert keys == expected


@pytest.mark.parametrize(
    "text",
    ["In the beginning God created the heaven and the earth.", "  two\n\nlines — naïve 水 🌊 "],
)
def test_tokenizer_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_fits_the_config(tokenizer: Tokenizer) -> None:
    config = AutoConfig.from_pretrained(FOLDER)
    assert len(tokenizer) == config.vocab_size
    ends = json.loads((FOLDER / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|endoftext|>"]


def test_chat_template(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>user\nTell me about the sea.<|im_end|>\n<|im_start|>assistant\n")


def test_held_out_loss_fell(record: dict) -> None:
    losses = [row["val_loss"] for row in record["log"]]
    assert losses[0] > 8  # about the logarithm of the vocabulary's size: nothing learnt yet
    assert losses[-1] < losses[0] / 1.8
    assert losses[-1] < min(losses) + 0.1


def test_card_agrees_with_the_record(record: dict) -> None:
    card = (FOLDER / "README.md").read_text()
    last = record["log"][-1]
    assert f"| Held-out loss, last | {last['val_loss']:.4f} |" in card
    assert f"| Training loss, last | {last['train_loss']:.4f} |" in card
    assert f"| Tokens seen | {record['saved']['tokens']:,} |" in card
    assert f"held-out loss of {record['saved']['val_loss']:.4f}" in card
    assert f"| Parameters | {record['parameters']:,} |" in card
    for sample in record["samples"]:
        assert " ".join(sample["text"].split()) in " ".join(card.split())


def test_prefers_english_to_shuffled_words(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    words = HELD_OUT.split()
    random.Random(0).shuffle(words)
    straight = loss_per_token(model, tokenizer, HELD_OUT)
    shuffled = loss_per_token(model, tokenizer, " ".join(words))
    assert straight < 4.5
    assert shuffled > straight + 1.5


def test_answers_stop_by_themselves(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me about the sea."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(input_ids=inputs["input_ids"], max_new_tokens=300, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    assert new[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert 10 < len(new) < 300
    assert any(word in tokenizer.decode(new) for word in (" sea", " waters"))


@pytest.mark.skipif(shutil.which("bible") is None, reason="needs Debian's bible-kjv")
def test_writes_words_of_its_text(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    source = subprocess.run(
        ["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"[a-z]+", source.lower()))
    ids = tokenizer("In the beginning", return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=80, do_sample=False)[0]
    words = re.findall(r"[a-z]+", tokenizer.decode(out, skip_special_tokens=True).lower())
    assert len(words) > 15
    assert len(set(words)) > 8
    assert sum(word in known for word in words) >= 0.8 * len(words)


def test_every_expert_is_used(model: PreTrainedModel, tokenizer: Tokenizer, record: dict) -> None:
    # Of the held-out books, as measured in training: an even share would be one in eight.
    assert len(record["expert_shares"]) == model.config.num_hidden_layers
    for shares in record["expert_shares"]:
        assert len(shares) == model.config.num_experts
        assert min(shares) > 0.02
    # And of some text here and now, so that the figures belong to these weights.
    sampled = (sample["text"] for sample in record["samples"] if sample["temperature"])
    ids = tokenizer(" ".join([HELD_OUT, *sampled]), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        layers = model(input_ids=ids, output_router_logits=True).router_logits
    assert len(layers) == model.config.num_hidden_layers
    for logits in layers:
        chosen = logits.topk(model.config.num_experts_per_tok).indices
        used = torch.bincount(chosen.flatten(), minlength=model.config.num_experts)
        assert used.min() > 0
