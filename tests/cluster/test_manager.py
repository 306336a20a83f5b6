"""What the manager does, without Ray: verbs, losses, health, taking over, explaining failures.

Starting and stopping real actors is in ``tests/e2e``.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray")

from actors.errors import AffluxError, CheckpointError
from cluster import manager as manager_module
from cluster import preflight, ray_actors, seats
from cluster.change import Refused
from cluster.manager import Manager, OtherSpec, StartFailed
from cluster.names import actor_name, manager_name
from cluster.preflight import LackingResources, Node
from cluster.spec import ClusterSpec, ResourceSpec, make_spec
from cluster.topology import Site
from tests.cluster.fake_workers import FakeRay

MODEL = Path(__file__).parents[2] / "deploy" / "models" / "verse"


def spec(**changes: Any) -> ClusterSpec:
    data = {
        "model": {"path": str(MODEL)},
        "attention": {"count": 2},
        "ffn": {"count": 2, "max": 6},
        "startup_timeout_s": 5,
        "warm_workers": 0,
        "membership": {"silence_s": 0.5, "drain_s": 0.5},
        "metrics": {"enabled": False},
    }
    return make_spec({**data, **changes})


@dataclass
class Fault:
    peer: str
    kind: str = "lost"
    detail: str = "layer 0"


class Deployment:
    """A manager over fake workers."""

    def __init__(self, ray: FakeRay):
        self.ray = ray
        self.managers: list[Manager] = []

    async def up(self, **changes: Any) -> Manager:
        wanted = spec(**changes)
        self.manager = Manager(wanted.model_dump(mode="json"))
        self.managers.append(self.manager)
        await asyncio.wait_for(self.manager.start(wanted.model_dump(mode="json")), 10)
        return self.manager

    async def ended(self, report: Any) -> Any:
        done = await self.manager.change(report.number, 10.0)
        assert done.ended, done
        return done

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not true():
                await asyncio.sleep(0.01)

    def settled(self) -> bool:
        core = self.manager.membership
        return core is not None and core.settled

    def state(self, name: str) -> str:
        core = self.manager.membership
        assert core is not None
        return core.members[name].state


@pytest.fixture
async def deployment(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Deployment]:
    monkeypatch.setattr(seats, "ROOM_GRACE_S", 0.0)
    monkeypatch.setattr(manager_module, "REFILL_S", 0.01)
    monkeypatch.setattr(manager_module, "NODES_S", 0.02)
    monkeypatch.setattr(manager_module, "peer_secret", lambda deployment: deployment.encode())
    deployment = Deployment(FakeRay(monkeypatch))
    yield deployment
    for manager in deployment.managers:
        await manager.stop()
    assert not deployment.ray.groups
    assert all(worker.dead.is_set() for worker in deployment.ray.workers.values())


def test_names() -> None:
    assert manager_name("x") == "x:manager"
    assert actor_name("x", "ffn-3") == "x:ffn-3"


async def test_every_actor_is_told_the_secret_and_where_to_listen(deployment: Deployment) -> None:
    manager = await deployment.up()
    for name in ("attention-0", "ffn-1"):
        config = deployment.ray.member(name).config
        assert config.secret == manager.spec.name.encode()
        assert config.address == "10.0.0.1"


async def test_start_connects_everybody_and_publishes(deployment: Deployment) -> None:
    manager = await deployment.up()
    members = await manager.members()
    assert sorted(members["attention"]) == ["attention-0", "attention-1"]
    assert members["not_ready"] is None and members["draining"] == []
    for name in ("attention-0", "attention-1"):
        worker = deployment.ray.member(name)
        assert worker.peers == {"ffn-0", "ffn-1"} and worker.table is not None
    status = await manager.status()
    assert status.health == "ready" and status.epoch == 1
    assert status.targets == {"attention": 2, "ffn": 2}
    assert {actor.state for actor in status.actors} == {"ready"}
    states = [event.state for event in await manager.events() if event.actor == "ffn-0"]
    assert states == ["pending", "placed", "importing", "loading", "connected", "ready"]


def rack(node: str, name: str) -> Site:
    return Site(node, {"afflux.io/rack": name, "ray.io/availability-zone": "z"}, {"CPU": 2.0})


async def test_actors_that_talk_are_put_together(deployment: Deployment) -> None:
    ray = deployment.ray
    ray.sites = [rack("10.0.0.1", "a"), rack("10.0.0.2", "b"), rack("10.0.0.3", "b")]
    manager = await deployment.up()
    assert set(ray.asked_for.values()) == {"10.0.0.2", "10.0.0.3"}
    await deployment.until(lambda: manager.membership is not None)
    ray.sites = []
    report = await manager.topology()
    assert report.links == () and report.best_s is None, "its nodes are gone"
    ray.sites = [rack("10.0.0.1", "a"), rack("10.0.0.2", "b")]
    report = await manager.topology()
    assert {link.tier for link in report.links} == {"host"}, "the fake puts all on one node"
    assert report.best_s is not None and report.best_s <= report.exchange_s <= report.worst_s


async def test_who_finds_the_place_taken_goes_elsewhere(deployment: Deployment) -> None:
    ray = deployment.ray
    ray.sites = [rack("10.0.0.1", "a"), rack("10.0.0.2", "b")]
    ray.full = {"10.0.0.1", "10.0.0.2"}
    await deployment.up()
    assert set(ray.asked_for.values()) == {None}


async def test_a_node_that_lost_an_actor_gets_no_other_at_once(deployment: Deployment) -> None:
    ray = deployment.ray
    ray.sites = [rack("10.0.0.1", "a"), rack("10.0.0.2", "b")]  # the fake runs all on the first
    await deployment.up(ffn={"count": 2, "max": 6, "redundant_experts": 8})
    before = set(ray.asked_for)
    ray.member("ffn-1").dead.set()
    await deployment.until(lambda: bool(set(ray.asked_for) - before))
    (new,) = set(ray.asked_for) - before
    assert ray.asked_for[new] == "10.0.0.2"


async def test_nobody_fails_to_start_for_want_of_advice(deployment: Deployment) -> None:
    def broken() -> list[Site]:
        raise RuntimeError("the GCS is away")

    deployment.ray.find_sites = broken
    await deployment.up()
    assert set(deployment.ray.asked_for.values()) == {None}


async def test_only_the_newest_events_are_kept(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.manager.EVENTS", 8)
    manager = await deployment.up()
    noted = manager._noted()
    assert noted > 8
    assert [event.number for event in await manager.events()] == list(range(noted - 7, noted + 1))
    assert [event.number for event in await manager.events(noted - 2)] == [noted - 1, noted]
    assert await manager.events(noted) == []


async def test_scale_up_and_down(deployment: Deployment) -> None:
    manager = await deployment.up()
    done = await deployment.ended(await manager.scale(attention=1, ffn=3))
    assert done.phase == "done" and done.started == ("ffn-2",)
    assert done.retired == ("attention-1",)
    assert deployment.ray.member("attention-1").stopped
    assert sorted(deployment.ray.groups) == ["attention-0", "ffn-0", "ffn-1", "ffn-2"]
    kept = [deployment.ray.member(f"ffn-{i}") for i in range(3)]
    assert {worker.epoch for worker in kept} == {2}, "older epochs are refused"
    held = sorted((0, e) for worker in kept for e in worker.experts[0])
    assert held == [(0, e) for e in range(8)]
    assert [report.number for report in await manager.history()] == [1, 2]


async def test_a_draining_actor_finishes_its_requests(deployment: Deployment) -> None:
    manager = await deployment.up(membership={"drain_s": 10})
    deployment.ray.member("attention-1").requests = 1
    report = await manager.retire("attention-1")
    await deployment.until(lambda: deployment.state("attention-1") == "draining")
    members = await manager.members()
    assert members["draining"] == ["attention-1"] and len(members["attention"]) == 2
    deployment.ray.member("attention-1").requests = 0
    await deployment.ended(report)
    assert list((await manager.members())["attention"]) == ["attention-0"]


async def test_a_draining_actor_adopts_what_is_published(deployment: Deployment) -> None:
    manager = await deployment.up(membership={"drain_s": 30, "commit_s": 2})
    draining = deployment.ray.member("attention-1")
    draining.requests = 1
    drained = await manager.retire("attention-1")
    await deployment.until(lambda: deployment.state("attention-1") == "draining")
    done = await deployment.ended(await manager.scale(ffn=3))
    assert done.phase == "done" and deployment.state("attention-1") == "draining"
    assert draining.table is not None and draining.table.epoch == done.epoch
    draining.requests = 0
    await deployment.ended(drained)


async def test_a_drain_ends_at_its_deadline(deployment: Deployment) -> None:
    manager = await deployment.up(membership={"drain_s": 0.2})
    deployment.ray.member("attention-1").requests = 1  # and nobody takes them away
    done = await deployment.ended(await manager.retire("attention-1"))
    assert done.phase == "done" and deployment.ray.member("attention-1").dead.is_set()


async def test_flip_uses_a_warm_worker(deployment: Deployment) -> None:
    manager = await deployment.up(warm_workers=1)
    await deployment.until(lambda: manager.warm.ready == 1)
    done = await deployment.ended(await manager.flip("attention-1", "ffn"))
    assert done.started == ("ffn-2",) and done.retired == ("attention-1",)
    assert deployment.ray.member("ffn-2").name == "warm-0"
    await deployment.until(lambda: manager.warm.ready == 1)
    assert manager.warm.names == ("warm-1",), "another one takes its place"


async def test_a_dead_warm_worker_is_passed_over(deployment: Deployment) -> None:
    manager = await deployment.up(warm_workers=1)
    await deployment.until(lambda: manager.warm.ready == 1)
    deployment.ray.workers["warm-0"].fails["ping"] = seats.RayActorError()
    done = await deployment.ended(await manager.scale(ffn=3))
    assert done.phase == "done" and deployment.ray.member("ffn-2").name == "ffn-2"


async def test_weights_are_offered_by_who_has_them(deployment: Deployment) -> None:
    manager = await deployment.up(transport={"peer_weights_mib": 0})
    await deployment.ended(await manager.scale(ffn=3))
    offers = deployment.ray.member("ffn-2").config.offers
    assert {offer.token for offer in offers} <= {"ffn-0", "ffn-1"} and offers
    assert "unexport" in deployment.ray.member("ffn-0").calls
    offered = [(layer, e) for o in offers for layer, ids in o.experts.items() for e in ids]
    wanted = deployment.ray.member("ffn-2").config.experts
    assert sorted(offered) == sorted((layer, e) for layer, ids in wanted.items() for e in ids)


async def test_no_room_rolls_back_and_says_so(deployment: Deployment) -> None:
    manager = await deployment.up()
    deployment.ray.room = False
    done = await deployment.ended(await manager.scale(ffn=3))
    assert done.phase == "rolled_back" and "CPU: 1 needed, 0 free" in done.error
    deployment.ray.room = True
    assert (await deployment.ended(await manager.scale(ffn=3))).phase == "done"


async def test_an_actor_waits_for_the_node_that_an_autoscaler_may_add(
    deployment: Deployment,
) -> None:
    manager = await deployment.up()
    deployment.ray.room, deployment.ray.autoscaled = False, True
    change = await manager.scale(ffn=3)
    by_name = manager.seats.by_name
    await deployment.until(
        lambda: "ffn-2" in by_name and by_name["ffn-2"].detail == seats.AWAITING_NODE
    )
    (waiting,) = [a for a in (await manager.status()).actors if a.name == "ffn-2"]
    assert waiting.detail == seats.AWAITING_NODE
    deployment.ray.room = True
    assert (await deployment.ended(change)).phase == "done"
    (ready,) = [a for a in (await manager.status()).actors if a.name == "ffn-2"]
    assert (ready.state, ready.detail) == ("ready", "")


async def test_refusals_change_nothing(deployment: Deployment) -> None:
    manager = await deployment.up()
    with pytest.raises(Refused, match="allows 1 to 4"):
        await manager.scale(attention=9)
    with pytest.raises(Refused, match="there is no actor"):
        await manager.retire("ffn-7")
    with pytest.raises(AffluxError, match="no change 99"):
        await manager.change(99)
    assert deployment.settled()


async def test_a_dead_ffn_actor_is_repaired_and_replaced(deployment: Deployment) -> None:
    manager = await deployment.up(ffn={"count": 3, "max": 6})
    deployment.ray.member("ffn-1").dead.set()
    await deployment.until(lambda: deployment.state("ffn-1") == "failed")
    await deployment.until(deployment.settled)
    verbs = [report.verb for report in await manager.history()]
    assert verbs == ["start", "repair", "replace"]
    assert (await manager.status()).health == "ready"
    assert "ffn-1" not in deployment.ray.member("attention-0").peers
    assert "ffn-1" not in deployment.ray.groups


async def test_what_an_attention_actor_reports_counts(deployment: Deployment) -> None:
    await deployment.up()
    reporter = deployment.ray.member("attention-0")
    reporter.faults.append(Fault("ffn-0", "silent"))
    reporter.news.set()
    await deployment.until(lambda: deployment.state("ffn-0") == "failed")
    reporter.news.clear()
    await deployment.until(deployment.settled)
    assert deployment.ray.member("ffn-0").dead.is_set(), "it is ended, whatever it thinks"


async def test_what_an_actor_that_is_being_ended_reports_does_not_count(
    deployment: Deployment,
) -> None:
    manager = await deployment.up()
    await manager.scale(attention=1)
    await deployment.until(deployment.settled)
    manager._on_fault("attention-1", Fault("ffn-0", "lost"))
    assert deployment.state("ffn-0") == "ready"
    manager._on_fault("attention-0", Fault("ffn-0", "lost"))
    assert deployment.state("ffn-0") == "failed"
    await deployment.until(deployment.settled)


async def test_a_frozen_actor_is_noticed_by_its_silence(deployment: Deployment) -> None:
    manager = await deployment.up()
    deployment.ray.member("attention-1").frozen = True
    await deployment.until(lambda: deployment.state("attention-1") == "failed")
    assert "attention-1" not in (await manager.members())["attention"]
    await deployment.until(deployment.settled)


async def test_health_follows_the_members(deployment: Deployment) -> None:
    manager = await deployment.up(membership={"replace_lost": False})
    deployment.ray.member("attention-0").dead.set()
    await deployment.until(lambda: manager._health == "degraded")
    assert (await manager.members())["not_ready"] is None
    deployment.ray.member("attention-1").dead.set()
    await deployment.until(lambda: manager._health == "failed")
    members = await manager.members()
    assert members["attention"] == {} and "no attention actor" in members["not_ready"]


async def test_members_wait_for_a_change(deployment: Deployment) -> None:
    manager = await deployment.up()
    version = (await manager.members())["version"]
    assert (await manager.members(version, 0.05))["version"] == version
    waiting = asyncio.create_task(manager.members(version, 5.0))
    deployment.ray.member("attention-1").dead.set()
    changed = await asyncio.wait_for(waiting, 5.0)
    assert changed["version"] != version


def replaced(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> Manager:
    """The manager dies and Ray starts another, which has not taken over yet."""
    old = deployment.manager
    watchers = [seat.watcher for seat in old.seats.by_name.values() if seat.watcher]
    for task in (*old._tasks, *old.warm._tasks, *watchers):
        task.cancel()
    deployment.managers.clear()
    monkeypatch.setattr(manager_module, "_restarted", lambda: False)
    manager = Manager(old.spec.model_dump(mode="json"))
    manager._took_over = False
    deployment.manager = manager
    deployment.managers.append(manager)
    return manager


async def test_a_new_manager_takes_over(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await deployment.up(warm_workers=1)
    await deployment.until(lambda: old.warm.ready == 1)
    await deployment.ended(await old.scale(attention=1, ffn=3))
    await old.set_url("http://somewhere")
    await deployment.until(lambda: deployment.ray.member("ffn-0").note.get("url") is not None)
    await deployment.until(lambda: old.warm.ready == 1)
    deployment.ray.member("ffn-2").dead.set()
    manager = replaced(deployment, monkeypatch)
    members = await manager.members()
    assert list(members["attention"]) == ["attention-0"]
    assert members["version"] != (await old.members())["version"]
    await deployment.until(deployment.settled)
    status = await manager.status()
    assert status.url == "http://somewhere" and status.targets == {"attention": 1, "ffn": 3}
    assert sorted(a.name for a in status.actors) == ["attention-0", "ffn-0", "ffn-1", "ffn-3"]
    assert (await deployment.ended(await manager.scale(ffn=2))).number > 2


async def test_a_new_manager_gives_no_name_twice(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await deployment.up(warm_workers=1)
    await deployment.until(lambda: old.warm.ready == 1)
    await deployment.ended(await old.flip("attention-1", "ffn"))
    assert deployment.ray.member("ffn-2").name == "warm-0"
    for name in old.warm.names:  # so that no warm worker is left whose number could be gone by
        deployment.ray.workers[name].dead.set()
    await asyncio.sleep(0)
    manager = replaced(deployment, monkeypatch)
    await manager.members()
    await deployment.until(lambda: manager.warm.ready == 1)
    assert "warm-0" not in manager.warm.names


MEASURED = {"port": 0}


async def read(manager: Manager, path: str) -> str:
    """A page of the manager's exporter."""
    port = manager.exposition.port
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    head, _, body = answer.partition("\r\n\r\n")
    assert " 200 " in head.splitlines()[0], answer
    return body


