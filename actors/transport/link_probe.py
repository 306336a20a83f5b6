"""How long a write takes from one node to another, by the data plane's own library and transports.

One end per node: whoever measures writes into the other's memory, which has to ``attend`` meanwhile
because TCP needs both sides' help. Not for a deployment's actors: what their frames take is known
from the frames (``hops``); this is for nodes that have no actors yet.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch

from actors.errors import PeerTimeout
from actors.transport import interfaces
from actors.transport.backoff import Backoff
from actors.transport.wire import REMOTE, Wire, wanted_tls

SMALL = 64
WRITES = 20
REPEATS = 3
LARGE = tuple(1 << n for n in range(18, 26))
"""Bytes of the writes that tell the rate, 256 KiB to 32 MiB; larger ones only while quick."""

LONG_S = 0.02
"""A write that took this long tells the rate well enough."""


@dataclass(frozen=True)
class ProbeOffer:
    """One end's memory, as the other has to know it."""

    name: str
    address: int
    metadata: bytes


@dataclass(frozen=True)
class Measured:
    """A link: seconds for the first byte one way, bytes per second after it."""

    latency_s: float
    bytes_per_s: float


class LinkProbe:
    """One node's end; ``attend`` may run on another thread than the rest.

    Args:
        name: unique among all ends.
        ucx_tls: UCX transport list, see ``Endpoint``.
        address: of this node, to choose the interface by.
    """

    def __init__(self, name: str, ucx_tls: str | None = None, address: str | None = None):
        interfaces.choose(address)
        self.name = name
        self._wire = Wire(name, REMOTE, wanted_tls(ucx_tls))
        self._memory = torch.ones(LARGE[-1], dtype=torch.uint8)  # not zeros: pages must be there
        self._registration = self._wire.register(self._memory)
        self._rest = threading.Event()

    def offer(self) -> ProbeOffer:
        """What the other end's ``measure`` wants."""
        return ProbeOffer(
            self.name, self._memory.data_ptr(), self._wire.metadata(self._registration)
        )

    def attend(self, timeout_s: float) -> None:
        """Let others write, until ``rest`` or for so long."""
        deadline = time.monotonic() + timeout_s
        while not self._rest.is_set() and time.monotonic() < deadline:
            self._wire.take_notes({})
        self._rest.clear()

    def rest(self) -> None:
        """End ``attend``, also one that has not begun."""
        self._rest.set()

    def measure(self, peer: ProbeOffer, timeout_s: float) -> Measured:
        """Write to another end that attends.

        Raises:
            PeerTimeout: it took longer. PeerLost: the transport found nobody.
        """
        deadline = time.monotonic() + timeout_s
        agent = self._wire.add(peer.metadata)
        sizes = (SMALL, *LARGE)
        local, remote = (
            self._wire.prepare(name, [(start, size, 0) for size in sizes], "DRAM")
            for name, start in (("", self._memory.data_ptr()), (agent, peer.address))
        )
        handles = [self._wire.handle(local, remote, index) for index in range(len(sizes))]
        try:
            self._write(handles[0], deadline)  # the first one connects
            # the fastest of each: slower ones waited for a core, not for the link
            trip = min(self._write(handles[0], deadline) for _ in range(WRITES))
            rate = 0.0
            for size, handle in zip(LARGE, handles[1:], strict=True):
                took = min(self._write(handle, deadline) for _ in range(REPEATS))
                rate = max(rate, size / max(took - trip, 0.1 * took))
                if took > max(LONG_S, 3 * trip):
                    break
            return Measured(trip / 2, rate)
        finally:
            for handle in handles:
                self._wire.release(handle)
            self._wire.remove(agent)

    def _write(self, handle: int, deadline: float) -> float:
        began = time.perf_counter()
        done = self._wire.post(handle, None)
        backoff = Backoff()
        while not done:
            if time.monotonic() > deadline:
                raise PeerTimeout(f"{self.name}: a write has not ended in time")
            done = self._wire.done(handle)
            if not done:
                backoff.pause()
        return time.perf_counter() - began

    def close(self) -> None:
        """Give the memory back."""
        self._wire.deregister(self._registration)
