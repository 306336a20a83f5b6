"""Bulk memory that peers may read: registered for a while, read whole, given back.

A ``Shelf`` makes tensors of this process readable; a ``Reader`` copies some of a peer's into
tensors here. Both use NIXL agents of their own, made when needed and dropped afterwards, so frames
and their latency are left alone. What the bytes mean is for the callers: see ``actors/weights.py``.

Shared memory and TCP read by address and ask nobody, so a reader could read what came after a loan
that has ended. Each loan therefore has a guard, wiped before its memory may be used for anything
else; a reader looks at it before and after every read.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from actors.errors import AffluxError, PeerLost
from actors.transport.backoff import Backoff
from actors.transport.wire import LOCAL, REMOTE, Wire, host_identity, local_wire_usable, wanted_tls

logger = logging.getLogger(__name__)

Region = tuple[int, int]
"""(address, bytes)."""

_POLL_S = 0.2e-3
_JOIN_S = 5.0
_GRACE_S = 5.0
_SLOWEST = 50e6  # bytes per second that a read may be given up below
_LINGER_S = 30.0
_GUARD_BYTES = 64
_guards: list[torch.Tensor] = []
"""Of all loans ever: their addresses must never hold anything else."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the memory of a ``Shelf``. Plain data; crosses Ray.

    ``wires`` maps a wire's kind to its NIXL metadata; ``host`` says who may share memory with the
    process; ``memory`` and ``device`` are NIXL's names for where it lies; ``guard`` is the address
    of the loan's guard.
    """

    token: str
    guard: int
    host: str
    memory: str
    device: int
    wires: tuple[tuple[str, bytes], ...]

    @property
    def seal(self) -> bytes:
        """What the guard says while the loan is open."""
        return _seal(self.token)

    @property
    def near(self) -> bool:
        """Whether this process can read it through shared memory."""
        kinds = [kind for kind, _ in self.wires]
        return LOCAL in kinds and self.host == host_identity() and local_wire_usable()


@dataclass
class _Lent:
    tensors: tuple[torch.Tensor, ...]
    guard: torch.Tensor
    registrations: list[tuple[Wire, Any]]
    until: float


class Shelf:
    """Lends tensors of this process to readers. Thread-safe.

    While anything is lent, a thread of its own polls NIXL, because reads over a network need this
    side to take part, and takes back what nobody returned in time.

    Args:
        name: unique among all processes that ever meet.
        device: "cpu" or a CUDA device; all tensors must be there.
        ucx_tls: UCX transport list, as of ``Endpoint``.
    """

    def __init__(self, name: str, *, device: str = "cpu", ucx_tls: str | None = None):
        self.name = name
        self._device = torch.device(device)
        self._tls = wanted_tls(ucx_tls)
        self._lent: dict[str, _Lent] = {}
        self._wires: list[Wire] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        """How many loans still hold memory."""
        return len(self._lent)

    def lend(self, tensors: Sequence[torch.Tensor], ttl_s: float) -> Access:
        """Make contiguous tensors readable until ``take_back``, at most for ``ttl_s`` seconds.

        They stay alive for as long; whoever lends them must not change them.
        """
        memory = tuple(tensors)
        token = secrets.token_hex(8)
        guard = torch.frombuffer(bytearray(_seal(token)), dtype=torch.uint8).to(self._device)
        with self._lock:
            wires = self._wires or self._make_wires()
            registrations = []
            try:
                for wire in wires:
                    registrations.append((wire, wire.register(guard, *memory)))
                metadata = tuple((wire.kind, wire.metadata(reg)) for wire, reg in registrations)
            except BaseException:
                for wire, registration in registrations:
                    wire.deregister(registration)
                raise
            self._wires = wires
            _guards.append(guard)
            self._lent[token] = _Lent(memory, guard, registrations, time.monotonic() + ttl_s)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._attend, name=f"{self.name}-lends", daemon=True
                )
                self._thread.start()
        return Access(
            token=token,
            guard=guard.data_ptr(),
            host=host_identity(),
            memory="DRAM" if self._device.type == "cpu" else "VRAM",
            device=self._device.index or 0,
            wires=metadata,
        )

    def take_back(self, token: str) -> bool:
        """End a loan that nobody reads any more; False when it is unknown or has run out."""
        with self._lock:
            lent = self._lent.get(token)
            known = lent is not None and bool(lent.guard.any())
            if lent is not None:
                self._end(token)
            thread = self._thread
        self._wake.set()
        deadline = time.monotonic() + _JOIN_S
        while thread is not None and thread.is_alive() and not self._lent:
            thread.join(_POLL_S)  # it drops the agents
            if time.monotonic() > deadline:
                break
        return known

    def close(self) -> None:
        """End all loans."""
        for token in list(self._lent):
            self.take_back(token)

    def _make_wires(self) -> list[Wire]:
        kinds = [REMOTE]
        if self._tls is None and self._device.type == "cpu" and local_wire_usable():
            kinds.append(LOCAL)
        return [Wire(f"{self.name}/{secrets.token_hex(4)}/{k}", k, self._tls) for k in kinds]

    def _end(self, token: str) -> None:
        lent = self._lent.pop(token)
        lent.guard.zero_()
        for wire, registration in lent.registrations:
            wire.deregister(registration)

    def _attend(self) -> None:
        while True:
            self._wake.wait(_POLL_S)
            self._wake.clear()
            with self._lock:
                now = time.monotonic()
                for token, lent in list(self._lent.items()):
                    if now > lent.until and lent.guard.any():
                        logger.warning("%s: a loan of memory has run out", self.name)
                        lent.guard.zero_()
                    if now > lent.until + _LINGER_S:  # a read under way then has failed by now
                        self._end(token)
                if not self._lent:
                    self._wires = []
                    self._thread = None
                    return
                for wire in self._wires:
                    with suppress(Exception):  # a reader that died is the reader's trouble
                        wire.take_notes({})


class Reader:
    """Reads from one shelf; a context manager that leaves nothing registered.

    Args:
        name: of the reading actor, for the agent's name.
        access: of the shelf.
        device: where the tensors to fill lie.
        ucx_tls: UCX transport list, as of ``Endpoint``.
    """

    def __init__(
        self, name: str, access: Access, *, device: str = "cpu", ucx_tls: str | None = None
    ):
        kind = LOCAL if access.near and wanted_tls(ucx_tls) is None else REMOTE
        self._device = torch.device(device)
        self._access = access
        self._wire = Wire(f"{name}/{secrets.token_hex(4)}/reads-{kind}", kind, wanted_tls(ucx_tls))
        self._peer = ""

    def __enter__(self) -> Reader:
        try:
            self._peer = self._wire.add(dict(self._access.wires)[self._wire.kind])
        except Exception as error:
            raise PeerLost(f"can't reach the memory of a peer: {error}") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._peer:
            self._wire.remove(self._peer)
        # With its agent gone nothing can write any more into tensors that a broken read leaves.
        del self._wire

    def read(self, source: Sequence[Region], into: Sequence[torch.Tensor]) -> None:
        """Fill tensors with the bytes of regions; the lists must cut the bytes in the same way.

        Args:
            source: the peer's regions, one for each row (slice of dim 0) of each tensor in turn.
            into: contiguous tensors; what they hold is worth nothing when this raises.

        Raises:
            ValueError: the sizes differ.
            PeerLost: the peer is gone or refused, is too slow (code ``read_timeout``), or the loan
                has ended (code ``loan_ended``).
        """
        target = [region for tensor in into for region in _rows(tensor)]
        if [size for _, size in target] != [size for _, size in source]:
            raise ValueError(
                f"{len(source)} regions of {sum(size for _, size in source)} bytes can't fill "
                f"{len(target)} rows of {sum(size for _, size in target)} bytes one by one"
            )
        self._check_guard()
        if target:
            self._copy(source, target, into)
            self._check_guard()

    def _check_guard(self) -> None:
        seal = torch.empty(1, _GUARD_BYTES, dtype=torch.uint8, device=self._device)
        self._copy([(self._access.guard, _GUARD_BYTES)], _rows(seal), [seal])
        if bytes(seal.flatten().tolist()) != self._access.seal:
            raise PeerLost("the peer no longer lends this memory", code="loan_ended")

    def _copy(
        self, source: Sequence[Region], target: Sequence[Region], into: Sequence[torch.Tensor]
    ) -> None:
        wire, nbytes = self._wire, sum(size for _, size in target)
        mine = "DRAM" if self._device.type == "cpu" else "VRAM"
        device = self._device.index or 0
        handle = registration = None
        try:
            registration = wire.register(*into)
            local = wire.prepare("", [(a, n, device) for a, n in target], mine)
            theirs = [(a, n, self._access.device) for a, n in source]
            remote = wire.prepare(self._peer, theirs, self._access.memory)
            handle = wire.reading(local, remote, len(target))
            self._wait(handle, nbytes)
        except AffluxError:
            raise
        except Exception as error:  # NIXL raises one class per status, some of them for any reason
            raise PeerLost(f"a read of {nbytes} bytes failed: {error}") from error
        finally:
            if handle is not None:
                wire.release(handle)
            if registration is not None:
                with suppress(Exception):  # what was in flight to a dead peer
                    wire.deregister(registration)

    def _wait(self, handle: int, nbytes: int) -> None:
        limit = _GRACE_S + nbytes / _SLOWEST
        deadline = time.monotonic() + limit
        backoff = Backoff()
        done = self._wire.post(handle, None)
        while not done:
            if time.monotonic() > deadline:
                raise PeerLost(
                    f"a read of {nbytes} bytes did not end within {limit:.0f} s; "
                    "the peer or the network is stuck",
                    code="read_timeout",
                )
            backoff.pause()
            done = self._wire.done(handle)


def _seal(token: str) -> bytes:
    return bytes.fromhex(token).ljust(_GUARD_BYTES, b"!")


def _rows(tensor: torch.Tensor) -> list[Region]:
    size = tensor[0].numel() * tensor.element_size()
    return [(tensor.data_ptr() + row * size, size) for row in range(len(tensor))]