async def listed(manager: Manager) -> dict[str, list[str]]:
    """Targets by job, as Prometheus is told."""
    groups = json.loads(await read(manager, "/sd"))
    return {group["labels"]["job"]: group["targets"] for group in groups}


async def test_the_manager_lists_who_can_be_scraped(deployment: Deployment) -> None:
    manager = await deployment.up(metrics=MEASURED)
    url = (await manager.status()).metrics_url
    assert url == f"http://127.0.0.1:{manager.exposition.port}"
    actors = [f"127.0.0.1:{name}" for name in ("attention-0", "attention-1", "ffn-0", "ffn-1")]
    own = f"127.0.0.1:{manager.exposition.port}"
    assert (await listed(manager))["afflux"] == sorted([own, *actors])
    here = {"name": "frontend-0", "metrics": "127.0.0.1:7", "node_ip": "10.0.0.1"}
    elsewhere = {"name": "frontend-1", "metrics": "127.0.0.1:8", "node_ip": "10.0.0.2"}
    for frontend in (here, elsewhere):
        await manager.members(frontend=frontend)
    await deployment.ended(await manager.scale(attention=1))
    manager._show()
    jobs = await listed(manager)
    assert "127.0.0.1:attention-1" not in jobs["afflux"], "who has left is not asked any more"
    assert "127.0.0.1:7" in jobs["afflux"] and jobs["vllm"] == ["127.0.0.1:7"]
    assert jobs["ray"] == ["10.0.0.1:8090"]


