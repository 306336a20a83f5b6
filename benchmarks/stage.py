"""A deployment of its own for a benchmark: started on a free port, asked, and taken down again.

It runs on a Ray of its own with a private state folder, so that it neither sees nor stops anybody
else's. Not for loads (``load.py``) or for what is done to its processes (``disturb.py``).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.console import Console

from benchmarks.load import Load, Request, Stream
from benchmarks.timeline import Count
from cluster.spec import ClusterSpec, load_spec
from cluster.status import ChangeReport, ClusterStatus, Role

POLL_S = 0.2
WHOLE_S = 120.0
"""How long a benchmark waits until a deployment is whole again."""

EMULATION = (
    "emulate.attention={a_s: 1.0e-5, b_s: 1.0e-3}",
    "emulate.ffn={a_s: 3.0e-4, b_s: 1.5e-3}",
    "emulate.transfer={a_s: 1.0e-9, b_s: 1.0e-4}",
)
"""Devices slow enough that the machine's own work hides behind them: with 16 streams of 150 tokens
of context, 25 ms of attention and 11 ms of experts per layer on one actor each."""


def bench_spec(
    name: str,
    *,
    attention: int,
    ffn: int,
    warm_workers: int,
    min_replicas: int = 1,
    timeout_s: float = 2.0,
    emulate: bool = False,
    overrides: Sequence[str] = (),
) -> ClusterSpec:
    """The embedded model in float32 on a free port, with room to scale on any machine.

    float32 because tokens are compared one by one: in bfloat16 another batch composition may round
    a near tie the other way.
    """
    fixed = [
        f"name={name}",
        "model.dtype=float32",
        f"attention.count={attention}",
        f"ffn.count={ffn}",
        "attention.max=6",
        "ffn.max=8",
        # Ray only counts these; small, so that any number of actors fits
        "attention.resources.cpus=0.1",
        "ffn.resources.cpus=0.1",
        "frontend.cpus=0.1",
        f"frontend.port={_free_port()}",
        "frontend.api_keys_env=null",
        "frontend.admin_keys_env=null",
        "attention.engine={max_model_len: 512, max_num_seqs: 32, enforce_eager: true, "
        "kv_cache_memory_bytes: 67108864}",
        f"ffn.min_replicas={min_replicas}",
        f"transport.timeout_s={timeout_s}",
        f"warm_workers={warm_workers}",
    ]
    return load_spec(None, [*fixed, *(EMULATION if emulate else ()), *overrides])


def others_cpu() -> float:
    """Share of the machine's CPU time in use right now, in percent; asked before a deployment
    starts, it says how much company a measurement had."""
    return float(psutil.cpu_percent(1.0))


class Stage:
    """A running deployment, and the verbs that benchmarks use on it."""

    def __init__(self, spec: ClusterSpec, url: str, record: Any):
        self.spec = spec
        self.url = url
        self.record = record
        self.unclean = False
        self.counts: list[Count] = []

    # -- load ------------------------------------------------------------------------------------

    def load(self, requests: Sequence[Request], *, concurrency: int, minimum: int = 0) -> Load:
        """A load against this deployment, running already."""
        return Load(
            self.url, self.spec.served_name, requests, concurrency=concurrency, minimum=minimum
        )

    def reference(self, requests: Sequence[Request], concurrency: int) -> list[Stream]:
        """Every request once, undisturbed; what later runs are compared with."""
        load = self.load(requests, concurrency=concurrency, minimum=len(requests))
        try:
            load.stop()
            return load.streams(600.0)
        finally:
            load.close()

    # -- questions and verbs ---------------------------------------------------------------------

    def status(self) -> ClusterStatus | None:
        """What the manager says; None while it is away."""
        from cluster import launcher
        from cluster.connection import ManagerAway, NotRunning

        at = time.time()
        try:
            seen = launcher.status(self.spec.name)
        except (ManagerAway, NotRunning):
            return None
        self.counts.append(Count(at, *ready_counts(seen)))
        return seen

    def changes(self) -> list[ChangeReport]:
        """The newest changes, newest last; none while the manager is away."""
        from cluster import launcher
        from cluster.connection import ManagerAway, NotRunning

        try:
            return launcher.changes(self.spec.name)
        except (ManagerAway, NotRunning):
            return []

    def scale(self, attention: int, ffn: int) -> ChangeReport:
        """Scale and wait for the end of it."""
        from cluster import launcher

        return launcher.scale(self.spec.name, attention=attention, ffn=ffn, wait=True)

    def flip(self, actor: str, to: Role) -> ChangeReport:
        """Flip and wait for the end of it."""
        from cluster import launcher

        return launcher.flip(self.spec.name, actor, to=to, wait=True)

    def names(self, role: Role) -> list[str]:
        """Actors of a role that serve, oldest first.

        Raises:
            ManagerAway: the manager could not be asked.
        """
        from cluster import launcher

        seen = launcher.status(self.spec.name).actors
        found = [actor.name for actor in seen if actor.role == role and is_ready(actor)]
        return sorted(found, key=lambda name: int(name.rpartition("-")[2]))

    def wait_whole(
        self,
        attention: int,
        ffn: int,
        *,
        without: str = "",
        manager_not: int | None = None,
        warm: bool = False,
        timeout_s: float = WHOLE_S,
    ) -> float | None:
        """Wait until the deployment is whole: healthy, so many actors ready, no change under way.

        Args:
            without: an actor that must not be among them.
            manager_not: a process that must not be the manager's.
            warm: the warm workers must be ready too.

        Returns:
            Unix time at which it was seen so; None if it was not in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self.status()
            if seen is not None and is_whole(seen, attention, ffn):
                gone = without not in {actor.name for actor in seen.actors if is_ready(actor)}
                other = manager_not is None or seen.manager_pid != manager_not
                if gone and other and (not warm or seen.warm >= seen.warm_target):
                    return time.time()
            if time.monotonic() > deadline:
                return None
            time.sleep(POLL_S)

    # -- processes -------------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """Every process of the deployment, Ray's own included."""
        from cluster import ray_head

        return ray_head.processes(self.record.ray)

    def pids(self, kind: Literal["attention", "ffn", "manager"]) -> dict[str, int]:
        """Processes of the actors of a role that serve, or that of the manager, by name.

        Raises:
            ManagerAway: the manager could not be asked.
        """
        from cluster import launcher

        seen = launcher.status(self.spec.name)
        if kind == "manager":
            return {"manager": seen.manager_pid} if seen.manager_pid else {}
        actors = [actor for actor in seen.actors if actor.role == kind and is_ready(actor)]
        return {actor.name: actor.pid for actor in actors if actor.pid}

    def frontends(self) -> list[int]:
        """Processes of the HTTP server's replicas."""
        found = []
        for process in self.processes():
            with suppress(psutil.Error):
                if any("ServeReplica" in word for word in process.cmdline()[:1]):
                    found.append(process.pid)
        return found

    def wait_frontends(self, count: int, gone: int, timeout_s: float = WHOLE_S) -> float | None:
        """Wait for ``count`` replicas without the process ``gone``; Unix time, or None if late."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pids = self.frontends()
            if len(pids) >= count and gone not in pids:
                return time.time()
            time.sleep(POLL_S)
        return None

    def keep_logs(self) -> Path:
        """Copy all logs to where they outlive the deployment; returns the folder."""
        kept = Path(tempfile.mkdtemp(prefix=f"{self.spec.name}-logs-"))
        logs = Path(self.record.ray.folder) / "r" / "session_latest" / "logs"
        with suppress(OSError, shutil.Error):  # some files may come and go
            shutil.copytree(logs, kept, dirs_exist_ok=True, ignore_dangling_symlinks=True)
        return kept


@contextmanager
def deployment(spec: ClusterSpec, console: Console) -> Iterator[Stage]:
    """Inside, ``spec`` runs and this process is connected to its Ray; afterwards it is down,
    whatever happened. Logs are kept when something was wrong (``Stage.unclean``, or an error)."""
    from cluster import launcher, records
    from cluster.status import ActorEvent

    words = f"starting {spec.attention.count}A{spec.ffn.count}F"
    with _private_state(), _interruptible():
        with console.status(words) as spinner:

            def tell(event: ActorEvent) -> None:
                spinner.update(f"{words}: {event.actor or event.detail} {event.state}")

            handle = launcher.up(spec, address="local", on_event=tell)
        try:
            record = records.load(spec.name)
            assert record is not None and record.ray is not None
            stage = Stage(spec, handle.url, record)
            try:
                with launcher.connected(record), _interruptible():  # Ray has put its own in place
                    yield stage
            except BaseException:
                stage.unclean = True
                raise
            finally:
                if stage.unclean:
                    console.print(f"logs: {stage.keep_logs()}", highlight=False)
        finally:
            report = launcher.down(spec.name)
            if report.left:
                console.print(f"these processes did not end: {report.left}", style="red")


@contextmanager
def watched(stage: Stage, every_s: float = 1.0) -> Iterator[list[Count]]:
    """Inside, the status is looked at now and then on a thread of its own. The list gets how many
    actors serve, as seen by this and by everybody else who asks the stage."""
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            stage.status()
            end.wait(every_s)

    stage.counts = []
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield stage.counts
    finally:
        end.set()
        thread.join(30)


def is_ready(actor: Any) -> bool:
    """Whether the actor takes part in serving."""
    return actor.state == "ready"


def ready_counts(status: ClusterStatus) -> tuple[int, int]:
    """Attention and FFN actors that serve."""
    roles = [actor.role for actor in status.actors if is_ready(actor)]
    return roles.count("attention"), roles.count("ffn")


def is_whole(status: ClusterStatus, attention: int, ffn: int) -> bool:
    """Healthy, with so many actors, and no change under way."""
    busy = status.change is not None and not status.change.ended
    return status.health == "ready" and ready_counts(status) == (attention, ffn) and not busy


def commit_window(report: ChangeReport) -> tuple[float, float]:
    """Begin and end in Unix seconds of the commit of a change that has ended. Counted from its end,
    because a change may have queued before its first phase."""
    seconds = report.seconds
    end = report.started_at + seconds.get("total", 0.0) - seconds.get("release", 0.0)
    return end - seconds.get("commit", 0.0), end


@contextmanager
def _private_state() -> Iterator[None]:
    home = tempfile.mkdtemp(prefix="afflux-bench-")
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = home
    clean = False
    try:
        yield
        clean = True
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before
        if clean:  # else the logs of a failed start are in there
            shutil.rmtree(home, ignore_errors=True)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the benchmark as Ctrl-C does, so that the deployment is taken down."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _free_port() -> int:
    """A TCP port that nothing listens on, below the range that Ray's processes pick from."""
    dice = random.SystemRandom()
    while True:
        port = dice.randrange(20000, 30000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
