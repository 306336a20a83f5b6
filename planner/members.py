"""The state of a simulated cluster: requests, lanes of attention workers, and who steps together.

Plain data with the few changes that keep it consistent. When what happens is ``steps``'s
business, who gets a request is ``admission``'s.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from planner.loads import Draw

NEVER = 1 << 62
"""A step that doesn't come."""


@dataclass(slots=True, eq=False)
class Request:
    """One request on its way.

    Args:
        index: number in order of arrival.
        arrival: when it came.
        prompt: tokens.
        output: tokens that it emits in all.
        cached: prompt tokens that prefill may skip.
        emitted: tokens emitted before it joined the lane where it is now.
        joined: step of that lane at which it joined.
        first: time of its first token; nan before.
        last: time of the last token it emitted elsewhere or in prefill; nan if none.
        prefill: tokens still to be prefilled.
        home: the lane that keeps a slot for it while it is prefilled elsewhere.
        replays: how often it was started again.
        known_start: False if it was already under way when the simulation began.
    """

    index: int
    arrival: float
    prompt: int
    output: int
    cached: int = 0
    emitted: int = 0
    joined: int = 0
    first: float = math.nan
    last: float = math.nan
    prefill: int = 0
    home: Member | None = None
    replays: int = 0
    known_start: bool = True

    @property
    def room(self) -> int:
        """KV tokens that it may come to hold."""
        return self.prompt + self.output


@dataclass(slots=True, eq=False)
class Worker:
    """An attention worker: its lanes take turns, first come first served.

    Args:
        index: number, never used twice.
        born: when it began to serve.
        source: what it draws from in a closed loop.
        ends: when its present attention ends.
        free: when it can begin the next; later than ``ends`` if it is busy while it sends.
        busy: time worked, including the rest of its present work.
        held: requests that have a slot here.
        reserved: KV tokens that they may come to hold.
        draining: takes nothing new.
        leaving: its requests go elsewhere at the end of their present step.
        lost: when it stopped; inf while it lives.
        noticed: when that is noticed; inf while it lives.
        gone: no longer a part of the cluster.
        stepping: a joint step of its lanes is under way.
        away: lanes of that step whose results are not back.
    """

    index: int
    born: float
    source: Iterator[Draw]
    members: list[Member] = field(default_factory=list)
    ends: float = 0.0
    free: float = 0.0
    busy: float = 0.0
    held: int = 0
    reserved: int = 0
    draining: bool = False
    leaving: bool = False
    lost: float = math.inf
    noticed: float = math.inf
    gone: bool = False
    stepping: bool = False
    away: int = 0

    @property
    def name(self) -> str:
        """Its name in spans."""
        return f"A{self.index}"


@dataclass(slots=True, eq=False)
class Member:
    """One lane of one attention worker.

    Requests that finish at a step are found by a heap of finishing steps, so that a step costs the
    same however many requests are in it.

    Args:
        held: requests that have a slot here, running or not.
        running: requests that emit a token per step.
        tokens: their context tokens.
        step: steps done.
        due: step at which the next of them finishes.
        joining: requests that take part from the next step on.
        fresh: requests whose last token didn't come from this lane's last step.
        prefilling: requests whose prompts ride in the steps, in order.
        chunks: what rides in the present step: (request, tokens).
        seconds: attention time of the present step, per layer round.
        ends: when the present attention ends.
    """

    worker: Worker
    lane: int
    group: Group
    held: int = 0
    running: int = 0
    tokens: int = 0
    step: int = 0
    due: int = NEVER
    finishing: list[tuple[int, int, Request]] = field(default_factory=list)
    joining: list[Request] = field(default_factory=list)
    fresh: list[Request] = field(default_factory=list)
    prefilling: deque[Request] = field(default_factory=deque)
    chunks: list[tuple[Request, int]] = field(default_factory=list)
    seconds: float = 0.0
    ends: float = 0.0

    def start(self, request: Request) -> None:
        """Lets it emit a token per step from the next step on."""
        request.joined = self.step
        self.running += 1
        self.tokens += request.prompt + request.emitted
        finish = self.step + request.output - request.emitted
        heappush(self.finishing, (finish, request.index, request))
        self.due = self.finishing[0][0]

    def finished(self) -> Request:
        """Takes out the request that is due now."""
        request = heappop(self.finishing)[2]
        self.due = self.finishing[0][0] if self.finishing else NEVER
        self.running -= 1
        self.tokens -= request.prompt + request.output
        return request

    def clear(self) -> list[Request]:
        """Takes out all requests, with the tokens that they have emitted, in order of arrival."""
        for _, _, request in self.finishing:
            if self.step > request.joined:
                request.emitted += self.step - request.joined
                request.last = min(self.group.ended, self.worker.lost)
        decoding = [request for _, _, request in self.finishing]
        requests = [*decoding, *self.prefilling, *self.joining]
        self.finishing, self.joining, self.fresh, self.chunks = [], [], [], []
        self.prefilling.clear()
        self.held = self.running = self.tokens = 0
        self.due = NEVER
        return sorted(requests, key=lambda request: request.index)


@dataclass(slots=True, eq=False)
class Group:
    """Lanes that step together: one lane of every worker (barrier), or a single one.

    Args:
        name: of its workers in spans.
        lane: number of the lane.
        stepping: members that take part in the present step.
        idle: waits for requests.
        ended: when its last step ended.
        round: layer round of the present step.
        load: requests and chunk tokens in the present step.
        transfer: transfer time one way, per layer round.
        arrived: when its frame came to the FFN workers.
        recorded: whether spans of the present step are recorded.
    """

    name: str
    lane: int
    members: list[Member] = field(default_factory=list)
    stepping: list[Member] = field(default_factory=list)
    idle: bool = True
    ended: float = 0.0
    round: int = 0
    load: int = 0
    transfer: float = 0.0
    arrived: float = 0.0
    recorded: bool = False
