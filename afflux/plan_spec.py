"""A cluster spec for ``afflux up`` from a planned configuration, with the plan in its comments.

Only AFD can be written down: a spec has neither pools for prefill nor attention that shares GPUs
with experts. Every actor is one process on one GPU, so configurations with tensor parallelism are
passed over for the best one without. Starts nothing.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from afflux.plan_report import provenance
from cluster.spec import MAX_LANES, make_spec
from planner.errors import PlannerError
from planner.explore.kernels.base import Side
from planner.explore.points import Group, Mode, Point
from planner.explore.question import Exploration, Question
from planner.explore.single_gpu import best_of_single_gpus, sides
from planner.explore.verdict import NAMES, counts, seconds

LEAST_FRAME_TOKENS, MOST_FRAME_TOKENS = 512, 65536
"""Of ``transport.max_frame_tokens``: its default, and the most that it may be."""


def emit(found: Exploration, model: str) -> tuple[str, list[str]]:
    """The spec of the best AFD configuration that a spec can express.

    Args:
        found: with AFD among its modes.
        model: as given by the user: a folder goes into the spec as it is.

    Returns:
        the YAML, accepted by ``cluster.spec``; and what to know about it, for people.

    Raises:
        PlannerError: another level wins, AFD holds no targets, or none of its configurations can be
            written as a spec; says what to do.
    """
    point, notes = choose(found)
    text = _text(found, point, model)
    make_spec(yaml.safe_load(text))
    return text, notes


def choose(found: Exploration) -> tuple[Point, list[str]]:
    """The configuration to write, and what to say about the choice.

    Raises:
        PlannerError: as ``emit``.
    """
    best = found.best.get(Mode.AFD)
    winner = found.winner
    if Mode.AFD not in found.question.modes:
        raise PlannerError("--emit-spec needs AFD among the levels; add afd to --modes")
    if best is None:
        why = found.refusals[Mode.AFD].text if Mode.AFD in found.refusals else "nothing fits"
        raise PlannerError(
            f"--emit-spec writes AFD, and AFD does not hold the targets: {why}; loosen what limits "
            "it, or take more GPUs"
        )
    if winner is not None and winner is not Mode.AFD:
        raise PlannerError(
            f"--emit-spec writes AFD only, and {NAMES[winner]} serves more here "
            f"({found.best[winner].tokens_per_s:,.0f} against {best.tokens_per_s:,.0f} tokens/s); "  # type: ignore[union-attr]
            "a spec has no pools for that: deploy it with vLLM itself, or add --modes afd for the "
            "spec of AFD all the same"
        )
    _check_sides(found.question)
    point = _expressible(found, best)
    notes = []
    if point is not best:
        notes.append(
            f"the best AFD configuration, {counts(best)}, needs tensor parallelism, which actors "
            f"do not have; the spec is of {counts(point)}: {point.tokens_per_s:,.0f} instead of "
            f"{best.tokens_per_s:,.0f} tokens/s"
        )
    replicas = sides(point)[0].replicas
    if replicas > 1:
        notes.append(
            f"the spec is one of {replicas} equal deployments; start each with a name and a port "
            "of its own: --set name=NAME --set frontend.port=PORT"
        )
    return point, notes


def _check_sides(question: Question) -> None:
    where = question.options.sides
    moved = [
        f"--{name}-on attention"
        for name, side in (("router", where.router), ("shared", where.shared))
        if side is not Side.ATTENTION
    ]
    if moved:
        raise PlannerError(
            "--emit-spec: afflux keeps router and shared experts beside attention; plan with "
            f"{' '.join(moved)}"
        )


def _expressible(found: Exploration, best: Point) -> Point:
    point = best_of_single_gpus(found)
    if point is None:
        raise PlannerError(
            f"--emit-spec: AFD holds the targets with tensor parallelism only ({counts(best)}), "
            "and every actor is one process on one GPU; take GPUs with more memory or looser "
            "targets, so that one GPU is enough for each"
        )
    if point.lanes > MAX_LANES:
        raise PlannerError(
            f"--emit-spec: the plan takes {point.lanes} lanes and a spec {MAX_LANES} at most; "
            f"plan with --lanes {MAX_LANES}"
        )
    return point


def _text(found: Exploration, point: Point, model: str) -> str:
    question = found.question
    attention, ffn = sides(point)
    total = attention.gpus + ffn.gpus
    least = {"attention": 1, "ffn": _least(ffn)}
    data: dict[str, Any] = {
        "name": _name(question.model.name),
        "model": _model(question, model),
        "lanes": point.lanes,
        "attention": {
            "count": attention.gpus,
            "min": least["attention"],
            "max": total - least["ffn"],
            "resources": {"cpus": 4, "gpus": 1},
            "engine": {
                "max_model_len": question.shape.longest,
                "max_num_seqs": point.batch,
                "gpu_memory_utilization": question.options.memory_share,
            },
        },
        "ffn": {
            "count": ffn.gpus,
            "min": least["ffn"],
            "max": min(total - least["attention"], question.model.experts),
            "resources": {"cpus": 2, "gpus": 1},
        },
        "transport": {"max_frame_tokens": _frame(point)},
        "frontend": {
            "host": "0.0.0.0",
            "max_requests": max(1024, 2 * point.batch * attention.gpus),
        },
        "slo": _targets(question),
    }
    if point.chunk:
        # A step holds the batch's tokens and one chunk of a prompt
        data["attention"]["engine"]["max_num_batched_tokens"] = point.chunk + point.batch
    data = {key: value for key, value in data.items() if value != {}}
    body = yaml.safe_dump(data, sort_keys=False, default_flow_style=False)
    return _comments(found, point) + _with_remarks(body)


def _targets(question: Question) -> dict[str, float]:
    given = {"ttft_s": question.targets.ttft, "tpot_s": question.targets.tpot}
    return {key: value for key, value in given.items() if math.isfinite(value)}


def _model(question: Question, given: str) -> dict[str, str]:
    folder = Path(given).expanduser()
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        return {"path": str(folder.resolve())}
    name = question.model.name
    return {"path": f"/models/{name.rsplit('/', 1)[-1]}", "served_name": name}


def _name(model: str) -> str:
    """A deployment's name: lower case letters, digits and dashes."""
    last = model.rstrip("/").rsplit("/", 1)[-1].lower()
    letters = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in last)
    return letters[:40].strip("-") or "afflux"