async def test_the_managers_page_follows_the_deployment(deployment: Deployment) -> None:
    manager = await deployment.up(metrics=MEASURED)
    assert 'afd_actors{model_name="verse",role="ffn",state="ready"} 2.0' in await read(
        manager, "/metrics"
    )
    deployment.ray.member("ffn-1").dead.set()
    await deployment.until(lambda: deployment.state("ffn-1") == "failed")
    await deployment.until(deployment.settled)
    page = await read(manager, "/metrics")
    for line in (
        'afd_actors{model_name="verse",role="ffn",state="ready"} 2.0',
        'afd_actors_lost_total{model_name="verse",role="ffn"} 1.0',
        'afd_actor_restarts_total{model_name="verse",role="ffn"} 1.0',
        'afd_recovery_seconds_count{model_name="verse",role="ffn"} 1.0',
        'afd_scale_events_total{model_name="verse",outcome="done",verb="replace"} 1.0',
        'afd_healthy{model_name="verse"} 1.0',
    ):
        assert line in page


async def test_scrapes_during_changes_do_not_fail(deployment: Deployment) -> None:
    manager = await deployment.up(metrics=MEASURED)
    going = True

    async def scrape() -> int:
        count = 0
        while going:
            page, _ = await asyncio.gather(read(manager, "/metrics"), read(manager, "/sd"))
            assert "afd_healthy" in page
            count += 1
        return count

    scraping = asyncio.create_task(scrape())
    for ffn in (4, 2, 5, 1, 3):
        await deployment.ended(await manager.scale(ffn=ffn))
    going = False
    assert await asyncio.wait_for(scraping, 10) > 0


