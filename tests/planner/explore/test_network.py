"""Exchanges: limits by hand, conservation, max-min fairness, classes against flow by flow."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.explore.calibration import BLACKWELL, HOPPER, NOMINAL, Calibration, calibration_of
from planner.explore.fairness import drain_time, fair_rates
from planner.explore.kernels.base import Side, Sides
from planner.explore.network import Placement, Traffic, a2f, f2a, fan_out, kv_transfer
from planner.explore.system import Gpu, System, Tier, find_system, with_network
from planner.explore.transfers import exchange_time, meeting_tiers, symmetric_time

GPU = Gpu("test", 80e9, 1e12, {"bf16": 1e15}, "made up")
DEEPSEEK = Traffic(7168, 256, 8)
QUICK = settings(max_examples=30, deadline=None)


def system_of(*tiers: tuple[int | None, float, float]) -> System:
    """A system of (GPUs per domain, latency, bandwidth) tiers."""
    return System("t", GPU, 8, tuple(Tier(f"t{i}", *tier) for i, tier in enumerate(tiers)))


FLAT = system_of((None, 1e-6, 1e9))
NODES = system_of((4, 1e-6, 100e9), (None, 5e-6, 10e9))
NESTED = system_of((2, 1e-6, 100e9), (4, 2e-6, 20e9), (None, 5e-6, 10e9))


def systems() -> st.SearchStrategy[System]:
    """Two or three tiers, faster inside or not."""
    bandwidth = st.floats(1e8, 1e12)
    two = st.builds(
        lambda a, x, y: system_of((a, 1e-6, x), (None, 5e-6, y)),
        st.integers(2, 5), bandwidth, bandwidth,
    )  # fmt: skip
    three = st.builds(
        lambda a, b, x, y, z: system_of((a, 1e-6, x), (a * b, 2e-6, y), (None, 5e-6, z)),
        st.integers(1, 3), st.integers(2, 3), bandwidth, bandwidth, bandwidth,
    )  # fmt: skip
    return st.one_of(two, three)


def sides(most: int = 12) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """GPUs of the two sides, none on both."""
    every = st.lists(st.integers(0, 2 * most), min_size=2, max_size=most, unique=True)
    return every.flatmap(
        lambda gpus: st.integers(1, len(gpus) - 1).map(lambda cut: (gpus[:cut], gpus[cut:]))
    )


def shared_ports() -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Random 0/1 passes where every flow passes a port, and capacities."""

    def build(ports: int, flows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        passes = (rng.random((ports, flows)) < 0.4).astype(float)
        passes[rng.integers(0, ports, flows), np.arange(flows)] = 1
        return passes, rng.uniform(0.5, 20, ports)

    return st.builds(build, st.integers(1, 8), st.integers(1, 12), st.integers(0, 10**6))


# -- fair rates --------------------------------------------------------------------------------


@QUICK
@given(shared_ports())
def test_no_port_carries_more_than_it_can(case):
    passes, capacities = case
    assert np.all(passes @ fair_rates(passes, capacities) <= capacities * (1 + 1e-9))


@QUICK
@given(shared_ports())
def test_a_flow_grows_only_at_the_cost_of_one_no_faster(case):
    passes, capacities = case
    rates = fair_rates(passes, capacities)
    loads = passes @ rates
    for flow in range(passes.shape[1]):
        # the definition of max-min: a full port where nobody is faster
        bottlenecks = [
            port
            for port in np.flatnonzero(passes[:, flow])
            if loads[port] >= capacities[port] * (1 - 1e-9)
            and rates[flow] >= rates[passes[port] > 0].max() * (1 - 1e-9)
        ]
        assert bottlenecks, f"flow {flow} could be faster"


def test_rates_of_the_textbook_example():
    # one long flow over three ports of 1, 1 and 2, one short flow on each, a second on the last
    passes = np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 0, 1, 1]], float)
    rates = fair_rates(passes, np.array([1.0, 1.0, 2.0]))
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.75, 0.75])


def test_a_flow_through_no_port_takes_no_time():
    assert fair_rates(np.zeros((1, 1)), np.ones(1))[0] == math.inf
    assert drain_time(np.ones(1), np.zeros((1, 1)), np.ones(1)) == 0


@QUICK
@given(shared_ports(), st.integers(0, 10**6))
def test_draining_takes_between_the_fullest_port_and_all_ports(case, seed):
    passes, capacities = case
    sizes = np.random.default_rng(seed).uniform(0, 50, passes.shape[1])
    seconds = drain_time(sizes, passes, capacities)
    each = passes @ sizes / capacities
    assert each.max() * (1 - 1e-9) <= seconds <= each.sum() * (1 + 1e-9)


