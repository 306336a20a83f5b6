"""The planner beside aiconfigurator 0.12 on the same questions: throughput and time.

Both look through the same splits (replicas within a node), batches and chunks, for aggregation and
for P/D, with the same correction factors. Theirs runs in an interpreter of its own that has the
full ``aiconfigurator`` package (``planner_aic_theirs``); ours takes its measured kernels as they
are, extrapolated where it extrapolates, and takes the dense layers of DeepSeek models for MoE
layers as it does (the figure without that stands beside it).

Compared are the best under the targets, each tool's own, and their best configurations evaluated by
us. CPU seconds per configuration are those of later runs on both sides: tables are read, ours are
tabulated anew for every run. That is done once per split and takes longer than the rest on so
coarse a grid, so that our own search, with all its batches and chunks, is timed too.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks.report import make_report, print_summary, print_table, write_report
from planner.explore.aggregated import evaluate
from planner.explore.kernels.aic import AicDB
from planner.explore.kernels.aic_package import Backend
from planner.explore.model import read_model
from planner.explore.pd import decode_workers, prefill_workers
from planner.explore.points import Shape, Targets
from planner.explore.pools import Replica, match, ttft_of
from planner.explore.question import Question
from planner.explore.split import Split, replica_gpus, splits
from planner.explore.system import find_system
from planner.explore.whole import Steps

WITHIN = 0.10
PREFILL_FACTOR, DECODE_FACTOR = 1.1, 1.08
"""On worker times, in aiconfigurator's tasks for P/D."""
_THEIRS = Path(__file__).with_name("planner_aic_theirs.py")
_AGG_BATCHES = [
    *range(1, 16), *range(16, 32, 4), *range(32, 64, 8), *range(64, 256, 16), *range(256, 513, 32),
]  # fmt: skip
_DECODE_BATCHES = [
    *range(1, 16), *range(16, 32, 2), *range(32, 128, 4), *range(128, 512, 8), 512,
]  # fmt: skip
Kind = Literal["agg", "disagg"]
Tried = Mapping[str, list[Split]]


@dataclass(frozen=True)
class Asked:
    """A question for both.

    Args:
        mode: aggregation or P/D, in their words.
        model: Hugging Face name.
        system, backend: of the kernels.
        gpus: of the system.
        prefix, prompt, output: tokens.
        ttft, tpot: targets, milliseconds.
    """

    mode: Kind
    model: str
    system: str
    backend: Backend
    gpus: int
    prefix: int
    prompt: int
    output: int
    ttft: float
    tpot: float

    @property
    def name(self) -> str:
        model = self.model.split("/")[-1]
        work = f"{self.prefix}+{self.prompt}/{self.output}"
        return f"{self.mode} {model} {self.system} {self.backend} {work} {self.tpot:g} ms"

    @property
    def node(self) -> int:
        """GPUs per node."""
        return find_system(self.system).node

    def question(self) -> Question:
        """In our words."""
        return Question(
            model=read_model(self.model),
            system=find_system(self.system),
            gpus=self.gpus,
            shape=Shape(self.name, self.prefix, self.prompt, self.output),
            targets=Targets(1e-3 * self.ttft, 1e-3 * self.tpot),
        )


@dataclass
class Row:
    """What both say to a question; tokens per second and GPU, CPU seconds per configuration.

    Args:
        ours, theirs: the best under the targets; nan where there is none.
        dense: ours with the dense layers that a model has.
        same: ours at their best configuration.
        same_worst: error at that of their best configurations, one per split, where it is largest.
        ours_each, theirs_each: seconds per configuration of the same search.
        own_each: of our own search, through all batches and chunks on the same splits.
        ours_count, theirs_count, own_count: configurations evaluated.
        ours_at, theirs_at: configurations of the best.
        error: what they said instead of an answer.
    """

    name: str
    ours: float = float("nan")
    theirs: float = float("nan")
    dense: float = float("nan")
    same: float = float("nan")
    same_worst: float = float("nan")
    ours_each: float = float("nan")
    theirs_each: float = float("nan")
    own_each: float = float("nan")
    ours_count: int = 0
    theirs_count: int = 0
    own_count: int = 0
    ours_at: str = ""
    theirs_at: str = ""
    error: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def best_error(self) -> float:
        """Of our best against theirs."""
        return self.ours / self.theirs - 1.0

    @property
    def same_error(self) -> float:
        """At their best configuration."""
        return self.same / self.theirs - 1.0


