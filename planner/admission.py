"""Which request gets which slot, and when: arrivals, the queue, prefill elsewhere, replay.

Open loop: first come first served, on the attention worker with the fewest requests that has a slot
and KV room; the queue is bounded. Closed loop: a slot that becomes free is refilled at once from
its worker's own stream. What happens in a slot is ``steps``'s business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from planner.clock import Clock
from planner.errors import PlannerError
from planner.loads import (
    Arrival,
    Arrivals,
    Closed,
    Draw,
    Load,
    Poisson,
    draws,
    poisson_arrivals,
    stationary_draws,
)
from planner.members import Member, Request, Worker
from planner.records import Meter
from planner.steps import Steps, fewest

if TYPE_CHECKING:
    from planner.simulator import Cluster


class Admission:
    """Hands requests to lanes.

    Args:
        cluster: what is simulated.
        load: what it is given to do.
        seed: of everything drawn.
        clock: simulated time; stopped when the last request is complete.
        steps: where the lanes are.
        meter: is told of arrivals, refusals and completions.
    """

    def __init__(
        self, cluster: Cluster, load: Load, seed: int, clock: Clock, steps: Steps, meter: Meter
    ):
        self._cluster = cluster
        self._load = load
        self._seed = seed
        self._clock = clock
        self._steps = steps
        self._meter = meter
        self._closed = load if isinstance(load, Closed) else None
        self._waiting: deque[Request] = deque()
        self._prefill_queue: deque[Request] = deque()
        self._prefilling = 0
        self._born = 0
        self._arrivals: Iterator[Arrival] = iter(())
        self._ended = self._closed is not None
        self._slots = cluster.batch * cluster.lanes
        self.emptied: Callable[[Worker], None]
        """Called when a draining worker has given its last request away."""
        steps.leave = self._complete
        steps.room = self.place

    @property
    def waiting(self) -> int:
        """Requests without a slot: in the queue, or waiting for a prefill worker."""
        return len(self._waiting) + len(self._prefill_queue)

    def open(self) -> None:
        """Asks for the first arrival of an open loop."""
        if isinstance(self._load, Poisson):
            self._arrivals = poisson_arrivals(self._load, self._seed)
            self._next_arrival()
        elif isinstance(self._load, Arrivals):
            self._arrivals = iter(self._load.items)
            self._next_arrival()

    def add_worker(self, index: int) -> Worker:
        """A new attention worker; in a closed loop its slots are filled from its own stream."""
        now = self._clock.now
        if self._closed is None:
            worker = Worker(index, now, iter(()))
            self._steps.add(worker)
            self.place()
            return worker
        closed = self._closed
        warm: list[Draw] = []
        limit = closed.requests
        if closed.stationary:
            count = self._slots if limit is None else min(self._slots, limit)
            warm = stationary_draws(closed.workload, self._seed, index, count)
            limit = None if limit is None else limit - count
        source = draws(closed.workload, self._seed, index, limit)
        worker = Worker(index, now, source)
        self._steps.add(worker)
        self.place()
        for member in worker.members:
            free = self._cluster.batch - member.held
            lengths: Iterable[Draw] = islice(warm, member.lane * self._cluster.batch, None)
            for draw in islice(lengths if closed.stationary else source, free):
                self._admit(member, self._drawn(draw))
        return worker

    # -- open loop --------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        """Lets in whoever comes now, and asks for the next one after."""
        now = self._clock.now
        for arrival in self._arrivals:
            if arrival.output < 1 or arrival.prompt < 0 or not arrival.time >= now:
                raise PlannerError(
                    f"{arrival} after time {now:g}; times must not fall, prompts are >= 0 and "
                    "outputs >= 1"
                )
            if arrival.time > now:
                self._clock.at(arrival.time, self._arrive, arrival)
                return
            self._let_in(arrival)
        self._ended = True
        self._stop_when_done()

    def _arrive(self, arrival: Arrival) -> None:
        self._let_in(arrival)
        self._next_arrival()

    def _let_in(self, arrival: Arrival) -> None:
        """To a slot or a prefill worker, at once or in turn, or away."""
        self._meter.arrive(self._clock.now)
        request = self._request(arrival.prompt, arrival.output, arrival.cached)
        if self._refuses(request):
            self._meter.reject()
        elif self._cluster.prefill == "disaggregated":
            self._prefill(request)
        else:
            self._waiting.append(request)
            self.place()

    def _refuses(self, request: Request) -> bool:
        limit, kv_tokens = self._cluster.max_queue, self._cluster.kv_tokens
        if kv_tokens is not None and request.room > kv_tokens:
            return True  # it would never fit
        return limit is not None and self.waiting >= limit and not self._fits_now(request)

    def _fits_now(self, request: Request) -> bool:
        """Whether it would not have to wait at all."""
        if self.waiting:
            return False
        if self._cluster.prefill == "disaggregated":
            return self._prefilling < self._cluster.prefill_workers
        return self._worker_for(request) is not None

    def place(self) -> None:
        """Gives slots to those who wait, in order; who doesn't fit holds up who is behind."""
        waiting = self._waiting
        while waiting:
            worker = self._worker_for(waiting[0])
            if worker is None:
                return
            member = min(worker.members, key=lambda member: (member.held, member.lane))
            self._admit(member, waiting.popleft())

    def _worker_for(self, request: Request) -> Worker | None:
        kv_tokens = self._cluster.kv_tokens
        slots, room = self._slots, request.room
        return fewest(
            worker
            for worker in self._steps.workers
            if worker.held < slots
            and not worker.draining
            and (kv_tokens is None or worker.reserved + room <= kv_tokens)
        )

    # -- slots ------------------------------------------------------------------------------------

    def _admit(self, member: Member, request: Request) -> None:
        """Gives the request a slot of the lane; it takes part from the next step on."""
        worker = member.worker
        worker.held += 1
        worker.reserved += request.room
        member.held += 1
        mode = self._cluster.prefill
        if mode == "disaggregated" and request.prefill:
            request.home = member
            self._prefill(request)
            return
        if mode == "none":
            request.prefill = 0
        member.joining.append(request)
        self._steps.wake(member)

    def _complete(self, member: Member, request: Request) -> None:
        """Its last token is out: the slot is free, and refilled at once in a closed loop."""
        worker = member.worker
        self._release(member, request)
        self._meter.complete(self._clock.now, request, worker.index)
        if self._closed is not None and not worker.draining:
            if self._waiting:
                self._admit(member, self._waiting.popleft())
            else:
                draw = next(worker.source, None)
                if draw is not None:
                    self._admit(member, self._drawn(draw))
        self._stop_when_done()

    def _release(self, member: Member, request: Request) -> None:
        worker = member.worker
        worker.held -= 1
        worker.reserved -= request.room
        member.held -= 1
        if worker.draining and not worker.held and not worker.gone:
            self.emptied(worker)

    def give_up(self, worker: Worker, members: list[Member]) -> None:
        """Takes all requests out of the lanes; they are replayed on other workers, before all
        who wait."""
        requests: list[Request] = []
        for member in members:
            requests += member.clear()
        for request in requests:
            worker.held -= 1
            worker.reserved -= request.room
            if self._cluster.prefill != "none":
                # What it had emitted is a part of its prompt now, and nothing of it is cached.
                request.prefill = request.prompt + request.emitted
            request.replays += 1
        self._meter.replay(len(requests))
        if worker.draining and not worker.held and not worker.gone:
            self.emptied(worker)
        if self._cluster.prefill == "disaggregated":
            for request in requests:
                request.home = None
                self._prefill(request)
        else:
            self._waiting.extendleft(reversed(requests))

    # -- prefill elsewhere ------------------------------------------------------------------------

    def _prefill(self, request: Request) -> None:
        self._prefill_queue.append(request)
        self._start_prefill()

    def _start_prefill(self) -> None:
        now = self._clock.now
        while self._prefill_queue and self._prefilling < self._cluster.prefill_workers:
            request = self._prefill_queue.popleft()
            self._prefilling += 1
            seconds = self._cluster.latencies.t_prefill(request.prefill)
            self._clock.at(now + seconds, self._prefilled, request)

    def _prefilled(self, request: Request) -> None:
        """The prompt's first token is out; its KV goes to the attention worker."""
        now = self._clock.now
        self._prefilling -= 1
        self._meter.lone_token(now)
        self._meter.token(now, request)
        request.emitted += 1
        request.last = now
        request.prefill = 0
        if request.emitted < request.output:
            delay = self._cluster.kv_transfer(request.prompt + request.emitted)
            self._clock.at(now + delay, self._received, request)
        elif request.home is not None:
            self._complete(request.home, request)
        else:
            self._meter.complete(now, request, -1)
            self._stop_when_done()
        self._start_prefill()

    def _received(self, request: Request) -> None:
        member, request.home = request.home, None
        if member is not None:
            if not (member.worker.gone or member.worker.leaving):
                member.joining.append(request)
                self._steps.wake(member)
                return
            self._release(member, request)
        self._waiting.append(request)
        self.place()

    # -- the small things -------------------------------------------------------------------------

    def _drawn(self, draw: Draw) -> Request:
        self._meter.arrive(self._clock.now)
        request = self._request(draw.prompt, draw.output, draw.cached)
        if draw.age:
            request.emitted, request.prefill, request.known_start = draw.age, 0, False
        return request

    def _request(self, prompt: int, output: int, cached: int) -> Request:
        self._born += 1
        # At least one token is computed, or there would be nothing to predict the next from.
        return Request(
            self._born - 1,
            self._clock.now,
            prompt,
            output,
            cached,
            prefill=max(1, prompt - cached),
        )

    def _stop_when_done(self) -> None:
        if self._ended and not self._meter.in_flight:
            self._clock.stop()
