"""What `afflux bench slo` asks for, and when: phases with arrivals of their own, or a trace.

A scenario is drawn once from a seed, so that every run of a comparison gets the same requests at
the same moments, whatever serves them. Prompts are pieces of token ids; requests that begin with
the same pieces share a prefix. Pure: sends nothing, waits for nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from planner.loads import Arrival, Arrivals
from planner.trace_files import BLOCK_TOKENS
from planner.traces import Trace

FIRST_ID = 4
"""Ids below are the embedded model's special tokens."""


class BadScenario(ValueError):
    """A scenario that can't be drawn; the text names the value and what would be possible."""


class Piece(NamedTuple):
    """A stretch of a prompt: equal keys mean equal text.

    Args:
        key: names the text.
        tokens: how many of it, from its beginning.
    """

    key: str
    tokens: int


@dataclass(frozen=True)
class Phase:
    """Requests of one kind for a while.

    Args:
        name: of the kind, as in "chat".
        seconds: how long it lasts.
        rate: requests per second, Poisson.
        prompt: least and most tokens of the prompts' own part, uniform.
        output: least and most tokens of the answers, uniform.
        shared: tokens that all prompts of a group begin with; 0: they share nothing.
        groups: how many such beginnings there are; each request takes one at random.

    Raises:
        BadScenario: a number is out of range.
    """

    name: str
    seconds: float
    rate: float
    prompt: tuple[int, int]
    output: tuple[int, int]
    shared: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.rate > 0):
            raise BadScenario(
                f"phase {self.name} has {self.seconds:g} s at {self.rate:g} requests/s; "
                "both must be above 0"
            )
        for what, (low, high) in (("prompt", self.prompt), ("output", self.output)):
            if not 1 <= low <= high:
                raise BadScenario(
                    f"phase {self.name}: {what} of {low} to {high} tokens; "
                    "expected 1 <= least <= most"
                )
        if self.shared < 0 or self.groups < 1:
            raise BadScenario(
                f"phase {self.name}: {self.shared} shared tokens in {self.groups} groups; "
                "expected at least 0 in at least 1"
            )

    @property
    def longest(self) -> int:
        """Tokens that a request comes to at most, answer included."""
        return self.shared + self.prompt[1] + self.output[1]


@dataclass(frozen=True)
class Asked:
    """One request to come.

    Args:
        at: seconds from the start of the scenario.
        phase: name of its phase.
        prompt: its pieces, in order.
        output: tokens to answer with, exactly.
    """

    at: float
    phase: str
    prompt: tuple[Piece, ...]
    output: int

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return sum(piece.tokens for piece in self.prompt)


@dataclass(frozen=True)
class Scenario:
    """Requests in the order of their arrival, and when each phase begins.

    Args:
        phases: (seconds from the start, name).
        seconds: until the last phase ends.
        notes: what had to be changed to make it fit, for people.
    """

    name: str
    asked: tuple[Asked, ...]
    phases: tuple[tuple[float, str], ...]
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def shifts(self) -> int:
        """How often the kind of requests changes."""
        return len(self.phases) - 1

    def phase_at(self, seconds: float) -> int:
        """Number of the phase at a time from the start; the nearest outside of all."""
        return max(0, bisect_right(self.phases, seconds, key=lambda phase: phase[0]) - 1)


# The kinds of requests. The embedded model has room for 1024 tokens.
CHAT = Phase("chat", 120.0, 5.2, prompt=(24, 40), output=(17, 31))
LONG = Phase("long-context", 160.0, 5.0, prompt=(8, 24), output=(11, 21), shared=256, groups=2)
CODING = Phase("coding", 120.0, 3.0, prompt=(32, 96), output=(24, 56), shared=128, groups=4)
AGENTIC = Phase("agentic", 120.0, 3.0, prompt=(8, 32), output=(8, 24), shared=256, groups=4)


def _shift(quick: bool) -> list[Phase]:
    return _lasting([CHAT, LONG, CHAT], 0.3 if quick else 1.0)


def _mix(quick: bool) -> list[Phase]:
    return _lasting([CHAT, CODING, AGENTIC, LONG, CHAT], 0.3 if quick else 1.0)


SCENARIOS: Mapping[str, Callable[[bool], list[Phase]]] = {"shift": _shift, "mix": _mix}
STEADY = "steady"
TRACE = "trace"
NAMES = (*SCENARIOS, STEADY, TRACE)


def phases_of(
    name: str, *, quick: bool = False, duration: float = 600.0, kind: Phase = CHAT
) -> list[Phase]:
    """The phases of a scenario by name.

    Args:
        quick: phases of a third, for a look.
        duration: seconds of ``steady``.
        kind: what ``steady`` consists of.

    Raises:
        BadScenario: there is no such scenario; lists those that there are.
    """
    if name == STEADY:
        return [replace(kind, seconds=duration)]
    if name not in SCENARIOS:
        raise BadScenario(f"there is no scenario {name!r}; there are {', '.join(NAMES)}")
    return SCENARIOS[name](quick)


