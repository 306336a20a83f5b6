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
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from actors.worker import Worker
from cluster.names import NAMESPACE, WORKER_ENV, actor_name, controller_name, manager_name
from cluster.preflight import LackingResources, Need, Node, labels_match, lacking, needs
from cluster.spec import ROLES, ClusterSpec, PoolSpec, Role
from cluster.topology import Site, memory_per_flop

_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # GiB; vLLM's old way to say kv_cache_memory_bytes

_A_BIT = 0.001
"""Of the resource that Ray gives every node by its address: who wants some has to be there."""

_NODE_GROUP = "ray.io/node-group"  # Ray's autoscaler and KubeRay put it on their nodes
_LOCAL_GROUP = "local.cluster.node"  # of Ray's local provider: machines that there are anyway


def create_group(
    deployment: str, member: str, pool: PoolSpec, address: str | None = None
) -> PlacementGroup:
    """Ask for the member's place; returns at once, ``PlacementGroup.wait`` waits for it.

    Args:
        address: of the node that it has to be on; None: any.
    """
    here = {f"node:{address}": _A_BIT} if address is not None else {}
    return placement_group(
        [pool.resources.bundle() | here],
        strategy="STRICT_PACK",
        name=actor_name(deployment, member),
        lifetime="detached",
        bundle_label_selector=[dict(pool.labels)] if pool.labels else None,  # type: ignore[arg-type]
    )


def create_worker(spec: ClusterSpec, role: Role, member: str, group: PlacementGroup) -> Any:
    """Start a process inside the member's group and return its Ray handle."""
    resources = spec.pool(role).resources
    options: dict[str, Any] = {
        **_detached(spec, member),
        "num_cpus": resources.cpus,
        "num_gpus": resources.gpus,
        "resources": dict(resources.custom),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, 0),
    }
    if resources.memory_gib:
        options["memory"] = int(resources.memory_gib * 2**30)
    return ray.remote(Worker).options(**options).remote()


