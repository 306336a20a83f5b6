"""Decode throughput: attention and experts on a core each, beside plain vLLM on the same two cores.

Plain vLLM runs eager and compiled, with one and with two threads; per batch its best setting
counts. Both sides are stepped by the same loop (``offline``), in turns, in one run, and every
engine lives in its own process. Nothing is placed by Ray here: this measures engine, seam and data
plane.
"""

import functools
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.checkpoint import Checkpoint
from actors.engine import AttentionConfig
from benchmarks import replay
from benchmarks.models import BALANCED, FFN_HEAVY, make_model
from benchmarks.offline import PlainEngine, Run
from benchmarks.processes import Remote
from benchmarks.report import make_report, print_summary, print_table, write_report
from benchmarks.samples import full_step_seconds, in_turns, prompts
from benchmarks.split import FFNHost, FFNPool, attention_process

BATCHES = (1, 8, 32, 64, 128, 256)
MOST_REQUESTS = 256
"""Of one batch; sizes the engines."""
PROMPT_TOKENS = 32
MODELS = {"balanced": BALANCED, "ffn_heavy": FFN_HEAVY}


def engine_args(eager: bool) -> dict[str, Any]:
    """Engine arguments of every side."""
    return {
        "skip_tokenizer_init": True,
        "max_model_len": 1024,
        "max_num_seqs": MOST_REQUESTS,
        "max_num_batched_tokens": 2048,
        "enforce_eager": eager,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 3 << 29,
    }


def number_format() -> str:
    """bfloat16, or float32 on a CPU that has to emulate bfloat16 (a hundred times slower)."""
    import torch

    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


def _decode_rate(run: Run, batch: int) -> tuple[float, float]:
    """(tokens/s, median step in ms) over the steps in which the whole batch decoded."""
    middle = full_step_seconds(run, batch)
    return batch / middle, middle * 1e3


class _Sides:
    """All engines of one model, built and ready, plain ones by setting."""

    def __init__(
        self, model: str, dtype: str, cores: Sequence[int], eagers: Sequence[bool], plain: bool
    ):
        self.cores = list(cores)
        settings = [
            (f"{'eager' if eager else 'compiled'}-{threads}t", eager, threads)
            for eager in eagers
            for threads in ((1, 2) if plain else ())
        ]
        self.plain: dict[str, Remote] = {}
        self.host = Remote(FFNHost, cores=self.cores[1:2])
        self.split: dict[str, Remote] = {}
        for name, eager, threads in settings:
            self.plain[name] = Remote(
                functools.partial(PlainEngine, model, dtype, engine_args(eager)),
                threads=threads,
                cores=self.cores[:threads],
            ).ready()
        self.pool = FFNPool([self.host], model, 1, 1, dtype=dtype, max_frame_tokens=512)
        for eager in eagers:
            name = "eager" if eager else "compiled"
            config = AttentionConfig(
                f"attention-{name}", model, dtype, engine_args(eager), max_frame_tokens=512
            )
            self.split[name] = attention_process(config, cores=self.cores[:1]).ready()
            self.pool.connect(self.split[name], config.name)
            self.split[name].adopt(self.pool.table)

    def close(self) -> None:
        for process in (*self.plain.values(), *self.split.values(), self.host):
            process.kill()


