"""Membership: who serves, what is changing, and what to do next. Pure: no Ray, no clock, no I/O.

``Membership`` takes orders (scale, retire, flip, rebalance) and news (an action is done or failed,
an actor was lost, time has passed) and hands out actions for the manager to carry out. A change is
a transaction: *prepare* starts actors, loads experts and connects peers, and can be rolled back;
*commit* publishes the expert table and only goes forward; *release* drops what the old table needed
and retires actors. One change at a time prepares or commits; draining overlaps with later changes.

Not here: how an action is carried out (``manager``) and which expert goes where (``placement``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from actors.table import ExpertTable
from cluster import placement
from cluster.change import (
    ROLES,
    Action,
    ActionKind,
    Change,
    Drain,
    Member,
    MemberState,
    Order,
    Refused,
    Shard,
    Times,
    UnknownActor,
    Verb,
)
from cluster.placement import Loads, PlacementError, Rules
from cluster.status import ChangeReport, Phase, Role

MAX_RETRIES = 2
"""How often an order is tried again after somebody else's loss broke it."""

BACKOFF_S = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Pauses before a repair or replacement that failed is tried again; the last one repeats."""

REPAIRS: tuple[Verb, ...] = ("repair", "replace")
"""What the deployment does of itself, over and over until it is whole."""

MAX_DOUBLINGS = 3
"""How often the time that a repair has to prepare is doubled after failures in a row."""

PUBLISH_AGAIN_S = 0.25
"""Pause before an attention actor that refused a table is asked once more."""

HISTORY = 1000


class Membership:
    """The state machine. Every method takes ``now``, seconds of a monotonic clock.

    Args:
        layers: MoE layers of the model. num_experts: experts per layer.
        targets: actors wanted per role. limits: (fewest, most) per role.
        rules: see ``placement``. times: deadlines.
        replace_lost: start actors in place of lost ones.
        wall: what to add to ``now`` for Unix time, for reports.
        on_change: called whenever members, table or a change's phase change.
    """

    def __init__(
        self,
        layers: Sequence[int],
        num_experts: int,
        *,
        targets: Mapping[Role, int],
        limits: Mapping[Role, tuple[int, int]],
        rules: Rules | None = None,
        times: Times | None = None,
        replace_lost: bool = True,
        wall: float = 0.0,
        on_change: Callable[[], None] | None = None,
    ):
        self.layers = tuple(layers)
        self.num_experts = num_experts
        self.targets = dict(targets)
        self.limits = dict(limits)
        self.rules = rules or Rules()
        self.times = times or Times()
        self.replace_lost = replace_lost
        self.loads: Loads | None = None
        self.members: dict[str, Member] = {}
        self.table: ExpertTable | None = None
        self.epoch = 0  # the highest ever used, rolled back ones included
        self.change: Change | None = None
        self.history: deque[Change] = deque(maxlen=HISTORY)
        self.past: list[ChangeReport] = []  # of the managers before this one
        self.connected: set[tuple[str, str]] = set()
        self.adopted: dict[str, int] = {}  # attention actor -> epoch in use
        self._wall = wall
        self._on_change = on_change or (lambda: None)
        self._queue: deque[Change] = deque()
        self._releasing: list[Change] = []  # draining and stopping, out of the way of others
        self._drains: dict[int, Drain] = {}  # by the number of the action
        self._stops: dict[int, Change | None] = {}
        self._outbox: list[Action] = []
        self._actions = 0
        self.changes = 0
        self.serial: dict[Role, int] = {"attention": 0, "ffn": 0}
        self._troubles = 0  # repairs and replacements that failed in a row
        self._not_before = 0.0
        self._losses: list[str] = []  # since everything was last as wanted
        self._released = 0  # the epoch below which nobody has anything any more

    # -- orders ----------------------------------------------------------------------------------

    def start(self, now: float) -> Change:
        """Bring up the first actors, as many as the targets say."""
        return self._enqueue(Order("start", _counts(self.targets)), now)

    def scale(self, wanted: Mapping[Role, int], now: float) -> Change:
        """Have this many actors of the roles given.

        Raises:
            Refused: outside the spec's min..max, or more FFN actors than can hold an expert each.
        """
        goal = self._goal()
        targets = {**goal, **wanted}
        for role in ROLES:
            self._check_limits(role, targets[role])
        if targets == goal:
            if pending := self._pending():
                return pending  # asked for already
            if not self._surplus(targets) and not self._missing(targets):
                return self._noop("scale", f"{_counts(goal)} already", now)
        self._check_spread(targets["ffn"])
        text = f"{_counts(goal)} to {_counts(targets)}"
        return self._enqueue(Order("scale", text, sets=dict(wanted)), now)

    def retire(self, name: str, now: float, *, replace: bool = False) -> Change:
        """Let an actor go: one fewer of its role, or a new one in its place with ``replace``.

        Raises:
            UnknownActor: there never was one. Refused: fewer than the spec's min would be left.
        """
        member = self._known(name)
        if pending := self._pending(name):
            return pending
        if member.state in ("draining", "retired", "failed"):
            return self._noop("retire", f"{name} is {member.state} already", now)
        adds: dict[Role, int] = {}
        if not replace:
            adds[member.role] = -1
            self._check_limits(member.role, self._goal()[member.role] - 1)
        text = f"{name}, with a replacement" if replace else name
        return self._enqueue(Order("retire", text, adds=adds, retire=(name,)), now)

    def evacuate(self, names: Sequence[str], now: float) -> Change:
        """Have others take the place of some actors, all at once.

        Raises:
            UnknownActor: there never was one of them.
        """
        for name in names:
            self._known(name)
        text = f"{', '.join(names)}, whose node is leaving"
        return self._enqueue(Order("retire", text, retire=tuple(names)), now)

    def flip(self, name: str, to: Role, now: float, *, room: bool = True) -> Change:
        """Turn one actor of a role into one of the other; their sum stays.

        Args:
            room: the cluster can hold the new actor while the old one is still there. Without
                room the old one leaves first.

        Raises:
            UnknownActor, Refused: as ``retire``; also when the actor is gone for another reason.
        """
        member = self._known(name)
        if member.role == to or member.flipped_to == to:
            done = "is" if member.role == to else "was turned into"
            return self._noop("flip", f"{name} {done} {_a(to)} already", now)
        if pending := self._pending(name):
            return pending
        if member.state != "ready":
            raise Refused(f"{name} is {member.state}; only an actor that is ready can be flipped")
        goal = self._goal()
        self._check_limits(member.role, goal[member.role] - 1)
        self._check_limits(to, goal[to] + 1)
        if to == "ffn":
            self._check_spread(goal["ffn"] + 1)
        order = Order(
            "flip",
            f"{name} to {to}",
            adds={member.role: -1, to: 1},
            retire=(name,),
            flip_to=to,
            room=room,
        )
        return self._enqueue(order, now)

    def rebalance(self, now: float) -> Change:
        """Place the experts anew by measured load."""
        return self._enqueue(Order("rebalance", "by measured load"), now)

    def change_by_number(self, number: int) -> Change | None:
        """A change that is queued, under way or remembered."""
        return next((change for change in self._all_changes() if change.number == number), None)

    def reports(self, limit: int = 50) -> list[ChangeReport]:
        """The last changes by number, newest last."""
        changes = sorted(self._all_changes(), key=lambda change: change.number)
        return [*self.past, *(self.report(change) for change in changes)][-limit:]

    def report(self, change: Change) -> ChangeReport:
        """A change as plain data."""
        return ChangeReport(
            number=change.number,
            verb=change.order.verb,
            text=change.order.text,
            phase=change.phase,
            started_at=(change.began_at or change.ordered_at) + self._wall,
            seconds=dict(change.seconds),
            epoch=change.epoch,
            started=tuple(change.starting),
            retired=change.retired or change.retiring,
            moved_experts=change.moved,
            error=change.error,
        )

    # -- news ------------------------------------------------------------------------------------

    def done(self, number: int, now: float) -> None:
        """An action was carried out."""
        self._finish(number, now, None)

    def failed(self, number: int, error: str, now: float) -> None:
        """An action could not be carried out, and its actor may still live."""
        self._finish(number, now, error)

    def lost(self, name: str, why: str, now: float) -> None:
        """An actor is dead, silent or not to be trusted any more. Twice is once."""
        member = self.members.get(name)
        if member is None or member.state in ("failed", "retired"):
            return
        was = member.state
        member.state, member.why = "failed", why
        self._losses.append(name)
        self._cut_off(member)
        self._stop(member, None, fence=True)
        for number, drain in list(self._drains.items()):
            if drain.name == name:
                self._end_drain(number, now)
        change = self.change
        if change is not None:
            for number, action in list(change.waiting.items()):
                if name in (action.actor, action.peer):
                    del change.waiting[number]
            change.again = [a for a in change.again if a[1] != name and member.role != "ffn"]
            if change.phase == "prepare" and (name in change.starting or member.role == "ffn"):
                self._roll_back(change, f"{name} was lost: {why}", now, again=was != "starting")
            else:
                self._go_on(change, now)
        self._plan(now)
        self._on_change()

    def tick(self, now: float) -> None:
        """Time has passed: enforce deadlines, start what was put off."""
        change = self.change
        if change is not None and change.deadline <= now:
            if change.phase == "prepare":
                late = ", ".join(action.label for action in change.waiting.values())
                limit = self._prepare_s(change)
                self._roll_back(change, f"not prepared within {limit:g} s: {late}", now)
            elif change.stage == "publish":
                late_ones = [a.actor for a in change.waiting.values()]
                late_ones += [name for _, name in change.again]
                text = f"did not adopt the new epoch within {self.times.commit_s:g} s"
                for name in late_ones:
                    self.lost(name, text, now)
            else:
                change.waiting.clear()  # an FFN actor that keeps more than it must does no harm
                self._go_on(change, now)
        change = self.change
        if change is not None and change.again:
            due = [name for at, name in change.again if at <= now]
            change.again = [(at, name) for at, name in change.again if at > now]
            for name in due:
                if self.members[name].live:  # it may have ended its drain meanwhile
                    self._publish(change, name)
        for number, drain in list(self._drains.items()):
            if drain.deadline <= now:
                self._end_drain(number, now)
        self._plan(now)

    def next_deadline(self) -> float | None:
        """When ``tick`` has something to do, if nothing else happens."""
        times = [drain.deadline for drain in self._drains.values()]
        if self.change is not None:
            times += [self.change.deadline, *(at for at, _ in self.change.again)]
        elif self._not_before:
            times.append(self._not_before)
        return min(times, default=None)

    def actions(self) -> list[Action]:
        """What has to be done now; each action is handed out once."""
        out, self._outbox = self._outbox, []
        return out

    def restore(
        self,
        members: Mapping[str, Role],
        table: ExpertTable | None,
        *,
        draining: Sequence[str] = (),
        connected: set[tuple[str, str]] = frozenset(),  # type: ignore[assignment]
        adopted: Mapping[str, int] | None = None,
        serial: Mapping[Role, int] | None = None,
        epoch: int = 0,
        past: Sequence[ChangeReport] = (),
        now: float = 0.0,
    ) -> None:
        """Take over actors that a manager before this one has left.

        Args:
            members: live actors; FFN actors that the table doesn't name are left-overs of a change
                that never committed, and are stopped.
            table: the newest table that an attention actor has adopted.
            serial, epoch: the highest numbers known to have been used.
            past: reports of earlier changes, oldest first; what had not ended then has now.
        """
        self.table = table
        self.epoch = max(epoch, table.epoch if table else 0)
        self.past = [_closed(report, self.table) for report in past]
        self.changes = max((report.number for report in past), default=0)
        for name, role in members.items():
            state: MemberState = "draining" if name in draining else "ready"
            self.members[name] = Member(name, role, state)
            self.serial[role] = max(self.serial[role], _number(name) + 1)
        for role, number in (serial or {}).items():
            self.serial[role] = max(self.serial[role], number)
        named = set(table.actors) if table else set()
        for name in named - set(members):
            self.members[name] = Member(name, "ffn", "failed", "was gone when the manager returned")
        self.connected = {pair for pair in connected if set(pair) <= set(members)}
        self.adopted = dict(adopted or {})
        for member in list(self.members.values()):
            unused = member.role == "ffn" and member.live and member.name not in named
            idle = member.role == "attention" and self.adopted.get(member.name, 0) == 0
            if unused or idle:
                member.state, member.why = "retired", "left over from a change that never committed"
                self._cut_off(member)
                self._stop(member, None, fence=True)
            elif member.state == "draining":
                self._start_drain(member, None, now)
        self._plan(now)

    # -- facts -----------------------------------------------------------------------------------

    def live(self, role: Role) -> list[Member]:
        """Actors that serve, draining ones included."""
        return [m for m in self.members.values() if m.role == role and m.live]

    def ready(self, role: Role) -> list[Member]:
        """Actors that take new work."""
        return [m for m in self.members.values() if m.role == role and m.state == "ready"]

    @property
    def orphans(self) -> int:
        """Experts (over all layers) without a live holder."""
        if self.table is None:
            return len(self.layers) * self.num_experts
        alive = {member.name for member in self.live("ffn")}
        return sum(
            not alive.intersection(holders)
            for experts in self.table.holders.values()
            for holders in experts
        )

    @property
    def gone(self) -> tuple[str, ...]:
        """Actors that were lost and for which the deployment has not made up yet."""
        return tuple(self._losses)

    def rebalanced(self) -> ExpertTable | None:
        """The table that a rebalance would make now; nothing changes."""
        return self._placed(self.table, [m.name for m in self.ready("ffn")]) if self.table else None

    def missing(self) -> dict[Role, int]:
        """How many ready actors of each role there are fewer than wanted."""
        return self._missing(self.targets)

    @property
    def settled(self) -> bool:
        """Nothing is changing, and the numbers are as wanted."""
        busy = self.change is not None or self._queue or self._drains or self._releasing
        wrong = self._broken() or self._behind() or self._missing(self.targets)
        return not busy and not wrong

    # -- planning --------------------------------------------------------------------------------

    def _plan(self, now: float) -> None:
        """Begin the next change if none is under way: repairs first, then orders."""
        while self.change is None:
            order = self._urgent(now)
            if order is not None:
                self.changes += 1
                change = Change(self.changes, order, now)
            elif self._queue:
                change = self._queue.popleft()
            else:
                return
            self._begin(change, now)

    def _urgent(self, now: float) -> Order | None:
        if self.table is None:  # nothing was ever started
            return None
        broken, behind, missing = self._broken(), self._behind(), self._missing(self.targets)
        for change in self._releasing:  # the room that it makes is for its own second half
            if change.leaves_first and change.order.flip_to in missing:
                missing[change.order.flip_to] -= 1
        missing = {role: count for role, count in missing.items() if count > 0}
        if not broken and not behind and not missing:
            self._troubles, self._not_before = 0, 0.0
            self._losses.clear()
            return None
        if now < self._not_before:
            return None
        if broken and self.ready("ffn") and self._can_repair():
            return Order("repair", f"without {', '.join(broken)}")
        if behind and not broken:
            return Order("repair", f"bring {', '.join(behind)} to epoch {self.epoch}")
        if (self._queue and not broken) or not self.replace_lost or not missing:
            return None
        return Order("replace", _counts(missing))

    def _can_repair(self) -> bool:
        try:
            self._repaired()
        except PlacementError:
            return False  # the survivors have no room: replacements first
        return True

    def _repaired(self) -> ExpertTable:
        assert self.table is not None
        names = [member.name for member in self.ready("ffn")]
        return placement.repair(self.table, self._broken(), names, self.rules, self.loads)

    def _begin(self, change: Change, now: float) -> None:
        order = change.order
        if not change.second_half:
            change.previous_targets = dict(self.targets)
            self.targets = order.applied(self.targets)
        if change.began_at is None:
            change.began_at = now
        change.phase_began, change.phase = now, "prepare"
        change.deadline = now + self._prepare_s(change)
        self.change = change
        try:
            self._check_again(change)
            change.retiring = self._victims(order)
            if order.verb != "repair" and not change.leaves_first:
                for role, count in self._missing(self.targets, change.retiring).items():
                    for _ in range(count):
                        change.starting[self._new_name(role)] = role
            change.table = self._new_table(change)
        except (PlacementError, Refused) as error:
            change.starting, change.retiring = {}, ()
            self._roll_back(change, error.message, now)
            return
        if not (change.starting or change.retiring or change.table or self._behind()):
            self._end(change, "noop", now)
            return
        for name, role in change.starting.items():
            self.members[name] = Member(name, role, "starting")
        self._prepare(change)
        self._on_change()
        self._go_on(change, now)

    def _check_again(self, change: Change) -> None:
        """What was possible when it was ordered may not be any more, once it has its turn."""
        order = change.order
        if change.second_half or order.verb not in ("scale", "retire", "flip"):
            return
        for role in ROLES:
            self._check_limits(role, self.targets[role])
        for name in order.retire:
            member = self.members[name]
            if member.state != "ready":
                raise Refused(f"{name} is {member.state} by now; nothing was changed")

    def _victims(self, order: Order) -> tuple[str, ...]:
        """Who leaves: those that were named, then the newest of what is too many."""
        named = [n for n in order.retire if n in self.members and self.members[n].state == "ready"]
        if order.verb in REPAIRS:
            return ()
        # A drain that is over leaves its actor retired, so only ready ones are counted here.
        for role, surplus in self._surplus(self.targets, named).items():
            ready = sorted(
                (m.name for m in self.ready(role) if m.name not in named), key=_number, reverse=True
            )
            named += ready[:surplus]
        return tuple(named)

    def _new_table(self, change: Change) -> ExpertTable | None:
        actors = [m.name for m in self.ready("ffn") if m.name not in change.retiring]
        actors += [name for name, role in change.starting.items() if role == "ffn"]
        if change.order.verb == "repair":
            if not self._broken():
                return None
            table = self._repaired()
        elif self.table is not None and set(actors) == set(self.table.actors):
            if change.order.verb != "rebalance":
                return None
            table = self._placed(self.table, actors)
        else:
            table = self._placed(self.table, actors)
        if self.table is not None and dict(table.holders) == dict(self.table.holders):
            return None
        self.epoch += 1
        table = ExpertTable(self.epoch, table.holders)
        change.moved = placement.moves(self.table, table)
        return table

    def _placed(self, current: ExpertTable | None, actors: Sequence[str]) -> ExpertTable:
        return placement.place(
            current,
            self.layers,
            self.num_experts,
            actors,
            self.rules,
            self.loads,
            epoch=self.epoch + 1,
        )

    # -- phases ----------------------------------------------------------------------------------

    def _prepare(self, change: Change) -> None:
        change.stage = "start"
        table = change.table
        for name, role in change.starting.items():
            experts = table.shard(name) if role == "ffn" and table is not None else {}
            epoch = table.epoch if table is not None else self.epoch
            sources = self._sources(experts)
            self._do(change, "start", name, role, experts=experts, epoch=epoch, sources=sources)
        if table is not None and self.table is not None:
            for name, experts in placement.additions(self.table, table).items():
                if name not in change.starting and experts:
                    sources = self._sources(experts)
                    self._do(change, "grow", name, "ffn", experts=experts, sources=sources)

    def _sources(self, experts: Shard) -> dict[str, Shard]:
        """Who has experts in memory: one live holder of each."""
        if self.table is None:
            return {}
        alive = {member.name for member in self.live("ffn")}
        found: dict[str, dict[int, list[int]]] = {}
        for layer, ids in experts.items():
            for expert in ids:
                holders = self.table.holders[layer][expert]
                holder = next((name for name in holders if name in alive), None)
                if holder is not None:
                    found.setdefault(holder, {}).setdefault(layer, []).append(expert)
        return dict(found)

    def _go_on(self, change: Change, now: float) -> None:
        """Move a change on to its next stage once nothing of this one is awaited."""
        while not change.waiting and not change.again and change is self.change:
            if change.stage == "start":
                change.stage = "connect"
                self._connect(change)
            elif change.stage == "connect":
                self._commit(change, now)
            elif change.stage == "publish":
                self._release(change, now)
            elif change.stage == "keep":
                self._let_go(change, now)
            else:
                return

    def _connect(self, change: Change) -> None:
        table = change.table or self.table
        assert table is not None
        attention = [m.name for m in self.live("attention")]
        attention += [name for name, role in change.starting.items() if role == "attention"]
        for ffn in table.actors:
            member = self.members.get(ffn)
            if member is None or member.state in ("failed", "retired"):
                continue  # lost just now: the repair that follows makes a table without it
            for name in attention:
                if (name, ffn) not in self.connected:
                    self._do(change, "connect", name, "attention", peer=ffn)

    def _commit(self, change: Change, now: float) -> None:
        """The point of no return: from here on the new table is the table."""
        self._phase(change, "commit", now)
        change.stage, change.deadline = "publish", now + self.times.commit_s
        if change.table is not None:
            self.table = change.table
            change.epoch = change.table.epoch
        for name, role in change.starting.items():
            if role == "ffn":
                self.members[name].state = "ready"
            else:
                self._publish(change, name)
        for name in self._behind():
            self._publish(change, name)

    def _publish(self, change: Change, name: str) -> None:
        assert self.table is not None
        table = self.table
        self._do(change, "publish", name, "attention", table=table, epoch=table.epoch)

    def _release(self, change: Change, now: float) -> None:
        self._phase(change, "release", now)
        change.stage, change.deadline = "keep", now + self.times.commit_s
        table = self.table
        assert table is not None
        if self._released == table.epoch or self._behind() or self._broken():
            return  # somebody may still use the old table: the repair that follows releases it
        self._released = table.epoch
        for member in self.ready("ffn"):
            if member.name not in change.retiring:
                shard = table.shard(member.name)
                self._do(change, "keep", member.name, "ffn", experts=shard, epoch=table.epoch)

    def _let_go(self, change: Change, now: float) -> None:
        """Retire actors; this goes on beside later changes."""
        change.stage = "drain"
        self._releasing.append(change)
        self.change = None
        for name in change.retiring:
            member = self.members[name]
            if member.state != "ready":
                continue
            member.flipped_to = change.order.flip_to
            if member.role == "ffn":
                self._retire_now(member, change)
            else:
                member.state = "draining"
                self._start_drain(member, change, now)
        self._settle(change, now)
        self._on_change()
        self._plan(now)

    def _start_drain(self, member: Member, change: Change | None, now: float) -> None:
        action = self._action("drain", member.name, member.role)
        self._drains[action.number] = Drain(member.name, change, now + self.times.drain_s)
        self._outbox.append(action)

    def _end_drain(self, number: int, now: float) -> None:
        drain = self._drains.pop(number)
        member = self.members[drain.name]
        if member.state == "draining":
            self._retire_now(member, drain.change)
        self._settle(drain.change, now)
        self._on_change()

    def _retire_now(self, member: Member, change: Change | None) -> None:
        # Stopped before it is cut off: past its drain's deadline it still steps, and a step whose
        # peer it was just told to forget would look like the loss of that peer.
        member.state = "retired"
        self._stop(member, change)
        self._cut_off(member)

    def _settle(self, change: Change | None, now: float) -> None:
        """End a releasing change when its drains and stops are over."""
        if change is None or change not in self._releasing:
            return
        drains = any(drain.change is change for drain in self._drains.values())
        if drains or any(owner is change for owner in self._stops.values()):
            return
        self._releasing.remove(change)
        change.retired += change.retiring
        if change.leaves_first:
            change.second_half = True
            self._queue.appendleft(change)
            self._plan(now)
        else:
            self._end(change, "done", now)

    def _roll_back(self, change: Change, error: str, now: float, *, again: bool = False) -> None:
        """Undo a prepare; ``again`` tries the order once more after the repair."""
        change.waiting.clear()
        for name in change.starting:
            member = self.members[name]
            if member.state == "starting":
                member.state, member.why = "retired", "its change was rolled back"
                self._cut_off(member)
                self._stop(member, None, fence=True)
        # Too much until the next change does no harm; an actor with an older table may need it.
        if change.table is not None and self.table is not None and not self._behind():
            for name in placement.additions(self.table, change.table):
                if name in self.members and self.members[name].live:
                    self._outbox.append(
                        self._action(
                            "keep",
                            name,
                            "ffn",
                            experts=self.table.shard(name),
                            epoch=self.table.epoch,
                        )
                    )
        self.targets = dict(change.previous_targets)
        order = change.order
        if order.verb in REPAIRS:
            self._troubles += 1
            pause = BACKOFF_S[min(self._troubles, len(BACKOFF_S) - 1)]
            self._not_before = now + (0.0 if again else pause)
        if again and order.retries < MAX_RETRIES and order.verb not in REPAIRS:
            order.retries += 1
            self.change = None
            change.phase, change.starting, change.table = "queued", {}, None
            change.retiring, change.stage = (), ""
            self._queue.appendleft(change)
            self._on_change()
            return
        change.error = error
        self._end(change, "rolled_back", now)

    def _end(self, change: Change, phase: Phase, now: float) -> None:
        if phase != "noop":
            self._phase(change, phase, now)
        change.phase = phase
        change.seconds["total"] = now - change.ordered_at
        change.table = None  # a large model's takes megabytes, and the history is long
        self.history.append(change)
        if self.change is change:
            self.change = None
        self._prune()
        self._on_change()

    def _prune(self) -> None:
        """Forget the oldest of those that are gone, so that years of changes fit into memory."""
        named = set(self.table.actors) if self.table else set()
        over = [m.name for m in self.members.values() if m.state in ("failed", "retired")]
        for name in over[:-HISTORY]:
            if name not in named:
                del self.members[name]

    def _phase(self, change: Change, phase: Phase, now: float) -> None:
        before = change.seconds.get(change.phase, 0.0)
        change.seconds[change.phase] = before + now - change.phase_began
        change.phase, change.phase_began = phase, now
        self._on_change()

    def _finish(self, number: int, now: float, error: str | None) -> None:
        if number in self._drains:
            self._end_drain(number, now)
            self._plan(now)
            return
        if number in self._stops:
            change = self._stops.pop(number)
            if change is not None:
                self._settle(change, now)
            self._plan(now)
            return
        change = self.change
        if change is None or number not in change.waiting:
            return  # of a change that is over, or of an actor that was lost
        action = change.waiting.pop(number)
        if error is None:
            self._take_in(action)
        elif change.phase == "prepare":
            self._roll_back(change, f"{action.label}: {error}", now)
            self._plan(now)
            return
        elif action.kind == "publish" and action.actor in change.starting:
            self.lost(action.actor, f"could not adopt the expert table: {error}", now)
            return
        elif (
            action.kind == "publish" and self.members[action.actor].live and not self._broken()
        ):  # It may have seen a loss that is not known here yet; then the loss comes next.
            change.again.append((now + PUBLISH_AGAIN_S, action.actor))
        self._go_on(change, now)
        self._plan(now)

    def _take_in(self, action: Action) -> None:
        if action.kind == "connect":
            self.connected.add((action.actor, action.peer))
        elif action.kind == "publish":
            self.adopted[action.actor] = action.epoch
            member = self.members[action.actor]
            if member.state == "starting":
                member.state = "ready"
            self._on_change()

    # -- small things ----------------------------------------------------------------------------

    def _enqueue(self, order: Order, now: float) -> Change:
        self.changes += 1
        change = Change(self.changes, order, now)
        self._queue.append(change)
        self._plan(now)
        self._on_change()
        return change

    def _noop(self, verb: Verb, text: str, now: float) -> Change:
        self.changes += 1
        change = Change(self.changes, Order(verb, text), now, phase="noop", seconds={"total": 0.0})
        self.history.append(change)
        return change

    def _do(self, change: Change, kind: ActionKind, actor: str, role: Role, **more: Any) -> None:
        action = self._action(kind, actor, role, **more)
        change.waiting[action.number] = action
        self._outbox.append(action)

    def _action(self, kind: ActionKind, actor: str, role: Role, **more: Any) -> Action:
        self._actions += 1
        return Action(self._actions, kind, actor, role, **more)

    def _stop(self, member: Member, change: Change | None, *, fence: bool = False) -> None:
        action = self._action("stop", member.name, member.role, fence=fence)
        self._stops[action.number] = change
        self._outbox.append(action)

    def _cut_off(self, member: Member) -> None:
        """Have the living forget a peer, and forget what it was connected to."""
        name = member.name
        for attention, ffn in sorted(self.connected):
            if name in (attention, ffn):
                self._outbox.append(self._action("disconnect", attention, "attention", peer=ffn))
        self.connected = {pair for pair in self.connected if name not in pair}
        self.adopted.pop(name, None)

    def _all_changes(self) -> Iterator[Change]:
        yield from self.history
        yield from self._releasing
        yield from self._queue
        if self.change is not None:
            yield self.change

    def _pending(self, name: str | None = None) -> Change | None:
        """The newest order that waits or is under way; with a name, the one that retires it."""
        orders = ([self.change] if self.change else []) + list(self._queue)
        if name is not None:
            orders = [*self._releasing, *orders]
            return next((c for c in orders if name in c.retiring or name in c.order.retire), None)
        orders = [c for c in orders if c.order.verb not in (*REPAIRS, "rebalance")]
        return orders[-1] if orders else None

    def _goal(self) -> dict[Role, int]:
        """The targets once every order that waits has had its turn."""
        goal = dict(self.targets)
        for change in self._queue:
            if not change.second_half:
                goal = change.order.applied(goal)
        return goal

    def _broken(self) -> list[str]:
        """Holders in the table that don't live any more."""
        if self.table is None:
            return []
        alive = {member.name for member in self.live("ffn")}
        return [name for name in self.table.actors if name not in alive]

    def _behind(self) -> list[str]:
        """Attention actors that serve with an older table."""
        if self.table is None:
            return []
        epoch = self.table.epoch
        return [m.name for m in self.live("attention") if self.adopted.get(m.name) != epoch]

    def _missing(self, targets: Mapping[Role, int], leaving: Sequence[str] = ()) -> dict[Role, int]:
        """How many actors of each role there are too few."""
        have = {role: sum(m.name not in leaving for m in self.ready(role)) for role in ROLES}
        return {role: targets[role] - have[role] for role in ROLES if targets[role] > have[role]}

    def _surplus(self, targets: Mapping[Role, int], leaving: Sequence[str] = ()) -> dict[Role, int]:
        """How many actors of each role there are too many."""
        have = {role: sum(m.name not in leaving for m in self.ready(role)) for role in ROLES}
        return {role: have[role] - targets[role] for role in ROLES if have[role] > targets[role]}

    def _new_name(self, role: Role) -> str:
        number = self.serial[role]
        self.serial[role] = number + 1
        return f"{role}-{number}"

    def _prepare_s(self, change: Change) -> float:
        if change.order.verb == "start":
            return self.times.start_s
        # where processes start slower than this allows, the next attempt must get further
        longer = 2 ** min(self._troubles, MAX_DOUBLINGS)
        return self.times.prepare_s * (longer if change.order.verb in REPAIRS else 1)

    def _known(self, name: str) -> Member:
        member = self.members.get(name)
        if member is None:
            live = ", ".join(m.name for m in self.members.values() if m.live) or "none"
            raise UnknownActor(f"there is no actor {name!r}; live actors: {live}")
        return member

    def _check_limits(self, role: Role, count: int) -> None:
        fewest, most = self.limits[role]
        if not fewest <= count <= most:
            bound = "min" if count < fewest else "max"
            raise Refused(
                f"{count} {role} actors: the spec allows {fewest} to {most}; change {role}.{bound} "
                "and start anew, or ask for fewer or more"
            )

    def _check_spread(self, ffn: int) -> None:
        copies = self.num_experts * self.rules.min_replicas + self.rules.redundant
        if ffn > copies:
            raise Refused(
                f"{ffn} FFN actors: the model has {self.num_experts} experts per layer, with "
                f"replicas {copies} copies, and an actor without any would be of no use"
            )


def _closed(report: ChangeReport, table: ExpertTable | None) -> ChangeReport:
    """The report of a change that the death of its manager has ended, one way or the other."""
    if report.ended:
        return report
    committed = report.phase == "release" or (
        report.epoch is not None and table is not None and report.epoch <= table.epoch
    )
    error = "" if committed else "the manager ended before it committed; ask again"
    phase: Phase = "done" if committed else "rolled_back"
    return report.model_copy(update={"phase": phase, "error": error})


def _counts(counts: Mapping[Role, int]) -> str:
    return " ".join(f"{role}={counts[role]}" for role in ROLES if role in counts)


def _a(role: Role) -> str:
    return "an attention actor" if role == "attention" else "an FFN actor"


def _number(name: str) -> int:
    return int(name.rpartition("-")[2])