def test_rates_are_shared_anew_when_a_flow_is_done():
    # two flows share 1 byte/s: the short one is done at 2 s, the long one has 3 of 4 bytes left
    assert drain_time(np.array([1.0, 4.0]), np.ones((1, 2)), np.ones(1)) == pytest.approx(5.0)
    # with its own port of 0.6 out, the long one then runs at 0.6: 2 + 3 / 0.6
    passes = np.array([[1.0, 1.0], [0.0, 1.0]])
    seconds = drain_time(np.array([1.0, 4.0]), passes, np.array([1.0, 0.6]))
    assert seconds == pytest.approx(7.0)


# -- exchanges ---------------------------------------------------------------------------------


@QUICK
@given(st.floats(1.0, 1e9))
def test_one_to_one_is_latency_and_bytes_over_bandwidth(size):
    seconds = exchange_time(NODES, [0], [1], [[size]], calibration=NOMINAL)
    assert seconds == pytest.approx(1e-6 + size / 100e9)
    seconds = exchange_time(NODES, [0], [4], [[size]], calibration=NOMINAL)
    assert seconds == pytest.approx(5e-6 + size / 10e9)


@pytest.mark.parametrize("senders", [2, 3, 7])
def test_many_to_one_take_turns_at_the_receiver(senders):
    one = exchange_time(FLAT, [0], [99], [[1e6]], calibration=NOMINAL) - 1e-6
    many = exchange_time(FLAT, range(senders), [99], [[1e6]] * senders, calibration=NOMINAL)
    assert many - 1e-6 == pytest.approx(senders * one)


@pytest.mark.parametrize("receivers", [2, 3, 7])
def test_one_to_many_take_turns_at_the_sender(receivers):
    many = exchange_time(FLAT, [99], range(receivers), [[1e6] * receivers], calibration=NOMINAL)
    assert many == pytest.approx(1e-6 + receivers * 1e6 / 1e9)


def test_many_to_many_is_as_long_as_the_fullest_port():
    # 3 senders, 2 receivers, 1e6 each: 3e6 into every receiver
    seconds = exchange_time(FLAT, [0, 1, 2], [5, 6], np.full((3, 2), 1e6), calibration=NOMINAL)
    assert seconds == pytest.approx(1e-6 + 3e6 / 1e9)


def test_inside_and_outside_go_at_once_through_ports_of_their_own():
    # GPU 0 sends 1e9 to GPU 1 in its node (10 ms) and 1e9 to GPU 4 elsewhere (100 ms)
    seconds = exchange_time(NODES, [0], [1, 4], [[1e9, 1e9]], calibration=NOMINAL)
    assert seconds == pytest.approx(5e-6 + 0.1)


def test_what_goes_further_out_passes_the_ports_between():
    # GPUs 0 and 1 are an island, 2 and 3 the other of the node, 4 is elsewhere. What meets in the
    # node (20 GB/s) and in the cluster (10 GB/s) shares the node's port: 10 + 10 GB/s
    seconds = exchange_time(NESTED, [0], [2, 4], [[1e9, 1e9]], calibration=NOMINAL)
    assert seconds == pytest.approx(5e-6 + 0.1)
    # twice the bytes in the node: 100 ms at 10 + 10, then the rest of 1e9 at 20
    seconds = exchange_time(NESTED, [0], [2, 4], [[2e9, 1e9]], calibration=NOMINAL)
    assert seconds == pytest.approx(5e-6 + 0.1 + 0.05)
    # the island's fabric is apart
    seconds = exchange_time(NESTED, [0], [1, 2], [[10e9, 2e9]], calibration=NOMINAL)
    assert seconds == pytest.approx(2e-6 + 0.1)


def test_meeting_tiers():
    assert meeting_tiers((2, 4, None), [0], [0, 1, 2, 4]).tolist() == [[-1, 0, 1, 2]]


@QUICK
@given(systems(), sides(10), st.floats(1.0, 1e8))
def test_classes_are_the_same_as_flow_by_flow(system, gpus, size):
    sources, targets = gpus
    sizes = np.full((len(sources), len(targets)), size)
    exact = exchange_time(system, sources, targets, sizes, calibration=NOMINAL)
    fast = symmetric_time(system, sources, targets, size, calibration=NOMINAL)
    assert fast == pytest.approx(exact, rel=1e-6)


@QUICK
@given(systems(), st.lists(st.integers(0, 20), min_size=2, max_size=7, unique=True))
def test_classes_hold_for_gpus_on_both_sides(system, gpus):
    sizes = np.full((len(gpus), len(gpus)), 1e6)
    exact = exchange_time(system, gpus, gpus, sizes, calibration=HOPPER, percentile="p99")
    fast = symmetric_time(system, gpus, gpus, 1e6, calibration=HOPPER, percentile="p99")
    assert fast == pytest.approx(exact, rel=1e-6)


