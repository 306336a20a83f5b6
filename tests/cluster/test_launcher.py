"""The launcher's own decisions: records, addresses, what is refused before anything starts.

Starting and stopping for real is in ``tests/e2e``.
"""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray")

from cluster import connection, launcher, preflight, ray_head, records
from cluster.app import application
from cluster.preflight import PortInUse
from cluster.records import RayRecord, Record
from cluster.spec import make_spec


@pytest.fixture(autouse=True)
def private_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def dead_ray(folder: Path) -> RayRecord:
    return RayRecord(pid=2**22 - 1, started_at=1.0, folder=str(folder))


def test_records_come_back() -> None:
    assert records.load("x") is None
    record = Record(name="x", address="127.0.0.1:1", url="http://127.0.0.1:8000")
    records.save(record)
    assert records.load("x") == record
    records.forget("x")
    records.forget("x")
    assert records.load("x") is None


def test_a_broken_record_is_none() -> None:
    records.state_folder().mkdir(parents=True)
    (records.state_folder() / "x.json").write_text("{")
    assert records.load("x") is None


def test_down_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "find_ray", lambda address: None)
    report = launcher.down("nothing")
    assert not report.found and report.left == ()


def test_status_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "find_ray", lambda address: None)
    with pytest.raises(launcher.NotRunning, match="afflux up --name nothing"):
        launcher.status("nothing")


def test_down_clears_a_dead_ray(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    ray = dead_ray(folder)
    records.save(Record(name="x", address="127.0.0.1:1", url="", ray=ray))
    with pytest.raises(launcher.NotRunning, match="afflux down --name x"):
        launcher.status("x")
    report = launcher.down("x")
    assert report.found and report.stopped_ray and report.left == ()
    assert not folder.exists()
    assert records.load("x") is None
    assert not launcher.down("x", address="local").found


def test_a_reused_pid_is_not_ours(tmp_path: Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    ray = RayRecord(pid=os.getpid(), started_at=1.0, folder=str(folder))
    assert not ray_head.alive(ray)
    _, left = ray_head.stop(ray)
    assert psutil.pid_exists(os.getpid()) and left == ()


def test_port_in_use_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_head, "start", lambda *_, **__: pytest.fail("Ray was started"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = make_spec({"model": {"path": "/x"}, "frontend": {"port": port}})
        with pytest.raises(PortInUse, match=f"127.0.0.1:{port}.*--set frontend.port"):
            launcher.up(spec, address="local")


def test_keys_stay_out_of_rays_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def start(_: object, *, without_env: tuple[str, ...]) -> None:
        asked.append(without_env)
        raise launcher.NoRay("far enough")

    monkeypatch.setattr(ray_head, "start", start)
    monkeypatch.setattr(preflight, "check_port", lambda *_: None)
    monkeypatch.setattr(preflight, "check_model", lambda *_: None)
    for names in ({}, {"api_keys_env": None, "admin_keys_env": "MINE"}):
        spec = make_spec({"model": {"path": "/x"}, "frontend": names})
        with pytest.raises(launcher.NoRay, match="far enough"):
            launcher.up(spec, address="local")
    assert asked == [("AFFLUX_API_KEYS", "AFFLUX_ADMIN_KEYS"), ("MINE",)]


def test_the_application_carries_digests_of_both_kinds_of_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AFFLUX_API_KEYS", "api-key")
    monkeypatch.setenv("AFFLUX_ADMIN_KEYS", "admin-key")
    app = application(make_spec({"model": {"path": "/x"}}), owned_by_serve=True)
    _, keys, admin_keys, *_ = app._bound_deployment.init_args
    for ring, key, other in ((keys, "api-key", "admin-key"), (admin_keys, "admin-key", "api-key")):
        assert ring.accepts(f"Bearer {key}") and not ring.accepts(f"Bearer {other}")


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9"),
        ("0.0.0.0", "http://127.0.0.1:9"),
        ("::", "http://127.0.0.1:9"),
        ("::1", "http://[::1]:9"),
        ("10.0.0.7", "http://10.0.0.7:9"),
    ],
)
def test_url(host: str, url: str) -> None:
    spec = make_spec({"model": {"path": "/x"}, "frontend": {"host": host, "port": 9}})
    assert launcher._url(spec) == url


def test_own_ray_gets_what_the_spec_names() -> None:
    spec = make_spec(
        {
            "model": {"path": "/x"},
            "attention": {
                "count": 1,
                "max": 2,
                "labels": {"role": "a", "zone": "!z"},
                "resources": {"cpus": 1.0, "custom": {"afd_attention": 1.0}},
            },
            "ffn": {"max": 3, "resources": {"cpus": 1.0, "custom": {"afd_ffn": 2.0}}},
            "frontend": {"labels": {"rack": "r"}},
        }
    )
    head = launcher._head_for(spec)
    assert head.resources == {"afd_attention": 2.0, "afd_ffn": 6.0}
    assert head.labels == {"role": "a", "rack": "r"}


def test_the_token_is_private() -> None:
    folder = ray_head._make_folder()
    try:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        token = folder / "token"
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) == 64
        assert len(str(folder)) <= ray_head._LONGEST_FOLDER
    finally:
        ray_head._remove(folder)
    assert not folder.exists()


def test_credentials_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    (tmp_path / "token").write_text("t")
    with ray_head.credentials(dead_ray(tmp_path)):
        assert os.environ["RAY_AUTH_MODE"] == "token"
        assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(tmp_path / "token")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


@pytest.mark.parametrize("address", ["10.9.8.7:6379", "ray://h:1"])
def test_a_given_address_is_taken_as_it_is(address: str) -> None:
    assert connection.find_ray(address) == address


def test_local_means_a_new_ray() -> None:
    assert connection.find_ray("local") is None


def test_a_slow_proxy_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve ends a proxy that takes 5 s to start, and starts another."""
    from ray import serve
    from ray.exceptions import ActorDiedError

    def start(**_: object) -> None:
        raise ActorDiedError

    ran, told = [], []
    monkeypatch.setattr(serve, "start", start)
    monkeypatch.setattr(serve, "run_many", lambda targets, **_: ran.extend(targets))
    notes = launcher._Notes(lambda event: told.append(event.detail))
    launcher._serve(make_spec({"model": {"path": "nowhere"}}), False, notes)
    assert len(ran) == 1 and "proxy again" in told[0]