_DEEPSEEK, _V32 = "deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-V3.2"
_QWEN, _SMALL = "Qwen/Qwen3-235B-A22B-FP8", "Qwen/Qwen3-30B-A3B"
_OSS, _MIXTRAL = "openai/gpt-oss-120b", "mistralai/Mixtral-8x7B-v0.1"
QUESTIONS: tuple[Asked, ...] = (
    Asked("agg", _DEEPSEEK, "h200_sxm", "trtllm", 32, 0, 4000, 1000, 3000, 60),
    Asked("agg", _DEEPSEEK, "b200_sxm", "trtllm", 32, 0, 4000, 1000, 2000, 40),
    Asked("agg", _DEEPSEEK, "h200_sxm", "sglang", 16, 0, 2000, 500, 3000, 80),
    Asked("agg", _V32, "b200_sxm", "trtllm", 32, 0, 8000, 1000, 5000, 60),
    Asked("agg", _QWEN, "h200_sxm", "trtllm", 16, 0, 4000, 1000, 3000, 50),
    Asked("agg", _QWEN, "b200_sxm", "trtllm", 16, 0, 1000, 1000, 1000, 25),
    Asked("agg", _QWEN, "h200_sxm", "vllm", 16, 0, 2000, 500, 3000, 50),
    Asked("agg", _QWEN, "h200_sxm", "trtllm", 16, 3000, 1000, 500, 3000, 40),
    Asked("agg", _SMALL, "h200_sxm", "trtllm", 8, 0, 2000, 500, 1000, 20),
    Asked("agg", _SMALL, "gb200", "trtllm", 8, 0, 2000, 500, 1000, 12),
    Asked("agg", _SMALL, "h100_sxm", "vllm", 8, 0, 1000, 500, 2000, 30),
    Asked("agg", _OSS, "b200_sxm", "trtllm", 8, 0, 4000, 1000, 2000, 15),
    Asked("agg", _OSS, "h200_sxm", "sglang", 8, 0, 1000, 1000, 1000, 20),
    Asked("agg", _OSS, "gb200", "trtllm", 8, 2000, 2000, 500, 2000, 25),
    Asked("agg", _MIXTRAL, "h200_sxm", "trtllm", 8, 0, 1000, 500, 1000, 25),
    Asked("agg", _MIXTRAL, "h100_sxm", "trtllm", 8, 0, 2000, 250, 2000, 40),
    Asked("disagg", _DEEPSEEK, "h200_sxm", "trtllm", 32, 0, 4000, 1000, 3000, 60),
    Asked("disagg", _DEEPSEEK, "b200_sxm", "trtllm", 32, 0, 4000, 1000, 2000, 30),
    Asked("disagg", _V32, "b200_sxm", "trtllm", 32, 0, 8000, 1000, 5000, 50),
    Asked("disagg", _QWEN, "h200_sxm", "trtllm", 32, 0, 4000, 1000, 3000, 40),
    Asked("disagg", _QWEN, "b200_sxm", "trtllm", 16, 0, 4000, 500, 2000, 20),
    Asked("disagg", _SMALL, "h200_sxm", "trtllm", 8, 0, 2000, 500, 1000, 15),
    Asked("disagg", _SMALL, "gb200", "trtllm", 16, 0, 2000, 1000, 500, 10),
    Asked("disagg", _OSS, "b200_sxm", "trtllm", 16, 0, 4000, 1000, 1000, 12),
    Asked("disagg", _OSS, "h200_sxm", "sglang", 16, 0, 2000, 1000, 2000, 25),
    Asked("disagg", _MIXTRAL, "h200_sxm", "trtllm", 8, 0, 1000, 500, 1000, 20),
)  # fmt: skip