def measure(
    label: str,
    model: str,
    *,
    batches: Sequence[int] = BATCHES,
    tokens: int = 20,
    repeats: int = 3,
    eager_only: bool = False,
    plain: bool = True,
) -> dict[str, Any]:
    """Compare both sides on one checkpoint, and record what the planner needs of the split one.

    Args:
        plain: False leaves plain vLLM and the comparison out.

    Returns:
        Plain data: per batch the rates of every setting (tokens/s, median of repeats), step times,
        the ratio split/best plain, FFN utilisation, lanes used, and whether the tokens were equal.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError(f"the decode benchmark needs 2 cores, this process may use {len(cores)}")
    eagers = (True,) if eager_only else (True, False) if plain else (False,)
    dtype = number_format()
    sides = _Sides(model, dtype, cores[:2], eagers, plain)
    rows = []
    try:
        engines = {**{f"plain {k}": v for k, v in sides.plain.items()}}
        engines |= {f"split {k}": v for k, v in sides.split.items()}
        for batch in batches if plain else ():
            for engine in engines.values():  # warm: first shapes compile, fits settle
                engine.generate(prompts(batch, PROMPT_TOKENS, 99), 8)
            rates: dict[str, list[float]] = {name: [] for name in engines}
            steps: dict[str, list[float]] = {name: [] for name in engines}
            outputs: dict[str, Run] = {}
            busy = wall = 0.0
            for repeat in range(repeats):
                for name, engine in engines.items():
                    before = sides.pool.info()[0]["busy_seconds"]
                    run = engine.generate(prompts(batch, PROMPT_TOKENS, repeat), tokens)
                    if name.startswith("split"):
                        busy += sides.pool.info()[0]["busy_seconds"] - before
                        wall += run.seconds
                    rate, step = _decode_rate(run, batch)
                    rates[name].append(rate)
                    steps[name].append(step)
                    outputs[name] = run
            middle = {name: statistics.median(values) for name, values in rates.items()}
            best_plain = max((n for n in middle if n.startswith("plain")), key=lambda n: middle[n])
            best_split = max((n for n in middle if n.startswith("split")), key=lambda n: middle[n])
            facts = engines[best_split].facts()
            same = sum(
                a == b
                for a, b in zip(
                    outputs["plain eager-1t"].tokens, outputs["split eager"].tokens, strict=True
                )
            )
            rows.append(
                {
                    "batch": batch,
                    "tokens_per_second": middle,
                    "step_ms": {n: statistics.median(v) for n, v in steps.items()},
                    "best_plain": best_plain,
                    "best_split": best_split,
                    "ratio": middle[best_split] / middle[best_plain],
                    "ffn_utilisation": busy / wall,
                    "attention_wait_share": facts["wait_seconds"]
                    / max(1e-9, facts["wait_seconds"] + facts["compute_seconds"]),
                    "lanes": statistics.mode(facts["lanes"]),
                    "same_requests": same / batch,
                    "stage_seconds": facts["stage_seconds"],
                    "hops": facts["hops"],
                }
            )
            _print_row(label, rows[-1])
        checkpoint = Checkpoint.open(model)
        layers = len(checkpoint.moe_layers)
        engine = sides.split["eager" if eager_only else "compiled"]
        lanes = {row["batch"]: row["lanes"] for row in rows} or _lanes(engine, batches, tokens)
        samples, replayed = in_turns(engine, layers, batches, lanes)
    finally:
        sides.close()
    return {
        "model": label,
        "dtype": dtype,
        "experts": checkpoint.num_experts,
        "layers": layers,
        "rows": rows,
        "samples": samples,
        "runs": replayed,
    }


def _lanes(engine: Remote, batches: Sequence[int], tokens: int) -> dict[int, int]:
    """Batch -> the number of lanes that the engine chooses for it, once it knows its times."""
    chosen = {}
    for batch in batches:
        for repeat in range(3):
            engine.generate(prompts(batch, PROMPT_TOKENS, repeat), tokens)
        chosen[batch] = statistics.mode(engine.facts()["lanes"])
    return chosen


def _print_row(label: str, row: dict[str, Any]) -> None:
    rates, plain, split = row["tokens_per_second"], row["best_plain"], row["best_split"]
    print(
        f"{label} batch {row['batch']}: {plain} {rates[plain]:.0f} tok/s, "
        f"{split} {rates[split]:.0f} tok/s with {row['lanes']} lanes, ratio {row['ratio']:.2f}",
        flush=True,
    )


def run(
    json_path: Path | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    quick: bool = False,
    plain: bool = True,
    eager_only: bool = False,
) -> dict[str, Any]:
    """The whole benchmark; prints tables, writes JSON when a path is given.

    Args:
        batches: requests decoded together, a row each.
        quick: two batches, eager only, one repeat; to see that it works.
        plain: False leaves plain vLLM out: what is left is what the planner needs.
        eager_only: nothing is compiled.
    """
    options: dict[str, Any] = (
        {"batches": (8, 32), "repeats": 1, "tokens": 16, "eager_only": True}
        if quick
        else {"batches": batches, "eager_only": eager_only}
    )
    with tempfile.TemporaryDirectory(prefix="afflux-decode-") as folder:
        results = {
            label: measure(
                label, str(make_model(Path(folder) / label, shape)), plain=plain, **options
            )
            for label, shape in MODELS.items()
        }
    summary: dict[str, Any] = {"dtype": number_format()}
    for label, result in results.items():
        for row in result["rows"]:
            summary[f"ratio_{label}_{row['batch']}"] = round(row["ratio"], 3)
    rows = [row for result in results.values() for row in result["rows"]]
    # batch composition may round a near tie the other way, so a share, and exact in tokens.py
    if plain:
        same = [row["same_requests"] for row in rows]
        summary["tokens_same_share"] = round(statistics.mean(same), 4)
        summary["tokens_match"] = all(share == 1.0 for share in same)
    replayed = [] if quick else _replay(results)
    if replayed:
        summary |= replay.summary(replayed)
    report = make_report("decode", summary, results)
    for label, result in results.items() if plain else ():
        print_table(
            f"decode, {label} model: tokens/s",
            ("batch", *result["rows"][0]["tokens_per_second"], "ratio", "lanes", "FFN busy"),
            [
                (
                    row["batch"],
                    *row["tokens_per_second"].values(),
                    round(row["ratio"], 2),
                    row["lanes"],
                    f"{row['ffn_utilisation']:.0%}",
                )
                for row in result["rows"]
            ],
        )
    if replayed:
        replay.print_rows(replayed)
    print_summary(report)
    write_report(report, json_path)
    return report


def _replay(results: dict[str, Any]) -> list[replay.Replayed]:
    with tempfile.TemporaryDirectory(prefix="afflux-decode-") as folder:
        path = Path(folder) / "decode.json"
        path.write_text(json.dumps({"details": results}), encoding="utf-8")
        return replay.replay(path)[0]


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    run(given.json, quick=given.quick)
