"""The life of a step: attention, to the FFN workers, wait, experts, back, and the next one.

The six states of arXiv 2601.21351's simulator as events. Attention workers serve their lanes first
come first served; what waits for the FFN workers is in ``ffn_pool``. Which requests are in a lane
is ``admission``'s business, how many workers there are ``changes``'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from planner.clock import Clock
from planner.ffn_pool import FfnPool
from planner.latency import Latencies
from planner.members import Group, Member, Request, Worker
from planner.records import Meter
from planner.spans import SpanLog

if TYPE_CHECKING:
    from planner.simulator import Cluster

Leave = Callable[[Member, Request], None]


class Steps:
    """Carries the groups through their steps.

    Args:
        cluster: what is simulated.
        clock: simulated time.
        meter: is told of tokens.
        spans: records the stages.

    ``leave`` (a request has its last token), ``room`` (slots may have become free) and ``cleared``
    (a worker that was leaving has ended its step) are set by those who care.
    """

    def __init__(self, cluster: Cluster, clock: Clock, meter: Meter, spans: SpanLog):
        self.clock = clock
        self.meter = meter
        self.spans = spans
        self.ffn = FfnPool(cluster, clock, spans, self._returned)
        self.workers: list[Worker] = []
        self.lost: list[Worker] = []  # and not noticed yet
        self.leave: Leave
        self.room: Callable[[], None]
        self.cleared: Callable[[Member], None]
        self.done = 0
        self.step_seconds = 0.0
        self.batches = 0
        self.batch_requests = 0
        self.batch_tokens = 0
        self.paused_until = 0.0
        self._barrier = cluster.boarding == "barrier"
        self._chunk = cluster.prefill_chunk
        self._rounds = cluster.layers
        self._latencies: Latencies = cluster.latencies
        self._attention = cluster.latencies.t_attention
        self._own_transfer = cluster.latencies.transfer_load == "attention"
        self._transfer_times: dict[int, float] = {}
        self._groups = [Group("A", lane) for lane in range(cluster.lanes)]  # with barrier boarding
        self._lanes = cluster.lanes
        self._blocking = cluster.sends == "blocking"
        self._joint = cluster.steps == "joint"
        self._attention_capacity = 0.0
        self._gone_busy = 0.0

    # -- workers -------------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """Lets the worker take part from the next step of each group on."""
        worker.free = self.clock.now
        for lane in range(self._lanes):
            group = self._groups[lane] if self._barrier else Group(worker.name, lane)
            member = Member(worker, lane, group)
            group.members.append(member)
            worker.members.append(member)
        self.workers.append(worker)

    def remove(self, worker: Worker) -> None:
        """Takes it out of its groups, not its requests out of its lanes."""
        now = self.clock.now
        end = min(now, worker.lost)
        worker.gone = True
        self._attention_capacity += end - worker.born
        self._gone_busy += worker.busy - max(0.0, worker.ends - end)
        self.workers.remove(worker)
        for member in worker.members:
            member.group.members.remove(member)

    def work(self) -> tuple[float, float, float, float]:
        """Time so far, summed over workers: attention busy, attention there, FFN busy, FFN there.

        A lost worker counts until it was lost.
        """
        now = self.clock.now
        busy, there = self._gone_busy, self._attention_capacity
        for worker in self.workers:
            end = min(now, worker.lost)
            busy += worker.busy - max(0.0, worker.ends - end)
            there += end - worker.born
        return busy, there, *self.ffn.work()

    # -- steps ---------------------------------------------------------------------------------

    def wake(self, member: Member) -> None:
        """Begins a step of the member's group if none is under way."""
        if self._joint:
            worker = member.worker
            if not worker.stepping:
                worker.stepping = True
                self.clock.at(self.clock.now, self._begin_joint, worker)
            return
        group = member.group
        if group.idle:
            group.idle = False
            self.clock.at(self.clock.now, self._wake, group)

    def _wake(self, group: Group) -> None:
        group.ended = self.clock.now
        self._begin(group)

    def _begin(self, group: Group) -> None:
        """Takes in who joins and sends the members' batches on their way."""
        now = self.clock.now
        if now < self.paused_until:
            self.clock.at(self.paused_until, self._begin, group)
            return
        load = largest = 0
        stepping = []
        for member in group.members:
            if member.joining:
                self._take_in(member)
            running = member.running
            if running:
                seconds = self._attention(member.tokens, running)
                self.batches += 1
                self.batch_requests += running
                self.batch_tokens += member.tokens
            elif member.prefilling:
                seconds = 0.0
            else:
                continue
            if member.prefilling:
                chunk = self._ride(member)
                seconds += self._latencies.t_prefill(chunk)
                running += chunk
            member.seconds = seconds / self._rounds
            load += running
            if running > largest:
                largest = running
            stepping.append(member)
        group.stepping = stepping
        if not stepping:
            group.idle = True
            return
        group.load = load
        group.transfer = self._transfer(largest if self._own_transfer else load)
        group.round = 0
        group.recorded = self.spans.begins(now)
        self._attend(group)

    def _attend(self, group: Group) -> None:
        """Attention on every member's worker, after what the worker does now."""
        now = latest = self.clock.now
        sending = group.transfer if self._blocking else 0.0
        for member in group.stepping:
            worker = member.worker
            if worker.lost <= now:
                member.ends = math.inf
                continue
            free = worker.free
            end = (free if free > now else now) + member.seconds
            member.ends = worker.ends = end
            worker.free = end + sending
            worker.busy += member.seconds
            if end > latest:
                latest = end
        self.clock.at(latest + group.transfer, self._arrive, group)
        if group.recorded:
            for member in group.stepping:
                if member.ends == math.inf:
                    continue
                start, name = member.ends - member.seconds, member.worker.name
                self.spans.add(name, group.lane, "wait", now, start)
                self.spans.add(name, group.lane, "attention", start, member.ends)
            self.spans.add(group.name, group.lane, "a2f", latest, latest + group.transfer)

    def _arrive(self, group: Group) -> None:
        """The frame is at the FFN workers, or waits for a worker that nobody knows is lost."""
        if self.lost and self._waits(group):
            return
        self.ffn.arrive(group)

    def _waits(self, group: Group) -> bool:
        cut = [m for m in group.stepping if m.worker.lost < m.ends and not m.worker.gone]
        if not cut:
            return False
        noticed = max(member.worker.noticed for member in cut)
        self.clock.at(max(noticed, self.clock.now), self._without, group)
        return True

    def _without(self, group: Group) -> None:
        """Goes on without the members whose workers are gone."""
        group.stepping = [member for member in group.stepping if not member.worker.gone]
        if not group.stepping:
            self._begin(group)
            return
        group.load = sum(
            member.running + sum(tokens for _, tokens in member.chunks) for member in group.stepping
        )
        self._arrive(group)

    def _returned(self, group: Group) -> None:
        group.round += 1
        if group.round < self._rounds:
            group.stepping = [m for m in group.stepping if not m.worker.gone]
            if group.stepping:
                self._attend(group)
            else:
                self._begin(group)
            return
        if self._joint:
            self._back(group)
            return
        self._finish(group)
        self._begin(group)

    # -- joint steps: all lanes of a worker begin and end one together ----------------------------

    def _begin_joint(self, worker: Worker) -> None:
        now = self.clock.now
        if now < self.paused_until:
            self.clock.at(self.paused_until, self._begin_joint, worker)
            return
        worker.away = 0
        for member in worker.members:
            group = member.group
            if group.idle:
                group.idle, group.ended = False, now
            self._begin(group)
            worker.away += not group.idle
        worker.stepping = worker.away > 0

    def _back(self, group: Group) -> None:
        """With the last lane's results the rest of the step begins: sampling, scheduling."""
        worker = group.stepping[0].worker
        worker.away -= 1
        if worker.away:
            return
        requests = sum(
            member.running + sum(tokens for _, tokens in member.chunks) for member in worker.members
        )
        seconds = self._latencies.outside(requests)
        worker.busy += seconds
        worker.free = worker.ends = self.clock.now + seconds
        self.clock.at(worker.ends, self._end_joint, worker)

    def _end_joint(self, worker: Worker) -> None:
        for member in worker.members:
            if not member.group.idle:
                self._finish(member.group)
        if not worker.gone:
            self._begin_joint(worker)

    def _finish(self, group: Group) -> None:
        """Every running request has its next token."""
        now = self.clock.now
        gap = now - group.ended
        group.ended = now
        self.done += 1
        self.step_seconds += gap
        emitted = repeats = 0
        left = False
        leaving = None
        for member in group.stepping:
            worker = member.worker
            if worker.lost < now:
                continue  # what it got is lost with it
            running = member.running
            member.step += 1
            member.tokens += running
            emitted += running
            repeats += running
            if member.fresh:
                repeats -= len(member.fresh)
                for request in member.fresh:
                    self.meter.token(now, request)
                member.fresh = []
            if member.chunks:
                emitted += self._prefilled(member)
                left = True  # a request of one token is complete after its prefill
            while member.due <= member.step:
                self.leave(member, member.finished())
                left = True
            if worker.leaving:
                leaving = [*(leaving or ()), member]
        self.meter.step(now, emitted, gap, repeats)
        for member in leaving or ():
            self.cleared(member)
        if left:
            self.room()

    # -- requests in a lane ---------------------------------------------------------------------

    def _take_in(self, member: Member) -> None:
        for request in member.joining:
            if request.prefill:
                member.prefilling.append(request)
            else:
                member.start(request)
                member.fresh.append(request)
        member.joining = []

    def _ride(self, member: Member) -> int:
        """Fills the step's chunk from the prompts in order; its number of tokens."""
        left = self._chunk
        member.chunks = []
        for request in member.prefilling:
            tokens = min(left, request.prefill)
            if not tokens:
                break
            member.chunks.append((request, tokens))
            left -= tokens
        return self._chunk - left

    def _prefilled(self, member: Member) -> int:
        """Takes note of the chunk done; the tokens that completed prompts emit."""
        now = self.clock.now
        emitted = 0
        for request, tokens in member.chunks:
            request.prefill -= tokens
            if request.prefill:
                continue
            member.prefilling.popleft()
            emitted += 1
            self.meter.token(now, request)
            request.emitted += 1
            request.last = now
            if request.emitted < request.output:
                member.start(request)
            else:
                self.leave(member, request)
        member.chunks = []
        return emitted

    # -- times ----------------------------------------------------------------------------------

    def _transfer(self, load: int) -> float:
        """One way, per layer round."""
        seconds = self._transfer_times.get(load)
        if seconds is None:
            seconds = self._latencies.t_transfer(load) / 2 / self._rounds
            self._transfer_times[load] = seconds
        return seconds


def mean(total: float, count: float) -> float:
    """The quotient; nan without a count."""
    return total / count if count else math.nan


def fewest(workers: Iterable[Worker]) -> Worker | None:
    """The worker that holds the fewest requests, the oldest of equals; None if there is none."""
    return min(workers, key=lambda worker: (worker.held, worker.index), default=None)
