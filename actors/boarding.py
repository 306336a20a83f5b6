"""Which frames share one kernel call.

Frames for the same layer that have already arrived, from whatever peers and lanes, ride together:
the experts' weights are then read once for all of them. Nobody ever waits for a rider: what is
here leaves. A frame of many tokens rides alone, because it fills a kernel by itself and would
only hold up the small ones. Pure decisions; computing them is the job of ``ffn.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class _Header(Protocol):
    @property
    def layer(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def dense(self) -> bool: ...


class Frame(Protocol):
    """Anything that says its layer, tokens and layout in a ``header``."""

    @property
    def header(self) -> _Header: ...


FrameT = TypeVar("FrameT", bound=Frame)


def board(frames: Sequence[FrameT], merge_tokens: int) -> list[list[FrameT]]:
    """Group frames into rides.

    Args:
        frames: what has arrived, oldest first.
        merge_tokens: most tokens of a ride of several frames; a larger frame rides alone.

    Returns:
        Rides in the order of their oldest frames; each keeps the order of arrival, and all its
        frames have the same layer and layout. Every frame is in exactly one ride.
    """
    rides: list[list[FrameT]] = []
    open_rides: dict[tuple[int, bool], tuple[list[FrameT], int]] = {}
    for frame in frames:
        header = frame.header
        key = (header.layer, header.dense)
        ride, tokens = open_rides.get(key, ([], merge_tokens))
        if tokens + header.tokens > merge_tokens:
            ride, tokens = [], 0
            rides.append(ride)
        ride.append(frame)
        if tokens + header.tokens <= merge_tokens:
            open_rides[key] = (ride, tokens + header.tokens)
    return rides