@QUICK
@given(systems(), sides(10), st.integers(0, 2), st.floats(1.0, 10.0))
def test_more_bandwidth_is_not_slower(system, gpus, tier, factor):
    assume(tier < len(system.tiers))
    name = system.tiers[tier].name
    faster = with_network(system, name, bandwidth=system.tiers[tier].bandwidth * factor)
    before = symmetric_time(system, *gpus, 1e6, calibration=NOMINAL)
    after = symmetric_time(faster, *gpus, 1e6, calibration=NOMINAL)
    assert after <= before * (1 + 1e-9)


@QUICK
@given(systems(), sides(10))
def test_the_way_back_takes_as_long(system, gpus):
    sources, targets = gpus
    there = symmetric_time(system, sources, targets, 1e6, calibration=NOMINAL)
    back = symmetric_time(system, targets, sources, 1e6, calibration=NOMINAL)
    assert back == pytest.approx(there)


def test_what_a_gpu_sends_itself_takes_no_time():
    assert exchange_time(FLAT, [3], [3], [[1e9]], calibration=NOMINAL) == 0
    assert symmetric_time(FLAT, [3], [3], 1e9, calibration=NOMINAL) == 0


def test_bad_exchanges_are_refused():
    with pytest.raises(PlannerError, match="shape"):
        exchange_time(FLAT, [0], [1], [[1.0, 2.0]])
    with pytest.raises(PlannerError, match="twice"):
        exchange_time(FLAT, [0, 0], [1], [[1.0], [1.0]])
    with pytest.raises(PlannerError, match="-1 bytes"):
        exchange_time(FLAT, [0], [1], [[-1.0]])


# -- tokens ------------------------------------------------------------------------------------


def brute_distinct(held: list[int], top_k: int) -> float:
    """Mean ranks over every choice of experts."""
    rank_of = [rank for rank, count in enumerate(held) for _ in range(count)]
    choices = list(combinations(rank_of, top_k))
    return sum(len(set(choice)) for choice in choices) / len(choices)


@pytest.mark.parametrize(
    ("held", "top_k"), [([2, 2, 2, 2], 3), ([3, 3], 2), ([2, 2, 1], 2), ([1] * 6, 4), ([5], 3)]
)
def test_distinct_ranks_by_counting_every_choice(held, top_k):
    expected = brute_distinct(held, top_k)
    assert fan_out("distinct", sum(held), top_k, len(held)) == pytest.approx(expected)


def test_fan_of_the_paper_and_its_limits():
    assert fan_out("paper", 256, 8, 4) == 2.5
    assert fan_out("paper", 256, 8, 126) == 4.5
    assert fan_out("distinct", 256, 8, 1) == pytest.approx(1)
    assert fan_out("distinct", 8, 2, 64) == pytest.approx(2)  # copies of experts: still top-k
    with pytest.raises(PlannerError, match="top-9 of 8"):
        fan_out("distinct", 8, 9, 2)
    with pytest.raises(PlannerError, match="'distinct' or 'paper'"):
        fan_out("all", 8, 2, 2)  # type: ignore[arg-type]


def test_bytes_of_a_token():
    fan = fan_out("distinct", 256, 8, 16)
    assert DEEPSEEK.a2f_bytes(16) == pytest.approx(fan * 14336 + 64)
    assert DEEPSEEK.f2a_bytes(16) == pytest.approx(fan * 14336)
    routed = Traffic(7168, 256, 8, sides=Sides(router=Side.FFN))
    assert routed.a2f_bytes(16) == 16 * 14336
    assert routed.f2a_bytes(16) == DEEPSEEK.f2a_bytes(16)
    shared = Traffic(7168, 256, 8, sides=Sides(shared=Side.FFN))
    assert shared.copies(16) == pytest.approx(fan + 1 - fan / 16)


def test_two_attention_one_ffn_in_a_node_by_hand():
    placement = Placement("", (0, 1), (2,))
    seconds = a2f(NODES, placement, [0, 10, 20], DEEPSEEK, calibration=NOMINAL)
    # one FFN rank: one copy, both senders share its port
    each = 2 * (14336 + 64) / 100e9
    assert seconds == pytest.approx([0, 1e-6 + 10 * each, 1e-6 + 20 * each])
    back = f2a(NODES, placement, 10, DEEPSEEK, calibration=NOMINAL)
    assert back == pytest.approx(1e-6 + 10 * 2 * 14336 / 100e9)


