"""Which expert table an attention actor uses, which of its holders are masked, and what went wrong.

The meeting point of two threads: the manager's calls come from any thread, the engine's thread uses
a table between steps, masks holders while it runs one, and waits here when a step can't go on
without a newer table. Nothing is sent from here (``experts_client``).
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol

from actors.errors import AffluxError, StepInterrupted
from actors.routing import Routes
from actors.table import ExpertTable

_KEPT_FAULTS = 64


@dataclass(frozen=True)
class Fault:
    """A holder that an attention actor stopped using.

    Args:
        number: counts up from 1 in the life of this attention actor.
        peer: the FFN actor.
        kind: ``lost`` (the transport says so), ``silent`` (deadline) or ``refused``.
        detail: one line with layer, step and the last frame that the peer sent.
        epoch: of the table in use.
        at: ``time.time()``.
    """

    number: int
    peer: str
    kind: Literal["lost", "silent", "refused"]
    detail: str
    epoch: int
    at: float


class HasPeers(Protocol):
    """What is asked of an endpoint here."""

    @property
    def peers(self) -> list[str]: ...


class Adoption:
    """See the module. Methods say which thread may call them.

    Args:
        endpoint: knows who is connected.
        wait_s: longest wait for a newer table.

    Attributes:
        routes: what the engine's thread sends by; None before the first table.
        version: changes whenever ``routes`` does.
        faults: the newest ones, oldest first.
        on_fault: called on the engine's thread with every new fault.
        fault_counts: faults since the start by kind.
    """

    def __init__(self, endpoint: HasPeers, wait_s: float):
        self.routes: Routes | None = None
        self.version = 0
        self.faults: deque[Fault] = deque(maxlen=_KEPT_FAULTS)
        self.on_fault: Callable[[Fault], None] | None = None
        self.fault_counts = dict.fromkeys(("lost", "silent", "refused"), 0)
        self.wait_s = wait_s
        self._endpoint = endpoint
        self._masked: dict[str, Fault] = {}
        self._number = 0
        self._changed = threading.Condition()
        self._far: frozenset[str] = frozenset()
        self._pending: Routes | None = None
        self._joined: set[str] = set()
        self._adopters: list[Future[int]] = []
        self._stopping = False
        self._stalled_since: float | None = None

    # -- any thread ------------------------------------------------------------------------------

    @property
    def table(self) -> ExpertTable | None:
        """The table in use."""
        return self.routes.table if self.routes else None

    @property
    def epoch(self) -> int:
        """Epoch in use; 0 before the first table."""
        return self.routes.table.epoch if self.routes else 0

    @property
    def stalled_s(self) -> float:
        """Seconds that the step in progress has waited for a newer table; 0.0 when it does not."""
        since = self._stalled_since
        return 0.0 if since is None else time.monotonic() - since

    def adopt(self, table: ExpertTable) -> Future[int]:
        """Offer a table. The future gives the epoch once this or a newer table is in use.

        Raises:
            AffluxError: an epoch before the newest one given (code ``old_epoch``), a holder that
                is not connected (``unknown_peer``), or the actor is stopping (``not_running``).
        """
        routes = Routes(table, far=self._far)  # milliseconds if large: not under the lock
        used: Future[int] = Future()
        with self._changed:
            if self._stopping:
                raise _stopping()
            newest = self._pending or self.routes
            if newest is not None and table.epoch < newest.table.epoch:
                raise AffluxError(
                    f"expert table of epoch {table.epoch} comes after epoch {newest.table.epoch} "
                    "was adopted; publish it under a higher epoch",
                    code="old_epoch",
                )
            if newest is None or table.epoch > newest.table.epoch:
                self._check_connected(table)
                self._pending = routes
            if self._pending is None:
                used.set_result(table.epoch)
            else:
                self._adopters.append(used)
                self._changed.notify_all()
        return used

    def joined(self, peer: str) -> None:
        """A peer was connected (anew): its mask ends before the next step."""
        with self._changed:
            self._joined.add(peer)
            self._changed.notify_all()

    def avoid(self, far: frozenset[str]) -> None:
        """From the next step on, ask these holders only for what nobody else holds."""
        with self._changed:
            self._far = far

    def stop(self) -> None:
        """End every wait; idempotent."""
        with self._changed:
            self._stopping = True
            adopters, self._adopters = self._adopters, []
            self._changed.notify_all()
        for used in adopters:
            if used.set_running_or_notify_cancel():
                used.set_exception(_stopping())

    def _check_connected(self, table: ExpertTable) -> None:
        connected = self._endpoint.peers
        unknown = [actor for actor in table.actors if actor not in connected]
        if unknown:
            raise AffluxError(
                f"expert table of epoch {table.epoch} names {unknown}, but this attention actor is "
                f"connected to {sorted(connected)} only; connect them first",
                code="unknown_peer",
            )

    # -- the engine's thread ---------------------------------------------------------------------

    @property
    def masked(self) -> dict[str, Fault]:
        """Holders that are not used, with the reason."""
        return self._masked

    def use_pending(self) -> None:
        """Between steps: use the newest table given, end the masks of peers that came back, and
        heed who is far."""
        moved = self.routes is not None and self.routes.far != self._far
        if self._pending is None and not self._joined and not moved:
            return
        with self._changed:
            routes = self._pending or self.routes
            far = self._far
            joined, self._joined = self._joined, set()
            if routes is None:
                return
            masked = {
                actor: fault
                for actor, fault in self._masked.items()
                if actor in routes.actors and actor not in joined
            }
            if masked.keys() != routes.masked or far != routes.far:
                routes = Routes(routes.table, masked, far)
            self.routes, self._masked, self._pending = routes, masked, None
            self.version += 1
            adopters, self._adopters = self._adopters, []
        for used in adopters:
            if used.set_running_or_notify_cancel():
                used.set_result(routes.table.epoch)

    def mask(self, peer: str, kind: Literal["lost", "silent", "refused"], detail: str) -> None:
        """Stop using a holder; a second reason for the same one is not recorded."""
        if peer in self._masked or self.routes is None:
            return
        self._number += 1
        self.fault_counts[kind] += 1
        fault = Fault(self._number, peer, kind, detail, self.epoch, time.time())
        self._masked[peer] = fault
        self.routes = Routes(self.routes.table, self._masked, self.routes.far)
        self.version += 1
        self.faults.append(fault)
        if self.on_fault is not None:
            self.on_fault(fault)

    def await_change(self, interrupted: StepInterrupted) -> None:
        """Wait until a newer table was given or a masked holder was connected anew.

        Raises:
            AffluxError: neither came within ``wait_s`` or before the actor stopped; with the code
                and the words of ``interrupted``.
        """
        self._stalled_since = time.monotonic()
        try:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or self._can_go_on(), timeout=self.wait_s
                )
                if self._can_go_on() and not self._stopping:
                    return
                why = (
                    "the attention actor is stopping"
                    if self._stopping
                    else f"no newer expert table within {self.wait_s:g} s"
                )
                raise AffluxError(f"{interrupted.message}; {why}", code=interrupted.code)
        finally:
            self._stalled_since = None

    def _can_go_on(self) -> bool:
        return self._pending is not None or not self._joined.isdisjoint(self._masked)


def _stopping() -> AffluxError:
    return AffluxError("the attention actor is stopping", code="not_running")
