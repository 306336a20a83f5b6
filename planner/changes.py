"""Changes of the number of workers: planned ones, a policy's, and losses.

Carries them out on the steps and on the requests. What a policy sees is made here; what it decides
is its own business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from planner.admission import Admission
from planner.asking import Asking
from planner.clock import Clock
from planner.control import Policy, Target
from planner.errors import PlannerError
from planner.events import Failure, Scale
from planner.members import Member, Worker
from planner.records import Meter
from planner.staff import Staff
from planner.steps import Steps, fewest

if TYPE_CHECKING:
    from planner.simulator import Cluster


class Changes:
    """Adds, retires and loses workers.

    Args:
        cluster: what is simulated.
        clock: simulated time.
        steps: where the workers are.
        admission: gives requests to new workers, and those of old ones to others.
        meter: what a policy is told.

    Attributes:
        done: (time, what) of all that was carried out.
        staff: workers over time.
        changed: when the workers that serve last became others; what was measured before is about
            another system.
    """

    def __init__(
        self, cluster: Cluster, clock: Clock, steps: Steps, admission: Admission, meter: Meter
    ):
        self.done: list[tuple[float, str]] = []
        self.staff: list[Staff] = []
        self.changed = 0.0
        self._cluster = cluster
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
        self._count()

    def schedule(
        self,
        events: Sequence[Scale | Failure],
        policy: Policy | None,
        interval: float | None,
        window: float | None = None,
    ) -> None:
        """Asks the clock for what will happen."""
        for event in events:
            if isinstance(event, Scale):
                self._clock.at(event.at, self._scale, event)
            else:
                self._clock.at(event.at, self._fail, event)
        if policy is not None and interval is not None:
            parts = (self._cluster, self._clock, self._steps, self._admission, self._meter, self)
            Asking(policy, interval, window, *parts)

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
        self._count()

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
        self.changed = self._clock.now
        for _ in range(preparation.count):
            self.add_worker()

    def _commit_ffn(self, change: tuple[int, int]) -> None:
        number, count = change
        if number != self._ffn_change:
            return  # another target came meanwhile
        self._note(f"{self._steps.ffn.count} -> {count} ffn")
        self._steps.ffn.set_count(count, self._clock.now + self._times.commit_pause)
        self.changed = self._clock.now
        self._count()

    def _pause(self) -> None:
        until = self._clock.now + self._times.commit_pause
        self._steps.paused_until = max(self._steps.paused_until, until)

    def _retire(self, worker: Worker) -> None:
        """Takes nothing new; goes when it is empty, or gives up the rest at the deadline."""
        worker.draining = True
        self.changed = self._clock.now
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
            self._count()

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
        self.changed = self._clock.now
        self._count()
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
        self.changed = self._clock.now
        self._count()

    # -- records ----------------------------------------------------------------------------------

    def _count(self) -> None:
        """Takes note of who is there now."""
        attention, ffn = self.attention, self._steps.ffn.count
        entry = Staff(
            self._clock.now,
            attention,
            self.attention_preparing,
            len(self._steps.workers) - attention,
            ffn,
            max(0, self.ffn_preparing),
        )
        if self.staff and self.staff[-1].at == entry.at:
            self.staff.pop()
        if not self.staff or self.staff[-1][1:] != entry[1:]:
            self.staff.append(entry)

    def _note(self, text: str) -> None:
        self.done.append((self._clock.now, text))


class _Preparation:
    """Attention workers that are being started together."""

    def __init__(self, count: int):
        self.count = count
