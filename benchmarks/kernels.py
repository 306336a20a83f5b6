"""Step times of attention and of experts, each by itself, for the planner to put together.

One thread: the two sides at once, a core each, because that is the company they keep when they
serve; then what handing over costs, against an FFN actor that computes nothing. Two threads: one
side after the other on both cores, as vLLM has them in one process. Nothing here steps a whole
model: whether the sum is right is for ``planner_two_cores`` to say. What it writes is read by
``planner.explore.kernels.measured``.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.checkpoint import Checkpoint
from actors.engine import AttentionConfig
from benchmarks.decode import number_format
from benchmarks.kernel_engines import AttentionKernels, ExpertKernels, IdleFFNHost
from benchmarks.models import BALANCED, FFN_HEAVY, make_model
from benchmarks.processes import Remote
from benchmarks.report import make_report, print_summary, print_table, write_report
from benchmarks.split import FFNPool

EVEN: dict[str, Any] = BALANCED | {"moe_intermediate_size": 256}
"""Experts take as long as attention and all that comes with it, Python included, where batches are
large and nothing is compiled: the best that one actor a side can have."""

MODELS: Mapping[str, dict[str, Any]] = {
    "balanced": BALANCED,
    "ffn_heavy": FFN_HEAVY,
    "even": EVEN,
}
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (60, 320, 1152)
MAX_FRAME_TOKENS = 512
_MOST_REQUESTS = 256
_HOP = ("attention", "wire", "ffn")
_LONGEST = 2048
_KV_BYTES = 2 << 30
_BLOCK = 128
_SLACK = 32
"""Tokens that a request may get while it is measured."""


@dataclass(frozen=True)
class Effort:
    """How much is measured of a model; on two quiet cores that takes about four times ``seconds``
    and a minute of building.

    Args:
        batches, contexts: requests that decode together, tokens of each.
        seconds: of each of four parts; every setting is visited once at least.
    """

    batches: Sequence[int] = BATCHES
    contexts: Sequence[int] = CONTEXTS
    seconds: float = 15.0


QUICK = Effort(batches=(4, 8, 16), contexts=(64,), seconds=2.0)


@dataclass(frozen=True)
class Place:
    """Where things run.

    Args:
        device: "cpu" or "cuda".
        dtype: of weights and activations.
        cores: of the attention and of the FFN side, or None: not pinned.
        threads: that are measured.
    """

    device: str
    dtype: str
    cores: tuple[int, int] | None
    threads: tuple[int, ...]

    def of(self, side: int) -> list[int] | None:
        return None if self.cores is None else [self.cores[side]]

    @property
    def both(self) -> list[int] | None:
        return None if self.cores is None else list(self.cores)


def find_place() -> Place:
    """A GPU when there is one, else the first two cores. Written for GPUs, not validated on one.

    Raises:
        ValueError: neither a GPU nor two cores.
    """
    import torch

    if torch.cuda.is_available():
        return Place("cuda", "bfloat16", None, (1,))
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError(f"the kernel benchmark needs 2 cores, this process may use {len(cores)}")
    return Place("cpu", number_format(), (cores[0], cores[1]), (1, 2))


def engine_args(compiled: bool) -> dict[str, Any]:
    """Engine arguments of every side."""
    return {
        "skip_tokenizer_init": True,
        "max_model_len": _LONGEST,
        "max_num_seqs": _MOST_REQUESTS,
        "max_num_batched_tokens": _LONGEST,
        "enforce_eager": not compiled,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": _KV_BYTES,
    }


def attention_config(name: str, model: str, dtype: str, compiled: bool) -> AttentionConfig:
    """What an attention side is told."""
    return AttentionConfig(
        name, model, dtype, engine_args(compiled), max_frame_tokens=MAX_FRAME_TOKENS
    )


def room(shape: Mapping[str, Any], dtype: str) -> int:
    """Tokens that the KV cache of a model of a shape has room for."""
    number = 4 if dtype == "float32" else 2
    heads, layers = shape["num_key_value_heads"], shape["num_hidden_layers"]
    return int(_KV_BYTES // (2 * heads * shape["head_dim"] * layers * number))


def fitting(batches: Sequence[int], contexts: Sequence[int], tokens: int) -> list[tuple[int, int]]:
    """(batch, context) that fit ``tokens`` of KV cache, which is handed out in blocks, one of which
    vLLM keeps."""
    return [
        (batch, context)
        for batch in batches
        for context in contexts
        if batch * -(-(context + _SLACK) // _BLOCK) * _BLOCK < tokens
    ]


def measure(
    label: str,
    model: str,
    shape: Mapping[str, Any],
    place: Place,
    effort: Effort,
    *,
    compiled: bool,
) -> dict[str, Any]:
    """Everything of one checkpoint, as ``planner.explore.kernels.measured_file`` reads it.

    Raises:
        ValueError: no setting fits the KV cache.
    """
    settings = fitting(effort.batches, effort.contexts, room(shape, place.dtype))
    if not settings:
        raise ValueError(f"{label}: no batch at no context fits the KV cache")
    experts = Checkpoint.open(model).num_experts
    held = [experts, *([experts // 2] if experts > 1 else [])]
    began = time.monotonic()
    one = _one_thread(model, place, effort, settings, held, compiled)
    two = (
        _two_threads(model, place, effort, settings, experts, compiled)
        if 2 in place.threads
        else {"attention": [], "experts": []}
    )
    return {
        "config": json.loads((Path(model) / "config.json").read_text(encoding="utf-8")),
        "dtype": place.dtype,
        "compiled": compiled,
        "attention": one["attention"] + two["attention"],
        "experts": one["experts"] + two["experts"],
        "hop": one["hop"],
        "seconds": time.monotonic() - began,
    }


def _one_thread(
    model: str,
    place: Place,
    effort: Effort,
    settings: Sequence[tuple[int, int]],
    held: Sequence[int],
    compiled: bool,
) -> dict[str, list[dict[str, Any]]]:
    config = attention_config("attention", model, place.dtype, compiled)
    attention = Remote(functools.partial(AttentionKernels, config), cores=place.of(0))
    experts = Remote(
        functools.partial(ExpertKernels, model, place.dtype, 1, held, place.device),
        cores=place.of(1),
    )
    host = None
    try:
        attention.ready()
        experts.ready()
        alone = [(batch, context, 0) for batch, context in settings]
        tokens = [(batch, count) for count in held for batch in effort.batches]
        with ThreadPoolExecutor(2) as pool:  # at once: each keeps a core busy
            steps = pool.submit(attention.time_steps, alone, effort.seconds)
            layers = pool.submit(experts.time_layers, tokens, effort.seconds)
            found = {"attention": _of(1, steps.result()), "experts": _of(1, layers.result())}
        experts.kill()
        host = Remote(IdleFFNHost, cores=place.of(1)).ready()
        actors = FFNPool([host], model, 1, 1, dtype=place.dtype, max_frame_tokens=MAX_FRAME_TOKENS)
        actors.connect(attention, config.name)
        attention.adopt(actors.table)
        return found | {"hop": _hops(attention, actors, settings, effort)}
    finally:
        for process in (attention, experts, *([host] if host else [])):
            process.kill()


def _two_threads(
    model: str,
    place: Place,
    effort: Effort,
    settings: Sequence[tuple[int, int]],
    experts: int,
    compiled: bool,
) -> dict[str, list[dict[str, Any]]]:
    config = attention_config("attention", model, place.dtype, compiled)
    sides = [
        Remote(functools.partial(AttentionKernels, config), threads=2, cores=place.both),
        Remote(
            functools.partial(ExpertKernels, model, place.dtype, 2, [experts], place.device),
            threads=2,
            cores=place.both,
        ),
    ]
    try:
        attention, ffn = (side.ready() for side in sides)
        alone = [(batch, context, 0) for batch, context in settings]
        steps = attention.time_steps(alone, effort.seconds)
        layers = ffn.time_layers([(batch, experts) for batch in effort.batches], effort.seconds / 2)
        return {"attention": _of(2, steps), "experts": _of(2, layers)}
    finally:
        for side in sides:
            side.kill()


def _hops(
    attention: Remote,
    actors: FFNPool,
    settings: Sequence[tuple[int, int]],
    effort: Effort,
) -> list[dict[str, Any]]:
    """What a message of each size costs, from steps against an actor that computes nothing.

    A step in two lanes of n tokens keeps the attention side busy all the time, so all that it takes
    beyond two steps of n without a hop is work. A step in one lane waits for the message besides:
    what neither side worked is the wire, and how long it took to see that something had come.
    """
    context = min(context for _, context in settings)
    sizes = sorted(batch for batch, at in settings if at == context)
    layers = len(actors.table.layers)
    rows: list[dict[str, Any]] = []
    for tokens in sizes:
        asked = [(tokens, context, 0), (tokens, context, 1)]
        if 2 * tokens in sizes:
            asked.append((2 * tokens, context, 2))
        before = actors.info()[0]
        timed = {
            row["lanes"]: row["layers_s"]
            for row in attention.time_steps(asked, effort.seconds / len(sizes))
        }
        after = actors.info()[0]
        frames = after["frames"] - before["frames"]
        spent = (after["busy_seconds"] - before["busy_seconds"]) / frames
        rows.append(hop_row(tokens, timed, layers, spent, rows[-1] if rows else None))
    return rows


def hop_row(
    tokens: int,
    timed: Mapping[int, float],
    layers: int,
    ffn: float,
    smaller: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One message there and back, seconds.

    Args:
        tokens: n.
        timed: seconds in the layers by lanes: 0 and 1 of n tokens, 2 of twice as many.
        layers: messages per step and lane.
        ffn: seconds that the FFN side works on a message.
        smaller: a message of fewer tokens; where two lanes weren't timed, as much of the whole is
            work of the attention side as of that one.

    Returns:
        ``attention_s`` and ``ffn_s`` worked, ``wire_s`` all else until the answer.
    """
    whole = max(0.0, timed[1] - timed[0]) / layers
    if 2 in timed:
        worked = max(0.0, timed[2] - 2 * timed[0]) / (2 * layers)
    else:
        parts = 0.0 if smaller is None else sum(smaller[f"{part}_s"] for part in _HOP)
        worked = whole * (smaller["attention_s"] / parts if smaller and parts else 0.5)
    worked = min(worked, whole)
    ffn = min(ffn, whole - worked)
    return {
        "tokens": tokens,
        "attention_s": worked,
        "ffn_s": ffn,
        "wire_s": whole - worked - ffn,
    }


