"""The spec of a benchmark's deployment, and when a deployment is whole."""

import pytest

from benchmarks.stage import bench_spec, commit_window, is_whole, ready_counts
from cluster.preflight import check_model
from cluster.spec import SpecError
from cluster.status import ActorStatus, ChangeReport, ClusterStatus


def spec(**changed):
    return bench_spec("bench-x", **({"attention": 2, "ffn": 3, "warm_workers": 1} | changed))


def test_the_spec_is_a_good_one_with_room_to_scale():
    made = spec(min_replicas=2, timeout_s=1.5, overrides=["membership.silence_s=3"])
    assert check_model(made).num_experts
    assert made.model.dtype == "float32" and made.emulate is None
    assert (made.attention.count, made.ffn.count, made.ffn.min_replicas) == (2, 3, 2)
    assert made.attention.max > 3 and made.ffn.max > 4
    assert (made.transport.timeout_s, made.membership.silence_s) == (1.5, 3)
    actors = made.attention.max + made.ffn.max + made.warm_workers
    assert actors * made.ffn.resources.cpus < 2.0
    assert spec().frontend.port != 8000


def test_emulation_is_asked_for():
    emulate = spec(emulate=True).emulate
    assert emulate is not None and emulate.ffn.a_s > 0 and emulate.attention.a_s > 0


def test_a_wrong_override_is_refused():
    with pytest.raises(SpecError, match="no_such"):
        spec(overrides=["no_such=1"])


def status(*states: str, health: str = "ready", change: ChangeReport | None = None):
    roles = ("attention", "attention", "ffn", "ffn", "ffn")
    actors = tuple(
        ActorStatus(name=f"{role}-{i}", role=role, state=state)
        for i, (role, state) in enumerate(zip(roles, states, strict=False))
    )
    return ClusterStatus(
        name="x", url=None, health=health, epoch=1, lanes=1, model="m", actors=actors, change=change
    )


def report(phase: str) -> ChangeReport:
    return ChangeReport(
        number=1,
        verb="repair",
        text="",
        phase=phase,
        started_at=100.0,
        seconds={"prepare": 2.0, "commit": 0.5, "release": 1.0, "total": 4.5},
    )


def test_whole_is_healthy_complete_and_idle():
    assert is_whole(status(*["ready"] * 5), 2, 3)
    assert is_whole(status(*["ready"] * 5, change=report("done")), 2, 3)
    assert not is_whole(status(*["ready"] * 5, change=report("prepare")), 2, 3)
    assert not is_whole(status(*["ready"] * 5, health="degraded"), 2, 3)
    assert not is_whole(status("ready", "failed", *["ready"] * 3), 2, 3)
    assert ready_counts(status("ready", "draining", "ready", "loading")) == (1, 1)


def test_a_commit_follows_the_queue_and_the_preparations():
    assert commit_window(report("done")) == (103.0, 103.5)
