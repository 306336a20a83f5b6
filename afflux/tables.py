"""Tables that the commands print."""

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from actors.checkpoint import Checkpoint
from cluster.spec import ROLES, ClusterSpec
from cluster.status import ActorStatus, ChangeReport, ClusterStatus, TopologyStatus

COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "degraded": "yellow",
    "failed": "red",
    "stopped": "red",
    "done": "green",
    "noop": "dim",
    "retired": "dim",
    "rolled_back": "red",
}
_PHASES = ("prepare", "commit", "release")
_ONE_LINE: dict[str, Any] = {"no_wrap": True, "overflow": "ignore"}


def print_status(console: Console, status: ClusterStatus) -> None:
    """The head lines and one row per actor."""
    console.print(status_view(status), crop=False)


def status_view(status: ClusterStatus) -> Group:
    """What ``print_status`` prints, to be drawn anywhere."""
    lines = [_head(status), _pools(status)]
    if status.change is not None and not status.change.ended:
        lines.append(Text(f"under way: {_under_way(status.change)}", "yellow", **_ONE_LINE))
    if status.detail:
        lines.append(Text(status.detail))
    table = Table(box=None, pad_edge=False)
    for title in ("actor", "state", "node", "pid", "reserved", "experts", "memory", "peers"):
        right = title in ("pid", "memory", "peers")
        table.add_column(title, justify="right" if right else "left")
    for actor in status.actors:
        table.add_row(
            actor.name,
            f"[{COLOURS.get(actor.state, 'yellow')}]{actor.state}[/]",
            actor.node_ip or "-",
            str(actor.pid or "-"),
            _amounts(actor.resources),
            _experts(actor),
            _size(actor.allocated_bytes),
            str(len(actor.peers)),
        )
    details = [Text(f"{actor.name}: {actor.detail}") for actor in status.actors if actor.detail]
    return Group(*lines, table, *details)


def print_topology(console: Console, found: TopologyStatus) -> None:
    """What there is between each attention and FFN actor, and how good the placement is."""
    table = Table(box=None, pad_edge=False)
    numbers = ("latency", "rate", "frames")
    titles = ("attention", "node", "FFN", "node", "tier", "latency", "rate", "known by", "frames")
    for title in titles:
        table.add_column(title, justify="right" if title in numbers else "left")
    for link in found.links:
        table.add_row(
            link.attention,
            found.nodes[link.attention],
            link.ffn,
            found.nodes[link.ffn],
            link.tier,
            f"{link.latency_s * 1e6:.4g} us",
            f"{link.bytes_per_s / 1e9:.3g} GB/s",
            "probe" if link.measured else "labels",
            "-" if link.wire_s is None else f"{link.wire_s * 1e3:.3g} ms",
        )
    console.print(table, crop=False)
    placed = [("these places", found.exchange_s), ("best", found.best_s), ("worst", found.worst_s)]
    costs = ", ".join(f"{what} {1e6 * s:.4g} us" for what, s in placed if s is not None)
    console.print(
        f"a layer's dispatch and combine of {found.nbytes / 2**20:.3g} MiB per attention actor: "
        f"{costs}",
        highlight=False,
    )
    for one in found.slow:
        console.print(
            f"{one.actor} is slow to reach: frames take {one.ratio:.1f} times as long as to the "
            f"fastest {one.role} actor; {one.advice}",
            style="yellow",
            highlight=False,
        )
        if one.command is not None:
            console.print(f"  {one.command}", highlight=False)


def _head(status: ClusterStatus) -> Text:
    text = Text(**_ONE_LINE)
    text.append(status.name, "bold").append(" ")
    text.append(status.health, COLOURS.get(status.health, "white"))
    text.append(
        f"  {status.url or 'no address yet'}  model {status.model}  "
        f"epoch {'-' if status.epoch is None else status.epoch}  lanes {status.lanes}"
    )
    if status.emulated:
        text.append("  EMULATED DEVICES", "bold yellow")
    return text


def _pools(status: ClusterStatus) -> Text:
    """Ready actors of those wanted, per role, and what else there is."""
    parts = []
    for role in ROLES:
        states = [actor.state for actor in status.actors if actor.role == role]
        part = f"{role} {states.count('ready')}/{status.targets.get(role, len(states))}"
        draining = states.count("draining")
        parts.append(part + (f" ({draining} draining)" if draining else ""))
    parts.append(f"warm workers {status.warm}/{status.warm_target}")
    if status.manager_pid is not None:
        parts.append(f"manager {status.manager_pid}")
    if status.metrics_url is not None:
        parts.append(f"metrics {status.metrics_url}")
    return Text("  ".join(parts), "dim", **_ONE_LINE)


