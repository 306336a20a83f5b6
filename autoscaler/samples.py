"""Measurements of one stage, kept by load: bounded, and mindful of loads that are not seen now.

A steady state gives the same load thousands of times. Here a load class keeps its newest few
samples only, each the median of what came in one message, so that other classes are neither pushed
out nor outvoted. Pure. Not for fitting: see ``stage_fits``.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Key = tuple[float, ...]

PER_OCTAVE = 2
"""Load classes per power of two."""


class Samples:
    """Newest samples by load class.

    Args:
        loads, values: columns of each sample.
        kept: samples of a class.
        classes: most of them; beyond, the one that was heard of longest ago goes.
    """

    def __init__(self, loads: int, values: int = 1, *, kept: int = 5, classes: int = 48):
        self._loads = loads
        self._values = values
        self._kept = kept
        self._classes = classes
        self._rings: dict[Key, deque[tuple[float, Floats]]] = {}

    def __len__(self) -> int:
        return sum(len(ring) for ring in self._rings.values())

    def add(self, loads: Floats, values: Floats, at: float) -> None:
        """Take in measurements of one message: one sample for each class among them.

        Args:
            loads: [n, loads]; a class is a half octave of each.
            values: [n, values]; what a sample keeps are medians, of these and of the loads.
            at: when.
        """
        rows = np.column_stack((loads, values))
        rows = rows[np.isfinite(rows).all(axis=1)]
        if not len(rows):
            return
        sizes = np.maximum(rows[:, : self._loads], 2.0**-20)
        classes, place = np.unique(
            np.round(PER_OCTAVE * np.log2(sizes)), axis=0, return_inverse=True
        )
        for number, key in enumerate(classes):
            middle = np.median(rows[place.ravel() == number], axis=0)
            ring = self._rings.setdefault(tuple(key.tolist()), deque(maxlen=self._kept))
            ring.append((at, middle))
        while len(self._rings) > self._classes:
            del self._rings[min(self._rings, key=lambda key: self._rings[key][-1][0])]

    def forget(self, before: float) -> None:
        """Drop what was measured before."""
        for key, ring in list(self._rings.items()):
            while ring and ring[0][0] < before:
                ring.popleft()
            if not ring:
                del self._rings[key]

    def columns(self) -> tuple[Floats, ...]:
        """All samples: loads, then values, and last the number of each one's class; [n] each."""
        rows = [
            [*sample, number]
            for number, ring in enumerate(self._rings.values())
            for _, sample in ring
        ]
        width = self._loads + self._values + 1
        return tuple(np.array(rows, dtype=np.float64).reshape(-1, width).T)
