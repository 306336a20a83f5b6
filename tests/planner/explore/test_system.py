"""Systems by name and from files, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from planner.errors import PlannerError
from planner.explore.system import Tier, find_system, read_system, with_network
from planner.explore.systems import SYSTEMS

FILE = """
name: mine
node: 8
kernels: h200_sxm
gpu:
  name: H200
  memory: 151397597184
  bandwidth: 4.8e+12
  flops: {bf16: 989.0e+12, fp8: 1978.0e+12}
  source: data sheet
tiers:
  - {name: nvlink, gpus: 8, latency: 10.0e-6, bandwidth: 450.0e+9}
  - {name: cluster, latency: 10.0e-6, bandwidth: 25.0e+9, p99: 1.5}
"""


@pytest.mark.parametrize(
    ("asked", "name"),
    [("H200_SXM", "h200_sxm"), ("b200", "b200_sxm"), ("h100-sxm", "h100_sxm"), ("GB200", "gb200")],
)
def test_finds_by_any_spelling(asked: str, name: str) -> None:
    assert find_system(asked).name == name


@pytest.mark.parametrize(
    ("asked", "words"),
    [("h20_sxm", "did you mean h200_sxm"), ("mi300x_oam_8", "known are|did you mean")],
)
def test_offers_what_is_near(asked: str, words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        find_system(asked)


def test_every_system_says_where_its_numbers_are_from() -> None:
    for system in SYSTEMS.values():
        assert system.gpu.source
        assert system.tiers[-1].name == "cluster"
        assert {"bf16"} <= set(system.gpu.flops) <= {"bf16", "fp8", "fp4"}


def test_the_papers_system() -> None:
    """arXiv 2605.28302: B200, 180 GiB, 8 per node, NVLink 900 GB/s, InfiniBand 100 GB/s, 10 us."""
    system = find_system("b200_sxm")
    assert system.gpu.memory == 180 * 1024**3
    assert system.node == 8
    assert system.tiers == (Tier("nvlink", 8, 1e-5, 900e9), Tier("cluster", None, 1e-5, 100e9))
    assert find_system("gb200").tiers[0] == Tier("rack", 72, 1e-5, 900e9)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "h800"])
def test_numbers_are_those_of_the_stated_source(name: str) -> None:
    core = pytest.importorskip("aiconfigurator_core", reason="needs afflux[plan] to compare with")
    file = Path(core.__file__).parent / "systems" / f"{name}.yaml"
    theirs, ours = yaml.safe_load(file.read_text()), find_system(name)
    gpu, node = theirs["gpu"], theirs["node"]
    assert ours.gpu.memory == gpu["mem_capacity"]
    assert ours.gpu.bandwidth == gpu["mem_bw"]
    assert ours.gpu.bandwidth_share == gpu["mem_bw_empirical_scaling_factor"]
    assert ours.gpu.launch == gpu["mem_empirical_constant_latency"]
    keys = {"bf16": "bfloat16_tc_flops", "fp8": "fp8_tc_flops", "fp4": "fp4_tc_flops"}
    assert ours.gpu.flops == {dtype: gpu[key] for dtype, key in keys.items() if key in gpu}
    assert ours.node == node["num_gpus_per_node"]
    assert ours.tiers[0].bandwidth == node["intra_node_bw"]
    assert ours.tiers[0].latency == node["p2p_latency"]
    outer = node.get("inter_rack_bw", node["inter_node_bw"])
    assert ours.tiers[-1].bandwidth == outer
    assert ours.kernels == name


def test_another_network() -> None:
    system = find_system("b200")
    slow = with_network(system, "cluster", bandwidth=50e9, latency=2e-5)
    assert slow.tier("cluster") == Tier("cluster", None, 2e-5, 50e9)
    assert slow.tier("nvlink") == system.tier("nvlink")
    assert with_network(slow, "cluster", bandwidth=100e9, latency=1e-5) == system
    for wrong in ({"bandwidth": 0.0}, {"latency": -1.0}, {"p99": 0.5}):
        with pytest.raises(PlannerError, match="of cluster is"):
            with_network(system, "cluster", **wrong)
    with pytest.raises(PlannerError, match="no tier 'ib', expected one of nvlink, cluster"):
        with_network(system, "ib", bandwidth=1e9)


def test_refuses_tiers_that_do_not_nest() -> None:
    system = find_system("b200")
    for tiers in ((), system.tiers[:1], system.tiers[::-1], (system.tiers[0], *system.tiers)):
        with pytest.raises(PlannerError, match="tier"):
            replace(system, tiers=tiers)


def test_reads_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(FILE)
    system = read_system(file)
    assert system.gpu.flops == find_system("h200_sxm").gpu.flops
    assert system.tiers[1] == Tier("cluster", None, 1e-5, 25e9, 1.5)
    assert system.gpu.bandwidth_share == 0.8


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("node: 8", "", "node"),
        ("memory: 151397597184", "memory: -1", "gpu.memory"),
        ("source: data sheet", "source: data sheet\n  speed: 3", "gpu.speed"),
        ("{bf16: 989.0e+12, ", "{", "lacks bf16"),
        ("gpus: 8, ", "", "only the last without"),
        ("name: mine", "name: [", "YAML"),
    ],
)
def test_refuses_files(tmp_path: Path, old: str, new: str, words: str) -> None:
    file = tmp_path / "mine.yaml"
    assert old in FILE
    file.write_text(FILE.replace(old, new))
    with pytest.raises(PlannerError, match=words):
        read_system(file)
    with pytest.raises(PlannerError, match="can't be read"):
        read_system(tmp_path / "none.yaml")