def draw(name: str, phases: Sequence[Phase], *, seed: int, room: int) -> Scenario:
    """The requests of phases, the same ones for the same seed.

    Args:
        room: tokens of the longest request that the model takes, answer included.

    Raises:
        BadScenario: no phases, or one whose requests may not fit.
    """
    if not phases:
        raise BadScenario("a scenario needs at least one phase")
    asked: list[Asked] = []
    begins: list[tuple[float, str]] = []
    now = 0.0
    for number, phase in enumerate(phases):
        if phase.longest > room:
            raise BadScenario(
                f"phase {phase.name} has requests of up to {phase.longest} tokens and the model "
                f"takes {room}; shorten prompt, output or shared"
            )
        begins.append((now, phase.name))
        asked += _drawn(phase, now, np.random.default_rng([seed, number]), len(asked))
        now += phase.seconds
    return Scenario(name, tuple(asked), tuple(begins), now)


def from_trace(trace: Trace, *, speed: float, room: int, limit_s: float | None = None) -> Scenario:
    """A recorded trace as a scenario of one phase.

    Prompts are clipped to the model's room at their end, which keeps what they share; answers to a
    quarter of it.

    Args:
        speed: how many times faster than recorded.
        room: see ``draw``.
        limit_s: leave out what would come later.

    Raises:
        BadScenario: a speed or room that is too small, or nothing comes in time.
    """
    if not speed > 0 or room < 8:
        raise BadScenario(
            f"speed is {speed:g} and room is {room} tokens; expected a speed above 0 and room "
            "for at least 8"
        )
    most = room // 4
    asked: list[Asked] = []
    clipped: Counter[str] = Counter()
    for index in range(len(trace)):
        at = float(trace.arrival[index]) / speed
        if limit_s is not None and at > limit_s:
            break
        wanted, answer = max(1, int(trace.prompt[index])), int(trace.output[index])
        output = min(answer, most)
        prompt = min(wanted, room - output)
        clipped["prompts"] += prompt < wanted
        clipped["answers"] += output < answer
        blocks = None if trace.blocks is None else trace.blocks[index]
        asked.append(Asked(at, TRACE, _pieces(index, prompt, blocks), output))
    if not asked:
        raise BadScenario(f"{trace.source}: no request within {limit_s:g} s at speed {speed:g}")
    notes = tuple(
        f"{count} of {len(asked)} {what} were clipped to the model's {room} tokens"
        for what, count in clipped.items()
        if count
    )
    end = asked[-1].at if limit_s is None else limit_s
    return Scenario(TRACE, tuple(asked), ((0.0, TRACE),), max(end, 1.0), notes)


def prompt_ids(asked: Asked, vocabulary: int) -> list[int]:
    """Token ids of a prompt, ``asked.tokens`` of them, none special."""
    ids: list[int] = []
    for piece in asked.prompt:
        seed = int.from_bytes(blake2b(piece.key.encode(), digest_size=8).digest(), "little")
        drawn = np.random.default_rng(seed).integers(FIRST_ID, vocabulary, piece.tokens)
        ids += drawn.tolist()
    return ids


def as_arrivals(asked: Iterable[Asked], block: int = 1) -> Arrivals:
    """The same load for the planner's simulator.

    What an earlier request began with counts as cached, in whole blocks of ``block`` tokens; the
    cache is taken to be large enough, and to be the same everywhere.
    """
    seen: dict[tuple[str, ...], int] = {}
    items = []
    for request in asked:
        cached, on = 0, True
        prefix: tuple[str, ...] = ()
        for piece in request.prompt:
            prefix = (*prefix, piece.key)
            known = min(seen.get(prefix, 0), piece.tokens)
            cached += known if on else 0
            on = on and known == piece.tokens
            seen[prefix] = max(seen.get(prefix, 0), piece.tokens)
        found = min(cached, request.tokens - 1) // block * block
        items.append(Arrival(request.at, request.tokens, request.output, found))
    return Arrivals(items, unit="s")


def _drawn(phase: Phase, begin: float, rng: np.random.Generator, first: int) -> list[Asked]:
    """The requests of one phase; ``first`` is the number of the first of them."""
    found: list[Asked] = []
    at = rng.exponential(1 / phase.rate)
    while at < phase.seconds:
        own = int(rng.integers(phase.prompt[0], phase.prompt[1] + 1))
        output = int(rng.integers(phase.output[0], phase.output[1] + 1))
        pieces = [Piece(f"own {first + len(found)}", own)]
        if phase.shared:
            pieces.insert(0, Piece(f"{phase.name} {rng.integers(phase.groups)}", phase.shared))
        found.append(Asked(begin + at, phase.name, tuple(pieces), output))
        at += rng.exponential(1 / phase.rate)
    return found


def _pieces(index: int, tokens: int, blocks: Sequence[int] | None) -> tuple[Piece, ...]:
    """A recorded prompt: its blocks as far as it goes, or a text of its own."""
    if not blocks:
        return (Piece(f"own {index}", tokens),)
    pieces = []
    for block in blocks:
        if tokens <= 0:
            break
        pieces.append(Piece(f"block {block}", min(tokens, BLOCK_TOKENS)))
        tokens -= BLOCK_TOKENS
    if tokens > 0:  # more tokens than the blocks stand for
        pieces.append(Piece(f"own {index}", tokens))
    return tuple(pieces)


def _lasting(phases: Sequence[Phase], factor: float) -> list[Phase]:
    return [replace(phase, seconds=phase.seconds * factor) for phase in phases]
