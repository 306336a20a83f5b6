"""The controller of a real deployment: it sees, decides, changes the numbers, and survives.

On the shared deployment, whose controller only advises; every test leaves it that way, with one
attention and two FFN actors.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from afflux.main import app
from autoscaler import launch
from autoscaler.journal import DecisionReport
from autoscaler.registry import BadPolicy
from cluster import launcher
from cluster.spec import ClusterSpec
from cluster.status import ClusterHandle
from tests.e2e.streams import Streams
from tests.e2e.test_elastic import Deployment, Tokens, same, undisturbed, until

__all__ = ["undisturbed"]

pytestmark = pytest.mark.timeout(1500)


class Controlled(Deployment):
    """The shared deployment and its controller."""

    def state(self) -> dict[str, Any]:
        return launch.state(self.name)

    def newest(self) -> DecisionReport:
        return launch.decisions(self.name, limit=1)[-1]

    def decided(self, what: str, seconds: float = 120.0, **fields: Any) -> DecisionReport:
        """Waits for a decision with these fields."""
        found: list[DecisionReport] = []

        def there() -> bool:
            for report in launch.decisions(self.name, limit=200):
                if all(getattr(report, key) == value for key, value in fields.items()):
                    found.append(report)
            return bool(found)

        until(there, what, seconds)
        return found[-1]


@pytest.fixture
def deployment(cluster: ClusterHandle, spec: ClusterSpec, in_ray: None) -> Iterator[Controlled]:
    deployment = Controlled(cluster, spec)
    deployment.warm()
    yield deployment
    launch.resume(spec.name)
    launch.set_policy(spec.name, "static", {}, "advise")
    deployment.until_whole("whole again")
    launcher.scale(spec.name, attention=1, ffn=2)
    deployment.until_whole("back to 1A2F")


def test_it_sees_the_load(deployment: Controlled) -> None:
    with deployment.streams(again=True) as streams:
        until(
            lambda: (
                deployment.newest().observed.get("tokens_rate", 0) > 0
                and deployment.newest().observed.get("running", 0) > 0
            ),
            "tokens are seen",
        )
    assert streams.tokens
    report = deployment.newest()
    assert (report.there, report.policy, report.mode) == ("1A2F", "static", "advise")
    until(lambda: deployment.newest().observed.get("running") == 0, "and that they have ended")
    until(lambda: launch.model(deployment.name) is not None, "a model is fitted")


def test_it_acts_and_nobody_notices(deployment: Controlled, undisturbed: Tokens) -> None:
    with deployment.streams(again=True) as streams:
        launch.set_policy(deployment.name, "static", {"attention": 2}, "on")
        report = deployment.decided("it has acted", target="2A2F", outcome="done")
        until(lambda: len(deployment.actors("attention")) == 2, "two attention actors")
        launch.set_policy(deployment.name, parameters={"attention": 1})
        deployment.decided("and back", target="1A2F", outcome="done")
    assert same(streams, undisturbed)
    assert "fixed" in report.reasons and report.change is not None
    verbs = [change.verb for change in launcher.changes(deployment.name)]
    assert verbs[-2:] == ["scale", "scale"]


def test_paused_it_only_says(deployment: Controlled) -> None:
    launch.pause(deployment.name)
    launch.set_policy(deployment.name, "static", {"ffn": 3}, "on")
    report = deployment.decided("it would", advised="1A3F", mode="paused")
    assert report.reasons[0] == "paused" and report.target is None
    trial = launch.try_policy(deployment.name, "static", {"attention": 3, "ffn": 1})
    assert trial.advised == "3A1F" and trial.target is None
    assert len(deployment.actors("ffn")) == 2


def test_killed_it_goes_on_with_its_settings(deployment: Controlled) -> None:
    launch.pause(deployment.name)
    launch.set_policy(deployment.name, "static", {"attention": 2}, "on")
    before = deployment.state()
    with Streams(deployment.url, "e2e-key-one", deployment.spec.served_name) as streams:
        os.kill(before["pid"], signal.SIGKILL)
        until(lambda: back(deployment, before["pid"]), "a new process")
    assert streams.tokens
    after = deployment.state()
    for key in ("policy", "parameters", "mode", "paused"):
        assert after[key] == before[key], key
    launch.resume(deployment.name)
    deployment.decided("what it was asked before it died", target="2A2F", outcome="done")


def back(deployment: Controlled, pid: int) -> bool:
    try:
        state = deployment.state()
    except Exception:  # it restarts
        return False
    return state["pid"] != pid and state["last"] is not None


def test_a_role_without_room_is_held_and_the_other_adjusted(deployment: Controlled) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    free = ray.available_resources()["CPU"]
    hog = placement_group([{"CPU": free - 0.1}])
    try:
        ray.get(hog.ready(), timeout=30)
        launch.set_policy(deployment.name, "static", {"attention": 2}, "on")
        until(
            lambda: "cannot_place" in deployment.newest().reasons,
            "it says that there is no room",
        )
        assert len(deployment.actors("attention")) == 1
        launch.set_policy(deployment.name, parameters={"attention": 2, "ffn": 1})
        report = deployment.decided("the other role is adjusted", target="1A1F", outcome="done")
        assert "cannot_place" in report.reasons
    finally:
        remove_placement_group(hog)


def test_a_bad_policy_changes_nothing(deployment: Controlled) -> None:
    before = deployment.state()
    for name, parameters in (("statics", {}), ("static", {"atention": 1}), ("nowhere:None", {})):
        with pytest.raises(BadPolicy):
            launch.set_policy(deployment.name, name, parameters)
    after = deployment.state()
    assert {**after, "last": None} == {**before, "last": None}


def test_by_the_command_line(deployment: Controlled) -> None:
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(app, ["policy", *arguments, "--name", deployment.name])
        assert done.exit_code == 0, done.output
        return done.output

    assert "advise" in run("get")
    assert "2A2F" in run("try", "static", "--set", "attention=2")
    assert "as_it_is" in run("log", "-n", "3") or "fixed" in run("log", "-n", "3")
    assert "paused" in run("pause") and "paused" in run("get")
    assert "acts again" in run("resume")
    assert "slo_feedback" in run("set", "slo_feedback", "--set", "high=0.85")
    assert "high=0.85" in run("get")