async def test_a_restarted_manager_takes_its_port_again(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await deployment.up(metrics=MEASURED)
    port = old.exposition.port
    await deployment.until(lambda: deployment.ray.member("ffn-0").note.get("metrics_port") == port)
    manager = replaced(deployment, monkeypatch)
    old.exposition.close()  # as the end of its process does
    await manager.members()
    assert manager.exposition.port == port
    assert "afd_healthy" in await read(manager, "/metrics")


async def test_metrics_can_be_off(deployment: Deployment) -> None:
    manager = await deployment.up(metrics={"enabled": False})
    assert (await manager.status()).metrics_url is None
    assert deployment.ray.member("ffn-0").config.metrics is None


async def test_what_actors_are_told_of_metrics(deployment: Deployment) -> None:
    await deployment.up(metrics={"port": 0, "expert_tokens": True})
    for name in ("attention-0", "ffn-0"):
        told = deployment.ray.member(name).config.metrics
        assert (told.model_name, told.host, told.expert_tokens) == ("verse", "127.0.0.1", True)


async def test_a_foreign_address_fails_the_start(deployment: Deployment) -> None:
    with pytest.raises(AffluxError, match=r"192\.0\.2\.1.*metrics\.host") as error:
        await deployment.up(metrics={"host": "192.0.2.1"})
    assert error.value.code == "bad_metrics_address"


async def test_a_missing_model_fails_the_start(deployment: Deployment) -> None:
    with pytest.raises(AffluxError, match="/no/such/model") as error:
        await deployment.up(model={"path": "/no/such/model"})
    assert error.value.code == "missing_checkpoint"
    assert (await deployment.manager.events())[-1].state == "failed"


async def test_another_spec_is_refused(deployment: Deployment) -> None:
    manager = await deployment.up()
    with pytest.raises(OtherSpec, match="afflux down --name afflux"):
        await manager.start(spec(ffn={"count": 3}).model_dump(mode="json"))


async def test_a_refusing_actor_fails_the_start_in_its_words(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = CheckpointError("truncated", "truncated_checkpoint")

    def create(*_: Any) -> Any:
        worker = deployment.ray._create(_[2])
        worker.fails["start"] = known
        return worker

    monkeypatch.setattr(ray_actors, "create_worker", create)
    with pytest.raises(AffluxError, match="truncated"):
        await deployment.up()


def test_lacking_resources_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [Node("n", {"CPU": 3.0})]
    monkeypatch.setattr(ray_actors, "free_nodes", lambda: nodes)
    with pytest.raises(LackingResources, match=r"CPU: 4 needed, 3 free"):
        ray_actors.check_room(spec(), count_frontend=False)
    with pytest.raises(LackingResources, match=r"CPU: 4.25 needed, 3 free"):
        ray_actors.check_room(spec(), count_frontend=True)
    nodes[0] = Node("n", {"CPU": 3.0}, {"ray.io/node-group": "workers"})
    ray_actors.check_room(spec(), count_frontend=True)  # an autoscaler may bring more
    nodes[0] = Node("n", {"CPU": 3.0}, {"ray.io/node-group": "local.cluster.node"})
    with pytest.raises(LackingResources):  # but not machines that there are anyway
        ray_actors.check_room(spec(), count_frontend=True)


async def test_a_late_start_says_who_is_late(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_actors, "free_nodes", lambda: [Node("n", {"CPU": 0.5})])
    monkeypatch.setattr(ray_actors, "node_of", lambda group: None)
    monkeypatch.setattr(ray_actors, "where", lambda handle: (None, None, None))
    create = deployment.ray._create

    def slow(*_: Any) -> Any:
        worker = create(_[2])
        worker.frozen = worker.name == "ffn-0"
        return worker

    monkeypatch.setattr(ray_actors, "create_worker", slow)
    with pytest.raises(StartFailed) as error:
        await deployment.up(startup_timeout_s=0.5)
    assert error.value.code == "start_timeout"
    assert "ffn-0 is importing" in error.value.message
    assert "CPU: 4 needed, 0.5 free" in error.value.message


def test_environment_of_a_worker() -> None:
    wanted = spec(
        ffn={"count": 1, "resources": ResourceSpec(cpus=3.5).model_dump()},
        transport={"ucx_tls": "tcp"},
    )
    env = ray_actors.worker_env(wanted)
    assert env["OMP_NUM_THREADS"] == "3"
    assert env["UCX_TLS"] == "tcp"
    assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert all(isinstance(value, str) for value in env.values())


def test_frontends_count_as_needs() -> None:
    assert [need.what for need in preflight.needs(spec())][-1] == "frontend-0"


async def test_a_node_that_is_about_to_leave_is_emptied(deployment: Deployment) -> None:
    deployment.ray.nodes = {"attention-1": "spot", "ffn-0": "spot"}
    await deployment.up()
    deployment.ray.leaving.add("spot")
    await deployment.until(lambda: deployment.state("ffn-0") == "retired")
    await deployment.until(deployment.settled)
    ready = {
        seat.name for seat in deployment.manager.seats.by_name.values() if seat.state == "ready"
    }
    assert ready == {"attention-0", "attention-2", "ffn-1", "ffn-2"}
    (report,) = [r for r in await deployment.manager.history() if r.verb == "retire"]
    assert report.phase == "done" and "leaving" in report.text


async def test_a_leaving_node_where_nobody_has_room(deployment: Deployment) -> None:
    """Who may go goes; who is the last of its kind stays until its node is gone."""
    deployment.ray.nodes = {"attention-0": "spot", "ffn-0": "spot"}
    await deployment.up(attention={"count": 1})
    deployment.ray.room = False
    deployment.ray.leaving.add("spot")
    await deployment.until(lambda: deployment.state("ffn-0") == "retired")
    await deployment.until(deployment.settled)
    assert deployment.state("attention-0") == "ready" and deployment.state("ffn-1") == "ready"
    assert (await deployment.manager.status()).health == "ready"
