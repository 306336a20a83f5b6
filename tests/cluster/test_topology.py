"""Where actors belong, by the network between nodes."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import topology
from cluster.preflight import Need
from cluster.topology import (
    ASSUMED,
    LABELS,
    Link,
    Network,
    Site,
    Tier,
    choose,
    exchange_s,
    fits,
    tier,
)

DOMAIN, RACK, ZONE = topology.LABELS
CPU = {"CPU": 1.0}
NEED = Need("x", CPU)
MB = 1e6


def site(node: str, cpus: float = 1.0, memory: float | None = None, **labels: str) -> Site:
    names = {"domain": DOMAIN, "rack": RACK, "zone": ZONE}
    known = {names.get(key, key): value for key, value in labels.items()}
    return Site(node, known, {"CPU": cpus}, memory)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (site("a"), site("a"), Tier.HOST),
        (site("a", domain="d", rack="r"), site("b", domain="d", rack="r"), Tier.NVLINK),
        (site("a", domain="d", rack="r"), site("b", domain="e", rack="r"), Tier.RACK),
        (site("a", rack="r", zone="z"), site("b", rack="s", zone="z"), Tier.ZONE),
        (site("a", rack="r", zone="z"), site("b", rack="s", zone="y"), Tier.FAR),
        (site("a"), site("b"), Tier.ZONE),
        (site("a", zone="z"), site("b"), Tier.ZONE),
    ],
)
def test_the_closest_thing_in_common(one: Site, other: Site, expected: Tier) -> None:
    assert tier(one, other) == tier(other, one) == expected


def test_what_was_measured_goes_before() -> None:
    slow = Link(1.0, 1.0)
    network = Network(measured={frozenset(("a", "b")): slow})
    assert network.link(site("b"), site("a")) == slow
    assert network.link(site("a"), site("c")) == ASSUMED[Tier.ZONE]


def test_an_exchange_by_hand() -> None:
    """Two senders, two receivers, one link speed: each node's interface carries four parts."""
    link = Link(1e-3, 1e9)
    network = Network(dict.fromkeys(Tier, link))
    seconds = exchange_s([site("a"), site("b")], [site("c"), site("d")], network, MB)
    # a part is 1 MB / 2, there and back 1 MB; two peers each: 2 MB at 1 GB/s, and two latencies
    assert seconds == pytest.approx(2e-3 + 2e-3)
    assert exchange_s([], [site("c")], network, MB) == 0.0


def test_pairs_stay_together() -> None:
    sites = [site(f"n{i}", rack=f"r{i // 2}", zone="z") for i in range(4)]
    found = choose(sites, [NEED], [NEED], Network(), MB)
    assert found is not None
    assert tier(found.attention[0], found.ffn[0]) == Tier.RACK
    assert found.worst is not None and found.worst > 1.9 * found.seconds


def test_new_actors_join_those_that_are_there() -> None:
    sites = [site("n1", rack="r0"), site("n2", rack="r1"), site("n3", rack="r1")]
    there = ([site("a", rack="r1")], [site("f", rack="r1")])
    found = choose(sites, [], [NEED, NEED], Network(), MB, present=there)
    assert found is not None and [s.node for s in found.ffn] == ["n2", "n3"]


def test_memory_is_for_attention_and_compute_for_ffn() -> None:
    sites = [site("a", memory=0.1), site("b", memory=0.3), site("c", memory=0.2)]
    found = choose(sites, [NEED], [NEED, NEED], Network(), MB)
    assert found is not None
    assert [s.node for s in found.attention] == ["b"]
    nearer = [site("a", 1, 0.1, rack="r"), site("b", 1, 0.3), site("c", 1, 0.2, rack="r")]
    found = choose(nearer, [NEED], [NEED], Network(), MB)
    assert found is not None and [s.node for s in found.attention] == ["c"], "the network first"


