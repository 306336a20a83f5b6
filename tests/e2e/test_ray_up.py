"""``ray up deploy/cluster.yaml`` on hosts of namespaces: a deployment, one more host, ``ray down``.

The file as it is but for what it tells a user to set: addresses, the user, and instead of the
set-up command, which installs from the Internet, a link to this environment.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
import yaml

from benchmarks.hosts import why_not
from cluster.paths import project_root
from cluster.ray_actors import autoscaled
from tests.e2e.plain import plain_tokens
from tests.e2e.ray_up import TOKENS, Launched, launched, processes
from tests.e2e.streams import PROMPTS
from tests.e2e.test_elastic import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ROLES = ("head", "attention", "ffn", "ffn")


def write(cluster: Launched, workers: int) -> None:
    """``deploy/cluster.yaml`` with so many workers."""
    data = yaml.safe_load((project_root() / "deploy/cluster.yaml").read_text())
    head, *others = cluster.hosts.each[: 1 + workers]
    data["provider"] |= {"head_ip": head.address, "worker_ips": [h.address for h in others]}
    data["min_workers"] = data["max_workers"] = workers
    cluster.write(data)


def wanted(cluster: Launched, count: int) -> dict[str, str]:
    pairs = zip(cluster.hosts.each[:count], ROLES, strict=False)
    return {host.address: role for host, role in pairs}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    with launched(len(ROLES), tmp_path_factory.mktemp("home")) as made:
        for host, role in zip(made.hosts, ROLES, strict=True):
            host.run("bash", "-c", f"echo {role} > ~/.afflux-role")
        yield made


def test_from_ray_up_to_ray_down(cluster: Launched) -> None:
    """One test, because every step needs the one before."""
    write(cluster, workers=2)
    cluster.ray("up", "-y", "--no-config-cache")
    until(lambda: cluster.nodes() == wanted(cluster, 3), "the hosts have joined", seconds=240)
    assert not any(autoscaled(node["Labels"]) for node in cluster.ray_nodes()), "no more will come"

    spec = "~/afflux/deploy/specs/several-hosts.yaml"
    up = f"afflux up {spec} --address auto --set model.dtype=float32 --set ffn.count=1"
    cluster.ray("exec", up, timeout=900)
    assert httpx.get(f"{cluster.url}/health", timeout=30).status_code == 200, "from outside"
    asker = cluster.hosts[2]
    answers = [cluster.complete(asker, prompt) for prompt in PROMPTS]
    assert answers == list(plain_tokens(TOKENS).values())

    cluster.ray("up", "-y", "--no-config-cache", "--no-restart")
    assert cluster.complete(asker, PROMPTS[0]) == answers[0], "it serves on"

    write(cluster, workers=3)
    cluster.ray("up", "-y", "--no-config-cache")  # ends Ray and what runs on it, as Ray says
    until(lambda: cluster.nodes() == wanted(cluster, 4), "the new host has joined", seconds=240)

    cluster.ray("down", "-y")
    # Ray's local provider stops the head only; a raylet that has lost its head gives up after a
    # minute (gcs_rpc_server_reconnect_timeout_s).
    until(lambda: not any(map(processes, cluster.hosts)), "nothing is left", seconds=180)
