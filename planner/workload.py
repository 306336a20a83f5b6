"""Name a workload: a preset, a pair of length distributions, or a trace.

The one entrance for commands and for other modules of the planner, which find all types here:
lengths (planner/lengths.py), workloads (planner/pairs.py) and their moments (planner/moments.py).
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from types import MappingProxyType

from planner.errors import PlannerError
from planner.lengths import (
    Empirical,
    Fixed,
    Geometric,
    Lengths,
    LogNormal,
    Marginal,
    parse_lengths,
)
from planner.moments import Moments, independent_moments, moments_of
from planner.pairs import Independent, Joint, LogNormalJoint, Workload
from planner.traces import read_trace

__all__ = [
    "PRESETS",
    "Empirical",
    "Fixed",
    "Geometric",
    "Independent",
    "Joint",
    "Lengths",
    "LogNormal",
    "LogNormalJoint",
    "Marginal",
    "Moments",
    "Workload",
    "independent_moments",
    "moments_of",
    "parse_lengths",
    "workload",
]


def _preset(name: str, prefix: int, prompt: int, output: int) -> Independent:
    whole = prefix + prompt
    return Independent(Fixed(whole), Geometric(output), name=name, reuse=prefix / whole)


PRESETS = MappingProxyType(
    {
        "chat": _preset("chat", prefix=4096, prompt=512, output=256),
        "coding": _preset("coding", prefix=2048, prompt=4096, output=1024),
        "agentic": _preset("agentic", prefix=524288, prompt=256, output=8192),
    }
)
"""The workloads of arXiv 2605.28302 (prefix KV, ISL, OSL): context of prefix + ISL tokens, of which
the prefix is found in the cache. The paper gives means only; geometric outputs are the assumption
of arXiv 2601.21351, and prompts are taken as equally long."""

FORMS = (
    "prompt and output lengths such as lognormal:1155:1.2,geometric:211 (optionally followed by "
    ",correlation:0.3 and ,reuse:0.5), or the path of a trace (Azure CSV or Mooncake JSONL)"
)

TRACE_SUFFIXES = (".csv", ".jsonl", ".json", ".gz")
"""What a name ends in that was meant as a file; the content decides how one is read."""


def workload(source: str | PathLike[str]) -> Workload:
    """The workload a text names, or the requests of a trace.

    Args:
        source: a preset (``PRESETS``), ``PROMPT,OUTPUT`` in the forms of ``parse_lengths``,
            or the path of a trace. After the two lengths, ``correlation:R`` couples the logarithms
            of two lognormals and ``reuse:S`` gives the share of prompt tokens found in a cache. A
            preset wins over a file of the same name (write ``./chat`` for that).

    Raises:
        PlannerError: nothing of the kind, or a distribution or trace that cannot be read.
    """
    if not isinstance(source, str):
        return read_trace(source).workload()
    text = source.strip()
    if text in PRESETS:
        return PRESETS[text]
    if text and Path(text).exists():
        return read_trace(text).workload()
    if "/" in text.partition(":")[0] or text.endswith(TRACE_SUFFIXES):
        raise PlannerError(f"no trace at {text!r}: there is no such file")
    if ":" in text:
        return _parse_pair(text)
    raise PlannerError(
        f"unknown workload {source!r}: expected a preset ({', '.join(PRESETS)}), {FORMS}"
    )


def _parse_pair(text: str) -> Workload:
    """``PROMPT,OUTPUT[,correlation:R][,reuse:S]``."""
    lengths: list[Marginal] = []
    extra: dict[str, float] = {}
    for item in text.split(","):
        kind, _, value = item.strip().partition(":")
        if kind not in ("correlation", "reuse"):
            lengths.append(parse_lengths(item))
            continue
        try:
            extra[kind] = float(value)
        except ValueError:
            raise PlannerError(f"{item.strip()!r} in {text!r}: expected a number") from None
    if len(lengths) != 2:
        raise PlannerError(f"{len(lengths)} length(s) in {text!r}: expected {FORMS}")
    prompt, output = lengths
    if "correlation" not in extra:
        return Independent(prompt, output, name=text, reuse=extra.get("reuse", 0.0))
    if not (isinstance(prompt, LogNormal) and isinstance(output, LogNormal)):
        raise PlannerError(
            f"correlation in {text!r}: only two lognormal lengths can be correlated; "
            "for others give a trace"
        )
    return LogNormalJoint(
        prompt, output, extra["correlation"], name=text, reuse=extra.get("reuse", 0.0)
    )
