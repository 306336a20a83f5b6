"""What the manager measures, over a membership whose actors do what they are told."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray")

from actors.metrics.catalogue import of
from cluster.control_metrics import STATES, ControlMetrics, Picture, versions
from cluster.seats import Seat
from cluster.slowness import Slowness
from cluster.spec import ROLES, make_spec
from tests.cluster.test_membership import World

SPEC = make_spec(
    {
        "name": "mine",
        "model": {"path": "m"},
        "attention": {"resources": {"cpus": 2.0, "gpus": 1.0}},
        "ffn": {"resources": {"cpus": 0.5}},
        "warm_workers": 3,
    }
)


SLOW = Slowness({("ffn", "ffn-1"): 4.0}, {"ffn": 1})


class Watched:
    """A world of actors, and the metrics of its manager."""

    def __init__(self, world: World):
        self.world = world
        self.wall = 1e9
        self.metrics = ControlMetrics(SPEC, clock=lambda: world.now, wall=lambda: self.wall)

    def look(self, *seats: Seat, health: Any = "ready", warm: int = 0) -> None:
        self.metrics.look(self.world.core, seats, health, warm)

    def value(self, name: str, **labels: str) -> float | None:
        registry = self.metrics.families.registry
        return registry.get_sample_value(name, {"model_name": "m", **labels})


@pytest.fixture
def watched() -> Watched:
    return Watched(World(attention=2, ffn=3).up())


def seat(name: str, state: Any = "ready", *, placed: bool = True) -> Seat:
    role: Any = name.partition("-")[0]
    return Seat(name, role, state=state, group=object() if placed else None)


def test_every_metric_of_the_catalogue_is_filled(watched: Watched) -> None:
    watched.metrics.look(watched.world.core, (), "ready", 0, SLOW)
    assert watched.value("afd_actors_slow", role="ffn") == 1
    assert not watched.metrics.families.missing
    text = generate_latest(watched.metrics.families.registry).decode()
    found = {family.name: family for family in text_string_to_metric_families(text)}
    for name, metric in of("manager").items():
        family = found[name.removesuffix("_total")]
        assert family.type == metric.kind and family.samples, f"{name} has no series"
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.label_names)


def test_before_anything_was_started() -> None:
    metrics = ControlMetrics(SPEC)
    metrics.look(None, (), "starting", 0)
    registry = metrics.families.registry
    labels = {"model_name": "m"}
    assert registry.get_sample_value("afd_healthy", labels) == 0
    assert registry.get_sample_value("afd_attention_ffn_ratio", labels) is None
    assert registry.get_sample_value("afd_actors_target", {**labels, "role": "ffn"}) == 0


def test_actors_by_state_and_the_ratio(watched: Watched) -> None:
    watched.look(
        seat("attention-0"),
        seat("attention-1", "loading"),
        seat("ffn-0"),
        seat("ffn-1", "retired", placed=False),
        seat("ffn-2", "failed"),
        warm=2,
    )
    assert watched.value("afd_actors", role="attention", state="ready") == 1
    assert watched.value("afd_actors", role="attention", state="loading") == 1
    assert watched.value("afd_actors", role="ffn", state="ready") == 1
    assert watched.value("afd_actors", role="ffn", state="failed") == 0, "made up for long ago"
    everything = sum(
        watched.value("afd_actors", role=r, state=s) or 0 for r in ROLES for s in STATES
    )
    assert everything == 3, "who has left is not counted"
    assert watched.value("afd_actors_target", role="ffn") == 3
    assert watched.value("afd_attention_ffn_ratio") == pytest.approx(2 / 3)
    assert watched.value("afd_attention_ffn_target_ratio") == pytest.approx(2 / 3)
    assert watched.value("afd_epoch") == 1 and watched.value("afd_experts_without_holder") == 0
    assert watched.value("afd_healthy") == 1
    assert watched.value("afd_warm_workers") == 2 and watched.value("afd_warm_workers_target") == 3
    watched.look(health="degraded")
    assert watched.value("afd_healthy") == 0


def test_a_change_is_counted_once_when_it_ends(watched: Watched) -> None:
    watched.look()
    assert watched.value("afd_scale_events_total", verb="start", outcome="done") == 1
    world = watched.world
    world.core.scale({"ffn": 4}, world.now)
    world.now += 3
    watched.look()
    assert watched.value("afd_change_age_seconds") == 3
    world.now += 1  # no look in between: the age goes on
    assert watched.value("afd_change_age_seconds") == 4
    world.settle()
    watched.look()
    watched.look()
    assert watched.value("afd_change_age_seconds") == 0
    assert watched.value("afd_scale_events_total", verb="scale", outcome="done") == 1
    assert watched.value("afd_scale_events_total", verb="scale", outcome="rolled_back") == 0
    assert watched.value("afd_scale_duration_seconds_sum", phase="prepare") == pytest.approx(4)
    assert watched.value("afd_scale_duration_seconds_count", phase="total") == 2
    world.core.scale({"ffn": 4}, world.now)
    watched.look()
    assert watched.value("afd_scale_events_total", verb="scale", outcome="noop") == 1
    assert watched.value("afd_scale_duration_seconds_count", phase="total") == 2, "it took no time"


def test_a_rolled_back_change(watched: Watched) -> None:
    world = watched.world
    world.core.scale({"ffn": 4}, world.now)
    world.take()
    world.step("ffn-3", fail=True)
    world.settle()
    watched.look()
    assert watched.value("afd_scale_events_total", verb="scale", outcome="rolled_back") == 1


def test_a_loss_its_replacement_and_how_long_it_took(watched: Watched) -> None:
    watched.look()
    world = watched.world
    world.now = 10.0
    world.kill("ffn-1")
    watched.look(seat("ffn-1", "failed"))
    assert watched.value("afd_actors_lost_total", role="ffn") == 1
    assert watched.value("afd_actors", role="ffn", state="failed") == 1
    assert (watched.value("afd_experts_without_holder") or 0) > 0
    assert watched.value("afd_recovery_seconds_count", role="ffn") == 0
    world.now = 12.5
    world.settle()
    watched.look(seat("ffn-1", "failed"))
    assert watched.value("afd_actors_lost_total", role="ffn") == 1, "once"
    assert watched.value("afd_actor_restarts_total", role="ffn") == 1
    assert watched.value("afd_actor_restarts_total", role="attention") == 0
    assert watched.value("afd_recovery_seconds_count", role="ffn") == 1
    assert watched.value("afd_recovery_seconds_sum", role="ffn") == pytest.approx(2.5)
    assert watched.value("afd_actors", role="ffn", state="failed") == 0
    assert watched.value("afd_experts_without_holder") == 0


def test_a_retired_actor_is_not_lost(watched: Watched) -> None:
    watched.world.core.scale({"attention": 1, "ffn": 2}, 0.0)
    watched.world.settle()
    watched.look()
    assert [watched.value("afd_actors_lost_total", role=role) for role in ROLES] == [0, 0]


def test_reserved_seconds_go_on_between_looks(watched: Watched) -> None:
    world = watched.world
    watched.look(seat("attention-0"), seat("ffn-0"), seat("ffn-1", "pending"))
    world.now += 10
    assert watched.value("afd_cpu_seconds_total", role="attention") == 20
    assert watched.value("afd_gpu_seconds_total", role="attention") == 10
    assert watched.value("afd_cpu_seconds_total", role="ffn") == 5
    watched.look(seat("attention-0", "failed", placed=False), seat("ffn-0"), seat("ffn-1"))
    world.now += 10
    assert watched.value("afd_gpu_seconds_total", role="attention") == 10
    assert watched.value("afd_cpu_seconds_total", role="ffn") == 15


def test_the_heartbeat_is_the_last_look(watched: Watched) -> None:
    watched.wall = 1e9 + 5
    watched.look()
    watched.wall += 60
    heartbeat = watched.value("afd_manager_heartbeat_timestamp_seconds")
    assert heartbeat == 1e9 + 5, "a loop that hangs shows"


def test_what_is_running() -> None:
    metrics = ControlMetrics(SPEC)
    config = {"deployment": "mine", "lanes": "auto", "emulated": "false", "dtype": "auto"}
    registry = metrics.families.registry
    assert registry.get_sample_value("afd_config_info", {"model_name": "m", **config}) == 1
    names = ("version", "vllm", "ray", "torch", "nixl")
    build = dict(zip(names, versions(), strict=True))
    assert registry.get_sample_value("afd_build_info", {"model_name": "m", **build}) == 1
    assert "unknown" not in build.values()


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10), st.floats(0, 10)), max_size=10),
    st.floats(0, 100),
)
def test_spent_is_the_integral(steps: list[tuple[float, float, float]], last: float) -> None:
    picture, now, cpu_s, gpu_s = Picture(), 0.0, 0.0, 0.0
    for seconds, cpus, gpus in steps:
        picture = Picture(reserved={"ffn": (cpus, gpus)}, spent=picture.spent_until(now), at=now)
        now += seconds
        cpu_s, gpu_s = cpu_s + seconds * cpus, gpu_s + seconds * gpus
    assert picture.spent_until(now)["ffn"] == pytest.approx((cpu_s, gpu_s))
    later = picture.spent_until(now + last)["ffn"]
    assert later[0] >= cpu_s * (1 - 1e-9) and later[1] >= gpu_s * (1 - 1e-9), "never falls"
