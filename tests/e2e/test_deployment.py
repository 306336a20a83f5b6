"""Start, status, refusals and the end of real deployments, through the launcher."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from actors.errors import AffluxError, CheckpointError
from actors.transport import trust
from cluster import launcher, ray_head, records
from cluster.names import NAMESPACE, actor_name
from cluster.preflight import LackingResources, PortInUse
from cluster.spec import ClusterSpec, SpecError, load_spec
from cluster.status import ActorEvent, ClusterHandle
from tests.e2e.conftest import KEY, OTHER_KEY, free_port


def test_progress_per_actor(cluster: ClusterHandle, events: list[ActorEvent]) -> None:
    for actor in ("attention-0", "ffn-0", "ffn-1"):
        states = [event.state for event in events if event.actor == actor]
        order = ["pending", "placed", "importing", "loading", "connected", "ready"]
        assert list(dict.fromkeys(states)) == order, actor
    seconds = [event.seconds for event in events]
    assert seconds == sorted(seconds)


def test_status(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    report = launcher.status(spec.name)
    assert (report.health, report.url) == ("ready", cluster.url)
    assert report.epoch >= 1  # other tests change the numbers, and change them back
    attention, *ffn = report.actors
    assert attention.role == "attention" and [actor.role for actor in ffn] == ["ffn", "ffn"]
    assert set(attention.peers) == {actor.name for actor in ffn}
    for actor in report.actors:
        assert actor.state == "ready" and actor.placement_group and actor.node_ip
        assert actor.pid is not None and psutil.pid_exists(actor.pid)
    per_layer = [sum(a.experts[layer] for a in ffn if a.experts) for layer in ffn[0].experts or {}]
    assert per_layer and len(set(per_layer)) == 1
    totals = [actor.expert_total or 0 for actor in ffn]
    assert max(totals) - min(totals) <= 1
    assert all((actor.allocated_bytes or 0) > 0 for actor in ffn)


def test_one_placement_group_per_actor(in_ray: None, spec: ClusterSpec) -> None:
    import ray

    groups = ray.util.placement_group_table().values()
    made = sorted(g["name"] for g in groups if g["state"] == "CREATED")
    actors = launcher.status(spec.name).actors
    assert len(actors) == 3
    assert made == sorted(f"{spec.name}:{actor.name}" for actor in actors)


def test_an_actor_meets_nobody_without_the_deployments_secret(
    in_ray: None, spec: ClusterSpec
) -> None:
    """Not by changing an offer that it was given, nor by sealing it with a secret of its own."""
    import ray
    from ray.exceptions import RayTaskError

    ffn = next(a for a in launcher.status(spec.name).actors if a.role == "ffn")
    handle = ray.get_actor(actor_name(spec.name, ffn.name), namespace=NAMESPACE)
    theirs = ray.get(handle.offer.remote("stranger"))
    forged = replace(theirs, name="stranger", peer=ffn.name)
    for offer in (forged, trust.sealed(b"", forged)):
        with pytest.raises(RayTaskError, match="not made with"):
            ray.get(handle.connect.remote(offer))
    assert "stranger" not in ray.get(handle.info.remote())["peers"]


def test_everything_listens_on_loopback(cluster: ClusterHandle) -> None:
    """But for a port of Serve's replica whose address Ray fixes: that one must want the token."""
    record = records.load(cluster.name)
    assert record is not None and record.ray is not None
    for process in ray_head.processes(record.ray):
        for connection in process.net_connections(kind="inet"):
            if connection.status != psutil.CONN_LISTEN:
                continue
            address = connection.laddr.ip.removeprefix("::ffff:")
            if "ServeReplica" in process.cmdline()[0] and address == "::":
                assert _grpc_code(connection.laddr.port) == "UNAUTHENTICATED"
            else:
                assert address in ("127.0.0.1", "::1"), (process.cmdline()[:3], address)


def _grpc_code(port: int) -> str:
    """What a gRPC server answers to a caller without the token."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        try:
            call(b"", timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def test_keys_are_nowhere(cluster: ClusterHandle) -> None:
    """No API key in any process's environment or arguments, in a log or in the state file."""
    record = records.load(cluster.name)
    assert record is not None and record.ray is not None
    for process in ray_head.processes(record.ray):
        text = " ".join([*process.cmdline(), *process.environ().values()])
        assert KEY not in text and OTHER_KEY not in text
    files = [*records.state_folder().rglob("*"), *Path(record.ray.folder).rglob("*.log")]
    files += [*Path(record.ray.folder).rglob("*.err"), *Path(record.ray.folder).rglob("*.out")]
    for file in files:
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file


