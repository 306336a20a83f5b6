"""A Prometheus of our own on this machine, for one deployment: start, look, stop.

The configuration is ``deploy/prometheus/prometheus.yml`` with this deployment's address in it, so
rules and alerts are those that a real installation loads. It listens on loopback, keeps its data in
a folder of the deployment, and one small record says which process it is. Installs nothing.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from actors.errors import AffluxError
from dashboards.ask import NoAnswer, get

PORT = 9090
"""Prometheus' usual port; taken if it is free and no other was asked for."""

HOW_TO_INSTALL = (
    "install it: 'apt-get install prometheus' on Debian and Ubuntu (then 'systemctl disable --now "
    "prometheus', unless the system's own is wanted too), 'brew install prometheus', or a release "
    "from https://prometheus.io/download with its folder on PATH"
)
START_S = 60.0
STOP_S = 20.0  # it writes what it holds in memory
_ASK_S = 5.0


class NoPrometheus(AffluxError):
    """There is no ``prometheus`` to start."""

    code = "no_prometheus"


class PrometheusFailed(AffluxError):
    """It did not start, did not take the configuration, or would not end."""

    code = "prometheus_failed"


@dataclass(frozen=True)
class Running:
    """One Prometheus of ours.

    Attributes:
        pid, started_at: which process; the Unix time guards against a reused pid.
        url: of its HTTP interface.
        discovery: the manager's service discovery that it reads.
    """

    pid: int
    started_at: float
    url: str
    discovery: str


@dataclass(frozen=True)
class TargetState:
    """One page as Prometheus sees it: ``health`` is up, down or unknown."""

    url: str
    job: str
    health: str
    error: str


def executable() -> str:
    """Path of the installed Prometheus.

    Raises:
        NoPrometheus: none is on PATH.
    """
    found = shutil.which("prometheus")
    if found is None:
        raise NoPrometheus(f"found no program 'prometheus' on PATH; {HOW_TO_INSTALL}")
    return found


def configuration(template: str, rules: Path, discovery: str) -> str:
    """The project's configuration for one deployment, as YAML.

    Args:
        template: text of ``prometheus.yml``.
        rules: the folder that its relative names of rule files count from.
        discovery: URL of the manager's service discovery; takes the place of every such URL.

    Raises:
        ValueError: the template has no service discovery over HTTP.
    """
    config: dict[str, Any] = yaml.safe_load(template) or {}
    sources = [
        source
        for job in config.get("scrape_configs") or ()
        for source in job.get("http_sd_configs") or ()
    ]
    if not sources:
        raise ValueError("the template asks no service discovery over HTTP (http_sd_configs)")
    for source in sources:
        source["url"] = discovery
    config["rule_files"] = [str(rules / name) for name in config.get("rule_files") or ()]
    return yaml.safe_dump(config, sort_keys=False)


def start(
    folder: Path, template: Path, discovery: str, *, port: int | None = None, days: int = 15
) -> Running:
    """Start it and wait until it answers; one that runs already gets the new address.

    Args:
        folder: its own; data of an earlier one in it are kept and go on.
        template: ``prometheus.yml``, with the rule files beside it.
        discovery: URL of the manager's service discovery.
        port: None: ``PORT`` if that is free, else any; 0: any.
        days: how long data are kept.

    Raises:
        NoPrometheus: none is installed.
        PrometheusFailed: it does not start; the text ends with the last lines of its log. Or one
            runs already on another port than ``port``.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    text = template.read_text(encoding="utf-8")
    config = configuration(text, template.parent.resolve(), discovery)
    known = find(folder)
    if known is not None:
        return _keep(folder, known, config, discovery, port)
    program = executable()
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    address = f"127.0.0.1:{_choose_port(port)}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={days}d",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    began = psutil.Process(process.pid).create_time()
    running = Running(process.pid, began, f"http://{address}", discovery)
    try:
        _wait_until_loaded(running, folder, process)
    except BaseException:
        process.kill()
        process.wait()
        raise
    _record(folder).write_text(json.dumps(asdict(running)), encoding="utf-8")
    return running


def find(folder: Path) -> Running | None:
    """The one that runs in this folder; None when there is none."""
    try:
        running = Running(**json.loads(_record(folder).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return running if _process(running) is not None else None


def stop(folder: Path, *, remove_data: bool = False) -> Running | None:
    """End it; its data stay unless asked otherwise.

    Returns:
        what ran; None when nothing did.

    Raises:
        PrometheusFailed: it would not end.
    """
    running = find(folder)
    process = None if running is None else _process(running)
    if running is not None and process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
        if psutil.wait_procs([process], timeout=STOP_S)[1]:
            process.kill()
            if psutil.wait_procs([process], timeout=STOP_S)[1]:
                raise PrometheusFailed(
                    f"Prometheus (pid {running.pid}) did not end; end it by hand"
                )
    _record(folder).unlink(missing_ok=True)
    if remove_data:
        shutil.rmtree(folder, ignore_errors=True)
    return running


def targets(running: Running) -> list[TargetState]:
    """Every page that it reads or tries to.

    Raises:
        NoAnswer: it does not answer.
    """
    words = {"state": "active"}
    found = get(running.url, "/api/v1/targets", words, timeout_s=_ASK_S)["activeTargets"]
    return [
        TargetState(
            url=target["scrapeUrl"],
            job=target["labels"].get("job", ""),
            health=target["health"],
            error=target["lastError"],
        )
        for target in found
    ]


def _keep(folder: Path, known: Running, config: str, discovery: str, port: int | None) -> Running:
    """Have a running one read its configuration again."""
    if port and not known.url.endswith(f":{port}"):
        raise PrometheusFailed(
            f"a Prometheus for this deployment runs already at {known.url}, not on port {port}; "
            "stop it first: afflux observe down"
        )
    (folder / "prometheus.yml").write_text(config, encoding="utf-8")
    kept = replace(known, discovery=discovery)
    process = _process(known)
    if process is not None:
        process.send_signal(signal.SIGHUP)
    _wait_until_loaded(kept, folder)
    _record(folder).write_text(json.dumps(asdict(kept)), encoding="utf-8")
    return kept


def _choose_port(port: int | None) -> int:
    """The port that was asked for, else the usual one if it is free, else any free one."""
    for wanted in (PORT, 0) if port is None else (port,):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", wanted))
            return int(probe.getsockname()[1])
    raise PrometheusFailed(
        f"port {port} of 127.0.0.1 is in use; choose another (--port), or leave it out"
    )


def _wait_until_loaded(
    running: Running, folder: Path, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Wait until it answers with a configuration that names our service discovery."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise PrometheusFailed(
                f"Prometheus ended with exit code {process.returncode}\n{_tail(folder)}"
            )
        with suppress(NoAnswer):
            if (
                running.discovery
                in get(running.url, "/api/v1/status/config", timeout_s=_ASK_S)["yaml"]
            ):
                return
        time.sleep(0.1)
    raise PrometheusFailed(
        f"Prometheus at {running.url} did not load its configuration within {START_S:g} s\n"
        + _tail(folder)
    )


def _process(running: Running) -> psutil.Process | None:
    try:
        process = psutil.Process(running.pid)
        same = abs(process.create_time() - running.started_at) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _record(folder: Path) -> Path:
    return folder / "running.json"


def _tail(folder: Path) -> str:
    with suppress(OSError):
        return "\n".join((folder / "prometheus.log").read_text(errors="replace").splitlines()[-10:])
    return ""