def _of(threads: int, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"threads": threads, **row} for row in rows]


def run(
    json_path: Path | str | None = None,
    *,
    models: Sequence[str] = (),
    effort: Effort | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Measure the bench models; prints tables, writes JSON when a path is given.

    Args:
        models: names of ``MODELS``; none: all.
        compiled: the engine compiles its model, as vLLM does by default.

    Raises:
        ValueError: an unknown model; fewer than two cores.
    """
    shapes = chosen_models(models)
    place, effort = find_place(), effort or Effort()
    measured = {}
    with tempfile.TemporaryDirectory(prefix="afflux-kernels-") as folder:
        for label, shape in shapes.items():
            model = str(make_model(Path(folder) / label, shape))
            measured[label] = measure(label, model, shape, place, effort, compiled=compiled)
            print_kernels(label, measured[label])
    summary = {
        "dtype": place.dtype,
        "device": place.device,
        "compiled": compiled,
        "models": ", ".join(measured),
        "seconds": round(sum(entry["seconds"] for entry in measured.values()), 1),
    }
    for label, entry in measured.items():
        middle = entry["hop"][len(entry["hop"]) // 2]
        work = middle["attention_s"] + middle["wire_s"] + middle["ffn_s"]
        summary[f"hop_us_{label}_{middle['tokens']}"] = round(1e6 * work, 1)
    report = make_report("kernels", summary, {"models": measured})
    print_summary(report)
    write_report(report, json_path)
    return report


def chosen_models(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Shapes by name; all of them without names.

    Raises:
        ValueError: an unknown name.
    """
    unknown = sorted(set(names) - set(MODELS))
    if unknown:
        raise ValueError(f"models {unknown}: expected some of {', '.join(MODELS)}")
    return {name: shape for name, shape in MODELS.items() if not names or name in names}


def print_kernels(label: str, entry: Mapping[str, Any]) -> None:
    """The rows of a model as tables, milliseconds of a step and microseconds of a message."""
    print_table(
        f"{label}: a decode step of the attention side, ms",
        ("threads", "requests", "context", "in layers", "outside", "steps"),
        [
            (r["threads"], r["batch"], r["context"], 1e3 * r["layers_s"], 1e3 * r["outside_s"],
             r["count"])
            for r in entry["attention"]
        ],
    )  # fmt: skip
    print_table(
        f"{label}: experts of all layers, ms",
        ("threads", "experts held", "tokens", "time", "passes"),
        [
            (r["threads"], r["held"], r["tokens"], 1e3 * r["seconds"], r["count"])
            for r in entry["experts"]
        ],
    )
    print_table(
        f"{label}: a message there and back, us",
        ("tokens", "attention side", "wire", "FFN side"),
        [
            (r["tokens"], 1e6 * r["attention_s"], 1e6 * r["wire_s"], 1e6 * r["ffn_s"])
            for r in entry["hop"]
        ],
    )
