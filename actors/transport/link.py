"""What an endpoint keeps per peer, and what it hands out: links and arrivals. No behaviour."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from actors.errors import PeerRefused
from actors.transport.frame import UNKEYED, FrameHeader, Kind
from actors.transport.hops import HopHistograms, HopStamps, HopTimes
from actors.transport.slots import SlotBuffer
from actors.transport.trust import nonce
from actors.transport.wire import Wire


class Link:
    """All that an endpoint keeps for one peer."""

    def __init__(self, peer: str, send: SlotBuffer, receive: SlotBuffer, session: int):
        self.peer = peer
        self.send = send
        self.receive = receive
        self.session = session
        self.nonce = nonce()
        self.tag: Any = UNKEYED  # the link's own once connected
        self.remote_session = 0
        self.offered = False
        self.connected = False
        self.lost: str | None = None
        self.agent = ""
        self.wire: Any = None  # a Wire once connected
        self.registrations: list[tuple[Wire, Any]] = []
        self.local: Any = None
        self.remote: Any = None
        self.handles: OrderedDict[int, int] = OrderedDict()
        self.busy: dict[int, int] = {}  # slot -> handle in flight
        self.classes = send.geometry.classes
        self.hops = HopHistograms()
        self.traffic: Any = None  # the Traffic of its wire once connected


class Arrival:
    """A frame that came in. Its tensors are views into the receive slot.

    They stay valid until its answer is posted (FFN side) or the next dispatch into its slot
    (attention side, see ``Geometry.slot``); copy what must live longer.

    Attributes:
        peer: name of the sender.
        header: see ``FrameHeader``; ``header.kind`` is DISPATCH, COMBINE or ERROR.
        x: [tokens, hidden]; hidden states, or partial sums of a COMBINE. None for ERROR.
        ids, weights: [tokens, top_k] (DENSE) or [pairs]; int32 and float32. DISPATCH only.
        rows: [pairs] int32, row of x of each pair; None for DENSE.
        error: (code, text) of an ERROR, else None.
    """

    __slots__ = ("_link", "back_ns", "error", "header", "ids", "peer", "rows", "weights", "x")

    def __init__(
        self,
        link: Link,
        header: FrameHeader,
        back_ns: int,
        x: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        error: tuple[str, str] | None = None,
    ):
        self._link = link
        self.peer = link.peer
        self.header = header
        self.back_ns = back_ns
        self.x = x
        self.ids = ids
        self.weights = weights
        self.rows = rows
        self.error = error

    @property
    def hop(self) -> HopTimes | None:
        """Where this answer's time went; None unless this is a COMBINE."""
        if self.header.kind != Kind.COMBINE:
            return None
        return self._link.hops.times(HopStamps(*self.header[-6:], self.back_ns))

    def raise_if_refused(self) -> None:
        """Raises PeerRefused with the peer's code and text when this is an ERROR."""
        if self.error is not None:
            code, text = self.error
            raise PeerRefused(f"{self.peer} refused {self.header.describe()}: {text}", code=code)
