"""Actors that share nothing but the network, on hosts of namespaces: one is lost after another.

Slow: five Rays and their agents start on this machine's cores.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.host_cluster import HostCluster, host_cluster
from benchmarks.hosts import Host, why_not
from tests.e2e.conftest import KEY
from tests.e2e.plain import plain_tokens
from tests.e2e.streams import Streams
from tests.e2e.test_elastic import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

MODEL = "verse"
TOKENS = 160
SETTINGS = ("model.dtype=float32", "transport.timeout_s=2", "membership.silence_s=4")


@pytest.fixture(scope="module")
def over_hosts() -> Iterator[HostCluster]:
    """2A2F, every actor on a host of its own."""
    with host_cluster(attention=2, ffn=2, env={"AFFLUX_API_KEYS": KEY}) as cluster:
        cluster.up((*SETTINGS, "attention.count=2", "ffn.count=2"))
        yield cluster
        cluster.afflux("down", timeout=120)


def streams(cluster: HostCluster, **options: object) -> Streams:
    return Streams(cluster.url, KEY, MODEL, tokens=TOKENS, **options)  # type: ignore[arg-type]


def whole(cluster: HostCluster) -> bool:
    """As 2A2F."""
    status = cluster.status()
    ready = sorted(a["role"] for a in status["actors"] if a["state"] == "ready")
    settled = status["health"] == "ready" and status["change"] is None
    return settled and ready == ["attention", "attention", "ffn", "ffn"]


def test_every_actor_has_a_host_of_its_kind(over_hosts: HostCluster) -> None:
    nodes = {a["name"]: a["node_ip"] for a in over_hosts.status()["actors"]}
    for role, hosts in (("attention", over_hosts.attention), ("ffn", over_hosts.ffn)):
        placed = {node for name, node in nodes.items() if name.startswith(role)}
        assert placed == {host.address for host in hosts}


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return plain_tokens(TOKENS)


def same(streams: Streams, expected: dict[str, list[int]]) -> bool:
    """Every stream has exactly plain vLLM's tokens."""
    return all(tokens == expected[prompt] for prompt, tokens in streams.tokens)


def test_tokens_equal_plain_vllm(over_hosts: HostCluster, expected: dict[str, list[int]]) -> None:
    with streams(over_hosts) as found:
        pass
    assert same(found, expected)


def test_a_request_from_another_host(over_hosts: HostCluster) -> None:
    body = {"model": MODEL, "prompt": "The sea", "max_tokens": 3}
    script = (
        "import json, sys, urllib.request as u;"
        "r = u.Request(sys.argv[1], sys.argv[2].encode(), json.loads(sys.argv[3]));"
        "print(json.load(u.urlopen(r, timeout=30))['usage']['completion_tokens'])"
    )
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    words = (f"{over_hosts.url}/v1/completions", json.dumps(body), json.dumps(headers))
    assert over_hosts.ffn[0].run("python", "-c", script, *words).strip() == "3"


def places(cluster: HostCluster, role: str) -> list[str]:
    actors = cluster.status()["actors"]
    return [a["node_ip"] for a in actors if a["role"] == role and a["state"] == "ready"]


def spread(cluster: HostCluster) -> None:
    """Every actor on a host of its own again: those that a lost host's went to have two."""
    for role in ("attention", "ffn"):
        if len(set(places(cluster, role))) == 1:
            for count in (1, 2):
                cluster.afflux("scale", f"{role}={count}", "--wait", timeout=600)
        assert len(set(places(cluster, role))) == 2


def lose(cluster: HostCluster, host: Host, way: str) -> None:
    if way == "cut":
        cluster.hosts.cut(host)
    else:
        cluster.kill(host)


@pytest.mark.parametrize("role", ["ffn", "attention"])
@pytest.mark.parametrize("way", ["killed", "cut"])
def test_a_lost_host(
    over_hosts: HostCluster, expected: dict[str, list[int]], role: str, way: str
) -> None:
    """Its actors start anew on the other host of their kind; requests wait, none fails."""
    spread(over_hosts)
    address = places(over_hosts, role)[0]
    lost = next(host for host in over_hosts.hosts if host.address == address)
    with streams(over_hosts, again=True) as found:
        began = time.monotonic()
        lose(over_hosts, lost, way)
        until(lambda: not whole(over_hosts), "the loss is noticed", seconds=180)
        noticed = time.monotonic() - began
        until(lambda: whole(over_hosts), "whole again", seconds=600)
        recovered = time.monotonic() - began
    gap = found.gap(began)
    print(
        f"{role} host {way}: noticed {noticed:.1f} s, longest gap {gap:.1f} s, "
        f"whole {recovered:.1f} s"
    )
    assert same(found, expected)
    assert gap < 60, "more than a request may wait"
    over_hosts.join(lost)