def create_warm_worker(spec: ClusterSpec, name: str, node_id: str) -> Any:
    """Start a process without a role on a node; it reserves nothing until it takes one.

    What it computes with is reserved by the placement group of the member that it becomes.
    """
    options = _detached(spec, name)
    return (
        ray.remote(Worker)
        .options(
            **options,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )


def _detached(spec: ClusterSpec, name: str) -> dict[str, Any]:
    return {
        "name": actor_name(spec.name, name),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "runtime_env": {"env_vars": worker_env(spec)},
        "max_restarts": 0,
        # They are asked several times a second, and Ray's head would keep a record of each call.
        "enable_task_events": False,
    }


def worker_env(spec: ClusterSpec) -> dict[str, str]:
    """Environment of a worker's process; must be there before torch and vLLM are imported.

    The same for both roles, since a warm worker may take either. A role sets its own threads.
    """
    threads = str(max(cpu_threads(spec.attention), cpu_threads(spec.ffn)))
    env = {**WORKER_ENV, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if _KV_SPACE in os.environ:
        env[_KV_SPACE] = os.environ[_KV_SPACE]
    if spec.transport.ucx_tls:
        env["UCX_TLS"] = spec.transport.ucx_tls
    if spec.transport.net_devices:
        env["UCX_NET_DEVICES"] = spec.transport.net_devices
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
    found = groups(deployment)
    for group in found.values():
        remove_group(group)
    return len(found)


def groups(deployment: str) -> dict[str, PlacementGroup]:
    """A deployment's placement groups by member name."""
    prefix = actor_name(deployment, "")
    return {
        facts["name"].removeprefix(prefix): PlacementGroup(ray.PlacementGroupID.from_hex(group_id))
        for group_id, facts in ray.util.placement_group_table().items()
        if facts["name"].startswith(prefix) and facts["state"] != "REMOVED"
    }


def remove_group(group: PlacementGroup) -> None:
    """Give a member's place back; nothing happens when it is gone already."""
    with suppress(ValueError, RayError):
        remove_placement_group(group)


def node_of(group: PlacementGroup) -> str | None:
    """Id of the node that a group's bundle is on; None while it has none."""
    facts = ray.util.placement_group_table(group)
    return next(iter(facts.get("bundles_to_node_id", {}).values()), None) or None


def gpus_of(group: PlacementGroup, count: float) -> list[int]:
    """The GPUs that a group has reserved on its node (asks by a task inside the group)."""
    ask = ray.remote(num_cpus=0, num_gpus=count)(lambda: ray.get_gpu_ids())
    strategy = PlacementGroupSchedulingStrategy(group, 0)
    return [int(gpu) for gpu in ray.get(ask.options(scheduling_strategy=strategy).remote())]


def workers(deployment: str) -> dict[str, Any]:
    """Ray handles of a deployment's live workers by name, warm ones included."""
    prefix = actor_name(deployment, "")
    others = (manager_name(deployment), controller_name(deployment))
    found = {}
    for entry in ray.util.list_named_actors(all_namespaces=True):
        name = entry["name"]
        if entry["namespace"] == NAMESPACE and name.startswith(prefix) and name not in others:
            with suppress(ValueError):  # gone meanwhile
                found[name.removeprefix(prefix)] = ray.get_actor(name, namespace=NAMESPACE)
    return found


def leaving_nodes() -> set[str]:
    """Ids of nodes that are going to end: preempted, idle, or drained by hand."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def free_nodes() -> list[Node]:
    """The live nodes of the cluster that stay, with what they have left."""
    from ray._private.state import available_resources_per_node

    free: Mapping[str, Mapping[str, float]] = available_resources_per_node()
    leaving = leaving_nodes()
    return [
        Node(node["NodeManagerAddress"], dict(free.get(node["NodeID"], {})), node.get("Labels", {}))
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def sites() -> list[Site]:
    """The live nodes by address, as ``topology`` sees them."""
    total = {n["NodeManagerAddress"]: n.get("Resources", {}) for n in ray.nodes() if n["Alive"]}
    return [
        Site(
            node.name,
            node.labels,
            node.resources,
            memory_per_flop(node.labels, total.get(node.name, {})),
        )
        for node in free_nodes()
    ]


def nodes_for(spec: ClusterSpec, home: str) -> dict[str, str]:
    """The live nodes that may have attention or FFN actors, full ones too, if there are several.

    Args:
        home: address of one that counts too, to know how far the others are from it.

    Returns:
        Address -> Ray's id.
    """
    wanted = [spec.pool(role).labels for role in ROLES]
    return {
        node["NodeManagerAddress"]: node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and any(labels_match(labels, node.get("Labels", {})) for labels in wanted)
    }


def node_ip() -> str:
    """Address of the node that this process is on."""
    return str(ray.util.get_node_ip_address())


def metrics_agents() -> tuple[str, ...]:
    """Where the live nodes' agents serve Ray's own metrics, "host:port"."""
    return tuple(
        f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    )


def autoscaled(labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels belongs to a cluster to which more may be added."""
    return labels.get(_NODE_GROUP, _LOCAL_GROUP) not in ("", _LOCAL_GROUP)


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
    if lines and not any(autoscaled(node.labels) for node in nodes):
        listed = "".join(f"\n  {line}" for line in lines)
        raise LackingResources(
            f"the Ray cluster cannot hold {spec.name}{listed}\nadd nodes, free what runs there, or "
            "lower attention.count, ffn.count or their resources"
        )


def check_one_more(spec: ClusterSpec, role: Role) -> bool:
    """Refuse what the cluster can't hold besides what runs, unless an autoscaler may add nodes.

    Returns:
        Whether there is room as it is.

    Raises:
        LackingResources: says which resource, how much is needed and how much is free.
    """
    pool = spec.pool(role)
    need = Need(f"one more {role} actor", pool.resources.bundle(), pool.labels)
    nodes = free_nodes()
    lines = lacking([need], nodes)
    if lines and not any(autoscaled(node.labels) for node in nodes):
        raise LackingResources(
            f"the Ray cluster has no room for one more {role} actor: {'; '.join(lines)}"
        )
    return not lines


def where(handle: Any) -> tuple[str | None, str | None, int | None]:
    """Node id, node address and pid of an actor's process; Nones while it has none."""
    from ray._private.state import actors

    facts = actors(handle._actor_id.hex()) or {}
    address = facts.get("Address", {})
    return address.get("NodeID") or None, address.get("IPAddress") or None, facts.get("Pid")