def test_serves_access_log_is_written(cluster: ClusterHandle, http: httpx.Client) -> None:
    """It was not: vLLM closed its handler, and every record stayed in the replica's memory."""
    record = records.load(cluster.name)
    assert record is not None and record.ray is not None
    logs = [*Path(record.ray.folder).rglob("replica_*frontend*.log")]

    def lines() -> int:
        return sum(log.read_text().count(" GET / 200 ") for log in logs)

    before, end = lines(), time.monotonic() + 10
    assert http.get("/v1/models").status_code == 200
    while lines() == before:  # the line comes after the answer
        assert time.monotonic() < end, "the request is not in the log"
        time.sleep(0.05)


def test_up_again_is_the_same_deployment(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    again = launcher.up(spec)
    assert again.already_running and again.url == cluster.url


def test_the_same_name_with_another_spec(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    other = spec.model_copy(update={"startup_timeout_s": 77.0})
    with pytest.raises(launcher.AlreadyUp, match=f"afflux down --name {spec.name}"):
        launcher.up(other)
    assert httpx.get(f"{cluster.url}/health").status_code == 200


def test_a_taken_port(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    other = spec.model_copy(update={"name": "other"})
    began = time.monotonic()
    with pytest.raises(PortInUse, match=str(spec.frontend.port)):
        launcher.up(other, address="local")
    assert time.monotonic() - began < 3
    assert records.load("other") is None


def test_serve_on_another_port_of_the_same_ray(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    frontend = spec.frontend.model_copy(update={"port": free_port()})
    other = spec.model_copy(update={"name": "other", "frontend": frontend})
    record = records.load(spec.name)
    assert record is not None
    with ray_head.credentials(record.ray):
        with pytest.raises(launcher.ServeElsewhere, match=f"port={spec.frontend.port}"):
            launcher.up(other, address=cluster.address)
        same_port = other.model_copy(update={"frontend": spec.frontend})
        with pytest.raises(launcher.ServeElsewhere, match="at '/' already"):
            launcher.up(same_port, address=cluster.address)
    assert httpx.get(f"{cluster.url}/health").status_code == 200


def test_lacking_resources(cluster: ClusterHandle, spec: ClusterSpec, in_ray: None) -> None:
    """Asked of a manager directly: the launcher would stop at Serve's port first."""
    import ray

    from cluster.manager import connect_manager

    big = load_spec(None, ["name=big", "ffn.resources.cpus=900", "ffn.resources.gpus=4"])
    manager = connect_manager(big)
    with pytest.raises(ray.exceptions.RayTaskError) as error:
        ray.get(manager.start.remote(big.model_dump(mode="json")), timeout=30)
    ray.kill(manager)
    cause = error.value.cause
    assert isinstance(cause, LackingResources)
    assert "CPU: 1800.25 needed" in cause.message and "GPU: 8 needed, 0 free" in cause.message
    assert httpx.get(f"{cluster.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["ffn.count=40", "ffn.max=40"], SpecError, "ffn.count"),
        (["model.path=/no/such/folder"], SpecError, "/no/such/folder"),
        (["ffn.resources.gpus=4"], LackingResources, "GPU: 8 needed, 0 free"),
    ],
)
def test_a_start_that_cannot_work_leaves_nothing(
    state_home: Path, overrides: list[str], error: type[AffluxError], words: str
) -> None:
    """The last is found out inside a Ray of our own, which must be gone afterwards."""
    before = _ray_folders()
    notes: list[str] = []
    bad = load_spec(None, ["name=bad", f"frontend.port={free_port()}", *overrides])
    began = time.monotonic()
    with pytest.raises(error, match=words):
        launcher.up(bad, address="local", on_event=lambda event: notes.append(event.detail))
    if error is LackingResources:
        kept = next(note for note in notes if note.startswith("logs of the failed start"))
        assert (Path(kept.split(": ", 1)[1]) / "gcs_server.out").is_file()
    assert time.monotonic() - began < 60
    assert records.load("bad") is None
    assert not launcher.down("bad", address="local").found
    assert _ray_folders() <= before, "a Ray head was left behind"


def _ray_folders() -> set[str]:
    """Folders of our own Ray heads that running processes of this user mention."""
    found = set()
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        found |= {word for word in words if word.startswith("--temp-dir=")}
    return found


def test_a_spec_that_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("model: {path: deploy/models/verse}\nattention: {count: 0}\nlane: 3\n")
    with pytest.raises(SpecError) as error:
        load_spec(file)
    assert "lane" in error.value.message and "attention.count" in error.value.message


def test_a_dense_model(dense_checkpoint: Path) -> None:
    from cluster.preflight import check_model

    with pytest.raises(CheckpointError) as error:
        check_model(load_spec(None, [f"model.path={dense_checkpoint}"]))
    assert error.value.code == "dense_model"


def test_status_and_down_of_nothing(state_home: Path) -> None:
    with pytest.raises(launcher.NotRunning):
        launcher.status("nothing", address="local")
    assert not launcher.down("nothing", address="local").found
