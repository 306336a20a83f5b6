"""The ratio changes and actors are lost while streams run; no token is missing, repeated or wrong.

All on the shared deployment, which every test leaves with one attention and two FFN actors. Tokens
are compared with an undisturbed run, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from cluster import launcher, ray_actors
from cluster.change import Refused
from cluster.spec import ClusterSpec
from cluster.status import ActorStatus, ClusterHandle, ClusterStatus
from tests.e2e.conftest import ADMIN_KEY, KEY
from tests.e2e.streams import PROMPTS, Streams

Tokens = dict[str, list[int]]


def until(true: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)


class Deployment:
    """The shared deployment, as these tests handle it."""

    def __init__(self, cluster: ClusterHandle, spec: ClusterSpec):
        self.url, self.name, self.spec = cluster.url, spec.name, spec

    def status(self) -> ClusterStatus:
        return launcher.status(self.name)

    def actors(self, role: str) -> list[ActorStatus]:
        return [a for a in self.status().actors if a.role == role and a.state == "ready"]

    def process(self, actor: ActorStatus) -> psutil.Process:
        assert actor.pid is not None
        return psutil.Process(actor.pid)

    def whole(self) -> bool:
        status = self.status()
        ready = [a.role for a in status.actors if a.state == "ready"]
        counts = {role: ready.count(role) for role in ("attention", "ffn")}
        return status.health == "ready" and counts == status.targets and status.change is None

    def until_whole(self, what: str = "whole", seconds: float = 300.0) -> None:
        """Wait for it; where it does not come, say how things stand."""
        deadline = time.monotonic() + seconds
        while not self.whole():
            assert time.monotonic() < deadline, (
                f"not within {seconds:g} s: {what}\n{self.status()}\n"
                + "\n".join(map(str, launcher.changes(self.name)[-5:]))
            )
            time.sleep(0.25)  # asking costs the two cores something as well

    def warm(self, count: int = 1) -> None:
        deadline = time.monotonic() + 600
        while self.status().warm < count:
            assert time.monotonic() < deadline, f"no warm workers within 600 s: {self.status()}"
            time.sleep(0.5)

    def streams(self, **options: object) -> Streams:
        return Streams(self.url, KEY, self.spec.served_name, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def undisturbed(cluster: ClusterHandle, spec: ClusterSpec) -> Tokens:
    with Deployment(cluster, spec).streams() as streams:
        pass
    tokens = dict(streams.tokens)
    assert len(tokens) == len(PROMPTS)
    return tokens


def same(streams: Streams, undisturbed: Tokens) -> bool:
    """Every stream has exactly the tokens that it would have had."""
    return all(tokens == undisturbed[prompt] for prompt, tokens in streams.tokens)


@pytest.fixture
def deployment(cluster: ClusterHandle, spec: ClusterSpec, in_ray: None) -> Iterator[Deployment]:
    deployment = Deployment(cluster, spec)
    deployment.warm()
    yield deployment
    deployment.until_whole("whole again")
    launcher.scale(spec.name, attention=1, ffn=2)
    deployment.until_whole("back to 1A2F")


def test_counts_change_under_streams(deployment: Deployment, undisturbed: Tokens) -> None:
    with deployment.streams(again=True) as streams:
        up = launcher.scale(deployment.name, attention=2, ffn=3)
        down = launcher.scale(deployment.name, attention=1, ffn=1)
        assert (up.phase, down.phase) == ("done", "done"), (up.error, down.error)
    assert same(streams, undisturbed)
    status = deployment.status()
    assert status.targets == {"attention": 1, "ffn": 1} and status.epoch == down.epoch
    assert launcher.scale(deployment.name, ffn=1).phase == "noop"


def test_a_flip_with_a_warm_worker(deployment: Deployment, undisturbed: Tokens) -> None:
    victim = deployment.actors("ffn")[0]
    with deployment.streams() as streams:
        done = launcher.flip(deployment.name, victim.name, to="attention")
    assert done.phase == "done", done.error
    assert same(streams, undisturbed)
    assert {len(deployment.actors(role)) for role in ("attention", "ffn")} == {2, 1}
    assert launcher.flip(deployment.name, victim.name, to="attention").phase == "noop"


def test_retire_any_actor(deployment: Deployment, undisturbed: Tokens) -> None:
    """The first attention actor goes while it has streams: they go on at its replacement."""
    first = deployment.actors("attention")[0]
    with deployment.streams() as streams:
        done = launcher.retire(deployment.name, first.name, replace=True)
    assert done.phase == "done", done.error
    assert same(streams, undisturbed)
    assert [a.name for a in deployment.actors("attention")] == list(done.started)
    with pytest.raises(Refused, match="allows 1 to"):
        launcher.retire(deployment.name, done.started[0])


def test_a_killed_ffn_actor(deployment: Deployment, undisturbed: Tokens) -> None:
    victim = deployment.actors("ffn")[0]
    with deployment.streams() as streams:
        began = time.monotonic()
        deployment.process(victim).kill()
        until(lambda: min(len(s.tokens) for s in streams.all) > 60, "tokens flow again")
        assert streams.gap(began) < 20
    assert same(streams, undisturbed)
    verbs = [change.verb for change in launcher.changes(deployment.name)]
    assert "repair" in verbs


def test_a_frozen_ffn_actor_that_wakes_up(deployment: Deployment, undisturbed: Tokens) -> None:
    """Its silence is found by the deadline of a frame; awake again, it does no harm."""
    frozen = deployment.process(deployment.actors("ffn")[1])
    with deployment.streams() as streams:
        began = time.monotonic()
        frozen.suspend()
        until(lambda: min(len(s.tokens) for s in streams.all) > 60, "tokens flow again")
        assert streams.gap(began) < deployment.spec.transport.timeout_s + 20
        if frozen.is_running():
            frozen.resume()
    assert same(streams, undisturbed)


def test_a_killed_attention_actor(deployment: Deployment, undisturbed: Tokens) -> None:
    launcher.scale(deployment.name, attention=2)
    victim = deployment.actors("attention")[0]
    with deployment.streams() as streams:
        deployment.process(victim).kill()
    assert same(streams, undisturbed)


def test_sampling_goes_on_elsewhere(deployment: Deployment) -> None:
    """Seeded sampling with penalties: the state is rebuilt at the other actor."""
    launcher.scale(deployment.name, attention=2)
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.5}
    with deployment.streams(**sampling) as plain:
        pass
    with deployment.streams(**sampling) as streams:
        deployment.process(deployment.actors("attention")[0]).kill()
    assert streams.tokens == plain.tokens


def test_all_actors_of_both_roles_are_lost(deployment: Deployment, undisturbed: Tokens) -> None:
    with deployment.streams() as streams:
        for actor in (*deployment.actors("ffn"), *deployment.actors("attention")):
            deployment.process(actor).kill()
    assert same(streams, undisturbed)
    deployment.until_whole("service returns by itself")


def test_a_killed_manager(deployment: Deployment, undisturbed: Tokens) -> None:
    before = deployment.status()
    assert before.manager_pid is not None
    with deployment.streams() as streams:
        psutil.Process(before.manager_pid).kill()
        victim = deployment.process(before.actors[-1])
        victim.kill()  # while nobody looks
    assert same(streams, undisturbed)
    deployment.until_whole("the new manager has made up for the loss")
    after = deployment.status()
    assert after.manager_pid != before.manager_pid
    assert (after.url, after.targets) == (before.url, before.targets)
    assert launcher.scale(deployment.name, ffn=3).phase == "done"


def test_a_failed_prepare_is_rolled_back(deployment: Deployment, undisturbed: Tokens) -> None:
    """The starting actor is killed half way; the next change works."""
    epoch = deployment.status().epoch
    with deployment.streams() as streams:
        order = launcher.scale(deployment.name, ffn=3, wait=False)
        until(
            lambda: any(a.name in order.started and a.pid for a in deployment.status().actors),
            "the new actor has a process",
        )
        started = next(a for a in deployment.status().actors if a.name in order.started)
        deployment.process(started).kill()
        until(lambda: launcher.change(deployment.name, order.number).ended, "the change has ended")
        report = launcher.change(deployment.name, order.number)
        if report.phase == "rolled_back":  # else the kill came too late
            assert started.name in report.error and deployment.status().epoch == epoch
        again = launcher.scale(deployment.name, ffn=3)
        assert again.phase in ("done", "noop"), again.error
    assert same(streams, undisturbed)


def test_admin_over_http(deployment: Deployment) -> None:
    admin = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=f"{deployment.url}/admin", headers=admin, timeout=60) as http:
        done = http.post("/scale", json={"ffn": 3, "wait": True})
        assert done.status_code == 200 and done.json()["phase"] == "done", done.text
        assert http.post("/scale", json={"ffn": 3}).json()["phase"] == "noop"
        assert http.post("/scale", json={"ffn": 99}).status_code == 409
        assert http.post("/retire", json={"actor": "ffn-77"}).status_code == 404
        assert http.get("/status").json()["targets"]["ffn"] == 3
        assert http.get("/changes").status_code == 200
    plain = {"Authorization": f"Bearer {KEY}"}
    assert httpx.get(f"{deployment.url}/admin/status", headers=plain).status_code == 401


def test_beyond_the_bound_is_429(deployment: Deployment) -> None:
    """Everything accepted is answered; what is too much is told when to come again."""
    import asyncio

    async def crowd() -> list[httpx.Response]:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=deployment.url, headers=headers, timeout=180, limits=limits
        ) as http:
            body = {"model": deployment.spec.served_name, "prompt": "The sea", "max_tokens": 60}
            return await asyncio.gather(
                *(
                    http.post("/v1/completions", json={**body, "ignore_eos": True})
                    for _ in range(80)
                )
            )

    answers = asyncio.run(crowd())
    codes = [answer.status_code for answer in answers]
    assert set(codes) == {200, 429} and codes.count(200) >= deployment.spec.frontend.max_requests
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1 and refused.json()["error"]["code"] == 429


def test_nothing_is_left_over(deployment: Deployment, in_ray: None) -> None:
    """After all this there is one placement group per actor, and no process too many."""
    spare = deployment.spec.warm_workers
    until(lambda: deployment.status().warm == spare, "all warm workers are ready", 120)
    groups = ray_actors.groups(deployment.name)
    assert sorted(groups) == sorted(a.name for a in deployment.status().actors)
    assert len(ray_actors.workers(deployment.name)) == len(groups) + spare
