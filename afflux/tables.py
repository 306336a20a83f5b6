"""Tables that the commands print."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from actors.checkpoint import Checkpoint
from cluster.spec import ROLES, ClusterSpec
from cluster.status import ActorStatus, ClusterStatus

COLOURS = {
    "ready": "green",
    "starting": "yellow",
    "degraded": "yellow",
    "failed": "red",
    "stopped": "red",
}


def print_status(console: Console, status: ClusterStatus) -> None:
    """The head line and one row per actor."""
    colour = COLOURS.get(status.health, "white")
    lanes = f"lanes {status.lanes}"
    console.print(
        f"[bold]{status.name}[/] [{colour}]{status.health}[/]  {status.url or 'no address yet'}  "
        f"model {status.model}  epoch {'-' if status.epoch is None else status.epoch}  {lanes}",
        highlight=False,
        soft_wrap=True,
    )
    if status.detail:
        console.print(status.detail, highlight=False, markup=False)
    table = Table(box=None, pad_edge=False)
    for title in ("actor", "state", "node", "pid", "reserved", "experts", "memory", "peers"):
        right = title in ("pid", "memory", "peers")
        table.add_column(title, justify="right" if right else "left")
    for actor in status.actors:
        colour = COLOURS.get(actor.state, "yellow")
        table.add_row(
            actor.name,
            f"[{colour}]{actor.state}[/]",
            actor.node_ip or "-",
            str(actor.pid or "-"),
            _amounts(actor.resources),
            _experts(actor),
            _size(actor.allocated_bytes),
            str(len(actor.peers)),
        )
    console.print(table)
    for actor in status.actors:
        if actor.detail:
            console.print(f"{actor.name}: {actor.detail}", highlight=False, markup=False)


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