def run(
    json_path: Path | str | None,
    interpreter: str,
    quick: bool = False,
    theirs_path: Path | None = None,
) -> dict[str, Any]:
    """Asks both: prints a table, writes JSON, returns the report.

    Args:
        interpreter: Python with aiconfigurator 0.12.
        quick: every fourth question.
        theirs_path: keeps their answers, and takes them from there where they are kept.
    """
    asked = QUESTIONS[::4] if quick else QUESTIONS
    answers = _their_answers(asked, interpreter, theirs_path)
    rows = []
    for one, answer in zip(asked, answers, strict=True):
        rows.append(compare(one, answer))
        print(f"{len(rows)}/{len(asked)} {one.name}", flush=True)
    print_table(
        "Best under the targets, output tokens/s/GPU",
        ("question", "theirs", "ours", "error", "at theirs", "worst split", "dense layers"),
        [
            (r.name, r.theirs, r.ours, _percent(r.best_error), _percent(r.same_error),
             _percent(r.same_worst), _percent(r.dense / r.theirs - 1.0))
            for r in rows
        ],
    )  # fmt: skip
    print_table(
        "CPU microseconds per configuration",
        ("question", "theirs", "ours", "faster", "on their grid"),
        [
            (r.name, 1e6 * r.theirs_each, 1e6 * r.own_each, r.theirs_each / r.own_each,
             r.theirs_each / r.ours_each)
            for r in rows
        ],
    )  # fmt: skip
    answered = [row for row in rows if np.isfinite(row.theirs)]
    best = [abs(row.best_error) for row in answered]
    same = [abs(row.same_error) for row in answered]
    report = make_report(
        "planner_aic",
        {
            "quick": quick,
            "questions": len(rows),
            "answered_by_both": sum(bool(np.isfinite(r.ours)) for r in answered),
            "aic_max_error": max(best),
            "aic_median_error": float(np.median(best)),
            "aic_within_10pct": sum(error <= WITHIN for error in best) / len(best),
            "aic_max_error_same": max(same),
            "aic_median_error_same": float(np.median(same)),
            "aic_max_error_dense_layers": max(abs(r.dense / r.theirs - 1) for r in answered),
            "aic_worst_split_error": max(abs(row.same_worst) for row in answered),
            "speedup_per_config": _each(answered, "theirs") / _each(answered, "own"),
            "least_speedup": min(row.theirs_each / row.own_each for row in answered),
            "speedup_on_their_grid": _each(answered, "theirs") / _each(answered, "ours"),
            "ours_us_per_config": 1e6 * _each(answered, "own"),
            "theirs_us_per_config": 1e6 * _each(answered, "theirs"),
            "ours_us_per_config_on_their_grid": 1e6 * _each(answered, "ours"),
            "refused_by_theirs": ", ".join(r.name for r in rows if r not in answered) or "none",
        },
        {"rows": [asdict(row) for row in rows]},
    )
    print_summary(report)
    write_report(report, json_path)
    return report


