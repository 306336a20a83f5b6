"""Train the small mixture-of-experts model that lies in `deploy/models/verse/`.

The model exists so that the serving system can be run and tested end to end on any machine,
without a download: a Qwen3-MoE of eight experts, 16 MB, trained on the King James Bible. It
writes readable English in that style and knows nothing; it is no benchmark of quality and this
script is no general trainer.

    apt-get install bible-kjv bible-kjv-text
    python deploy/models/train.py --out deploy/models/verse
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

# fmt: off
BOOKS = (
    "Genesis", "Exodus", "Leviticus", "Numbers", "Deuteronomy", "Joshua", "Judges", "Ruth",
    "1 Samuel", "2 Samuel", "1 Kings", "2 Kings", "1 Chronicles", "2 Chronicles", "Ezra",
    "Nehemiah", "Esther", "Job", "Psalm", "Proverbs", "Ecclesiastes", "Song of Solomon",
    "Isaiah", "Jeremiah", "Lamentations", "Ezekiel", "Daniel", "Hosea", "Joel", "Amos",
    "Obadiah", "Jonah", "Micah", "Nahum", "Habakkuk", "Zephaniah", "Haggai", "Zechariah",
    "Malachi", "Matthew", "Mark", "Luke", "John", "Acts", "Romans", "1 Corinthians",
    "2 Corinthians", "Galatians", "Ephesians", "Philippians", "Colossians", "1 Thessalonians",
    "2 Thessalonians", "1 Timothy", "2 Timothy", "Titus", "Philemon", "Hebrews", "James",
    "1 Peter", "2 Peter", "1 John", "2 John", "3 John", "Jude", "Revelation",
)
# fmt: on
HELD_OUT = {"Ruth", "Joel", "Jonah", "Titus", "James"}
END, START, STOP, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLE_PROMPTS = (
    "Tell me about the sea.",
    "Tell me about Moses.",
    "In the beginning",
    "Tell me a story.",
)


@dataclass(frozen=True)
class Verse:
    """One verse of the text and where it stands."""

    book: str
    chapter: int
    number: int
    text: str


def read_verses() -> list[Verse]:
    """Return all verses of the King James Bible as printed by Debian's `bible` program."""
    program = shutil.which("bible")
    if program is None:
        sys.exit("the text is missing: apt-get install bible-kjv bible-kjv-text")
    out = subprocess.run(
        [program, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True
    ).stdout
    names: dict[str, str] = {}
    verses = []
    for line in out.splitlines():
        found = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line)
        if found is None:
            continue
        short, chapter, number, text = found.groups()
        book = names.setdefault(short, BOOKS[min(len(names), len(BOOKS) - 1)])
        verses.append(Verse(book, int(chapter), int(number), " ".join(text.split())))
    if len(verses) != 31102 or len(names) != 66:
        sys.exit(f"expected 66 books and 31102 verses, read {len(names)} and {len(verses)}")
    return verses


def chapters(verses: list[Verse]) -> list[str]:
    """Join the verses into one running text per chapter."""
    joined: dict[tuple[str, int], list[str]] = defaultdict(list)
    for verse in verses:
        joined[verse.book, verse.chapter].append(verse.text)
    return [" ".join(texts) for texts in joined.values()]


