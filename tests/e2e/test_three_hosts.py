"""The fewest hosts: a head, and two with room for two actors each; one is lost, and comes back.

With it goes half of all actors at once, and there is no room for others. Slow, see ``test_hosts``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.host_cluster import EITHER, HostCluster, host_cluster
from benchmarks.hosts import why_not
from tests.e2e.conftest import KEY
from tests.e2e.plain import plain_tokens
from tests.e2e.test_elastic import until
from tests.e2e.test_hosts import SETTINGS, TOKENS, lose, places, same, speed, streams, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

ANYWHERE = f"{{afflux.io/role: {EITHER}}}"
COUNTS = ("attention.count=2", "ffn.count=2")
LABELS = (f"attention.labels={ANYWHERE}", f"ffn.labels={ANYWHERE}")
HALF_A_HOST = ("attention.resources.cpus=2", "ffn.resources.cpus=2")


@pytest.fixture(scope="module")
def three_hosts() -> Iterator[HostCluster]:
    with host_cluster(attention=0, ffn=0, either=2, env={"AFFLUX_API_KEYS": KEY}) as cluster:
        cluster.up((*SETTINGS, *COUNTS, *LABELS, *HALF_A_HOST))
        yield cluster
        cluster.afflux("down", timeout=120)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return plain_tokens(TOKENS)


def by_host(cluster: HostCluster) -> Counter[str]:
    return Counter(places(cluster, "attention")) + Counter(places(cluster, "ffn"))


def test_tokens_equal_plain_vllm(three_hosts: HostCluster, expected: dict[str, list[int]]) -> None:
    with streams(three_hosts) as found:
        pass
    assert same(found, expected)
    assert set(by_host(three_hosts)) == {host.address for host in three_hosts.either}


@pytest.mark.parametrize("way", ["killed", "cut"])
def test_half_of_all_actors_is_lost(
    three_hosts: HostCluster, expected: dict[str, list[int]], way: str
) -> None:
    """The others do their work until the host is back; requests wait, none fails."""
    address = by_host(three_hosts).most_common(1)[0][0]
    lost = next(host for host in three_hosts.either if host.address == address)
    with streams(three_hosts, again=True) as found:
        began = time.monotonic()
        lose(three_hosts, lost, way)
        until(lambda: not whole(three_hosts), "the loss is noticed", seconds=180)
        assert speed(found) > 0, "the others serve without it"
        three_hosts.join(lost)
        until(lambda: whole(three_hosts), "whole again", seconds=600)
        recovered = time.monotonic() - began
    print(f"host {way}: longest gap {found.gap(began):.1f} s, whole {recovered:.1f} s")
    assert same(found, expected)
    assert found.gap(began) < 60, "more than a request may wait"
