"""How near a system is to its targets, one number per symptom: 1 is the target itself.

Shared by the policies that react to symptoms. Not for deciding what to do about it, and not for
predictions: ``autoscaler.predict`` knows the latency model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from autoscaler.policy import SLO, View
from planner.control import Snapshot
from planner.digest import Percentiles


@dataclass(frozen=True)
class Saturation:
    """Shares of what is allowed; 0 where nothing was measured.

    Args:
        ttft: time to first token over its target, at the percentile of the targets.
        tpot: the same of the time per output token.
        queue: waiting requests over those that can get their first token within the target.
        refused: above 1 when requests were refused, by their share; else 0.
        kv: share of the KV room in use over what counts as full.
    """

    ttft: float = 0.0
    tpot: float = 0.0
    queue: float = 0.0
    refused: float = 0.0
    kv: float = 0.0

    @property
    def worst(self) -> float:
        """Of all symptoms."""
        return max(getattr(self, entry.name) for entry in fields(self))

    def __str__(self) -> str:
        """The symptoms there are, the worst first, as in ``tpot 1.2, ttft 0.4``."""
        shares = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        order = sorted((name for name in shares if shares[name]), key=lambda name: -shares[name])
        return ", ".join(f"{name} {shares[name]:.2f}" for name in order) or "idle"


def measure(view: View, samples: int = 5, full: float = 0.9) -> Saturation:
    """The saturation that a snapshot shows.

    Args:
        samples: a percentile over fewer requests than this is their median instead.
        full: share of the KV room, in (0, 1], that counts as full.
    """
    snapshot, slo = view.snapshot, view.slo
    tpot = _at(snapshot.tpot, slo, samples)
    if not snapshot.tpot.count:
        # Nothing completed: a request's TPOT is the mean of its gaps.
        tpot = snapshot.itl.mean
    return Saturation(
        ttft=_share(_at(snapshot.ttft, slo, samples), slo.ttft),
        tpot=_share(tpot, slo.tpot),
        queue=_queue(snapshot, slo),
        refused=_refused(snapshot),
        kv=_share(snapshot.kv_usage, full),
    )


def slots_used(view: View) -> float:
    """Share of the slots of the attention workers that serve; 0 to 1, 1 where none serves."""
    slots = view.snapshot.attention * view.system.slots
    return min(1.0, view.snapshot.running / slots) if slots > 0 else 1.0


def idle(snapshot: Snapshot) -> bool:
    """Whether there was nothing to do at all."""
    s = snapshot
    return not (s.running or s.waiting or s.rejected or s.arrival_rate > 0 or s.tokens_rate > 0)


def speaks(snapshot: Snapshot) -> bool:
    """Whether the snapshot holds latencies, or an idle system: enough to do with less."""
    return idle(snapshot) or bool(snapshot.tpot.count or snapshot.itl.count)


def _at(percentiles: Percentiles, slo: SLO, samples: int) -> float:
    """The percentile of the targets, or the next higher one that is kept."""
    if percentiles.count < samples or slo.percentile <= 0.5:
        return percentiles.p50
    return percentiles.p90 if slo.percentile <= 0.9 else percentiles.p99


def _share(value: float, of: float) -> float:
    share = value / of
    return max(0.0, share) if math.isfinite(share) else 0.0


def _queue(snapshot: Snapshot, slo: SLO) -> float:
    """Little's law: at the rate of first tokens, so many may wait and still meet the target.

    One more may: a request that has just come says nothing.
    """
    if not snapshot.waiting or not snapshot.window > 0:
        return 0.0
    return snapshot.waiting / (1.0 + snapshot.ttft.count / snapshot.window * slo.ttft)


def _refused(snapshot: Snapshot) -> float:
    if not snapshot.rejected:
        return 0.0
    came = max(snapshot.rejected, snapshot.arrival_rate * snapshot.window)
    return 1.0 + snapshot.rejected / came
