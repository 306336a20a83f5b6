"""A cloud for Ray's autoscaler whose machines are the hosts of ``benchmarks.hosts``.

What is on is in a file that all hosts see, because ``ray up`` asks from outside and the autoscaler
from the head. A host that is switched on has its sshd already, a host that is switched off loses
every other process at once. Only for tests.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from ray.autoscaler.node_provider import NodeProvider

Machines = dict[str, dict[str, str]]
"""Address -> Ray's tags; no tags: switched off."""

_SSH = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")


class HostProvider(NodeProvider):
    """For ``provider: {type: external, module: ..., machines: FILE, key: FILE}``."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str):
        super().__init__(provider_config, cluster_name)
        self._file = Path(provider_config["machines"])
        self._key = provider_config["key"]

    @contextmanager
    def _machines(self) -> Iterator[Machines]:
        with FileLock(self._file.with_suffix(".lock")):
            machines: Machines = json.loads(self._file.read_text())
            before = json.dumps(machines)
            yield machines
            if json.dumps(machines) != before:
                self._file.write_text(json.dumps(machines))

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        with self._machines() as machines:
            return [
                address
                for address, tags in machines.items()
                if tags and tag_filters.items() <= tags.items()
            ]

    def is_running(self, node_id: str) -> bool:
        with self._machines() as machines:
            return bool(machines[node_id])

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        with self._machines() as machines:
            return machines[node_id]

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        with self._machines() as machines:
            machines[node_id] |= tags

    def internal_ip(self, node_id: str) -> str:
        return node_id

    def external_ip(self, node_id: str) -> str:
        return node_id

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        with self._machines() as machines:
            off = [address for address, its in machines.items() if not its]
            if len(off) < count:
                raise RuntimeError(f"{count} machines were asked for, {len(off)} are left")
            for address in off[:count]:
                machines[address] = dict(tags)

    def terminate_node(self, node_id: str) -> None:
        options = [word for one in (*_SSH, "ConnectTimeout=5") for word in ("-o", one)]
        command = ["ssh", "-i", self._key, *options, f"root@{node_id}", "kill -9 -1"]
        subprocess.run(command, timeout=30, capture_output=True)  # takes the login with it
        with self._machines() as machines:
            machines[node_id] = {}