def _least(ffn: Group) -> int:
    """FFN actors that hold all experts: the others' share of the weights has to fit as well."""
    if not (ffn.memory > 0 and ffn.room > 0):
        return ffn.gpus
    return max(1, min(ffn.gpus, math.ceil(ffn.gpus * ffn.memory / ffn.room)))


def _frame(point: Point) -> int:
    """Tokens of a lane's step, up to a power of two, so that it is one frame."""
    tokens = max(1, math.ceil((point.batch + point.chunk) / point.lanes))
    return min(MOST_FRAME_TOKENS, max(LEAST_FRAME_TOKENS, 2 ** math.ceil(math.log2(tokens))))


def _comments(found: Exploration, point: Point) -> str:
    question = found.question
    attention, ffn = sides(point)
    shape, targets = question.shape, question.targets
    lines = [
        f"{question.model.name} on {point.gpus} x {question.system.name}, by afflux plan.",
        "",
        "STATUS: planned, not validated. Nobody has run this file. What the plan expects:",
        f"  workload {shape.name}: {shape.prefix} tokens cached, {shape.prompt} of prompt, "
        f"{shape.output} of output",
        f"  {counts(point)}, batch {point.batch} per attention actor, {point.lanes} lanes",
        f"  TTFT {seconds(point.ttft)} (target {seconds(targets.ttft)}), TPOT "
        f"{seconds(point.tpot)} (target {seconds(targets.tpot)}), safe bound "
        f"{seconds(point.tpot_safe)}",
        f"  {point.tokens_per_s:,.0f} tokens/s, {point.tokens_per_s_gpu:,.1f} per GPU",
        f"  memory: {attention.memory / 2**30:.0f} of {attention.room / 2**30:.0f} GiB on an "
        f"attention GPU, {ffn.memory / 2**30:.0f} of {ffn.room / 2**30:.0f} on an FFN GPU",
        f"  times: {provenance(point)}; {found.source}",
    ]
    if question.ffn_system is not None:
        lines.append(
            f"  FFN actors are planned for {question.ffn_system.name}: give both pools labels that "
            "pick their nodes"
        )
    if attention.replicas > 1:
        lines.append(
            f"  One of {attention.replicas} equal deployments: give each a name and a port of its "
            "own"
        )
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


REMARKS = {
    "  path:": "the checkpoint, at the same place on every node",
    "lanes:": "micro-batches that take turns; auto chooses for every step",
    "    max_num_seqs:": "the planned batch of an attention actor",
    "    max_model_len:": "the longest context of the workload",
    "  max_frame_tokens:": "a lane's step in one frame",
    "slo:": "reported, and what the controller holds when autoscaler.mode is on",
}


def _with_remarks(body: str) -> str:
    lines: list[str] = []
    for line in body.splitlines():
        remark = next((text for key, text in REMARKS.items() if line.startswith(key)), "")
        top = line and not line.startswith(" ") and lines
        lines.append(("\n" if top else "") + line + (f"  # {remark}" if remark else ""))
    return "\n".join(lines) + "\n"
