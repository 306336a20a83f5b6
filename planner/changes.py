"""Changes of the number of workers: planned ones, a policy's, and losses.

Carries them out on the steps and on the requests. What a policy sees is made here; what it decides
is its own business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.admission import Admission
from planner.clock import Clock
from planner.control import Policy, Snapshot, Target
from planner.errors import PlannerError
from planner.events import Failure, Scale
from planner.members import Member, Worker
from planner.records import Meter
from planner.steps import Steps, fewest, mean

if TYPE_CHECKING:
    from planner.simulator import Cluster

PATIENCE = 1000
"""Questions to a policy with nothing left to happen before the run is taken for stalled."""


class Changes:
    """Adds, retires and loses workers.

    Args:
        cluster: what is simulated.
        clock: simulated time.
        steps: where the workers are.
        admission: gives requests to new workers, and those of old ones to others.
        meter: what a policy is told.
    """

    def __init__(
        self, cluster: Cluster, clock: Clock, steps: Steps, admission: Admission, meter: Meter
    ):
        self.done: list[tuple[float, str]] = []
        self._times = cluster.changes
        self._clock = clock
        self._steps = steps
        self._admission = admission
        self._meter = meter
        self._born = 0
        self._preparing: list[_Preparation] = []
        self._ffn_target = cluster.ffn
        self._ffn_change = 0
        steps.cleared = self._clear
        admission.emptied = self._remove

    @property
    def attention(self) -> int:
        """Attention workers that take requests."""
        return sum(not worker.draining for worker in self._steps.workers)

    @property
    def attention_preparing(self) -> int:
        """Attention workers that are being started."""
        return sum(preparation.count for preparation in self._preparing)

    @property
    def ffn_preparing(self) -> int:
        """Change of the number of FFN workers under way."""
        return self._ffn_target - self._steps.ffn.count

    def add_worker(self) -> None:
        """A new attention worker serves from now on."""
        self._admission.add_worker(self._born)
        self._born += 1

    def schedule(
        self, events: Sequence[Scale | Failure], policy: Policy | None, interval: float | None
    ) -> None:
        """Asks the clock for what will happen."""
        for event in events:
            if isinstance(event, Scale):
                self._clock.at(event.at, self._scale, event)
            else:
                self._clock.at(event.at, self._fail, event)
        if policy is not None and interval is not None:
            _Control(policy, interval, self._clock, self._steps, self._admission, self._meter, self)

    # -- planned changes --------------------------------------------------------------------------

    def _scale(self, event: Scale) -> None:
        attention, ffn = event.attention, event.ffn
        if event.relative:
            if attention is not None:
                attention += self.attention + self.attention_preparing
            if ffn is not None:
                ffn += self._ffn_target
        self.set_target(Target(attention, ffn))

    def set_target(self, target: Target) -> None:
        """Starts what is needed to get there from what is there or under way.

        Raises:
            PlannerError: fewer than one worker of a role.
        """
        for role, count in (("attention", target.attention), ("ffn", target.ffn)):
            if count is not None and count < 1:
                raise PlannerError(
                    f"a target of {count} {role} workers at {self._clock.now:g}; 1 is the least"
                )
        if target.attention is not None:
            self._set_attention(target.attention)
        if target.ffn is not None and target.ffn != self._ffn_target:
            self._ffn_target = target.ffn
            self._ffn_change += 1
            subject = (self._ffn_change, target.ffn)
            self._clock.at(self._clock.now + self._times.prepare_ffn, self._commit_ffn, subject)

    def _set_attention(self, target: int) -> None:
        more = target - self.attention - self.attention_preparing
        if more > 0:
            preparation = _Preparation(more)
            self._preparing.append(preparation)
            ready = self._clock.now + self._times.prepare_attention
            self._clock.at(ready, self._commit_attention, preparation)
            return
        for preparation in reversed(self._preparing):
            cancelled = min(-more, preparation.count)
            preparation.count -= cancelled
            more += cancelled
        for _ in range(-more):
            worker = fewest(w for w in self._steps.workers if not w.draining)
            assert worker is not None
            self._retire(worker)

    def _commit_attention(self, preparation: _Preparation) -> None:
        self._preparing.remove(preparation)
        if not preparation.count:
            return
        self._note(f"+{preparation.count} attention")
        self._pause()
        for _ in range(preparation.count):
            self.add_worker()

    def _commit_ffn(self, change: tuple[int, int]) -> None:
        number, count = change
        if number != self._ffn_change:
            return  # another target came meanwhile
        self._note(f"{self._steps.ffn.count} -> {count} ffn")
        self._steps.ffn.set_count(count, self._clock.now + self._times.commit_pause)

    def _pause(self) -> None:
        until = self._clock.now + self._times.commit_pause
        self._steps.paused_until = max(self._steps.paused_until, until)

    def _retire(self, worker: Worker) -> None:
        """Takes nothing new; goes when it is empty, or gives up the rest at the deadline."""
        worker.draining = True
        self._note(f"draining attention {worker.index}")
        if not worker.held:
            self._remove(worker)
        elif self._times.drain_deadline < math.inf:
            self._clock.at(self._clock.now + self._times.drain_deadline, self._give_up, worker)

    def _give_up(self, worker: Worker) -> None:
        if worker.gone:
            return
        worker.leaving = True
        idle = [member for member in worker.members if member.group.idle]
        # The others are in a step whose tokens count; they are cleared at its end.
        self._admission.give_up(worker, idle)
        waiting = [m for m in worker.members if m not in idle and m not in m.group.stepping]
        self._admission.give_up(worker, waiting)
        self._admission.place()

    def _clear(self, member: Member) -> None:
        """The last step of a lane of a leaving worker has ended."""
        self._admission.give_up(member.worker, [member])
        self._admission.place()

    def _remove(self, worker: Worker) -> None:
        if not worker.gone:
            self._note(f"-1 attention (worker {worker.index})")
            self._steps.remove(worker)

    # -- losses -----------------------------------------------------------------------------------

    def _fail(self, failure: Failure) -> None:
        if failure.role == "ffn":
            self._lose_ffn(failure)
            return
        alive = [w for w in self._steps.workers if w.lost == math.inf]
        if failure.worker is not None:
            alive = [w for w in alive if w.index == failure.worker]
        worker = max(alive, key=lambda w: (w.held, -w.index), default=None)
        if worker is None:
            self._note("no attention worker to lose")
            return
        self._note(f"lost attention {worker.index}")
        worker.lost = self._clock.now
        worker.noticed = self._clock.now + failure.detect
        self._steps.lost.append(worker)
        self._clock.at(worker.noticed, self._notice, worker)

    def _notice(self, worker: Worker) -> None:
        """Its requests start again elsewhere from prompt and emitted tokens."""
        self._steps.lost.remove(worker)
        if worker.gone:
            return
        self._note(f"noticed that attention {worker.index} is lost")
        worker.draining = True
        self._steps.remove(worker)
        self._admission.give_up(worker, worker.members)
        self._admission.place()

    def _lose_ffn(self, failure: Failure) -> None:
        if not self._steps.ffn.count:
            self._note("no ffn worker to lose")
            return
        self._note(f"lost ffn, {self._steps.ffn.count - 1} left")
        self._steps.ffn.fail()
        if self._ffn_target == self._steps.ffn.count:
            # Without a change under way this is what there is now; asking for the old number
            # again brings a new one.
            self._ffn_target -= 1
        blocked = self._clock.now + failure.detect + failure.recover
        self._steps.ffn.set_count(self._steps.ffn.count - 1, blocked)

    def _note(self, text: str) -> None:
        self.done.append((self._clock.now, text))


class _Preparation:
    """Attention workers that are being started together."""

    def __init__(self, count: int):
        self.count = count


class _Control:
    """Asks a policy at intervals, and hands on what it says."""

    def __init__(
        self,
        policy: Policy,
        interval: float,
        clock: Clock,
        steps: Steps,
        admission: Admission,
        meter: Meter,
        changes: Changes,
    ):
        self._policy = policy
        self._interval = interval
        self._clock = clock
        self._steps = steps
        self._admission = admission
        self._meter = meter
        self._changes = changes
        self._since = 0.0
        self._work = (0.0, 0.0, 0.0, 0.0)
        self._batches = (0, 0, 0)
        self._patience = PATIENCE
        clock.at(interval, self._ask)

    def _ask(self, _: None) -> None:
        # With nothing else due only the policy can set things going again.
        self._patience = self._patience - 1 if self._clock.idle else PATIENCE
        target = self._policy.decide(self._snapshot())
        if target is not None:
            self._changes.set_target(target)
        if self._patience or not self._clock.idle:
            self._clock.at(self._clock.now + self._interval, self._ask)

    def _snapshot(self) -> Snapshot:
        now, steps, changes = self._clock.now, self._steps, self._changes
        window = now - self._since
        tally = self._meter.fresh_window()
        work = steps.work()
        attention_busy, attention_there, ffn_busy, ffn_there = (
            new - old for new, old in zip(work, self._work, strict=True)
        )
        totals = (steps.batches, steps.batch_requests, steps.batch_tokens)
        batches, requests, tokens = (
            new - old for new, old in zip(totals, self._batches, strict=True)
        )
        self._since, self._work, self._batches = now, work, totals
        return Snapshot(
            now=now,
            window=window,
            attention=changes.attention,
            ffn=steps.ffn.count,
            attention_preparing=changes.attention_preparing,
            attention_draining=len(steps.workers) - changes.attention,
            ffn_preparing=changes.ffn_preparing,
            running=sum(worker.held for worker in steps.workers),
            waiting=self._admission.waiting,
            arrival_rate=tally.arrived / window,
            rejected=tally.rejected,
            tokens_rate=tally.tokens / window,
            completed=tally.completed,
            ttft=tally.ttft.percentiles(),
            tpot=tally.tpot.percentiles(),
            itl=tally.itl.percentiles(),
            attention_busy=mean(attention_busy, attention_there),
            ffn_busy=mean(ffn_busy, ffn_there),
            batch=mean(requests, batches),
            kv_tokens=mean(tokens, batches),
            theta=tally.sums.theta,
            nu2=tally.sums.nu2,
            prompt_mean=mean(tally.sums.prompt, tally.sums.count),
            output_mean=mean(tally.sums.output, tally.sums.count),
        )
