"""``ray up`` on hosts of namespaces, as its user would type it, and a look at what came of it.

Not the cluster files: every test writes its own from one in ``deploy/``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.hosts import Host, Hosts, hosts
from cluster.paths import project_root

TOKENS = 24
ENV = {"RAY_AUTH_MODE": "token"}


@dataclass
class Launched:
    """Hosts, and the file that ``ray up`` takes."""

    hosts: Hosts
    home: Path
    """Of the user: holds the file and Ray's token."""

    @property
    def file(self) -> Path:
        return self.home / "cluster.yaml"

    @property
    def head(self) -> Host:
        return self.hosts[0]

    @property
    def url(self) -> str:
        return f"http://{self.head.address}:8000"

    def write(self, data: dict[str, Any]) -> None:
        """The file, with what is the same for all: the login, and no set-up from the Internet but a
        link to this environment."""
        data["auth"] = {"ssh_user": "root", "ssh_private_key": str(self.head.key)}
        data["file_mounts"]["~/afflux"] = str(project_root())
        (path,) = [c for c in data["setup_commands"] if "afflux-venv/bin" in c]
        data["setup_commands"] = [f"ln -sfn {sys.prefix} ~/afflux-venv", path]
        self.file.write_text(yaml.safe_dump(data, width=10_000))

    def ray(self, *words: str, timeout: float = 300) -> str:
        """A command of Ray's launcher."""
        env = {**os.environ, **ENV, "HOME": str(self.home), "PYTHONPATH": str(project_root())}
        command = [str(Path(sys.executable).parent / "ray"), words[0], str(self.file), *words[1:]]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=env, cwd=self.home
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout[-3000:]} {ended.stderr[-3000:]}"
        return ended.stdout

    def afflux(self, *words: str, timeout: float = 900) -> str:
        """afflux's command line on the head."""
        return self.head.run("afflux", *words, env=ENV, timeout=timeout)

    def nodes(self) -> dict[str, str]:
        """Address -> role, of Ray's live nodes."""
        return {
            node["NodeManagerAddress"]: node["Labels"].get("afflux.io/role", "")
            for node in self.ray_nodes()
        }

    def ray_nodes(self) -> list[dict[str, Any]]:
        """Ray's live nodes, as Ray tells of them."""
        script = (
            "import json, ray; ray.init('auto', logging_level='ERROR');"
            "print('nodes', json.dumps([n for n in ray.nodes() if n['Alive']]))"
        )
        said = self.head.run("python", "-c", script, env=ENV, timeout=120).splitlines()
        (line,) = [line for line in said if line.startswith("nodes ")]  # Ray says things too
        return list(json.loads(line.removeprefix("nodes ")))

    def complete(self, host: Host, prompt: str) -> list[int]:
        """Ask for a greedy completion from a host; returns the tokens."""
        body = {"model": "verse", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        body |= {"return_token_ids": True, "ignore_eos": True}
        script = (
            "import sys, urllib.request as u;"
            "kind = {'Content-Type': 'application/json'};"
            "asked = u.Request(sys.argv[1], sys.argv[2].encode(), kind);"
            "print(u.urlopen(asked, timeout=60).read().decode())"
        )
        said = host.run("python", "-c", script, f"{self.url}/v1/completions", json.dumps(body))
        return list(json.loads(said)["choices"][0]["token_ids"])


@contextmanager
def launched(count: int, home: Path) -> Iterator[Launched]:
    """So many hosts, and a user with a token; nothing is started on them."""
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    try:
        with hosts(count) as made:
            yield Launched(made, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def processes(host: Host) -> list[str]:
    """Ray's processes on a host."""
    script = "pgrep -af 'raylet|gcs_server|ray::' || true"
    return [line for line in host.run("bash", "-c", script).splitlines() if "pgrep" not in line]
