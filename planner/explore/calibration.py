"""What exchanges reach of a link's data sheet: share of the bandwidth, overhead, cost per peer.

Constants with the fit that made them. The measurements are DeepEP's low-latency kernels and
TensorRT-LLM's NVLink all-to-all as recorded in ``aiconfigurator-core``; reading those tables is
``exchanges``'s business, comparing with other published figures ``published``'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from planner.errors import PlannerError
from planner.explore.system import System, Tier


@dataclass(frozen=True)
class Link:
    """What is reached on a tier.

    Args:
        share: of the tier's bandwidth.
        overhead: seconds of an exchange on top of the tier's latency: launches, flags, waiting.
    """

    share: float
    overhead: float


@dataclass(frozen=True)
class Calibration:
    """How transfers on a system's tiers are timed.

    Args:
        name: for people.
        source: of the numbers.
        links: by name of the tier; a tier that is not here is taken at its word.
        per_peer: seconds for every peer that a GPU sends to or gets from.
        spread: 99th percentile of measured over fitted times: the least factor for a p99. What is
            published are averages of many runs; how they scatter over the fit stands in for the
            tail of a single exchange, which nobody has published for these kernels.
    """

    name: str
    source: str
    links: Mapping[str, Link] = field(default_factory=dict)
    per_peer: float = 0.0
    spread: float = 1.0

    def bandwidth(self, tier: Tier) -> float:
        """Bytes per second that one GPU reaches on a tier, each way."""
        link = self.links.get(tier.name)
        return tier.bandwidth * (1.0 if link is None else link.share)

    def latency(self, tier: Tier) -> float:
        """Seconds of an exchange without bytes and peers."""
        link = self.links.get(tier.name)
        return tier.latency + (0.0 if link is None else link.overhead)


@dataclass(frozen=True)
class Measurement:
    """An all-to-all of GPUs that all send alike.

    Args:
        source: table and system, for people.
        tier: "nvlink", or "cluster" where the slowest part goes between nodes.
        latency, bandwidth: of that tier in the data sheet, seconds and bytes per second.
        peers: other GPUs that each GPU sends to.
        size: bytes that each GPU sends over that tier.
        seconds: measured.
        held_out: not used for fits.
    """

    source: str
    tier: str
    latency: float
    bandwidth: float
    peers: int
    size: float
    seconds: float
    held_out: bool = False


def fit(name: str, source: str, measured: Sequence[Measurement]) -> Calibration:
    """Least squares of relative errors, nothing below 0:
    seconds = latency + overhead(tier) + per_peer * peers + size / (share(tier) * bandwidth).

    Args:
        name, source: of the result.
        measured: at least one more than there are parameters, two per tier and one.

    Raises:
        PlannerError: too few measurements.
    """
    tiers = sorted({one.tier for one in measured})
    used = [one for one in measured if not one.held_out]
    if len(used) <= 2 * len(tiers) + 1:
        raise PlannerError(f"{len(used)} measurements of {name}, expected more: nothing to fit")
    seconds = np.array([one.seconds for one in used])
    columns = [np.array([one.peers for one in used], float)]
    for tier in tiers:
        on = np.array([one.tier == tier for one in used], float)
        columns += [on, on * [one.size / one.bandwidth for one in used]]
    rest = 1 - np.array([one.latency for one in used]) / seconds
    solved, _ = nnls(np.stack(columns, axis=1) / seconds[:, None], rest)
    links = {
        tier: Link(float(1 / solved[2 + 2 * index]), float(solved[1 + 2 * index]))
        for index, tier in enumerate(tiers)
    }
    found = Calibration(name, source, links, float(solved[0]))
    spread = np.quantile([one.seconds / predicted(found, one) for one in used], 0.99)
    return Calibration(name, source, links, found.per_peer, max(1.0, float(spread)))


def predicted(calibration: Calibration, one: Measurement) -> float:
    """Seconds that a calibration gives for what was measured."""
    tier = Tier(one.tier, None, one.latency, one.bandwidth)
    alone = calibration.latency(tier) + calibration.per_peer * one.peers
    return alone + one.size / calibration.bandwidth(tier)


NOMINAL = Calibration("nominal", "latencies and bandwidths of the system's tiers, nothing lost")
"""As arXiv 2605.28302 has it: what the tiers say."""

HOPPER = Calibration(
    "hopper",
    "fit to DeepEP low latency on H100 and H200, 1, 2, 4 and 8 nodes, aiconfigurator-core 0.12",
    {"nvlink": Link(0.5247, 0.208e-6), "cluster": Link(0.9358, 10.70e-6)},
    0.1098e-6,
    1.353,
)
_NVLINK_5 = Link(0.5538, 5.79e-6)
BLACKWELL = Calibration(
    "blackwell",
    "fit to DeepEP low latency on B200, B300, GB200 and GB300, one node, and to TensorRT-LLM's "
    "NVLink all-to-all on GB200, 4 to 64 GPUs, aiconfigurator-core 0.12; between domains as Hopper",
    {"nvlink": _NVLINK_5, "rack": _NVLINK_5, "cluster": HOPPER.links["cluster"]},
    0.0413e-6,
    1.596,
)
"""Constants of ``fit``: ``python -m benchmarks.planner_published`` makes them again and a test
compares."""

_FAMILIES = {"h": HOPPER, "b": BLACKWELL, "gb": BLACKWELL}


def calibration_of(system: System) -> Calibration:
    """The calibration of a system's family by the letters its name starts with; Hopper's for
    families that nothing was measured of."""
    letters = (system.kernels or system.name).lower()
    family = letters[: next((i for i, c in enumerate(letters) if not c.isalpha()), len(letters))]
    return _FAMILIES.get(family, HOPPER)
