"""A Ray cluster on test hosts, as ``ray start`` makes one: a head, attention hosts, FFN hosts, or
hosts for either.

What ``ray up`` does, without SSH and set-up commands: the nodes have the addresses, labels and the
token that ``deploy/cluster.yaml`` gives them. For tests and benchmarks over several hosts.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from benchmarks.hosts import Host, Hosts, hosts
from cluster.paths import project_root

SPEC = "deploy/specs/several-hosts.yaml"
EITHER = "either"
"""Role in the label of a host that may have actors of both."""

_PORT = 6379
_CPUS = 4  # as Ray counts them; all hosts share the machine's cores
_OBJECTS = 100_000_000
_START_S = 900.0


@dataclass
class HostCluster:
    """Hosts that are nodes of one Ray; the first is the head, where the frontend and CLI run."""

    hosts: Hosts
    attention: list[Host]
    ffn: list[Host]
    either: list[Host]
    env: dict[str, str] = field(repr=False)
    labels: Callable[[Host], str] | None = None
    """More Ray labels of a host, as ``ray start --labels`` takes them."""

    @property
    def head(self) -> Host:
        """Runs no actors of ours but the frontend's."""
        return self.hosts[0]

    @property
    def url(self) -> str:
        """Of the deployment's HTTP server."""
        return f"http://{self.head.address}:8000"

    def role(self, host: Host) -> str:
        """What its label ``afflux.io/role`` says."""
        if host in self.attention or host in self.ffn:
            return "attention" if host in self.attention else "ffn"
        return EITHER if host in self.either else "head"

    def labels_of(self, host: Host) -> str:
        """Its Ray labels, as ``ray start --labels`` takes them."""
        role = f"afflux.io/role={self.role(host)}"
        return f"{role},{self.labels(host)}" if self.labels is not None else role

    def afflux(self, *words: str, timeout: float = 60.0) -> str:
        """Run the command line on the head; returns what it printed.

        Raises:
            subprocess.CalledProcessError: it failed; ``stderr`` says why.
        """
        return self.head.run("afflux", *words, "--address", "auto", env=self.env, timeout=timeout)

    def up(self, settings: Sequence[str] = ()) -> None:
        """Start the deployment of ``SPEC``.

        Args:
            settings: KEY=VALUE, as for ``--set``.
        """
        options = [word for setting in settings for word in ("--set", setting)]
        model = f"model.path={project_root() / 'deploy/models/verse'}"
        spec = str(project_root() / SPEC)
        self.afflux("up", spec, "--set", model, *options, timeout=_START_S)

    def kill(self, host: Host) -> None:
        """End all of its Ray's processes at once; the host and its link stay."""
        pids = host.run("pgrep", "-f", "ray|raylet|gcs_server").split()
        host.run("bash", "-c", f"kill -9 {' '.join(pids)} || true")

    def join(self, host: Host) -> None:
        """Make it a node again, after ``kill`` or ``Hosts.cut``."""
        self.hosts.mend(host)
        host.run("ray", "stop", "--force", env=self.env, timeout=60)
        _join(self, host)

    def status(self) -> dict[str, Any]:
        """What ``afflux status --json`` says."""
        return dict(json.loads(self.afflux("status", "--json")))


@contextmanager
def host_cluster(
    attention: int,
    ffn: int,
    either: int = 0,
    env: dict[str, str] | None = None,
    labels: Callable[[Host], str] | None = None,
) -> Iterator[HostCluster]:
    """Make hosts, one for the head besides, and a Ray over them; all gone afterwards.

    Args:
        attention, ffn, either: hosts of each kind.
        env: of every process there; it shows in the list of processes, so no real keys.
        labels: see ``HostCluster.labels``.

    Raises:
        RuntimeError: hosts can't be made here. subprocess.CalledProcessError: Ray did not start.
    """
    with hosts(1 + attention + ffn + either) as made:
        # every host sees the file; in the environment it would be in the list of processes
        token = made[0].folder.parent / "ray_token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        settings = {**ray, **_quiet(), **(env or {})}
        others = iter(made.each[1:])
        cluster = HostCluster(
            made,
            attention=list(islice(others, attention)),
            ffn=list(islice(others, ffn)),
            either=list(others),
            env=settings,
            labels=labels,
        )
        for host in made:
            _join(cluster, host)
        yield cluster


def _join(cluster: HostCluster, host: Host) -> None:
    joins = (
        ["--head", f"--port={_PORT}", "--include-dashboard=false"]
        if host is cluster.head
        else [f"--address={cluster.head.address}:{_PORT}"]
    )
    host.run(
        "ray",
        "start",
        *joins,
        f"--node-ip-address={host.address}",
        f"--labels={cluster.labels_of(host)}",
        f"--num-cpus={_CPUS}",
        f"--object-store-memory={_OBJECTS}",
        "--disable-usage-stats",
        env=cluster.env,
        timeout=_START_S,
    )


def _quiet() -> dict[str, str]:
    names = ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS")
    return {name: os.environ.get(name, "1") for name in names}
