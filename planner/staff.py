"""How many workers there were, and when: what a run is billed for.

A worker counts from the moment that it is asked for until it is gone, so starting and draining ones
count as well. Who asks for them is ``changes``'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Staff(NamedTuple):
    """Workers from time ``at`` on.

    Args:
        attention: that take requests.
        attention_preparing: that are being started.
        attention_draining: that finish what they have.
        ffn: that serve.
        ffn_preparing: that are being started; those to be given up serve until they are.
    """

    at: float
    attention: int
    attention_preparing: int
    attention_draining: int
    ffn: int
    ffn_preparing: int

    @property
    def attention_paid(self) -> int:
        """Attention workers that somebody pays for."""
        return self.attention + self.attention_preparing + self.attention_draining

    @property
    def ffn_paid(self) -> int:
        """FFN workers that somebody pays for."""
        return self.ffn + self.ffn_preparing


def worker_time(staff: Sequence[Staff], until: float) -> tuple[float, float]:
    """Workers times time, attention and FFN, from the first entry until a time.

    Args:
        staff: in order of time; each entry holds until the next, the last one for good.
        until: in the same unit as the entries; what lies beyond it does not count.
    """
    attention = ffn = 0.0
    for entry, after in pairwise([*staff, None]):
        assert entry is not None
        end = until if after is None else min(after.at, until)
        span = max(0.0, end - entry.at)
        attention += span * entry.attention_paid
        ffn += span * entry.ffn_paid
    return attention, ffn
