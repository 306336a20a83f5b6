"""aiconfigurator's answers to questions, for ``planner_aic``; runs in an interpreter that has it.

Reads questions as JSON from standard input, writes answers as JSON to standard output. It imports
nothing of this project.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

_AGG = ("tp", "dp", "moe_tp", "moe_ep")


def main() -> None:
    """Answers all questions."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    answers = []
    for question in json.load(sys.stdin):
        try:
            answers.append(answer(question))
        except Exception as error:
            # a refusal is an answer: the table shows it
            answers.append({"error": f"{type(error).__name__}: {error}"[:300], "rows": []})
        print(question["name"], "answered", file=sys.stderr, flush=True)
    json.dump(answers, sys.stdout)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """What it finds for one question: best rows, configurations evaluated, CPU seconds."""
    from aiconfigurator.sdk.backends.base_backend import BaseBackend
    from aiconfigurator.sdk.task_v2 import Task

    counts = {"run_agg": 0, "run_static": 0}
    old = {name: getattr(BaseBackend, name) for name in counts}

    def counted(name: str) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return old[name](*given, **named)

        return call

    task = Task(**_given(question))
    roles = ("agg",) if question["mode"] == "agg" else ("prefill", "decode")
    # their splits: (tp, pp, dp, moe_tp, moe_ep, cp)
    splits = {role: [(p[0], p[2], p[3], p[4]) for p in task.iter_parallel(role)] for role in roles}
    # the first run reads tables and warms caches
    task.run()
    try:
        for name in counts:
            setattr(BaseBackend, name, counted(name))
        start = time.process_time()
        found = task.run()
        seconds = time.process_time() - start
    finally:
        for name, method in old.items():
            setattr(BaseBackend, name, method)
    rows = found.to_dict("records")
    kept = [
        row for row in rows if row["ttft"] <= question["ttft"] and row["tpot"] <= question["tpot"]
    ]
    columns = (
        ["tp", "dp", "moe_tp", "moe_ep", "bs", "ctx_tokens", "ttft", "tpot", "tokens/s/gpu"]
        if question["mode"] == "agg"
        else [
            *(f"({pool}){key}" for pool in "pd" for key in (*_AGG, "bs", "workers")),
            "ttft", "tpot", "tokens/s/gpu", "tokens/s", "num_total_gpus",
        ]
    )  # fmt: skip
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in kept:
        key = tuple(row[name] for name in columns if name.split(")")[-1] in _AGG)
        if key not in best or row["tokens/s/gpu"] > best[key]["tokens/s/gpu"]:
            best[key] = {name: float(row[name]) for name in columns}
    ranked = sorted(best.values(), key=lambda row: -row["tokens/s/gpu"])
    return {
        "error": "",
        "rows": ranked[:8],
        "splits": splits,
        "configurations": sum(counts.values()),
        "seconds": seconds,
    }


def _given(question: dict[str, Any]) -> dict[str, Any]:
    """A task's arguments: one target, replicas within a node."""
    sizes = [size for size in (1, 2, 4, 8) if size <= question["node"]]
    shared = {
        "isl": question["prefix"] + question["prompt"],
        "osl": question["output"],
        "prefix": question["prefix"],
        "ttft": question["ttft"],
        "tpot": question["tpot"],
        "total_gpus": question["gpus"],
        "pareto_sweep": False,
    }
    names = {
        "model_path": _path(question),
        "system_name": question["system"],
        "backend_name": question["backend"],
    }
    lists = {"num_gpu": sizes, "tp": sizes, "dp": sizes, "moe_tp": sizes, "moe_ep": sizes}
    lists |= {"pp": [1], "cp": [1]}
    if question["mode"] == "agg":
        wanted = {f"agg_{key}_candidates": value for key, value in lists.items()}
        return {"serving_mode": "agg", **names, **wanted, **shared}
    pools: dict[str, Any] = {}
    for pool in ("prefill", "decode"):
        pools |= {f"{pool}_{key}": value for key, value in names.items()}
        pools |= {f"{pool}_{key}_candidates": value for key, value in lists.items()}
    return {
        "serving_mode": "disagg",
        **pools,
        **shared,
        "num_gpu_per_replica": [question["gpus"]],
        "max_gpu_per_replica": question["gpus"],
    }


def _path(question: dict[str, Any]) -> str:
    """The model by its name where it comes along with them, else a folder with its config."""
    from aiconfigurator.sdk import common

    if question["model"] in common.DefaultHFModels:
        return str(question["model"])
    folder = tempfile.mkdtemp(prefix="planner-aic-")
    # what they insist on and no kernel depends on
    config = {"max_position_embeddings": 131_072, **question["config"]}
    (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


if __name__ == "__main__":
    main()