class Chats:
    """Makes chat samples out of the verses: a question by template, a passage as the answer."""

    def __init__(self, verses: list[Verse], seed: int) -> None:
        self.verses = verses
        self.random = random.Random(seed)
        after_the: dict[str, int] = defaultdict(int)
        inner: dict[str, int] = defaultdict(int)
        where: dict[str, list[int]] = defaultdict(list)
        for i, verse in enumerate(verses):
            for word in set(re.findall(r"[A-Za-z]{3,}", verse.text)):
                where[word].append(i)
            for word in re.findall(r"\bthe ([a-z]{3,})", verse.text):
                after_the[word] += 1
            for word in re.findall(r"[a-z,] ([A-Z][a-z]{2,})", verse.text):
                inner[word] += 1
        self.names = {w: where[w] for w, n in inner.items() if n >= 8 and w.lower() not in where}
        self.things = {
            w: where[w] for w, n in after_the.items() if n >= 10 and n >= 0.2 * len(where[w])
        }
        self.drawn = {
            kind: (list(group), list(accumulate(math.sqrt(len(p)) for p in group.values())))
            for kind, group in (("name", self.names), ("thing", self.things))
        }
        self.stories = [
            i
            for i, v in enumerate(verses)
            if re.match(r"(And it came to pass|Now there was|There was a|Then went)", v.text)
        ]
        self.by_book: dict[str, list[int]] = defaultdict(list)
        for i, verse in enumerate(verses):
            self.by_book[verse.book].append(i)

    def passage(self, i: int, length: int, start: int = 0) -> str:
        """Return whole verses of one chapter from verse `i` on, up to about `length` letters."""
        text, first = self.verses[i].text[start:].strip(), self.verses[i]
        while len(text) < length and i + 1 < len(self.verses):
            i += 1
            following = self.verses[i]
            if (following.book, following.chapter) != (first.book, first.chapter):
                break
            if len(text) + len(following.text) > 2 * length:
                break
            text += " " + following.text
        return text if text[-1] in ".?!" else text.rstrip(":;,") + "."

    def turn(self) -> tuple[str, str]:
        """Return one question and its answer."""
        rng = self.random
        length = rng.choice((100, 160, 240, 320))
        kind = rng.random()
        if kind < 0.45:
            named = rng.random() < 0.4
            words, sums = self.drawn["name" if named else "thing"]
            word = rng.choices(words, cum_weights=sums)[0]
            places = rng.choices((self.names if named else self.things)[word], k=3)
            i = min(places, key=lambda p: self.verses[p].text.find(word))
            about = word if named else f"the {word}"
            asks = ["Tell me about {}."] * 4 + ["Speak of {}.", "Tell me of {}", "{}"]
            asks += ["Who is {}?", "Who was {}?"] if named else ["What is {}?"]
            return rng.choice(asks).format(about), self.passage(i, length)
        i = rng.randrange(len(self.verses))
        verse = self.verses[i]
        if kind < 0.75:
            words = verse.text.split()
            count = rng.randint(2, max(2, min(9, len(words) // 2)))
            opening = " ".join(words[:count])
            ask = rng.choice(("{}", "{}", "Continue: {}", "Continue: {}", "Go on: {}"))
            rest = self.passage(i, max(length, len(verse.text)), len(opening))
            return ask.format(opening.rstrip(",;:")), rest
        if kind < 0.85:
            ask = rng.choice(("Recite {}.", "Read me {}.", "What does {} say?", "{}"))
            if rng.random() < 0.4:
                i -= verse.number - 1
                return ask.format(f"{verse.book} {verse.chapter}"), self.passage(i, 320)
            place = f"{verse.book} {verse.chapter}:{verse.number}"
            return ask.format(place), self.passage(i, len(verse.text))
        if kind < 0.93:
            ask = rng.choice(("Tell me a story.", "Tell me a story", "Tell a story."))
            return ask, self.passage(rng.choice(self.stories), 400)
        if kind < 0.96:
            ask = rng.choice(("Sing me a psalm.", "Give me a psalm.", "Sing a song."))
            return ask, self.passage(rng.choice(self.by_book["Psalm"]), length)
        ask = rng.choice(("Give me a proverb.", "Tell me a proverb.", "Give me some advice."))
        return ask, self.verses[rng.choice(self.by_book["Proverbs"])].text

    def sample(self) -> list[dict[str, str]]:
        """Return one conversation of one to three turns, now and then with a system message."""
        messages = []
        if self.random.random() < 0.08:
            messages.append({"role": "system", "content": "You are a helpful assistant."})
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            question, answer = self.turn()
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages


def render(messages: list[dict[str, str]]) -> str:
    """Write a conversation as `CHAT_TEMPLATE` does."""
    return "".join(f"{START}{m['role']}\n{m['content']}{STOP}\n" for m in messages)


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END, START, STOP, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3MoeConfig:
    """Return the model's configuration."""
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=2 * args.expert_size,
        moe_intermediate_size=args.expert_size,
        num_experts=args.experts,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        router_aux_loss_coef=args.aux,
        output_router_logits=True,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(STOP),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


def sorted_experts(
    self: torch.nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Run the experts over rows sorted by expert: the fastest way found on one CPU core."""
    flat = index.reshape(-1)
    order = flat.argsort(stable=True)
    rows = order // index.shape[1]
    counts = torch.bincount(flat, minlength=self.num_experts).tolist()
    parts = hidden.to(torch.bfloat16).index_select(0, rows).split(counts)
    gate_up = self.gate_up_proj.to(torch.bfloat16).unbind(0)
    down = self.down_proj.to(torch.bfloat16).unbind(0)
    outs = []
    for part, first, second in zip(parts, gate_up, down, strict=True):
        gate, up = functional.linear(part, first).chunk(2, dim=-1)
        outs.append(functional.linear(functional.silu(gate) * up, second))
    out = torch.cat(outs) * weights.reshape(-1)[order, None]
    return torch.zeros_like(hidden).index_add(0, rows, out.to(hidden.dtype))


def blocks(
    texts: list[list[int]],
    chats: Chats,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    share: float,
    rng: random.Random,
) -> Iterator[list[int]]:
    """Yield packed blocks for ever: each epoch all texts, mixed with fresh chat samples."""
    total = sum(map(len, texts))
    while True:
        epoch = list(texts)
        made = 0
        while made < total * share / (1 - share):
            batch = [render(chats.sample()) + END for _ in range(200)]
            for ids in tokenizer(batch)["input_ids"]:
                epoch.append(ids)
                made += len(ids)
        # Texts first, then blocks: a block is cut from one running stream, so that the end mark
        # stands only where a text truly ends, and neighbours do not meet in one batch.
        rng.shuffle(epoch)
        stream = [i for ids in epoch for i in ids]
        packed = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
        rng.shuffle(packed)
        yield from packed


def autocast() -> torch.autocast:
    """Matrix products in bfloat16, the weights in float32."""
    return torch.autocast("cpu", torch.bfloat16)


def balance_loss(routers: tuple[torch.Tensor, ...], top: int) -> torch.Tensor:
    """Return the router balance loss, summed over layers; `top` per layer is even use.

    Transformers' own loss adds the counts of all layers first, so that a layer may starve an
    expert as long as another layer makes up for it.
    """
    total = torch.zeros(())
    for logits in routers:
        shares = logits.float().softmax(-1)
        chosen = shares.topk(top).indices.flatten()
        counts = torch.bincount(chosen, minlength=logits.shape[-1]) / len(logits)
        total = total + logits.shape[-1] * (counts * shares.mean(0)).sum()
    return total


@torch.no_grad()
def held_out(model: Qwen3MoeForCausalLM, data: torch.Tensor) -> tuple[float, list[list[float]]]:
    """Return the loss per token on held-out blocks, and each layer's share of use by expert."""
    model.eval()
    losses, used = [], torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for batch in data.split(8):
        with autocast():
            out = model(input_ids=batch, output_router_logits=True)
        losses.append(
            functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="none"
            )
        )
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(model.config.num_experts_per_tok).indices.flatten()
            used[layer] += torch.bincount(chosen, minlength=model.config.num_experts)
    model.train()
    shares = used / used.sum(1, keepdim=True)
    return torch.cat(losses).mean().item(), [[round(x, 4) for x in row] for row in shares.tolist()]


def save(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, record: dict
) -> None:
    """Write the folder: weights in bfloat16, tokenizer, configuration, training record."""
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    state.pop("lm_head.weight", None)
    copy = Qwen3MoeForCausalLM(Qwen3MoeConfig(**model.config.to_dict())).to(torch.bfloat16)
    copy.load_state_dict(state, strict=False)
    copy.config.use_cache = True
    copy.config.output_router_logits = False
    ends = [tokenizer.convert_tokens_to_ids(t) for t in (STOP, END)]
    copy.generation_config = GenerationConfig(
        eos_token_id=ends, pad_token_id=tokenizer.convert_tokens_to_ids(PAD)
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        copy.save_pretrained(folder)
        config = Path(folder) / "config.json"  # the count of experts under its older name, too
        fields = json.loads(config.read_text()) | {"num_experts": copy.config.num_experts}
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        (Path(folder) / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            file.replace(out / file.name)


def plot(record: dict, path: Path) -> None:
    """Draw the two loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["tokens"] / 1e6 for row in record["log"]]
    figure, axis = plt.subplots(figsize=(6.4, 3.6), dpi=100)
    axis.plot(tokens, [row["train_loss"] for row in record["log"]], label="training")
    axis.plot(tokens, [row["val_loss"] for row in record["log"]], label="held-out books")
    axis.set(xlabel="tokens seen, millions", ylabel="loss per token, nats")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


@torch.no_grad()
def answers(folder: Path, seed: int) -> list[dict[str, object]]:
    """Ask the saved model the sample prompts, greedily and at temperature 0.7."""
    model = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows: list[dict[str, object]] = []
    for prompt in SAMPLE_PROMPTS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        inputs.pop("token_type_ids", None)
        for temperature in (0.0, 0.7):
            torch.manual_seed(seed)
            how = {"do_sample": True, "temperature": temperature} if temperature else {}
            ids = model.generate(**inputs, max_new_tokens=200, **how)[0]
            new = ids[inputs["input_ids"].shape[1] :]
            rows.append(
                {
                    "prompt": prompt,
                    "temperature": temperature,
                    "text": tokenizer.decode(new, skip_special_tokens=True).strip(),
                    "tokens": len(new),
                    "stopped": new[-1].item() in model.generation_config.eos_token_id,
                }
            )
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the verse model.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "verse")
    parser.add_argument("--steps", type=int, default=4000, help="length of the schedule")
    parser.add_argument("--stop", type=int, help="end after this step of the schedule")
    parser.add_argument("--batch", type=int, default=8, help="blocks per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per block")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay")
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--share", type=float, default=0.5, help="share of chat samples")
    parser.add_argument("--aux", type=float, default=0.01, help="router balance loss, per layer")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--expert-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=200, help="steps")
    parser.add_argument("--save-every", type=int, default=500, help="steps")
    return parser.parse_args()


def main() -> None:
    """Train and write the folder."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    verses = read_verses()
    kept = [v for v in verses if v.book not in HELD_OUT]
    kept_text = chapters(kept)
    chats = Chats(kept, args.seed)
    tokenizer = make_tokenizer(kept_text + [render(chats.sample()) for _ in range(500)], args.vocab)
    texts = list(tokenizer([t + END for t in kept_text])["input_ids"])
    held = [v for v in verses if v.book in HELD_OUT]
    ids = [i for text in tokenizer([t + END for t in chapters(held)])["input_ids"] for i in text]
    ids = ids[: len(ids) // args.length * args.length]
    val = torch.tensor(ids).view(-1, args.length)

    model = Qwen3MoeForCausalLM(make_config(tokenizer, args)).train()
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model.config._experts_implementation = "sorted"
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )

    def rate(step: int) -> float:
        if step < args.warmup:
            return (step + 1) / args.warmup
        done = (step - args.warmup) / max(1, args.steps - args.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    record: dict = {
        "settings": {k: v for k, v in vars(args).items() if k != "out"},
        "parameters": sum(p.numel() for p in model.parameters()),
        "text_tokens": sum(map(len, texts)),
        "held_out_books": sorted(HELD_OUT),
        "held_out_tokens": val.numel(),
        "torch": torch.__version__,
        "log": [],
    }
    print({k: v for k, v in record.items() if k != "log"}, flush=True)
    stream = blocks(texts, chats, tokenizer, args.length, args.share, rng)
    began, mark, seen, losses = time.time(), time.time(), 0, []
    last = args.stop or args.steps
    bar = tqdm(range(1, last + 1), mininterval=5)
    for step in bar:
        batch = torch.tensor([next(stream) for _ in range(args.batch)])
        with autocast():
            out = model(input_ids=batch)
        loss = functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
        )
        routers = balance_loss(out.router_logits, model.config.num_experts_per_tok)
        (loss + args.aux * routers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seen += batch.numel()
        losses.append(loss.item())
        if step % args.log_every == 0 or step in (1, last):
            speed = len(losses) * batch.numel() / (time.time() - mark)
            val_loss, shares = held_out(model, val)
            row = {
                "step": step,
                "tokens": seen,
                "train_loss": round(sum(losses) / len(losses), 4),
                "val_loss": round(val_loss, 4),
                "aux_loss": round(routers.item() / args.layers, 4),
                "least_used": min(map(min, shares)),
                "tokens_per_second": round(speed),
                "seconds": round(time.time() - began),
            }
            record["log"].append(row)
            record["expert_shares"] = shares
            bar.set_postfix(
                train=row["train_loss"], val=row["val_loss"], tok_s=row["tokens_per_second"]
            )
            print(row, flush=True)
            losses, mark = [], time.time()
        if step % args.save_every == 0 and step < last:
            save(model, tokenizer, args.out, record)
    val_loss, record["expert_shares"] = held_out(model, val)
    record["saved"] = {"step": last, "tokens": seen, "val_loss": round(val_loss, 4)}
    save(model, tokenizer, args.out, record)
    plot(record, args.out / "loss.png")
    record["samples"] = answers(args.out, args.seed)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