@pytest.mark.parametrize("most", [20_000, 0])
def test_a_role_is_not_on_one_node_for_nothing(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(topology, "MOST_CHOICES", most)
    sites = [site("a", 4), site("b", 4), site("c", 4)]
    there = ([site("x")], [])
    found = choose(sites, [], [NEED, NEED, NEED], Network(), MB, present=there)
    assert found is not None and sorted(s.node for s in found.ffn) == ["a", "b", "c"]


def test_no_room_is_no_choice() -> None:
    assert choose([], [NEED], [NEED], Network(), MB) is None
    assert choose([site("a")], [NEED], [NEED], Network(), MB) is None
    picky = Need("x", CPU, {"afflux.io/role": "ffn"})
    assert choose([site("a"), site("b")], [NEED], [picky], Network(), MB) is None
    found = choose(
        [site("a"), site("b", **{"afflux.io/role": "ffn"})], [NEED], [picky], Network(), MB
    )
    assert found is not None and [s.node for s in found.ffn] == ["b"]


@st.composite
def clusters(draw: st.DrawFn) -> list[Site]:
    place = st.sampled_from(("0", "1"))
    return [
        site(f"n{i}", draw(st.sampled_from((1.0, 2.0))), rack=draw(place), zone=draw(place))
        for i in range(draw(st.integers(1, 4)))
    ]


@given(clusters(), st.integers(1, 3), st.integers(1, 3), st.floats(1.0, 1e9), st.booleans())
def test_the_choice_is_the_best_that_fits(
    sites: list[Site], attention: int, ffn: int, nbytes: float, greedy: bool
) -> None:
    network = Network()
    needs = [NEED] * attention, [NEED] * ffn
    with pytest.MonkeyPatch.context() as patch:
        if greedy:
            patch.setattr(topology, "MOST_CHOICES", 0)
        found = choose(sites, *needs, network, nbytes)
    possible = [
        exchange_s(where[:attention], where[attention:], network, nbytes)
        for where in product(sites, repeat=attention + ffn)
        if fits([(NEED, site) for site in where])
    ]
    assert (found is None) == (not possible)
    if found is not None:
        assert fits([(NEED, site) for site in (*found.attention, *found.ffn)])
        again = exchange_s(found.attention, found.ffn, network, nbytes)
        assert found.seconds == pytest.approx(again)
        assert min(possible) <= again * (1 + 1e-9)
        assert (found.worst is None) == greedy
        if not greedy:
            assert again <= min(possible) * 1.251
            assert found.worst == pytest.approx(max(possible))


def test_among_equals_attention_is_close_to_where_tokens_go() -> None:
    names = ("a1", "a2", "b1", "b2")
    racks = [Site(name, {LABELS[1]: name[0]}, {"CPU": 1}) for name in names]
    home = Site("b0", {LABELS[1]: "b"})
    need = [Need("x", {"CPU": 1})]
    found = choose(racks, need, need, Network(), 1e6, home=home)
    assert found is not None and found.attention[0].node[0] == found.ffn[0].node[0] == "b"
    found = choose(racks, need, need, Network(), 1e6)
    assert found is not None and found.attention[0].node[0] == "a"


def test_what_differs_by_noise_only_is_equal() -> None:
    sites = [Site(name, {}, {"CPU": 1}) for name in ("a", "b", "c")]
    links = {("a", "b"): 1.1e-3, ("a", "c"): 1.0e-3, ("b", "c"): 9e-2}
    measured = {frozenset(pair): Link(latency, 1e9) for pair, latency in links.items()}
    need = [Need("x", {"CPU": 1})]
    found = choose(sites, need, need, Network(measured=measured), 1.0)
    assert found is not None and {found.attention[0].node, found.ffn[0].node} == {"a", "b"}


def test_measurements_count_to_a_factor_of_two_of_the_best() -> None:
    links = {"ab": (1e-4, 8e9), "ac": (1.9e-4, 5e9), "bc": (2.1e-4, 3.9e9), "ad": (1e-3, 8e8)}
    measured = {frozenset(pair): Link(*link) for pair, link in links.items()}
    rough = Network(measured=measured).rough().measured
    assert rough[frozenset("ab")] == rough[frozenset("ac")] == Link(1e-4, 8e9)
    assert rough[frozenset("bc")] == Link(2e-4, 4e9)
    assert rough[frozenset("ad")] == Link(8e-4, 1e9)
    assert Network().rough() == Network()
