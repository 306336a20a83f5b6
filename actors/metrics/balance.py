"""How evenly an FFN actor's experts were used lately. Pure: loads in, one number out."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Loads = Mapping[int, Sequence[int]]
"""Layer -> pairs per global expert id since the start."""


class Balance:
    """Greatest over mean load of a layer's experts, mean over layers.

    Args:
        window_s: how far back it looks, about.
        clock: seconds.
    """

    def __init__(self, window_s: float = 60.0, clock: Callable[[], float] = time.monotonic):
        self._window_s = window_s
        self._clock = clock
        self._past: deque[tuple[float, Loads]] = deque()
        self._lock = threading.Lock()

    def __call__(self, loads: Loads, experts: Mapping[int, Sequence[int]]) -> float:
        """The ratio since ``window_s`` ago, or since the first call; 1.0 when nothing happened.

        Args:
            loads: as they are now.
            experts: layer -> ids of those that count, for layers with any.
        """
        now = self._clock()
        with self._lock:
            past = self._past
            while len(past) > 1 and now - past[1][0] >= self._window_s:
                past.popleft()
            before = past[0][1] if past else {}
            # A few are enough to move on by, however often somebody reads.
            if not past or now - past[-1][0] >= self._window_s / 6:
                past.append((now, loads))
        ratios = []
        for layer, ids in experts.items():
            counts = loads.get(layer)
            if counts is None or not len(ids):
                continue
            lately = np.array([counts[expert] for expert in ids], dtype=np.float64)
            earlier = before.get(layer)
            if earlier is not None:
                lately -= [earlier[expert] for expert in ids]
            if lately.sum() > 0:
                ratios.append(lately.max() / lately.mean())
        return float(np.mean(ratios)) if ratios else 1.0
