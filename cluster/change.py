"""The parts of a membership change: orders, actions, the change itself. Plain data.

``membership`` moves them along; ``manager`` carries actions out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from actors.errors import AffluxError
from actors.table import ExpertTable
from cluster.status import Phase, Role

ROLES: tuple[Role, ...] = ("attention", "ffn")
MemberState = Literal["starting", "ready", "draining", "failed", "retired"]
ActionKind = Literal["start", "grow", "connect", "publish", "keep", "drain", "disconnect", "stop"]
Verb = Literal["start", "scale", "retire", "flip", "rebalance", "repair", "replace"]
Shard = Mapping[int, Sequence[int]]


class Refused(AffluxError):
    """An order that can't be carried out; the text says why and what would be possible."""

    code = "refused"


class UnknownActor(Refused):
    """An order about an actor that never was; lists those that are."""

    code = "unknown_actor"


@dataclass(frozen=True)
class Times:
    """Deadlines in seconds; see ``MembershipSpec``."""

    prepare_s: float = 300.0
    commit_s: float = 10.0
    drain_s: float = 10.0
    start_s: float = 600.0


@dataclass(frozen=True)
class Action:
    """Something for the manager to do; report ``done`` or ``failed`` with its number.

    Actions of one actor must be carried out in the order in which they were handed out.

    Args:
        kind: start (with ``experts`` for an FFN actor), grow (hold ``experts`` as well), keep
            (drop everything but ``experts``, refuse epochs below ``epoch``), connect and disconnect
            (attention actor ``actor`` and FFN actor ``peer``), publish ``table``, drain (done when
            it has no requests), stop (end the process and give its place back).
        actor: whom it is about.
        sources: live FFN actors that hold what is to be loaded, and what of it.
        fence: a stop of an actor that is not to be trusted to end by itself.
    """

    number: int
    kind: ActionKind
    actor: str
    role: Role
    peer: str = ""
    experts: Shard = field(default_factory=dict)
    sources: Mapping[str, Shard] = field(default_factory=dict)
    table: ExpertTable | None = None
    epoch: int = 0
    fence: bool = False

    @property
    def label(self) -> str:
        """For texts: ``start ffn-2``."""
        return f"{self.kind} {self.actor}" + (f" and {self.peer}" if self.peer else "")


@dataclass
class Member:
    """An actor as the membership sees it."""

    name: str
    role: Role
    state: MemberState
    why: str = ""
    flipped_to: Role | None = None

    @property
    def live(self) -> bool:
        """It serves, be it only its last requests."""
        return self.state in ("ready", "draining")


@dataclass
class Order:
    """What was asked: how the targets change, and which actors must go."""

    verb: Verb
    text: str
    sets: Mapping[Role, int] = field(default_factory=dict)  # targets, whatever they were
    adds: Mapping[Role, int] = field(default_factory=dict)  # to the targets at its turn
    retire: tuple[str, ...] = ()
    flip_to: Role | None = None
    room: bool = True
    retries: int = 0

    def applied(self, targets: Mapping[Role, int]) -> dict[Role, int]:
        """The targets after this order."""
        changed = {**targets, **self.sets}
        return {role: count + self.adds.get(role, 0) for role, count in changed.items()}


@dataclass
class Change:
    """One transaction; ``report`` is its public face."""

    number: int
    order: Order
    ordered_at: float
    began_at: float | None = None  # when its prepare began
    phase: Phase = "queued"
    starting: dict[str, Role] = field(default_factory=dict)
    retiring: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    table: ExpertTable | None = None  # the new one; None keeps the table as it is
    previous_targets: dict[Role, int] = field(default_factory=dict)
    stage: str = ""
    waiting: dict[int, Action] = field(default_factory=dict)
    again: list[tuple[float, str]] = field(default_factory=list)  # publish once more: when, to whom
    deadline: float = 0.0
    phase_began: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    moved: int = 0
    epoch: int | None = None
    error: str = ""
    second_half: bool = False

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.phase in ("done", "noop", "rolled_back")

    @property
    def leaves_first(self) -> bool:
        """The half of a flip that makes room: the old actor goes, nothing starts yet."""
        order = self.order
        return order.flip_to is not None and not order.room and not self.second_half


@dataclass(frozen=True)
class Drain:
    """An attention actor that may finish what it has, until the deadline."""

    name: str
    change: Change | None
    deadline: float
