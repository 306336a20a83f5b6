"""What the manager decides without Ray: judging health, explaining failures, its environment.

Starting and stopping real actors is in ``tests/e2e``.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray")

from actors.errors import AffluxError, CheckpointError
from cluster import preflight, ray_actors
from cluster.manager import Manager, OtherSpec, StartFailed
from cluster.names import actor_name, manager_name
from cluster.preflight import LackingResources, Node
from cluster.spec import ClusterSpec, ResourceSpec, make_spec


def spec(**changes: Any) -> ClusterSpec:
    data = {
        "model": {"path": "/no/such/model"},
        "attention": {"count": 2},
        "ffn": {"count": 2},
        "startup_timeout_s": 5,
    }
    return make_spec({**data, **changes})


async def ready_manager() -> Manager:
    manager = Manager(spec().model_dump(mode="json"))
    for member in manager._members.values():
        member.state, member.handle = "ready", object()
    manager._judge()
    return manager


def test_names() -> None:
    assert manager_name("x") == "x:manager"
    assert actor_name("x", "ffn-3") == "x:ffn-3"


async def test_health_follows_the_members() -> None:
    manager = await ready_manager()
    members = await manager.members()
    assert manager._health == "ready"
    assert sorted(members["attention"]) == ["attention-0", "attention-1"]
    assert members["not_ready"] is None

    manager._members["attention-0"].state = "failed"
    manager._judge()
    members = await manager.members()
    assert manager._health == "degraded"
    assert list(members["attention"]) == ["attention-1"]
    assert members["not_ready"] is None

    manager._members["ffn-1"].state = "failed"
    manager._judge()
    assert manager._health == "failed"
    assert "ffn-1" in (await manager.members())["not_ready"]


async def test_without_attention_actors_nothing_is_ready() -> None:
    manager = await ready_manager()
    for name in ("attention-0", "attention-1"):
        manager._members[name].state = "failed"
    manager._judge()
    assert manager._health == "failed"
    assert (await manager.members())["attention"] == {}


async def test_members_wait_for_a_change() -> None:
    manager = await ready_manager()
    version = (await manager.members())["version"]
    assert (await manager.members(version, 0.05))["version"] == version
    waiting = asyncio.create_task(manager.members(version, 5.0))
    await asyncio.sleep(0.05)
    manager._members["attention-1"].state = "failed"
    manager._judge()
    changed = await asyncio.wait_for(waiting, 1.0)
    assert changed["version"] > version
    assert list(changed["attention"]) == ["attention-0"]


async def test_a_missing_model_fails_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "remove_groups", lambda name: 0)
    manager = Manager(spec().model_dump(mode="json"))
    with pytest.raises(AffluxError, match="/no/such/model") as error:
        await manager.start(spec().model_dump(mode="json"))
    assert error.value.code == "missing_checkpoint"
    assert (await manager.events())[-1].state == "failed"
    with pytest.raises(AffluxError, match="/no/such/model"):
        await manager.start(spec().model_dump(mode="json"))


async def test_another_spec_is_refused() -> None:
    manager = Manager(spec().model_dump(mode="json"))
    with pytest.raises(OtherSpec, match="afflux down --name afflux"):
        await manager.start(spec(ffn={"count": 3}).model_dump(mode="json"))


def test_lacking_resources_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("n", {"CPU": 3.0})]
    monkeypatch.setattr(ray_actors, "free_nodes", lambda: nodes)
    with pytest.raises(LackingResources, match=r"CPU: 4 needed, 3 free"):
        ray_actors.check_room(spec(), count_frontend=False)
    with pytest.raises(LackingResources, match=r"CPU: 4.25 needed, 3 free"):
        ray_actors.check_room(spec(), count_frontend=True)
    nodes[0] = Node("n", {"CPU": 3.0}, {ray_actors.AUTOSCALED: "workers"})
    ray_actors.check_room(spec(), count_frontend=True)  # an autoscaler may bring more


async def test_a_late_start_says_who_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actors, "free_nodes", lambda: [Node("n", {"CPU": 0.5})])
    manager = Manager(spec().model_dump(mode="json"))
    manager._members["ffn-0"].state = "loading"
    error = manager._explain(TimeoutError())
    assert isinstance(error, StartFailed) and error.code == "start_timeout"
    assert "ffn-0 is loading" in error.message and "CPU: 3 needed, 0.5 free" in error.message


async def test_known_errors_keep_their_words() -> None:
    manager = Manager(spec().model_dump(mode="json"))
    known = CheckpointError("truncated", "truncated_checkpoint")
    assert manager._explain(known) is known


def test_environment_of_a_worker() -> None:
    pool = spec(ffn={"count": 1, "resources": ResourceSpec(cpus=3.5).model_dump()}).ffn
    env = ray_actors.worker_env(pool, "tcp")
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["UCX_TLS"] == "tcp"
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert all(isinstance(value, str) for value in env.values())


def test_frontends_count_as_needs() -> None:
    assert [need.what for need in preflight.needs(spec())][-1] == "frontend-0"
