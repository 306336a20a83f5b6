"""A Ray head of our own: started on loopback, behind a token, in a private folder; and stopped.

Used when there is no Ray cluster to join. Ray 2.60 gives ``ray start`` the machine's outside
address even when asked for 127.0.0.1, unless multi-node clusters are disabled by the variable that
exists for Windows and macOS; with it, every port listens on loopback only. Token authentication is
on as well, with a token file of our own (0600), because other users share the loopback interface.
Never calls ``ray stop``: that would stop other people's clusters.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from actors.errors import AffluxError
from cluster.records import RayRecord

START_S = 60.0
STOP_S = 10.0
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0": no multi-node cluster, loopback only
_LONGEST_FOLDER = 38  # Ray puts Unix sockets (at most 107 characters) 62 characters below it


class RayStartFailed(AffluxError):
    """Our Ray head did not come up; the text ends with the last lines of its log."""

    code = "ray_start_failed"


@dataclass(frozen=True)
class HeadOptions:
    """What a Ray head of our own gets.

    Args:
        object_store_bytes: shared memory for Ray's objects; afflux needs little of it.
        resources: custom resources that the spec asks for.
        labels: node labels that the spec asks for.
        dashboard: start Ray's dashboard too.
    """

    object_store_bytes: int = 200_000_000
    resources: Mapping[str, float] | None = None
    labels: Mapping[str, str] | None = None
    dashboard: bool = False


def start(options: HeadOptions, *, without_env: tuple[str, ...] = ()) -> tuple[RayRecord, str]:
    """Start a head and wait until it takes connections.

    Args:
        without_env: variables that its processes must not inherit (API keys).

    Returns:
        how to stop it, and its address.

    Raises:
        RayStartFailed: nothing is left running.
    """
    try:
        return _start(options, without_env)
    except RayStartFailed:
        # Ray gives its own processes 30 s, fixed; a machine that is busy gets a second try.
        return _start(options, without_env)


def _start(options: HeadOptions, without_env: tuple[str, ...]) -> tuple[RayRecord, str]:
    folder = _make_folder()
    ports = _free_ports(6)
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        "--node-ip-address=127.0.0.1",
        f"--port={ports[0]}",
        f"--ray-client-server-port={ports[1]}",
        f"--dashboard-port={ports[2]}",
        f"--dashboard-agent-listen-port={ports[3]}",
        f"--dashboard-agent-grpc-port={ports[4]}",
        f"--metrics-export-port={ports[5]}",
        *("--min-worker-port=0", "--max-worker-port=0"),
        f"--object-store-memory={options.object_store_bytes}",
        f"--include-dashboard={str(options.dashboard).lower()}",
        f"--temp-dir={folder / 'r'}",
        *("--disable-usage-stats", "--log-color=false", "--include-log-monitor=false"),
    ]
    if options.resources:
        command.append(f"--resources={json.dumps(dict(options.resources))}")
    if options.labels:
        command.append("--labels=" + ",".join(f"{k}={v}" for k, v in options.labels.items()))
    dropped = {"RAY_ADDRESS", *without_env}
    env = {k: v for k, v in os.environ.items() if k not in dropped} | _token_env(folder)
    # vLLM's rendezvous and UCX would listen on the outside address, for peers that can't be there.
    env["VLLM_HOST_IP"] = "127.0.0.1"
    if sys.platform == "linux":
        env.setdefault("UCX_NET_DEVICES", "lo")
    # Ray gives its workers niceness 15; what serves must not yield to everything else.
    env.setdefault("RAY_worker_niceness", "0")
    env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # what runs there is stopped by us before
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    record = RayRecord(
        pid=process.pid, started_at=psutil.Process(process.pid).create_time(), folder=str(folder)
    )
    try:
        _wait_until_up(process, folder)
    except BaseException:
        stop(record)
        raise
    return record, f"127.0.0.1:{ports[0]}"


def alive(record: RayRecord) -> bool:
    """Whether the head still runs."""
    return _process(record) is not None


def processes(record: RayRecord) -> list[psutil.Process]:
    """The head and everything it started that still runs."""
    head = _process(record)
    found = {head.pid: head} if head else {}
    with suppress(psutil.Error):
        for child in head.children(recursive=True) if head else []:
            found[child.pid] = child
    for process in psutil.process_iter():  # a dead head's orphans are still in its session
        with suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record.pid:
                found.setdefault(process.pid, process)
    found.pop(os.getpid(), None)
    return [p for p in found.values() if p.create_time() >= record.started_at - 1.0]


def stop(record: RayRecord) -> tuple[int, tuple[int, ...]]:
    """End the head and everything it started, and remove its folder.

    Returns:
        how many processes were ended, and the pids of those that would not end.
    """
    victims = processes(record)
    head = _process(record)
    if head is not None:
        with suppress(psutil.Error):
            head.send_signal(signal.SIGTERM)
        psutil.wait_procs([head], timeout=STOP_S)
    for process in (known := {p.pid: p for p in [*victims, *processes(record)]}).values():
        with suppress(psutil.Error):
            process.kill()
    _, left = psutil.wait_procs(list(known.values()), timeout=STOP_S)
    left = [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    if not left:
        _remove(Path(record.folder))
    return len(known), tuple(p.pid for p in left)


@contextmanager
def credentials(record: RayRecord | None) -> Iterator[None]:
    """Inside, this process can connect to the head of ``record``; None changes nothing."""
    if record is None:
        yield
        return
    wanted = _token_env(Path(record.folder))
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    loopback_before = _set_loopback(True)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _set_loopback(loopback_before)


def _token_env(folder: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        _LOOPBACK_ONLY: "0",
    }


def _set_loopback(on: bool) -> bool:
    """Have an already imported Ray read the environment again; returns what it was before.

    Ray reads the variable once, at import, and caches the token; a process that talks to several
    clusters one after the other needs both refreshed.
    """
    from ray._private import ray_constants
    from ray._raylet import AuthenticationTokenLoader, Config

    before = not ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = not on
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    return before


def _make_folder() -> Path:
    """A private folder with the token file, short enough for Ray's sockets.

    Ray opens its own folder to everybody, so it gets one inside ours, which stays closed.
    """
    base = tempfile.gettempdir()
    if len(base) + len("/afflux-ray-xxxxxxxx") > _LONGEST_FOLDER:
        base = "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="afflux-ray-", dir=base))
    descriptor = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return folder


def _remove(folder: Path) -> None:
    """Remove the folder; a process that just ended may still be writing its last log line."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _wait_until_up(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        log = (folder / "head.log").read_text(errors="replace")
        if "Ray runtime started" in log:
            return
        if process.poll() is not None:
            raise RayStartFailed(f"Ray ended with exit code {process.returncode}\n{_tail(log)}")
        time.sleep(0.1)
    log = (folder / "head.log").read_text(errors="replace")
    raise RayStartFailed(f"Ray was not up within {START_S:g} s\n{_tail(log)}")


def _tail(log: str) -> str:
    return "\n".join(line for line in log.splitlines()[-15:])


def _process(record: RayRecord) -> psutil.Process | None:
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started_at) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None
