"""Memory of the slots: one send and one receive buffer per peer, cut into slots.

CPU slots lie on huge pages where the kernel gives them: writing into another process's memory
costs per page, and 256 KiB are 64 small pages or one huge one (measured: a raw NIXL round trip of
256 KiB took 62 us on small pages and 36 us on huge ones). Not for transfers: see ``wire``.
"""

from __future__ import annotations

import mmap
import time
from collections import OrderedDict
from contextlib import suppress
from typing import NamedTuple

import torch

from actors.transport.geometry import Geometry, Layout

PROBE_BYTES = 64
"""After the slots: what a peer overwrites to see whether this process is still there."""

_HUGE = 2 << 20
_FIRST = 256 << 10
_FIRST_LANES = 3
"""Bytes of a slot that a step of usual size writes, and lanes that it has."""
_QUARANTINE_S = 60.0
_MAX_VIEWS = 512
_retired: list[tuple[float, SlotBuffer]] = []


class Views(NamedTuple):
    """One frame in a slot, as tensors; ``rows`` is None for a DENSE frame."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    rows: torch.Tensor | None
    layout: Layout


class SlotBuffer:
    """The slots of a geometry in one registered piece of memory.

    Args:
        geometry: shape of the frames.
        device: "cpu" or a CUDA device; CUDA slots are plain device tensors.
    """

    def __init__(self, geometry: Geometry, device: str = "cpu"):
        self.geometry = geometry
        size = geometry.slot_bytes * geometry.slots + PROBE_BYTES
        self.bytes = _huge_pages(size) if device == "cpu" else _device_bytes(size, device)
        self.address = self.bytes.data_ptr()
        self._x = self.bytes.view(geometry.dtype)
        self._int = self.bytes.view(torch.int32)
        self._float = self.bytes.view(torch.float32)
        self._views: OrderedDict[tuple[int, int, int, bool], Views] = OrderedDict()
        self._answers: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    def touch(self) -> None:
        """Have the kernel find memory for the first part of the first slots now.

        It does so at the first write, which then takes milliseconds for a huge page: of a step, if
        nobody has written before (measured: 60 ms more for the first step with three new peers).
        """
        if self.bytes.device.type == "cpu":
            slot = self.geometry.slot_bytes
            for lane in range(min(self.geometry.lanes, _FIRST_LANES)):  # its first slot
                start = lane * slot
                self.bytes[start : start + min(slot, _FIRST) : mmap.PAGESIZE] = 0

    def views(self, slot: int, tokens: int, pairs: int, dense: bool) -> Views:
        """Question tensors in a slot; raises ValueError like ``Geometry.layout``."""
        key = (slot, tokens, pairs, dense)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = self._make_views(*key)
            if len(self._views) > _MAX_VIEWS:
                self._views.popitem(last=False)
        return views

    def answer(self, slot: int, tokens: int) -> torch.Tensor:
        """[tokens, hidden] view of a slot."""
        key = (slot, tokens)
        view = self._answers.get(key)
        if view is None:
            geometry = self.geometry
            if not 1 <= tokens <= geometry.max_tokens:
                raise ValueError(f"answer of {tokens} tokens, expected 1 to {geometry.max_tokens}")
            start = slot * geometry.slot_bytes // geometry.itemsize
            shape = (tokens, geometry.hidden)
            view = self._x.as_strided(shape, (geometry.hidden, 1), start)
            self._answers[key] = view
            if len(self._answers) > _MAX_VIEWS:
                self._answers.popitem(last=False)
        return view

    def _make_views(self, slot: int, tokens: int, pairs: int, dense: bool) -> Views:
        geometry = self.geometry
        layout = geometry.layout(tokens, pairs, dense)
        start = slot * geometry.slot_bytes
        shape = (tokens, geometry.top_k) if dense else (pairs,)
        strides = (geometry.top_k, 1) if dense else (1,)
        ids = self._int.as_strided(shape, strides, (start + layout.ids) // 4)
        weights = self._float.as_strided(shape, strides, (start + layout.weights) // 4)
        rows = None
        if not dense:
            rows = self._int.as_strided(shape, strides, (start + layout.rows) // 4)
        return Views(self.answer(slot, tokens), ids, weights, rows, layout)

    def retire(self) -> None:
        """Keep the memory mapped for a while although nobody uses it any more.

        Over shared memory a peer writes by address, and a peer that has not yet heard that the
        link is closed would otherwise write into whatever was mapped there next.
        """
        now = time.monotonic()
        while _retired and now - _retired[0][0] > _QUARANTINE_S:
            _retired.pop(0)
        _retired.append((now, self))


def _huge_pages(size: int) -> torch.Tensor:
    """Zeroed bytes, aligned to and advised for huge pages; small pages where there are none."""
    # Private, because the kernel gives shared anonymous memory no huge pages.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, -(-size // _HUGE) * _HUGE + _HUGE, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without transparent huge pages: slower, still right
            pages.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _HUGE
    # Not a slice: as_strided counts from the start of the storage.
    return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=start)


def _device_bytes(size: int, device: str) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)