def _under_way(report: ChangeReport) -> str:
    age = max(0.0, time.time() - report.started_at)
    return f"change {report.number} ({report.verb} {report.text}): {report.phase}, {age:.1f} s"


def print_changes(console: Console, reports: Sequence[ChangeReport]) -> None:
    """One row per change, newest last; errors below."""
    if not reports:
        console.print("no changes yet")
        return
    table = Table(box=None, pad_edge=False)
    numbers = ("#", "total s", *_PHASES, "epoch", "moved")
    for title in ("#", "verb", "what", "phase", "when", "total s", *_PHASES, "epoch", "moved"):
        justify: Any = "right" if title in numbers else "left"
        table.add_column(title, justify=justify, no_wrap=title != "what")
    for report in reports:
        took = [report.seconds.get(name) for name in ("total", *_PHASES)]
        table.add_row(
            str(report.number),
            report.verb,
            Text(report.text),
            f"[{COLOURS.get(report.phase, 'yellow')}]{report.phase}[/]",
            _when(report.started_at),
            *("-" if seconds is None else f"{seconds:.2f}" for seconds in took),
            "-" if report.epoch is None else str(report.epoch),
            str(report.moved_experts),
        )
    console.print(table)
    for report in reports:
        if report.error:
            line = f"change {report.number}: {report.error}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def phases(report: ChangeReport) -> str:
    """``1.92 s (prepare 1.80, commit 0.01, release 0.11)``, as far as known."""
    parts = [f"{name} {took:.2f}" for name, took in report.seconds.items() if name != "total"]
    total = report.seconds.get("total", 0.0)
    return f"{total:.2f} s" + (f" ({', '.join(parts)})" if parts else "")


def _when(started_at: float) -> str:
    """Local time of day, with the day if that is another."""
    then = datetime.fromtimestamp(started_at)
    today = then.date() == datetime.now().date()
    return then.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S")


def print_spec(console: Console, spec: ClusterSpec, checkpoint: Checkpoint | None) -> None:
    """What a spec asks for; ``checkpoint`` adds what the model is."""
    table = Table(box=None, pad_edge=False)
    for title in ("pool", "actors", "min..max", "each", "labels", "experts per actor and layer"):
        table.add_column(title)
    for role in ROLES:
        pool = spec.pool(role)
        experts = ""
        if role == "ffn" and checkpoint is not None:
            low, rest = divmod(checkpoint.num_experts, pool.count)
            experts = f"{low} or {low + 1}" if rest else str(low)
        table.add_row(
            role,
            str(pool.count),
            f"{pool.min}..{pool.max}",
            _amounts(pool.resources.bundle()),
            ", ".join(f"{key}={value}" for key, value in pool.labels.items()) or "-",
            experts or "-",
        )
    console.print(f"[bold]{spec.name}[/]: {spec.served_name}", highlight=False)
    if checkpoint is not None:
        console.print(
            f"{checkpoint.path}: {len(checkpoint.moe_layers)} MoE layers, "
            f"{checkpoint.num_experts} experts, top {checkpoint.top_k}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(table)
    front = spec.frontend
    console.print(
        f"frontend {front.host}:{front.port}, {front.replicas} replica(s) at {front.cpus:g} CPU; "
        f"lanes {spec.lanes}; SLO: {spec.slo.percentile:.0%} within TTFT {spec.slo.ttft_s:g} s "
        f"and TPOT {spec.slo.tpot_s:g} s",
        highlight=False,
        soft_wrap=True,
    )


def _amounts(resources: Mapping[str, float]) -> str:
    parts = []
    for name, amount in resources.items():
        if name == "memory":
            parts.append(f"{amount / 2**30:g} GiB")
        else:
            parts.append(f"{amount:g} {name}")
    return ", ".join(parts) or "-"


def _experts(actor: ActorStatus) -> str:
    if not actor.experts:
        return "-"
    per_layer = set(actor.experts.values())
    low, high = min(per_layer), max(per_layer)
    span = str(low) if low == high else f"{low}..{high}"
    return f"{span} x {len(actor.experts)} layers"


def _size(amount: int | None) -> str:
    return "-" if amount is None else f"{amount / 2**20:.1f} MiB"
