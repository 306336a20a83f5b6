"""What a scaling policy sees and says: a snapshot in, a target out.

The simulator calls a policy in its loop; the controller of a live deployment calls the same policy
with snapshots made from telemetry. So nothing here knows which of the two it is. Not for the
policies themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from planner.digest import Percentiles


@dataclass(frozen=True)
class Target:
    """How many workers of each role there shall be; None leaves a role as it is."""

    attention: int | None = None
    ffn: int | None = None


@dataclass(frozen=True)
class Snapshot:
    """The system now, and what happened in the window since the policy was last asked.

    Times are in the latency model's unit (seconds in a live deployment); shares are 0 to 1; a
    figure that nothing was measured for is nan, or 0 where it is a count.

    Args:
        now: time of the snapshot.
        window: length of the window that rates, shares and percentiles are over.
        attention: attention workers that take requests.
        ffn: FFN workers that serve.
        attention_preparing: attention workers that are being started.
        attention_draining: attention workers that finish what they have and take nothing new.
        ffn_preparing: change of the number of FFN workers under way; 0 if none.
        running: requests that hold a slot.
        waiting: requests that wait for a prefill worker or for a slot.
        arrival_rate: requests per unit of time that arrived (accepted or not) in the window.
        rejected: requests refused in the window.
        tokens_rate: output tokens per unit of time in the window.
        completed: requests completed in the window.
        ttft: time to first token, queueing included, of requests whose first token came.
        tpot: (last token - first token) / (tokens - 1), of requests that completed.
        itl: time between two tokens of a request.
        attention_busy: busy share of the attention workers, mean over workers.
        ffn_busy: busy share of the FFN workers.
        batch: mean requests in one lane's step on one attention worker.
        kv_tokens: mean context tokens in one lane's step on one attention worker.
        theta: context tokens per slot that the window's completions stand for,
            E[DP + D(D-1)/2] / E[D] (arXiv 2601.21351 v3).
        nu2: the variance that belongs to it, m2 - theta^2 (same source).
        prompt_mean: mean prompt length of the window's completions, tokens.
        output_mean: mean output length of the window's completions, tokens.
        prefix_hit: share of prompt tokens that were found in the prefix cache.
        kv_usage: share of the room for contexts that is in use, mean over attention workers.
        imbalance: load of the busiest FFN worker over the mean, >= 1.
        age: time since the newest measurement that this rests on; 0 in a simulation.
    """

    now: float
    window: float
    attention: int
    ffn: int
    attention_preparing: int = 0
    attention_draining: int = 0
    ffn_preparing: int = 0
    running: int = 0
    waiting: int = 0
    arrival_rate: float = 0.0
    rejected: int = 0
    tokens_rate: float = 0.0
    completed: int = 0
    ttft: Percentiles = field(default_factory=Percentiles)
    tpot: Percentiles = field(default_factory=Percentiles)
    itl: Percentiles = field(default_factory=Percentiles)
    attention_busy: float = float("nan")
    ffn_busy: float = float("nan")
    batch: float = float("nan")
    kv_tokens: float = float("nan")
    theta: float = float("nan")
    nu2: float = float("nan")
    prompt_mean: float = float("nan")
    output_mean: float = float("nan")
    prefix_hit: float = float("nan")
    kv_usage: float = float("nan")
    imbalance: float = float("nan")
    age: float = 0.0

    @property
    def context(self) -> float:
        """Mean context tokens of the requests that run; nan where next to nothing runs."""
        return self.kv_tokens / self.batch if self.batch > 1e-3 else float("nan")


class Policy(Protocol):
    """Decides how many workers there shall be.

    Called once per interval; may keep state between calls. A target that equals what is there or
    under way changes nothing, so a policy may repeat itself.
    """

    def decide(self, snapshot: Snapshot) -> Target | None:
        """The target for this snapshot; None to leave everything as it is."""
        ...
