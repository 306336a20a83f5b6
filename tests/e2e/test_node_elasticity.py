"""Ray's autoscaler brings and takes hosts as actors come and go, with the cloud file as shipped.

``deploy/cluster-aws.yaml`` with a provider that hands out hosts of namespaces instead of machines
of AWS: its node types, labels, custom resources and start commands are what is tested.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator

import pytest
import yaml
from ray.autoscaler._private.providers import _get_default_config

from benchmarks.hosts import why_not
from cluster.paths import project_root
from tests.e2e.plain import plain_tokens
from tests.e2e.ray_up import ENV, TOKENS, Launched, launched, processes
from tests.e2e.streams import PROMPTS
from tests.e2e.test_elastic import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

MACHINES = 5
IDLE_MINUTES = 0.25
SPEC = str(project_root() / "deploy/specs/several-hosts.yaml")
ONE_EACH = ("attention.resources.custom={afd_attention: 1}", "ffn.resources.custom={afd_ffn: 1}")


def write(cluster: Launched) -> None:
    """No workers to begin with, and one actor has room on each."""
    root = project_root()
    # for a provider of somebody else's Ray fills in no defaults
    defaults = _get_default_config({"type": "aws"})
    data = defaults | yaml.safe_load((root / "deploy/cluster-aws.yaml").read_text())
    data["provider"] = {
        "type": "external",
        "module": "tests.e2e.host_provider.HostProvider",
        "machines": str(cluster.head.folder.parent / "machines.json"),
        "key": str(cluster.head.key),
    }
    data["max_workers"] = MACHINES - 1
    data["idle_timeout_minutes"] = IDLE_MINUTES
    for kind, amount in (
        ("head", {}),
        ("attention", {"afd_attention": 1}),
        ("ffn", {"afd_ffn": 1}),
    ):
        node = data["available_node_types"][kind]
        node |= {"node_config": {}, "resources": {"CPU": 4, **amount}}
        if kind != "head":
            node |= {"min_workers": 0, "max_workers": 3}
    data["head_setup_commands"] = []
    # the autoscaler, which the head's command starts, has to find the provider
    data["head_start_ray_commands"] = [
        command.replace("RAY_AUTH_MODE=token;", f"RAY_AUTH_MODE=token PYTHONPATH={root};")
        for command in data["head_start_ray_commands"]
    ]
    cluster.write(data)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    with launched(MACHINES, tmp_path_factory.mktemp("home")) as made:
        machines = {host.address: {} for host in made.hosts}
        (made.head.folder.parent / "machines.json").write_text(json.dumps(machines))
        yield made


def roles(cluster: Launched) -> Counter[str]:
    return Counter(cluster.nodes().values())


def tokens(cluster: Launched) -> list[list[int]]:
    return [cluster.complete(cluster.head, prompt) for prompt in PROMPTS]


def test_hosts_come_and_go_with_actors(cluster: Launched) -> None:
    """One test, because every step needs the one before."""
    expected = list(plain_tokens(TOKENS).values())
    write(cluster)
    cluster.ray("up", "-y", "--no-config-cache")
    assert roles(cluster) == {"head": 1}

    settings = ("model.dtype=float32", "ffn.count=1", *ONE_EACH)
    words = [word for one in settings for word in ("--set", one)]
    began = time.monotonic()
    cluster.afflux("up", SPEC, "--address", "auto", *words)
    print(f"from no workers to serving: {time.monotonic() - began:.0f} s")
    assert roles(cluster) == {"head": 1, "attention": 1, "ffn": 1}, "of the right kinds"
    assert tokens(cluster) == expected

    began = time.monotonic()
    cluster.afflux("scale", "ffn=2", "--wait")
    print(f"another host and its actor: {time.monotonic() - began:.0f} s")
    assert roles(cluster) == {"head": 1, "attention": 1, "ffn": 2}
    assert tokens(cluster) == expected

    cluster.afflux("scale", "ffn=1", "--wait")
    began = time.monotonic()
    until(lambda: roles(cluster)["ffn"] == 1, "the empty host is given back", seconds=240)
    print(f"given back after {time.monotonic() - began:.0f} s ({IDLE_MINUTES * 60:.0f} s idle)")
    assert tokens(cluster) == expected

    # a spot instance's notice: another host is fetched and the actor moves before this one goes
    (leaving,) = [n for n in cluster.ray_nodes() if n["Labels"].get("afflux.io/role") == "ffn"]
    notice = ("--node-id", leaving["NodeID"], "--reason", "DRAIN_NODE_REASON_PREEMPTION")
    deadline = ("--reason-message", "spot", "--deadline-remaining-seconds", "600")
    began = time.monotonic()
    cluster.head.run("ray", "drain-node", "--address", "auto", *notice, *deadline, env=ENV)
    until(lambda: moved(cluster, leaving["NodeManagerAddress"]), "the actor has moved", seconds=600)
    print(f"on another host {time.monotonic() - began:.0f} s after the notice")
    assert tokens(cluster) == expected

    cluster.ray("down", "-y")
    until(lambda: not any(map(processes, cluster.hosts)), "nothing is left", seconds=60)


def moved(cluster: Launched, address: str) -> bool:
    actors = json.loads(cluster.afflux("status", "--json"))["actors"]
    places = [a["node_ip"] for a in actors if a["role"] == "ffn" and a["state"] == "ready"]
    return len(places) == 1 and address not in places
