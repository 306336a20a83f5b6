"""How a frame's payload lies in a slot: sizes and offsets only, no memory.

A frame is contiguous from offset 0, so that it is one write:

    x [T, H] dtype | ids [P] int32 | weights [P] float32 | rows [P] int32 (PAIRS only)

DENSE frames have P = T * top_k and ids and weights are read as [T, top_k]. PAIRS frames carry any
P up to T * top_k, each pair a (row of x, global expert id, weight). An answer is x alone.
Not for allocation: see ``slots``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

DTYPES: dict[int, torch.dtype] = {1: torch.bfloat16, 2: torch.float16, 3: torch.float32}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_LANES = 8
DEPTH = 2
"""Frames that a lane may have in flight to a peer, each in a slot of its own: of a batch in several
pieces one is computed while the next is on its way."""
_ALIGN = 64
_SMALLEST = 256
_STEPS = 32  # sizes per power of two, so padding wastes at most 1/32 of a frame


class Layout(NamedTuple):
    """Byte offsets of one frame; ``nbytes`` is exact, without padding to a size class."""

    ids: int
    weights: int
    rows: int
    nbytes: int


def size_class(nbytes: int) -> int:
    """Index of the smallest size class that holds ``nbytes``. Classes are dense: see above."""
    units = max(0, -(-nbytes // _SMALLEST) - 1)  # 0 = up to 256 bytes
    if units < 2 * _STEPS:
        return units
    shift = units.bit_length() - _STEPS.bit_length()
    return (shift * _STEPS) + (units >> shift)


def class_bytes(index: int) -> int:
    """Bytes of a size class; the inverse of ``size_class``."""
    if index < 2 * _STEPS:
        return (index + 1) * _SMALLEST
    shift = index // _STEPS - 1
    units = ((index - shift * _STEPS) << shift) + (1 << shift) - 1
    return (units + 1) * _SMALLEST


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of every frame between two processes; both sides must have the same.

    Args:
        hidden: hidden size H.
        top_k: experts per token K.
        dtype: of hidden states, a torch dtype or its name ("bfloat16", "float16", "float32").
        max_tokens: most tokens of one frame; the caller splits longer batches into chunks.
        lanes: micro-batches that may be in flight per peer, 1 to 8; each has ``DEPTH`` slots.

    Raises:
        ValueError: a number is out of range or the dtype can't be sent.
    """

    hidden: int
    top_k: int
    dtype: torch.dtype
    max_tokens: int
    lanes: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.dtype, str):
            object.__setattr__(self, "dtype", getattr(torch, self.dtype, self.dtype))
        if self.dtype not in DTYPE_CODES:
            names = ", ".join(str(dtype) for dtype in DTYPE_CODES)
            raise ValueError(f"dtype {self.dtype} can't be sent; use one of {names}")
        for field in ("hidden", "top_k", "max_tokens", "lanes"):
            value = getattr(self, field)
            if value < 1:
                raise ValueError(f"{field} is {value}, must be at least 1")
        if self.lanes > MAX_LANES:
            raise ValueError(f"lanes is {self.lanes}, at most {MAX_LANES} are supported")
        if self.top_k > 0xFFFF:
            raise ValueError(f"top_k is {self.top_k}, at most 65535 fits a frame")

    @property
    def dtype_code(self) -> int:
        return DTYPE_CODES[self.dtype]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def max_pairs(self) -> int:
        return self.max_tokens * self.top_k

    @property
    def slots(self) -> int:
        """Slots of a peer, in either direction."""
        return self.lanes * DEPTH

    def slot(self, lane: int, chunk: int) -> int:
        """Where a lane's frame of that number lies: frames ``DEPTH`` apart share a slot."""
        return lane + self.lanes * (chunk % DEPTH)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest frame, rounded up to its size class."""
        largest = self.layout(self.max_tokens, self.max_pairs, dense=False).nbytes
        return class_bytes(size_class(largest))

    @property
    def classes(self) -> int:
        """Number of size classes that fit a slot."""
        return size_class(self.slot_bytes) + 1

    def answer_bytes(self, tokens: int) -> int:
        """Bytes of an answer for ``tokens`` rows."""
        return tokens * self.hidden * self.itemsize

    def layout(self, tokens: int, pairs: int, dense: bool) -> Layout:
        """Offsets of a question.

        Raises:
            ValueError: more tokens or pairs than a slot holds, or none, or a DENSE frame whose
                pairs are not tokens * top_k.
        """
        if not 1 <= tokens <= self.max_tokens:
            raise ValueError(
                f"frame of {tokens} tokens; a frame holds 1 to {self.max_tokens}: "
                "split the batch into chunks or raise transport.max_frame_tokens"
            )
        if not 1 <= pairs <= tokens * self.top_k:
            raise ValueError(
                f"frame of {pairs} (token, expert) pairs for {tokens} tokens; "
                f"expected 1 to {tokens * self.top_k}"
            )
        if dense and pairs != tokens * self.top_k:
            raise ValueError(
                f"dense frame of {pairs} pairs for {tokens} tokens, "
                f"expected {tokens * self.top_k} (tokens * top_k)"
            )
        # Pairs start on 64 bytes, so that int32 views are aligned for any hidden size.
        ids = -(-self.answer_bytes(tokens) // _ALIGN) * _ALIGN
        weights = ids + 4 * pairs
        rows = weights + 4 * pairs
        return Layout(ids, weights, rows, rows if dense else rows + 4 * pairs)
