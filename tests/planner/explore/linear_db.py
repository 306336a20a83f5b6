"""A source of kernel times whose arithmetic a test can do again by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.explore.kernels.base import Array, Load, NotCovered, Provenance, Sides, Time
from planner.explore.model import Model


@dataclass
class LinearDB:
    """Attention: 1 ms + 10 us per token + 1 ns per token of context and decode, + 2 ns per token of
    context and prompt token. Experts: 2 ms + 5 us per token. Exchange: 3 us per token."""

    name: str = "linear"
    backend: str = ""
    most_tokens: float = np.inf
    calls: int = 0

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        self.calls += 1
        tokens = load.decode + load.prefill
        if np.any(tokens > self.most_tokens):
            error = NotCovered("too many tokens")
            error.covered = np.asarray(tokens <= self.most_tokens)
            raise error
        seen = load.past + load.prefill / load.prompts / 2
        seconds = (
            1e-3 + 10e-6 * tokens + 1e-9 * load.decode * load.context + 2e-9 * load.prefill * seen
        )
        return Time({Provenance.MEASURED: seconds / tp})

    def experts(self, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
        return Time({Provenance.INTERPOLATED: 2e-3 + 5e-6 * tokens / (tp * ep)})

    def exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int, tokens: Array) -> Time:
        return Time({Provenance.ROOFLINE: 3e-6 * tokens})
