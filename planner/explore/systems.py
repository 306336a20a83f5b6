"""The systems that are known by name, with the sources of their numbers.

Peak rates, memory and links are those of NVIDIA's data sheets as the system files of
aiconfigurator-core 0.12 (Apache-2.0) state them, and so are the 10 us per message.
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.explore.system import Gpu, System, Tier

GIB = 1024**3
MIB = 1024**2
_FILE = "aiconfigurator-core 0.12 systems/{}.yaml, after {}"
_LATENCY = 10e-6


def _source(file: str, sheet: str) -> str:
    return _FILE.format(file, sheet)


def _nodes_of_eight(
    name: str, gpu: Gpu, inside: float, between: float, kernels: str, link: str = "nvlink"
) -> System:
    """Eight GPUs per node, one network card per GPU; ``link``: name of the tier inside."""
    tiers = (
        Tier(link, 8, _LATENCY, inside),
        Tier("cluster", None, _LATENCY, between),
    )
    return System(name, gpu, 8, tiers, kernels)


def _racks_of_72(name: str, gpu: Gpu) -> System:
    """NVL72: one NVLink domain per rack of 18 trays with four GPUs each."""
    # between racks 5 us of InfiniBand come on top (inter_rack_latency in the system file)
    tiers = (Tier("rack", 72, _LATENCY, 900e9), Tier("cluster", None, _LATENCY + 5e-6, 100e9))
    return System(name, gpu, 4, tiers, name)


_A100 = Gpu(
    "A100 SXM 80GB",
    80 * GIB,
    2.039e12,
    {"bf16": 312e12},
    _source("a100_sxm", "the A100 80GB SXM data sheet"),
)
_HOPPER = {"bf16": 989e12, "fp8": 1978e12}
_H100 = Gpu("H100 SXM", 80 * GIB, 3.35e12, _HOPPER, _source("h100_sxm", "the H100 data sheet"))
_H200 = Gpu("H200 SXM", 141 * GIB, 4.8e12, _HOPPER, _source("h200_sxm", "the H200 data sheet"))
_H800 = Gpu(
    "H800 SXM",
    80 * GIB,
    3.35e12,
    _HOPPER,
    "as H100 SXM but 400 GB/s of NVLink in both directions together (arXiv 2505.09343, section 2)",
)
_B200 = Gpu(
    "B200 SXM",
    180 * GIB,
    7.7e12,
    {"bf16": 2250e12, "fp8": 4500e12, "fp4": 9000e12},
    _source("b200_sxm", "the Blackwell data sheet; arXiv 2605.28302 takes 8 TB/s of HBM"),
)
_B300 = Gpu(
    "B300 SXM",
    275_040 * MIB,
    7.75e12,
    {"bf16": 2250e12, "fp8": 4500e12, "fp4": 14_000e12},
    _source("b300_sxm", "the Blackwell Ultra data sheet"),
)
_GB200 = Gpu(
    "GB200",
    189_471 * MIB,
    8e12,
    {"bf16": 2500e12, "fp8": 5000e12, "fp4": 10_000e12},
    _source("gb200", "the Blackwell data sheet"),
)
_GB300 = Gpu(
    "GB300",
    284_208 * MIB,
    8e12,
    {"bf16": 2500e12, "fp8": 5000e12, "fp4": 15_000e12},
    _source("gb300", "the Blackwell Ultra data sheet"),
)
_L40S = Gpu(
    "L40S",
    46_068 * MIB,
    864e9,
    {"bf16": 362.05e12, "fp8": 733e12},
    _source("l40s", "the L40S data sheet; within a node PCIe 4.0, no NVLink"),
)

SYSTEMS: Mapping[str, System] = {
    system.name: system
    for system in (
        _nodes_of_eight("a100_sxm", _A100, 300e9, 25e9, "a100_sxm"),
        _nodes_of_eight("h100_sxm", _H100, 450e9, 50e9, "h100_sxm"),
        _nodes_of_eight("h200_sxm", _H200, 450e9, 50e9, "h200_sxm"),
        # the H800's kernels are the H100's: only its NVLink is slower
        _nodes_of_eight("h800", _H800, 200e9, 50e9, "h100_sxm"),
        _nodes_of_eight("b200_sxm", _B200, 900e9, 100e9, "b200_sxm"),
        _nodes_of_eight("b300_sxm", _B300, 900e9, 100e9, "b300_sxm"),
        _racks_of_72("gb200", _GB200),
        _racks_of_72("gb300", _GB300),
        _nodes_of_eight("l40s", _L40S, 32e9, 50e9, "l40s", link="node"),
    )
}
"""By name. Bandwidths are per GPU and direction."""
