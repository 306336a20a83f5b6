"""What ``afflux plan`` is given, from words to objects of ``planner.explore``; refusals that name
the option. Computes nothing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.errors import PlannerError

if TYPE_CHECKING:
    from planner.explore.kernels.base import KernelDB
    from planner.explore.points import Mode, Shape, Targets
    from planner.explore.question import Options, Question
    from planner.explore.system import System

COMPARED = ("model", "system", "ffn-system", "gpus", "workload", "ttft", "tpot", "network")
COMPARED_KERNELS = ("kernels", "backend")
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6}
_TIME = re.compile(r"\s*([0-9.eE+-]+|inf)\s*(s|ms|us|µs)?\s*$")


@dataclass(frozen=True)
class Given:
    """The words of one question; see the options of ``afflux plan``."""

    model: str
    system: str
    gpus: int
    workload: str
    ttft: str | None
    tpot: str | None
    options: Options
    ffn_system: str | None = None
    network: tuple[str, ...] = ()
    modes: str | None = None
    kernels: str = "aic"
    backend: str = "trtllm"
    precision: str | None = None
    kv_precision: str | None = None

    def but(self, text: str) -> Given:
        """The same question with one thing changed: ``system=h200_sxm``.

        Raises:
            PlannerError: no such thing can be changed, or not to that.
        """
        key, sign, value = text.partition("=")
        known = (*COMPARED, *COMPARED_KERNELS)
        if not sign or not value or key not in known:
            raise PlannerError(
                f"--compare {text}: expected KEY=VALUE, as in system=h200_sxm, workload=coding or "
                f"network=cluster=50; keys are {', '.join(known)}{_perhaps(key, known)}"
            )
        if key == "network":
            return replace(self, network=(*self.network, value))
        if key == "gpus":
            if not value.isdecimal():
                raise PlannerError(f"--compare {text}: expected a whole number of GPUs")
            return replace(self, gpus=int(value))
        words: dict[str, Any] = {key.replace("-", "_"): value}
        return replace(self, **words)


@dataclass(frozen=True)
class Asked:
    """A question and where its kernel times come from.

    Args:
        ffn_db: of the FFN side's GPUs where they differ; None: ``db``.
    """

    question: Question
    db: KernelDB
    ffn_db: KernelDB | None = None


def ask(given: Given) -> Asked:
    """Look up everything that was named.

    Raises:
        PlannerError: one of the words means nothing, or they contradict each other.
    """
    question = make_question(given)
    db = kernels(given, question.system)
    other = question.ffn_system
    return Asked(question, db, None if other is None else kernels(given, other))


def make_question(given: Given) -> Question:
    """``ask`` without kernel times.

    Raises:
        PlannerError: see ``ask``.
    """
    from planner.explore.model import read_model
    from planner.explore.question import Question

    shape, strict = workload(given.workload)
    targets = _targets(given, strict)
    ffn_system = None if given.ffn_system is None else system(given.ffn_system)
    first = with_links(system(given.system), given.network)
    if ffn_system is not None:
        ffn_system = with_links(ffn_system, given.network)
    _whole_nodes(given.gpus, first)
    return Question(
        read_model(
            given.model,
            precision=_precision(given.precision, "--precision"),
            kv_precision=_precision(given.kv_precision, "--kv-precision"),
        ),
        first,
        given.gpus,
        shape,
        targets,
        ffn_system,
        modes(given.modes),
        given.options,
    )


def make_options(*, router_on: str, shared_on: str, **given: Any) -> Options:
    """Options that make sense.

    Args:
        router_on, shared_on: "attention" or "ffn".
        given: the other fields of ``Options``.

    Raises:
        PlannerError: a number is out of range; names the option.
    """
    from planner.explore.kernels.base import Side, Sides
    from planner.explore.question import Options

    for name in ("prefill_rate", "decode_rate", "memory_share"):
        if not 0 < given[name] <= 1:
            raise PlannerError(
                f"--{name.replace('_', '-')} {given[name]:g}: expected a share above 0, at most 1"
            )
    if not 0 < given["wire_bytes"] <= 8:
        raise PlannerError(
            f"--wire-bytes {given['wire_bytes']:g}: expected bytes per element, above 0, at most 8"
        )
    if not 1 <= given["pd_ttft"] < math.inf:
        raise PlannerError(f"--pd-ttft {given['pd_ttft']:g}: expected a factor, 1 or more")
    return Options(sides=Sides(Side(router_on), Side(shared_on)), **given)


def workload(text: str) -> tuple[Shape, Targets | None]:
    """A named workload with its strict targets, or ``PREFIX:PROMPT:OUTPUT`` without.

    Raises:
        PlannerError: neither of both, or numbers out of range.
    """
    from planner.explore.points import Shape

    shapes = _shapes()
    if text in shapes:
        return shapes[text]
    parts = text.split(":")
    if len(parts) == 3 and all(re.fullmatch(r"-?[0-9_]+", part) for part in parts):
        prefix, prompt, output = (int(part) for part in parts)
        return Shape(text, prefix, prompt, output), None
    raise PlannerError(
        f"--workload {text}: expected {', '.join(shapes)}, or PREFIX:PROMPT:OUTPUT in tokens, as "
        f"in 4096:512:256{_perhaps(text, shapes)}"
    )


def duration(text: str, option: str) -> float:
    """``50ms``, ``0.05s``, or a plain number, which is milliseconds as in vLLM's ``--goodput``.

    Raises:
        PlannerError: no time above 0, or a plain fraction, which was hardly meant as milliseconds.
    """
    match = _TIME.match(text)
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if match is None or math.isnan(number):
        raise PlannerError(f"{option} {text}: expected a time, as in 50ms or 0.05s")
    if number <= 0:
        raise PlannerError(f"{option} {text}: expected a time above 0, as in 50ms or 0.05s")
    if match[2] is None and number < 1:
        raise PlannerError(
            f"{option} {text}: a number without a unit is milliseconds; write {text}s or {text}ms"
        )
    return number * _UNITS[match[2] or "ms"]


def modes(text: str | None) -> tuple[Mode, ...]:
    """Levels by their names, separated by commas; None: all of them.

    Raises:
        PlannerError: an unknown name.
    """
    from planner.explore.points import Mode

    if text is None:
        return tuple(Mode)
    names = {mode.value: mode for mode in Mode}
    found = []
    for word in text.split(","):
        name = {"agg": "aggregated", "p/d": "pd", "p/d+afd": "pd+afd"}.get(word.strip().lower())
        name = name or word.strip().lower()
        if name not in names:
            raise PlannerError(
                f"--modes {text}: there is no level {word.strip()!r}; levels are "
                f"{', '.join(names)}{_perhaps(name, names)}"
            )
        found.append(names[name])
    return tuple(dict.fromkeys(found))


def system(name: str) -> System:
    """A system by name, or from a file.

    Raises:
        PlannerError: there is none, or the file is malformed.
    """
    from planner.explore.system import find_system, read_system

    described = Path(name).suffix in (".yaml", ".yml")
    return read_system(name) if described else find_system(name)


def with_links(found: System, texts: Sequence[str]) -> System:
    """A system with other bandwidths and latencies: ``cluster=50`` (GB/s per GPU and direction),
    ``cluster=50,10us``.

    Raises:
        PlannerError: the system has no such tier, or a number is out of range.
    """
    from planner.explore.system import with_network

    for text in texts:
        name, sign, rest = text.partition("=")
        names = [tier.name for tier in found.tiers]
        if name not in names:
            raise PlannerError(
                f"--network {text}: {found.name} has no tier {name!r}; expected TIER=GB/s or "
                f"TIER=GB/s,LATENCY, where tiers are {', '.join(names)}{_perhaps(name, names)}"
            )
        rate, comma, late = rest.partition(",")
        try:
            bandwidth = float(rate) * 1e9
        except ValueError:
            bandwidth = math.nan
        if not sign or not 0 < bandwidth < math.inf:
            raise PlannerError(
                f"--network {text}: expected GB/s per GPU and direction above 0, as in {name}=50"
            )
        if comma and not late.strip().endswith("s"):
            raise PlannerError(f"--network {text}: expected a latency with a unit, as in 10us")
        latency = duration(late, f"--network {name}: latency") if comma else None
        found = with_network(found, name, bandwidth=bandwidth, latency=latency)
    return found


def kernels(given: Given, on: System) -> KernelDB:
    """The source of kernel times that was named.

    Raises:
        PlannerError: there is no such source or backend, or its package is missing.
    """
    from planner.explore.kernels.sources import find_source

    return find_source(
        given.kernels,
        on,
        backend=given.backend,
        allow_extrapolation=given.options.allow_extrapolation,
    )


def _targets(given: Given, strict: Targets | None) -> Targets:
    """What was given, and where it was not the named workload's strict targets."""
    from planner.explore.points import Targets

    missing = [
        name for name, value in (("--ttft", given.ttft), ("--tpot", given.tpot)) if value is None
    ]
    if strict is None and missing:
        raise PlannerError(
            f"--workload {given.workload} has no targets of its own; give {' and '.join(missing)}, "
            "as in --ttft 100ms --tpot 15ms"
        )
    ttft = strict.ttft if given.ttft is None and strict else duration(str(given.ttft), "--ttft")
    tpot = strict.tpot if given.tpot is None and strict else duration(str(given.tpot), "--tpot")
    return Targets(ttft, tpot)


def _precision(text: str | None, option: str) -> Literal["fp8", "bf16"] | None:
    if text is None:
        return None
    if text == "fp8":
        return "fp8"
    if text == "bf16":
        return "bf16"
    raise PlannerError(f"{option} {text}: expected fp8 or bf16")


def _whole_nodes(gpus: int, on: System) -> None:
    if gpus < 1:
        raise PlannerError(f"--gpus {gpus}: expected 1 or more")
    if gpus > on.node and gpus % on.node:
        low = gpus // on.node * on.node
        raise PlannerError(
            f"--gpus {gpus}: {on.name} has {on.node} GPUs per node, and {gpus} do not divide into "
            f"whole nodes; take {low} or {low + on.node}"
        )


def _shapes() -> dict[str, tuple[Shape, Targets]]:
    from planner.explore.points import SHAPES

    return dict(SHAPES)


def _perhaps(word: str, known: Iterable[str]) -> str:
    """``; did you mean chat?`` where something is near."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
