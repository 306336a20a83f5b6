"""What a cluster says about itself: the models behind ``afflux status`` and start-up progress.

Plain data that crosses Ray and turns into JSON. Not for telemetry: numbers that change per step
are metrics.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["attention", "ffn"]
State = Literal[
    "pending",
    "placed",
    "importing",
    "starting",
    "warm",
    "loading",
    "connected",
    "ready",
    "draining",
    "retired",
    "failed",
    "stopped",
]
Phase = Literal["queued", "prepare", "commit", "release", "done", "noop", "rolled_back"]
Health = Literal["starting", "ready", "degraded", "failed", "stopped"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ActorEvent(_Model):
    """One step of one actor's life, for progress displays.

    ``actor`` is empty for an event of the whole cluster (e.g. "starting Ray"); ``seconds`` counts
    from the start of the cluster; ``number`` grows by one per event of a manager.
    """

    actor: str
    role: Role | None
    state: State
    detail: str = ""
    seconds: float = 0.0
    number: int = 0


class ActorStatus(_Model):
    """One attention or FFN actor as the manager last saw it."""

    name: str
    role: Role
    state: State
    node: str | None = None
    node_ip: str | None = None
    pid: int | None = None
    placement_group: str | None = None
    resources: dict[str, float] = Field(default_factory=dict)
    experts: dict[int, int] | None = None
    expert_total: int | None = None
    allocated_bytes: int | None = None
    peers: tuple[str, ...] = ()
    detail: str = ""


class ChangeReport(_Model):
    """One change of the membership: what was asked, how far it is, what it did.

    ``started_at`` is the Unix time at which its prepare began; ``seconds`` holds the duration of
    each phase that has ended, and ``total``. ``epoch`` is the expert table's after the commit. A
    ``noop`` asked for what is so already; a ``rolled_back`` change says why in ``error`` and left
    the old table serving.
    """

    number: int
    verb: Literal["start", "scale", "retire", "flip", "rebalance", "repair", "replace"]
    text: str
    phase: Phase
    started_at: float
    seconds: dict[str, float] = Field(default_factory=dict)
    epoch: int | None = None
    started: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    moved_experts: int = 0
    error: str = ""

    @property
    def ended(self) -> bool:
        """Nothing more will happen to it."""
        return self.phase in ("done", "noop", "rolled_back")


class LinkStatus(_Model):
    """The way between an attention and an FFN actor: ``tier`` by their nodes' labels, and what it
    does; ``measured``: by a probe, not only believed. ``wire_s``: what frames spend on it lately,
    there and back, whatever else happens on the nodes; None while there are few."""

    attention: str
    ffn: str
    tier: str
    latency_s: float
    bytes_per_s: float
    measured: bool
    wire_s: float | None = None


class SlowActor(_Model):
    """An actor that frames take long to reach: ``ratio`` times as long as the fastest of its role.

    ``advice`` is what to do about it, ``command`` the command line that does it, if there is one.
    """

    actor: str
    role: Role
    ratio: float
    advice: str
    command: str | None = None


class TopologyStatus(_Model):
    """How far apart actors are, and what it costs by the figures of ``cluster.topology``.

    ``nodes``: actor -> address. ``exchange_s``: a layer's dispatch and combine of ``nbytes`` per
    attention actor, the slowest's; ``best_s``, ``worst_s``: that of the best and worst placement
    of as many actors (None: no room for them; worst also where not all ways were looked at).
    ``slow``: actors that frames take long to reach.
    """

    nodes: dict[str, str] = Field(default_factory=dict)
    links: tuple[LinkStatus, ...] = ()
    nbytes: float = 0.0
    exchange_s: float = 0.0
    best_s: float | None = None
    worst_s: float | None = None
    slow: tuple[SlowActor, ...] = ()


class ClusterStatus(_Model):
    """The whole cluster; ``health`` is "degraded" when some but not all actors answer.

    ``targets`` says how many actors of each role are wanted (empty when unknown); ``change`` is the
    change under way. ``warm`` of ``warm_target`` processes without a role are ready. ``emulated``:
    the times are those of emulated devices. ``metrics_url``: where the manager serves its metrics
    and the list of everybody's (``/metrics``, ``/sd``); None without metrics.
    """

    name: str
    url: str | None
    health: Health
    epoch: int | None
    lanes: int | str
    model: str
    actors: tuple[ActorStatus, ...] = ()
    targets: dict[str, int] = Field(default_factory=dict)
    change: ChangeReport | None = None
    warm: int = 0
    warm_target: int = 0
    emulated: bool = False
    manager_pid: int | None = None
    metrics_url: str | None = None
    detail: str = ""


class ClusterHandle(_Model):
    """What ``up`` hands back: where to send requests and how to find the cluster again."""

    name: str
    url: str
    address: str
    started_ray: bool
    already_running: bool = False


class DownReport(_Model):
    """What ``down`` found and stopped. ``left`` must be empty: pids that outlived the deadline."""

    name: str
    found: bool
    actors: tuple[str, ...] = ()
    stopped_ray: bool = False
    processes: int = 0
    left: tuple[int, ...] = ()