def compare(asked: Asked, answer: dict[str, Any]) -> Row:
    """Our answer beside theirs."""
    row = Row(asked.name, error=answer["error"])
    if answer["rows"]:
        row.theirs = answer["rows"][0]["tokens/s/gpu"]
        row.theirs_at = _described(answer["rows"][0])
        row.theirs_count = answer["configurations"]
        row.theirs_each = answer["seconds"] / answer["configurations"]
    question = asked.question()
    ours = _aggregated if asked.mode == "agg" else _disaggregated
    tried = {role: _both(asked, theirs) for role, theirs in answer.get("splits", {}).items()}
    # the first run reads tables, each tabulates anew
    for grid in ("warm", "same", "own"):
        steps = Steps(question, _kernels(asked, all_moe=True))
        start = time.process_time()
        best, at_best, count = ours(asked, steps, tried, own=grid == "own")
        each = (time.process_time() - start) / max(count, 1)
        if grid == "own":
            row.own_each, row.own_count = each, count
        else:
            row.ours, row.ours_at, row.ours_count, row.ours_each = best, at_best, count, each
    row.dense = row.ours
    if question.model.dense_layers:
        row.dense = ours(asked, Steps(question, _kernels(asked, all_moe=False)), tried, False)[0]
    at = _same_aggregated if asked.mode == "agg" else _same_disaggregated
    errors = []
    for position, their in enumerate(answer["rows"]):
        same = at(asked, steps, their)
        errors.append(same / their["tokens/s/gpu"] - 1.0)
        if position == 0:
            row.same = same
    row.same_worst = max(errors, key=abs, default=float("nan"))
    row.details = {"errors_by_split": errors, "theirs": answer["rows"]}
    return row


def _kernels(asked: Asked, all_moe: bool) -> AicDB:
    """Their kernels, beyond their tables too, but none that is guessed from others."""
    return AicDB(
        find_system(asked.system),
        asked.backend,
        allow_extrapolation=True,
        estimate=False,
        all_moe=all_moe,
    )


def _aggregated(asked: Asked, steps: Steps, tried: Tried, own: bool) -> tuple[float, str, int]:
    """Best tokens/s/GPU, where, configurations evaluated.

    Args:
        own: batches and chunks of our search; else theirs.
    """
    best, at, count = float("nan"), "", 0
    targets = steps.question.targets
    for split in tried.get("agg", _all(asked)):
        given = (None, None) if own else (_AGG_BATCHES, _chunks(asked))
        found = evaluate(steps, split, *given)
        count += int(np.isfinite(found.rate).sum())
        held = (found.ttft <= targets.ttft) & (found.tpot <= targets.tpot)
        if not held.any():
            continue
        row = int(np.argmax(np.where(held, found.rate, -np.inf)))
        value = float(found.rate[row]) / found.gpus
        if not value <= best:
            best = value
            at = f"{split}, batch {found.plan.batch[row]:g}, chunk {found.chunk[row]:g}"
    return best, at, count


def _same_aggregated(asked: Asked, steps: Steps, their: dict[str, float]) -> float:
    # their chunks count cached tokens, ours only those that are computed
    chunk = their["ctx_tokens"] * asked.prompt / (asked.prefix + asked.prompt)
    found = evaluate(_roomy(steps), _split(their), [int(their["bs"])], [round(chunk)])
    return float(found.rate[0]) / found.gpus if len(found.rate) else float("nan")


def _disaggregated(asked: Asked, steps: Steps, tried: Tried, own: bool) -> tuple[float, str, int]:
    question, db = steps.question, steps.db
    prompts, requests = (None, None) if own else ([1], _DECODE_BATCHES)
    prefills: list[Replica] = []
    decodes: list[Replica] = []
    for split in tried.get("prefill", _all(asked)):
        prefills += prefill_workers(
            question, db, split, steps, batches=prompts, factor=PREFILL_FACTOR
        )
    for split in tried.get("decode", _all(asked)):
        decodes += decode_workers(
            question, db, split, steps, batches=requests, factor=DECODE_FACTOR
        )
    count = len(prefills) + len(decodes)
    targets = question.targets
    prefills = [one for one in prefills if ttft_of(question, one) < targets.ttft]
    decodes = [one for one in decodes if one.seconds < targets.tpot]
    if not prefills or not decodes:
        return float("nan"), "", count
    found = match(question, prefills, decodes)
    found = found.where(found.gpus == asked.gpus)
    if not len(found.gpus):
        return float("nan"), "", count
    row = int(np.argmax(found.requests_per_s))
    p, d = prefills[found.prefill[row]], decodes[found.decode[row]]
    at = (
        f"{found.prefills[row]} x {p.split} batch {p.batch}, "
        f"{found.decodes[row]} x {d.split} batch {d.batch}"
    )
    return float(found.requests_per_s[row]) * asked.output / asked.gpus, at, count