@pytest.mark.parametrize("ffn_tp", [1, 2])
@pytest.mark.parametrize("ffn", [(2, 3, 5, 6), (4, 5, 6, 7, 9, 10)])
def test_transfers_are_the_exchange_of_their_bytes(ffn, ffn_tp):
    placement = Placement("", (0, 1, 8), ffn)
    ranks = len(ffn) // ffn_tp
    pair = 12 * DEEPSEEK.a2f_bytes(ranks) / ranks
    exact = exchange_time(NODES, placement.attention, ffn, np.full((3, len(ffn)), pair))
    got = a2f(NODES, placement, 12, DEEPSEEK, ffn_tp=ffn_tp)
    assert got == pytest.approx(exact)
    pair = 12 * DEEPSEEK.f2a_bytes(ranks) / len(ffn)
    exact = exchange_time(NODES, ffn, placement.attention, np.full((len(ffn), 3), pair))
    assert f2a(NODES, placement, 12, DEEPSEEK, ffn_tp=ffn_tp) == pytest.approx(exact)


def test_sides_on_other_systems_meet_at_the_slower_way_out():
    placement = Placement("", (0, 1), (0,))
    other = system_of((4, 1e-6, 100e9), (None, 9e-6, 2e9))
    seconds = a2f(NODES, placement, 10, DEEPSEEK, ffn_system=other, calibration=NOMINAL)
    assert seconds == pytest.approx(9e-6 + 10 * 2 * (14336 + 64) / 2e9)


def test_p99_is_the_tier_s_factor_or_the_calibration_s_spread():
    slow = with_network(NODES, "t1", p99=3.0)
    placement = Placement("", (0,), (4,))
    half = a2f(slow, placement, 10, DEEPSEEK, calibration=HOPPER)
    tail = a2f(slow, placement, 10, DEEPSEEK, calibration=HOPPER, percentile="p99")
    assert tail == pytest.approx(3 * half)
    inside = Placement("", (0,), (1,))  # does not cross the slow tier
    half = a2f(slow, inside, 10, DEEPSEEK, calibration=HOPPER)
    tail = a2f(slow, inside, 10, DEEPSEEK, calibration=HOPPER, percentile="p99")
    assert tail == pytest.approx(HOPPER.spread * half)


def test_many_peers_cost_by_the_peer():
    costly = Calibration("c", "", per_peer=1e-6)
    placement = Placement("", (0,), tuple(range(1, 8)))
    with_peers = a2f(FLAT, placement, 10, DEEPSEEK, calibration=costly)
    assert with_peers - a2f(FLAT, placement, 10, DEEPSEEK, calibration=NOMINAL) == pytest.approx(
        7e-6
    )


def test_bad_groups_and_tokens_are_refused():
    placement = Placement("", (0,), (1, 2, 3))
    with pytest.raises(PlannerError, match="3 FFN GPUs in groups of 2"):
        a2f(NODES, placement, 1, DEEPSEEK, ffn_tp=2)
    with pytest.raises(PlannerError, match="expected 0 or more"):
        a2f(NODES, placement, -1, DEEPSEEK)
    with pytest.raises(PlannerError, match="0 and 3 GPUs"):
        a2f(NODES, Placement("", (), (1, 2, 3)), 1, DEEPSEEK)


# -- KV cache ----------------------------------------------------------------------------------


def test_kv_between_equal_groups_goes_one_to_one():
    seconds = kv_transfer(NODES, 8e9, [0, 1], [2, 3], calibration=NOMINAL)
    assert seconds == pytest.approx(1e-6 + 4e9 / 100e9)


@QUICK
@given(st.integers(1, 5), st.integers(1, 5))
def test_kv_between_unequal_groups_is_bound_by_the_smaller(sources, targets):
    seconds = kv_transfer(FLAT, 6e6, range(sources), range(10, 10 + targets), calibration=NOMINAL)
    assert seconds == pytest.approx(1e-6 + 6e6 / min(sources, targets) / 1e9)


# -- calibrations ------------------------------------------------------------------------------


def test_a_slower_link_is_slower_with_any_calibration():
    system = find_system("h200_sxm")
    placement = Placement("", (0,), (8,))
    later = with_network(system, "cluster", latency=50e-6)
    extra = a2f(later, placement, 1, DEEPSEEK) - a2f(system, placement, 1, DEEPSEEK)
    assert extra == pytest.approx(40e-6)


def test_families_have_their_calibration():
    assert calibration_of(find_system("h800")) is HOPPER
    assert calibration_of(find_system("b200_sxm")) is BLACKWELL
    assert calibration_of(find_system("gb200")) is BLACKWELL
    assert calibration_of(find_system("l40s")) is HOPPER
