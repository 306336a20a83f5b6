"""``ray up deploy/cluster.yaml`` on hosts of namespaces: a deployment, one more host, ``ray down``.

The file as it is but for what it tells a user to set: addresses, the user, and instead of the
set-up command, which installs from the Internet, a link to this environment.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from benchmarks.hosts import Host, Hosts, hosts, why_not
from cluster.paths import project_root
from tests.e2e.plain import plain_tokens
from tests.e2e.streams import PROMPTS
from tests.e2e.test_elastic import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

TOKENS = 24
ROLES = ("head", "attention", "ffn", "ffn")


@dataclass
class Cluster:
    """Hosts, and the file that ``ray up`` takes for the first few of them."""

    hosts: Hosts
    home: Path

    @property
    def file(self) -> Path:
        return self.home / "cluster.yaml"

    def write(self, workers: int) -> None:
        """``deploy/cluster.yaml`` with so many workers."""
        data = yaml.safe_load((project_root() / "deploy/cluster.yaml").read_text())
        head, *others = self.hosts.each[: 1 + workers]
        data["provider"] |= {"head_ip": head.address, "worker_ips": [h.address for h in others]}
        data["auth"] = {"ssh_user": "root", "ssh_private_key": str(head.key)}
        data["min_workers"] = data["max_workers"] = workers
        data["file_mounts"]["~/afflux"] = str(project_root())
        (path,) = [c for c in data["setup_commands"] if "afflux-venv/bin" in c]
        data["setup_commands"] = [f"ln -sfn {sys.prefix} ~/afflux-venv", path]
        self.file.write_text(yaml.safe_dump(data))

    def ray(self, *words: str, timeout: float = 300) -> str:
        """A command of Ray's launcher, as its user would type it."""
        env = {**os.environ, "HOME": str(self.home), "RAY_AUTH_MODE": "token"}
        command = [str(Path(sys.executable).parent / "ray"), words[0], str(self.file), *words[1:]]
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=env, cwd=self.home
        )
        assert ended.returncode == 0, f"{words}: {ended.stdout[-3000:]} {ended.stderr[-3000:]}"
        return ended.stdout

    def nodes(self) -> dict[str, str]:
        """Address -> role, of Ray's live nodes."""
        script = (
            "import json, ray; ray.init('auto', logging_level='ERROR');"
            "print('nodes', json.dumps({n['NodeManagerAddress']: n['Labels'].get('afflux.io/role')"
            " for n in ray.nodes() if n['Alive']}))"
        )
        env = {"RAY_AUTH_MODE": "token"}
        said = self.hosts[0].run("python", "-c", script, env=env).splitlines()
        (line,) = [line for line in said if line.startswith("nodes ")]  # Ray says things too
        return dict(json.loads(line.removeprefix("nodes ")))

    def wanted(self, count: int) -> dict[str, str]:
        pairs = zip(self.hosts.each[:count], ROLES, strict=False)
        return {host.address: role for host, role in pairs}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with hosts(len(ROLES)) as made:
        for host, role in zip(made, ROLES, strict=True):
            host.run("bash", "-c", f"echo {role} > ~/.afflux-role")
        yield Cluster(made, home)
    shutil.rmtree(home, ignore_errors=True)


def processes(host: Host) -> list[str]:
    """Ray's processes on a host."""
    script = "pgrep -af 'raylet|gcs_server|ray::' || true"
    return [line for line in host.run("bash", "-c", script).splitlines() if "pgrep" not in line]


def complete(host: Host, url: str, prompt: str) -> dict[str, Any]:
    """Ask from a host."""
    body = {"model": "verse", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True}
    script = (
        "import sys, urllib.request as u;"
        "r = u.Request(sys.argv[1], sys.argv[2].encode(), {'Content-Type': 'application/json'});"
        "print(u.urlopen(r, timeout=60).read().decode())"
    )
    said = host.run("python", "-c", script, f"{url}/v1/completions", json.dumps(body))
    return dict(json.loads(said)["choices"][0])


def test_from_ray_up_to_ray_down(cluster: Cluster) -> None:
    """One test, because every step needs the one before."""
    cluster.write(workers=2)
    cluster.ray("up", "-y", "--no-config-cache")
    until(lambda: cluster.nodes() == cluster.wanted(3), "the hosts have joined", seconds=240)

    spec = "~/afflux/deploy/specs/several-hosts.yaml"
    up = f"afflux up {spec} --address auto --set model.dtype=float32 --set ffn.count=1"
    cluster.ray("exec", up)
    url = f"http://{cluster.hosts[0].address}:8000"
    assert httpx.get(f"{url}/health", timeout=30).status_code == 200, "from outside of the cluster"
    answers = [complete(cluster.hosts[2], url, prompt)["token_ids"] for prompt in PROMPTS]
    assert answers == list(plain_tokens(TOKENS).values())

    cluster.ray("up", "-y", "--no-config-cache", "--no-restart")
    assert complete(cluster.hosts[2], url, PROMPTS[0])["token_ids"] == answers[0], "it serves on"

    cluster.write(workers=3)
    cluster.ray("up", "-y", "--no-config-cache")  # ends Ray and what runs on it, as Ray says
    until(lambda: cluster.nodes() == cluster.wanted(4), "the new host has joined", seconds=240)

    cluster.ray("down", "-y")
    # Ray's local provider stops the head only; a raylet that has lost its head gives up after a
    # minute (gcs_rpc_server_reconnect_timeout_s).
    until(lambda: not any(map(processes, cluster.hosts)), "nothing is left", seconds=180)