def _same_disaggregated(asked: Asked, steps: Steps, their: dict[str, float]) -> float:
    roomy = _roomy(steps)
    question, options = roomy.question, roomy.question.options
    rates = []
    for pool, workers, factor, share in (
        ("p", prefill_workers, PREFILL_FACTOR, options.prefill_rate),
        ("d", decode_workers, DECODE_FACTOR, options.decode_rate),
    ):
        own = {name.removeprefix(f"({pool})"): value for name, value in their.items()}
        found = workers(
            question, steps.db, _split(own), roomy, batches=[int(own["bs"])], factor=factor
        )
        if not found:
            return float("nan")
        rates.append(found[0].requests_per_s * own["workers"] * share)
    return min(rates) * asked.output / their["num_total_gpus"]


def _all(asked: Asked) -> list[Split]:
    """Ours within a node."""
    sizes, model = replica_gpus(min(asked.node, asked.gpus)), read_model(asked.model)
    return [split for size in sizes for split in splits(model, size, asked.node)]


def _both(asked: Asked, theirs: list[list[int]]) -> list[Split]:
    """Those of ours that they try too."""
    wanted = {tuple(one) for one in theirs}
    return [one for one in _all(asked) if (one.tp, one.dp, one.moe_tp, one.ep) in wanted]


def _split(their: dict[str, float]) -> Split:
    return Split(*(int(their[key]) for key in ("tp", "dp", "moe_tp", "moe_ep")))


def _chunks(asked: Asked) -> list[int]:
    """Theirs without chunked prefill: whole prompts."""
    whole = asked.prefix + asked.prompt
    most = max(8192, 2 * whole)
    return [count * asked.prompt for count in range(1, most // whole + 1)]


def _roomy(steps: Steps) -> Steps:
    """The same without a limit of memory: what fits is another question than how fast it is."""
    question = steps.question
    return Steps(replace(question, options=replace(question.options, memory_share=9.0)), steps.db)


def _their_answers(
    asked: Sequence[Asked], interpreter: str, kept: Path | None
) -> list[dict[str, Any]]:
    if kept is not None and kept.exists():
        answers: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8"))
        return answers
    questions = json.dumps(
        [
            {
                **asdict(one),
                "name": one.name,
                "node": one.node,
                "config": dict(read_model(one.model).config),
            }
            for one in asked
        ]
    )
    done = subprocess.run(
        [interpreter, str(_THEIRS)], input=questions, stdout=subprocess.PIPE, text=True, check=True
    )
    # whatever it logs comes before
    answers = json.loads(done.stdout[done.stdout.index("[{") :])
    if kept is not None:
        kept.write_text(json.dumps(answers), encoding="utf-8")
    return answers


def _described(row: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in row.items() if "tokens/s" not in key)


def _each(rows: Sequence[Row], whose: Literal["ours", "theirs", "own"]) -> float:
    """CPU seconds per configuration over all questions."""
    counts = [getattr(row, f"{whose}_count") for row in rows]
    times = [getattr(row, f"{whose}_each") for row in rows]
    return sum(n * t for n, t in zip(counts, times, strict=True)) / sum(counts)


def _percent(share: float) -> str:
    return f"{100 * share:+.1f} %"


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--aiconfigurator", required=True, help="Python with aiconfigurator 0.12")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--theirs", type=Path, help="keeps their answers, reused if there")
    given = parser.parse_args()
    run(given.json, given.aiconfigurator, given.quick, given.theirs)