def test_the_frontend_is_started_again(
    over_hosts: HostCluster, expected: dict[str, list[int]]
) -> None:
    over_hosts.head.run("pkill", "-9", "-f", "^ray::ServeReplica")
    until(lambda: answers(over_hosts), "it answers again", seconds=360)
    with streams(over_hosts) as found:
        pass
    assert same(found, expected)


def test_links_are_known_by_measurement(over_hosts: HostCluster) -> None:
    links = topology(over_hosts)["links"]
    assert len(links) == 4 and all(link["measured"] for link in links)
    assert all(1e-6 < link["latency_s"] < 0.1 and link["bytes_per_s"] > 1e6 for link in links)


def test_a_slow_link(over_hosts: HostCluster, expected: dict[str, list[int]]) -> None:
    """Nothing fails, the actor behind it is named, and what is advised takes the load off it."""
    spread(over_hosts)
    address = places(over_hosts, "ffn")[1]
    host = next(host for host in over_hosts.hosts if host.address == address)
    (name,) = [a["name"] for a in over_hosts.status()["actors"] if a["node_ip"] == address]
    with streams(over_hosts, again=True) as found:
        before = speed(found)
        over_hosts.hosts.shape(host, delay_s=0.002, loss=0.01)
        named: list[dict[str, Any]] = []
        until(
            lambda: named.extend(topology(over_hosts)["slow"]) or named,
            "somebody is named as slow",
            seconds=360,
        )
        slow = named[0]
        assert (slow["actor"], slow["role"]) == (name, "ffn") and slow["ratio"] > 2
        page = httpx.get(f"{over_hosts.status()['metrics_url']}/metrics", timeout=30).text
        (line,) = [x for x in page.splitlines() if "slowness" in x and f'actor_id="{name}"' in x]
        assert float(line.split()[-1]) > 1.5
        during = speed(found)
        over_hosts.afflux(*slow["command"].split()[1:], "--wait", timeout=600)
        after = speed(found)
    print(f"tokens/s {before:.0f}, {during:.0f} with a slow link, {after:.0f} without its actor")
    assert same(found, expected)
    assert during < before and during < after
    assert address not in places(over_hosts, "ffn")
    over_hosts.hosts.shape(host)


def test_a_host_that_is_about_to_leave(
    over_hosts: HostCluster, expected: dict[str, list[int]]
) -> None:
    """It is emptied before it goes: no gap but that of a change, and nothing is lost."""
    address = places(over_hosts, "attention")[0]
    script = (
        "import ray; ray.init('auto', logging_level='ERROR');"
        f"print([n['NodeID'] for n in ray.nodes() if n['NodeManagerAddress'] == '{address}'][-1])"
    )
    head, env = over_hosts.head, over_hosts.env
    node = head.run("python", "-c", script, env=env).split()[-1]
    notice = ("--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION")
    deadline = ("--reason-message", "spot", "--deadline-remaining-seconds", "300")
    with streams(over_hosts, again=True) as found:
        began = time.monotonic()
        head.run("ray", "drain-node", "--address", "auto", *notice, *deadline, env=env)
        until(
            lambda: address not in places(over_hosts, "attention") and whole(over_hosts),
            "it is empty",
            seconds=600,
        )
        took = time.monotonic() - began
    print(f"emptied in {took:.1f} s, longest gap {found.gap(began):.2f} s")
    assert same(found, expected)


def topology(cluster: HostCluster) -> dict[str, Any]:
    return dict(json.loads(cluster.afflux("status", "--topology", "--json")))


def speed(streams: Streams, seconds: float = 10.0) -> float:
    """Tokens per second of all streams."""

    def tokens() -> int:
        return sum(len(stream.tokens) for stream in list(streams.all))

    before, began = tokens(), time.monotonic()
    time.sleep(seconds)
    return (tokens() - before) / (time.monotonic() - began)


def answers(cluster: HostCluster) -> bool:
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"model": MODEL, "prompt": "The sea", "max_tokens": 1}
    try:
        url = f"{cluster.url}/v1/completions"
        return httpx.post(url, json=body, headers=headers, timeout=30).status_code == 200
    except httpx.HTTPError:
        return False
