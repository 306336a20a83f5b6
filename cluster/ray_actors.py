"""Ray's side of one attention or FFN actor: its placement group, its process, its end.

One small placement group per actor, because Ray can't resize groups. Nothing here knows what the
actors do or when: that is the manager's part.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.names import NAMESPACE, WORKER_ENV, actor_name
from cluster.preflight import LackingResources, Node, lacking, needs
from cluster.spec import ClusterSpec, PoolSpec, Role

AUTOSCALED = "ray.io/node-group"
"""Label that Ray's autoscaler and KubeRay put on their nodes."""


def create_group(deployment: str, member: str, pool: PoolSpec) -> PlacementGroup:
    """Ask for the member's place; returns at once, ``PlacementGroup.wait`` waits for it."""
    return placement_group(
        [pool.resources.bundle()],
        strategy="STRICT_PACK",
        name=actor_name(deployment, member),
        lifetime="detached",
        bundle_label_selector=[dict(pool.labels)] if pool.labels else None,  # type: ignore[arg-type]
    )


def create_actor(spec: ClusterSpec, role: Role, member: str, group: PlacementGroup) -> Any:
    """Start the member's process inside its group and return its Ray handle."""
    pool = spec.pool(role)
    resources = pool.resources
    options: dict[str, Any] = {
        "name": actor_name(spec.name, member),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "resources": dict(resources.custom),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
        "runtime_env": {"env_vars": worker_env(pool, spec.transport.ucx_tls)},
        "max_restarts": 0,
    }
    if resources.memory_gib:
        options["memory"] = int(resources.memory_gib * 2**30)
    return _actor_class(role).options(**options).remote()


def _actor_class(role: Role) -> Any:
    if role == "attention":
        from actors.attention import AttentionActor

        return ray.remote(AttentionActor)
    from actors.ffn import FFNActor

    # Threads, so that questions are answered while the experts load.
    return ray.remote(max_concurrency=4)(FFNActor)


def worker_env(pool: PoolSpec, ucx_tls: str | None = None) -> dict[str, str]:
    """Environment of an actor's process; must be there before torch and vLLM are imported."""
    threads = str(cpu_threads(pool))
    env = {**WORKER_ENV, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    if ucx_tls:
        env["UCX_TLS"] = ucx_tls
    return env


def cpu_threads(pool: PoolSpec) -> int:
    """Compute threads of an actor: the whole part of its CPUs, at least one."""
    return max(1, int(pool.resources.cpus))


def kill(handle: Any) -> None:
    """End an actor's process at once; nothing happens when it is gone already."""
    with suppress(ValueError, RayError):
        ray.kill(handle, no_restart=True)


def remove_groups(deployment: str) -> int:
    """Remove every placement group of a deployment; returns how many there were."""
    prefix = actor_name(deployment, "")
    removed = 0
    for group_id, facts in ray.util.placement_group_table().items():
        if facts["name"].startswith(prefix) and facts["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))
            removed += 1
    return removed


def free_nodes() -> list[Node]:
    """The live nodes of the cluster with what they have left."""
    from ray._private.state import available_resources_per_node

    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    return [
        Node(node["NodeManagerAddress"], dict(free.get(node["NodeID"], {})), node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def check_room(spec: ClusterSpec, *, count_frontend: bool) -> None:
    """Refuse at once what the cluster can't hold, unless an autoscaler may add nodes.

    Args:
        count_frontend: the frontend's replicas have no place yet and need one too.

    Raises:
        LackingResources: says which resource, how much is needed and how much is free.
    """
    wanted = [n for n in needs(spec) if count_frontend or not n.what.startswith("frontend")]
    nodes = free_nodes()
    lines = lacking(wanted, nodes)
    if lines and not any(node.labels.get(AUTOSCALED) for node in nodes):
        listed = "".join(f"\n  {line}" for line in lines)
        raise LackingResources(
            f"the Ray cluster cannot hold {spec.name}{listed}\nadd nodes, free what runs there, or "
            "lower attention.count, ffn.count or their resources"
        )


def where(handle: Any) -> tuple[str | None, str | None, int | None]:
    """Node id, node address and pid of an actor's process; Nones while it has none."""
    from ray._private.state import actors

    facts = actors(handle._actor_id.hex()) or {}
    address = facts.get("Address", {})
    return address.get("NodeID") or None, address.get("IPAddress") or None, facts.get("Pid")
