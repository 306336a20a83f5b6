"""One process's end of the data plane: frames in, frames out, never waiting.

An endpoint keeps a link per peer (slots on both sides, prepared writes, a session number) and
moves frames over it. It is symmetric: an attention actor calls ``dispatch`` and gets COMBINE
arrivals, an FFN actor gets DISPATCH arrivals and calls ``combine`` or ``refuse``. There is one
frame in flight per slot and direction; a question may be sent again, it overwrites itself.

Not here: who holds which expert, deadlines and retries (the callers'), what a frame's layer means.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import torch

from actors.errors import FrameError, PeerLost, PeerMismatch, PeerTimeout
from actors.transport import frame, trust
from actors.transport.backoff import Backoff, yield_cpu
from actors.transport.frame import DENSE, DIGEST_BYTES, PROTOCOL, FrameHeader, Kind
from actors.transport.geometry import Geometry, class_bytes, size_class
from actors.transport.hops import HopStamps
from actors.transport.link import Arrival, Link
from actors.transport.offer import Offer
from actors.transport.slots import PROBE_BYTES, SlotBuffer
from actors.transport.traffic import Traffic, transport_name
from actors.transport.wire import (
    LOCAL,
    REMOTE,
    Wire,
    host_identity,
    local_wire_usable,
    wanted_tls,
)

logger = logging.getLogger(__name__)

_MAX_HANDLES = 256
_SETTLE_S = 0.05
_PUSH_NS = 50_000
_PROBE_S = 0.02
_DEPARTED = 16
"""Peers that may leave a local wire before new ones get another. Between processes of one host UCX
keeps what it had for a peer until the whole worker goes (measured: 0.13 MiB per peer)."""
_DISPATCH, _COMBINE, _ERROR, _BYE = (int(kind) for kind in Kind)  # cheaper to look up
_now = time.monotonic_ns


class Endpoint:
    """See the module. Thread-safe; every call returns at once.

    Args:
        name: this actor's name, unique in the deployment.
        geometry: shape of all frames; peers must have the same.
        model_digest: of the checkpoint, as hex or bytes; peers must have the same.
        device: "cpu" or a CUDA device such as "cuda:0". CUDA slots are written device to device
            over the remote wire; that path has not been run on a GPU yet.
        ucx_tls: UCX transport list, e.g. "tcp,self". None (and no UCX_TLS in the environment)
            uses shared memory inside a host and UCX's choice between hosts.
        secret: the deployment's; peers must have the same. Empty: anybody may meet.
    """

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        model_digest: str | bytes,
        *,
        device: str = "cpu",
        ucx_tls: str | None = None,
        secret: bytes = b"",
    ):
        self.name = name
        self._secret = secret
        self.geometry = geometry
        self.digest = _short_digest(model_digest)
        self.device = torch.device(device)
        self.counters: Counter[str] = Counter()
        self._source = zlib.crc32(name.encode())
        self._lock = threading.RLock()
        self._waiters: list[int] = []
        self._links: dict[str, Link] = {}
        self._agents: dict[str, Link] = {}
        self._host = host_identity()
        self._closed = False
        tls = wanted_tls(ucx_tls)
        self._wires = {REMOTE: self._make_wire(REMOTE, tls)}
        if tls is None and self.device.type == "cpu" and local_wire_usable():
            self._wires[LOCAL] = self._make_wire(LOCAL)
        self._polled: list[Wire] = []
        self._departed = 0
        self._traffic = {kind: Traffic(transport_name(kind == LOCAL, tls)) for kind in self._wires}

    # ---- membership -----------------------------------------------------------------------

    @property
    def peers(self) -> list[str]:
        """Names of connected peers that are not known to be lost."""
        # a copy, because another thread may change the membership meanwhile
        links = list(self._links.values())
        return [link.peer for link in links if link.connected and not link.lost]

    @property
    def lost(self) -> dict[str, str]:
        """Peers that the transport lost, or that left, with the reason."""
        return {link.peer: link.lost for link in list(self._links.values()) if link.lost}

    def session(self, peer: str) -> int:
        """Number of the meeting with a peer, different after it was connected anew; 0: not met."""
        link = self._links.get(peer)
        return 0 if link is None else link.session

    def offer(self, peer: str) -> Offer:
        """Slots for a peer, to be passed to its ``connect``.

        Asking again before both sides have connected returns the same slots; asking for a peer
        that was connected starts over with new ones (a restarted peer under the same name).
        """
        slots = self._new_slots(peer)
        self._renew_wire()
        with _Membership(self):
            link = self._links.get(peer)
            if link is not None and (link.lost or (link.offered and link.connected)):
                self._drop(link)
                link = None
            if link is None:
                link = self._make_link(peer, slots)
            link.offered = True
            return self._describe(link)

    def connect(self, offer: Offer) -> None:
        """Make a peer's slots reachable; frames from and to it may flow afterwards.

        Connect both sides before either dispatches: frames of strangers are dropped.

        Raises:
            PeerMismatch: the peer serves something else, with both sides' values; or it does not
                have the deployment's secret (code ``peer_not_genuine``).
        """
        self._terms(offer.name).check(offer)
        if not trust.is_genuine(self._secret, offer):
            self._count("not_genuine", 1, "%s refused a stranger's offer: %s", offer.name)
            raise PeerMismatch(
                f"the offer in {offer.name}'s name was not made with {self.name}'s secret, or was "
                "changed on the way; actors of one deployment get the same from its manager",
                code="peer_not_genuine",
            )
        slots = self._new_slots(offer.name)
        self._renew_wire()
        with _Membership(self):
            peer = offer.name
            link = self._links.get(peer)
            if link is not None and (link.lost or link.connected):
                if link.remote_session == offer.session and not link.lost:
                    return  # the same offer again
                self._drop(link)
                link = None
            if link is None:
                link = self._make_link(peer, slots)
            self._join(link, offer)
        # The transport sets itself up at the first write: now, and not when a step waits for it.
        with suppress(PeerLost):  # whoever sends to it will hear
            self.probe(peer)

    def disconnect(self, peer: str) -> None:
        """Forget a peer and tell it so; no error when it is unknown or gone."""
        with _Membership(self):
            link = self._links.get(peer)
            if link is not None:
                self._say_bye(link)
                self._drop(link)

    def close(self) -> None:
        """Disconnect every peer; the endpoint can't be used afterwards. Safe to call twice."""
        with _Membership(self):
            for link in list(self._links.values()):
                self._say_bye(link)
                self._drop(link)
            self._closed = True
            self._polled = []
            self._wires = {}

    def _new_slots(self, peer: str) -> tuple[SlotBuffer, SlotBuffer]:
        """Slots for a peer that may turn out to have some: allocated without the lock, because a
        step must not wait for it. Memory that is not used costs nothing on a CPU."""
        device = str(self.device)
        slots = SlotBuffer(self.geometry, device), SlotBuffer(self.geometry, device)
        if peer not in self._links:
            for buffer in slots:
                buffer.touch()
        return slots

    def _make_wire(self, kind: str, tls: str | None = None) -> Wire:
        return Wire(f"{self.name}/{secrets.token_hex(4)}/{kind}", kind, tls)

    def _renew_wire(self) -> None:
        """Put a new local wire in the place of a worn one, which goes with its last link."""
        if self._departed < _DEPARTED or self._closed:
            return
        fresh = self._make_wire(LOCAL)  # takes milliseconds: without the lock
        with _Membership(self):
            if self._departed >= _DEPARTED and not self._closed:
                self._departed = 0
                self._wires[LOCAL] = fresh

    def _make_link(self, peer: str, slots: tuple[SlotBuffer, SlotBuffer]) -> Link:
        if self._closed:
            raise PeerLost(f"endpoint {self.name} is closed; make a new one")
        send, receive = slots
        link = self._links[peer] = Link(peer, send, receive, 1 + secrets.randbelow(0xFFFFFFFF))
        for wire in self._wires.values():
            for buffer in (send, receive):
                link.registrations.append((wire, wire.register(buffer.bytes)))
        return link

    def _describe(self, link: Link) -> Offer:
        # Registrations come in pairs (send, receive) per wire; a peer writes only into receive.
        wires = tuple(
            (wire.kind, wire.metadata(memory)) for wire, memory in link.registrations[1::2]
        )
        offer = replace(
            self._terms(link.peer),
            session=link.session,
            address=link.receive.address,
            wires=wires,
            nonce=link.nonce,
        )
        return trust.sealed(self._secret, offer)

    def _terms(self, peer: str) -> Offer:
        """An offer without slots: what both sides must agree on."""
        geometry = self.geometry
        return Offer(
            name=self.name,
            peer=peer,
            session=0,
            protocol=PROTOCOL,
            digest=self.digest,
            dtype=geometry.dtype_name,
            hidden=geometry.hidden,
            top_k=geometry.top_k,
            max_tokens=geometry.max_tokens,
            lanes=geometry.lanes,
            host=self._host,
            address=0,
            memory="DRAM" if self.device.type == "cpu" else "VRAM",
            device=self.device.index or 0,
            wires=(),
        )

    def _join(self, link: Link, offer: Offer) -> None:
        theirs = dict(offer.wires)
        mine_by_kind = {owner.kind: owner for owner, _ in link.registrations}
        near = LOCAL in theirs and LOCAL in mine_by_kind and offer.host == self._host
        kind = LOCAL if near else REMOTE
        wire = link.wire = mine_by_kind[kind]
        link.traffic = self._traffic[kind]
        link.agent = wire.add(theirs[kind])
        link.remote_session = offer.session
        link.tag = frame.tagger(trust.link_key(self._secret, link.nonce, offer.nonce))
        mine = self._terms(link.peer)
        source = _regions(self.geometry, link.send.address, mine.device)
        target = _regions(self.geometry, offer.address, offer.device)
        link.local = wire.prepare("", source, mine.memory)
        link.remote = wire.prepare(link.agent, target, offer.memory)
        link.connected = True
        self._agents[link.agent] = link
        if wire not in self._polled:
            self._polled = [*self._polled, wire]

    def _say_bye(self, link: Link) -> None:
        if link.wire is None or not link.connected or link.lost:
            return
        header = self._header(_BYE, link, 0)
        with suppress(PeerLost):
            link.wire.notify(link.agent, frame.pack(header, tag=link.tag))

    def _drop(self, link: Link) -> None:
        self._links.pop(link.peer, None)
        link.lost = link.lost or "disconnected"
        wire = link.wire
        if wire is not None:
            link.traffic.hops.add(link.hops)
            for handle in link.handles.values():
                wire.release(handle)
            link.handles.clear()
            self._agents.pop(link.agent, None)
            wire.remove(link.agent)
            if wire is self._wires.get(LOCAL):
                self._departed += 1
            if not any(other.wire is wire for other in self._links.values()):
                self._polled = [other for other in self._polled if other is not wire]
        link.local = link.remote = None
        for owner, registration in link.registrations:
            owner.deregister(registration)
        link.registrations.clear()
        link.send.retire()
        link.receive.retire()

    # ---- sending ----------------------------------------------------------------------------

    def send_views(
        self, peer: str, lane: int, tokens: int, pairs: int, dense: bool, chunk: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tensors (x, ids, weights, rows) of the send slot, for a producer that writes in place.

        Fill them, then call ``dispatch`` with these same tensors: nothing is copied again.
        """
        with self._lock:
            link = self._link(peer)
            slot = self.geometry.slot(lane, chunk)
            self._settle(link, slot)
            x, ids, weights, rows, _ = link.send.views(slot, tokens, pairs, dense)
            return x, ids, weights, rows

    def dispatch(
        self,
        peer: str,
        lane: int,
        *,
        layer: int,
        step: int,
        epoch: int,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        rows: torch.Tensor | None = None,
        chunk: int = 0,
    ) -> int:
        """Send hidden states to be run through experts.

        Call ``poll`` now and then afterwards: a large frame over a network needs it to get on.

        Args:
            x: [tokens, hidden] of the geometry's dtype, any strides.
            ids: global expert ids, [tokens, top_k], or [pairs] when ``rows`` is given.
            weights: routing weights, shaped like ids.
            rows: [pairs] row of x of each pair; None sends a DENSE frame.
            chunk: number of the piece when a batch is split; says which of the lane's slots it
                takes, see ``Geometry.slot``.

        Returns:
            ``session`` of the link that it went over.

        Raises:
            ValueError: wrong shape or dtype, more tokens than a frame holds, no such lane.
            PeerLost: the peer is unknown, left, or its process is gone.
            PeerTimeout: the slot's previous write has still not left (code ``slot_busy``).
        """
        queued = _now()
        dense = rows is None
        tokens = x.shape[0]
        pairs = ids.numel()
        self._check_question(lane, x, ids, weights, rows)
        with self._lock:
            link = self._link(peer)
            geometry = self.geometry
            slot = geometry.slot(lane, chunk)
            if slot in link.busy:
                self._settle(link, slot)
            views = link.send.views(slot, tokens, pairs, dense)
            if x.data_ptr() != views.x.data_ptr():
                views.x.copy_(x)
                views.ids.copy_(ids)
                views.weights.copy_(weights)
                if rows is not None and views.rows is not None:
                    views.rows.copy_(rows)
            header = FrameHeader(
                _DISPATCH,
                geometry.dtype_code,
                DENSE if dense else 0,
                lane,
                layer,
                chunk,
                geometry.top_k,
                tokens,
                pairs,
                epoch,
                self._source,
                link.remote_session,
                step,
                self.digest,
                queued,
                _now(),
            )
            nbytes = views.layout.nbytes
            self._post(link, slot, nbytes, frame.pack(header, b"", link.tag))
            link.traffic.dispatch_frames += 1
            link.traffic.dispatch_bytes += nbytes
            return link.session

    def result_view(self, arrival: Arrival, tokens: int) -> torch.Tensor:
        """[tokens, hidden] in the send slot, so that a kernel can write the answer in place.

        Raises:
            PeerLost: the peer is gone.  PeerTimeout: see ``dispatch``.
        """
        slot = self._slot(arrival.header)
        with self._lock:
            link = self._live(arrival)
            if slot in link.busy:
                self._settle(link, slot)
            return link.send.answer(slot, tokens)

    def combine(
        self,
        arrival: Arrival,
        out: torch.Tensor | None = None,
        *,
        compute_start_ns: int,
        compute_end_ns: int,
    ) -> None:
        """Answer a DISPATCH.

        Args:
            out: [tokens, hidden]; None when ``result_view`` was filled already.
            compute_start_ns, compute_end_ns: ``time.monotonic_ns()`` around the kernel.

        Raises:
            ValueError: wrong shape.  PeerLost, PeerTimeout: see ``dispatch``.
        """
        question = arrival.header
        slot, tokens = self._slot(question), question.tokens
        with self._lock:
            link = self._live(arrival)
            if slot in link.busy:
                self._settle(link, slot)
            if out is not None:
                view = link.send.answer(slot, tokens)
                if out.shape != view.shape:
                    raise ValueError(
                        f"answer of shape {tuple(out.shape)}, expected {tuple(view.shape)}"
                    )
                if out.data_ptr() != view.data_ptr():
                    view.copy_(out)
            header = self._reply(_COMBINE, link, arrival, compute_start_ns, compute_end_ns, _now())
            note = frame.pack(header, b"", link.tag)
            self._post(link, slot, self.geometry.answer_bytes(tokens), note)

    def refuse(self, arrival: Arrival, code: str, text: str) -> None:
        """Answer a DISPATCH with an error; raises PeerLost when the peer is gone."""
        with self._lock:
            self._refuse(self._live(arrival), arrival.header, code, text)

    def probe(self, peer: str) -> int:
        """Touch a peer's memory to find out whether its process is still there.

        A frozen process passes; only a deadline tells. Raises PeerLost when it is gone. Returns
        ``session``.
        """
        with self._lock:
            link = self._link(peer)
            probe = self.geometry.slots  # lies behind the slots
            if probe in link.busy:
                self._advance(link, probe)
            if probe not in link.busy:
                self._write(link, probe, link.classes * probe, None)
            return link.session

    # ---- receiving --------------------------------------------------------------------------

    def poll(self) -> list[Arrival]:
        """Frames that arrived since the last call, oldest first per peer; never waits.

        Also moves unfinished writes along, so call it while anything is in flight. Frames that
        can't be read, of strangers or of earlier meetings are counted in ``counters``, logged and
        dropped; questions that don't fit this endpoint are answered with an ERROR.
        """
        if self._waiters:
            time.sleep(50e-6)  # let a membership change have the lock
        arrivals: list[Arrival] = []
        with self._lock:
            for wire in self._polled:
                notes = wire.take_notes({})
                if notes:
                    seen = _now()
                    for agent, batch in notes.items():
                        self._receive(agent, batch, seen, arrivals)
            for link in self._links.values():
                if link.busy:
                    for slot in list(link.busy):
                        try:
                            self._advance(link, slot)
                        except PeerLost:
                            break  # kept in ``lost``; the others go on
        return arrivals

    def wait(self, timeout_s: float, peers: Iterable[str] = ()) -> list[Arrival]:
        """Poll until something arrives, at most ``timeout_s`` seconds (then an empty list).

        Args:
            peers: probed while waiting, because a peer that died after it took a frame would
                otherwise show only as a timeout.

        Raises:
            PeerLost: one of ``peers`` is gone.
        """
        backoff = Backoff()
        deadline = time.monotonic() + timeout_s
        next_probe = time.monotonic() + _PROBE_S
        while True:
            arrivals = self.poll()
            if arrivals:
                return arrivals
            now = time.monotonic()
            if now >= deadline:
                return arrivals
            if now >= next_probe:
                next_probe = now + _PROBE_S
                for peer in peers:
                    self.probe(peer)
            backoff.pause()

    def hops(self) -> dict[str, dict]:
        """Hop histograms per peer as plain data, see ``HopHistograms.snapshot``."""
        with self._lock:
            return {link.peer: link.hops.snapshot() for link in self._links.values()}

    def take_wire_s(self) -> dict[str, float]:
        """Per peer the median seconds on the wire, there and back, since it was last asked.

        Without peers that had few frames meanwhile.
        """
        with _Membership(self):  # or a polling thread would hardly ever let go of the lock
            links = [link for link in self._links.values() if link.connected and not link.lost]
            found = {link.peer: link.hops.take_wire_s() for link in links}
        return {peer: seconds for peer, seconds in found.items() if seconds is not None}

    def traffic(self) -> list[Traffic]:
        """Totals per wire since the endpoint began, peers that left included. A copy."""
        with _Membership(self):  # or a polling thread would hardly ever let go of the lock
            totals = {kind: traffic.copy() for kind, traffic in self._traffic.items()}
            for link in self._links.values():
                if link.wire is not None:
                    totals[link.wire.kind].hops.add(link.hops)
        return list(totals.values())

    def _receive(self, agent: str, batch: list[bytes], seen: int, arrivals: list[Arrival]) -> None:
        link = self._agents.get(agent)
        if link is None:
            self._count("stranger", len(batch), "%s dropped frames of unknown agent %s", agent)
            return
        for note in batch:
            try:
                header = frame.unpack(note, link.tag)
                if header.session != link.session:
                    self._count("stale", 1, "%s dropped a frame of an earlier meeting: %s", header)
                    continue
                arrival = self._read(link, header, note, seen)
            except FrameError as error:
                self._count(error.code, 1, "%s dropped a frame: %s", f"{link.peer}: {error}")
                continue
            if arrival is not None:
                arrivals.append(arrival)

    def _read(self, link: Link, header: FrameHeader, note: bytes, seen: int) -> Arrival | None:
        kind = header.kind
        if kind == _BYE:
            self._lose(link, "it closed the connection")
            return None
        if kind == _ERROR:
            return Arrival(link, header, seen, error=frame.unpack_error(note))
        geometry = self.geometry
        fault = None
        if header.digest != self.digest:
            fault = (
                "digest_mismatch",
                f"frame for model {header.digest.hex()}, {self.name} serves {self.digest.hex()}",
            )
        elif header.dtype != geometry.dtype_code or header.top_k != geometry.top_k:
            fault = (
                "bad_dtype" if header.dtype != geometry.dtype_code else "bad_frame",
                f"frame has dtype code {header.dtype} and top_k {header.top_k}, "
                f"expected {geometry.dtype_code} ({geometry.dtype_name}) and {geometry.top_k}",
            )
        elif header.lane >= geometry.lanes:
            fault = ("bad_frame", f"lane {header.lane}, expected 0 to {geometry.lanes - 1}")
        if fault is None:
            try:
                if kind == _COMBINE:
                    link.hops.add(HopStamps(*header[-6:], seen))
                    link.traffic.combine_frames += 1
                    link.traffic.combine_bytes += geometry.answer_bytes(header.tokens)
                    answer = link.receive.answer(self._slot(header), header.tokens)
                    return Arrival(link, header, seen, answer)
                views = link.receive.views(
                    self._slot(header), header.tokens, header.pairs, bool(header.flags & DENSE)
                )
                return Arrival(link, header, seen, *views[:4])
            except ValueError as error:
                fault = ("bad_frame", str(error))
        if kind == _DISPATCH:
            with suppress(PeerLost):
                self._refuse(link, header, *fault)
        raise FrameError(f"{fault[1]} ({header.describe()})", code=fault[0])

    # ---- internals --------------------------------------------------------------------------

    def _check_question(self, lane, x, ids, weights, rows) -> None:
        geometry = self.geometry
        if not 0 <= lane < geometry.lanes:
            raise ValueError(f"lane {lane}, expected 0 to {geometry.lanes - 1}")
        if x.dtype != geometry.dtype or x.dim() != 2 or x.shape[1] != geometry.hidden:
            raise ValueError(
                f"hidden states are {tuple(x.shape)} {x.dtype}, "
                f"expected [tokens, {geometry.hidden}] {geometry.dtype}"
            )
        expected = (x.shape[0], geometry.top_k) if rows is None else rows.shape
        if ids.shape != expected or weights.shape != expected:
            raise ValueError(
                f"ids are {tuple(ids.shape)} and weights {tuple(weights.shape)}, "
                f"expected {tuple(expected)} for both"
            )

    def _link(self, peer: str) -> Link:
        link = self._links.get(peer)
        if link is None or not link.connected:
            raise PeerLost(
                f"{self.name} is not connected to {peer}; "
                f"connected: {', '.join(self.peers) or 'nobody'}",
                code="peer_unknown",
            )
        if link.lost:
            raise PeerLost(f"{self.name} lost {peer}: {link.lost}")
        return link

    def _live(self, arrival: Arrival) -> Link:
        link = arrival._link
        if link.lost:
            raise PeerLost(f"{self.name} lost {link.peer}: {link.lost}")
        return link

    def _lose(self, link: Link, reason: str) -> None:
        if link.lost is None:
            link.lost = reason
            link.busy.clear()
            self.counters["peers_lost"] += 1
            logger.warning("%s lost %s: %s", self.name, link.peer, reason)

    def _count(self, what: str, number: int, text: str, detail: object) -> None:
        # A peer gone wrong may send thousands: log the first and then every power of two.
        before = self.counters[what]
        self.counters[what] = before + number
        if before.bit_length() != (before + number).bit_length():
            logger.warning(text + " (%d so far)", self.name, detail, before + number)

    def _header(self, kind: int, link: Link, lane: int) -> FrameHeader:
        return FrameHeader(
            kind, self.geometry.dtype_code, 0, lane, 0, 0, self.geometry.top_k, 0, 0, 0,
            self._source, link.remote_session, 0, self.digest,
        )  # fmt: skip

    def _reply(
        self, kind: int, link: Link, arrival: Arrival, start: int, end: int, reply: int
    ) -> FrameHeader:
        q = arrival.header
        return FrameHeader(
            kind, q.dtype, q.flags, q.lane, q.layer, q.chunk, q.top_k, q.tokens, q.pairs, q.epoch,
            self._source, link.remote_session, q.step, self.digest,
            q.queued_ns, q.sent_ns, arrival.back_ns, start, end, reply,
        )  # fmt: skip

    def _refuse(self, link: Link, question: FrameHeader, code: str, text: str) -> None:
        header = question._replace(
            source=self._source, session=link.remote_session, digest=self.digest
        )
        try:
            link.wire.notify(link.agent, frame.pack_error(header, code, text, link.tag))
        except PeerLost as error:
            self._lose(link, error.message)
            raise

    def _slot(self, header: FrameHeader) -> int:
        return self.geometry.slot(header.lane, header.chunk)

    def _post(self, link: Link, slot: int, nbytes: int, note: bytes) -> None:
        if self.device.type == "cuda":
            # The write reads device memory outside the stream's order.
            torch.cuda.current_stream(self.device).synchronize()
        self._write(link, slot, slot * link.classes + size_class(nbytes), note)

    def _write(self, link: Link, slot: int, index: int, note: bytes | None) -> None:
        wire = link.wire
        handle = link.handles.get(index)
        if handle is None:
            handle = self._make_handle(link, index)
        try:
            if not wire.post(handle, note):
                # NIXL sends the notification when it sees the write complete, and sees it only
                # when asked. The caller may compute for long before its next poll, so ask a while.
                deadline = _now() + _PUSH_NS
                while not (done := wire.done(handle)) and _now() < deadline:
                    pass
                if not done:
                    link.busy[slot] = handle
        except PeerLost as error:
            self._lose(link, error.message)
            raise PeerLost(f"{self.name} lost {link.peer}: {error.message}") from error

    def _make_handle(self, link: Link, index: int) -> int:
        wire = link.wire
        if len(link.handles) >= _MAX_HANDLES:
            in_flight = set(link.busy.values())
            oldest = next(i for i, h in link.handles.items() if h not in in_flight)
            wire.release(link.handles.pop(oldest))
        handle = link.handles[index] = wire.handle(link.local, link.remote, index)
        return handle

    def _advance(self, link: Link, slot: int) -> None:
        """Drop a slot's write from ``busy`` when it is complete."""
        try:
            if link.wire.done(link.busy[slot]):
                del link.busy[slot]
        except PeerLost as error:
            self._lose(link, error.message)
            raise PeerLost(f"{self.name} lost {link.peer}: {error.message}") from error

    def _settle(self, link: Link, slot: int) -> None:
        """A slot may be written again only when its last write has left.

        It nearly always has: the peer's next frame in a slot follows our last one. So this is a
        short bounded wait, for a frame sent again after a deadline.
        """
        deadline = time.monotonic() + _SETTLE_S
        while slot in link.busy:
            self._advance(link, slot)
            if slot in link.busy:
                if time.monotonic() > deadline:
                    raise PeerTimeout(
                        f"slot {slot} of {self.name} to {link.peer} still sends its last frame "
                        f"after {_SETTLE_S} s; the peer or the network is stuck",
                        code="slot_busy",
                    )
                yield_cpu()


class _Membership:
    """Takes the endpoint's lock and asks its polling thread to let go of it."""

    def __init__(self, endpoint: Endpoint):
        self._endpoint = endpoint

    def __enter__(self) -> None:
        self._endpoint._waiters.append(1)  # a list, because += on an int is not atomic
        self._endpoint._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._endpoint._lock.release()
        self._endpoint._waiters.pop()


def _regions(geometry: Geometry, address: int, device: int) -> list[tuple[int, int, int]]:
    """One descriptor per (slot, size class), then the probe's; same order on both sides."""
    sizes = [class_bytes(index) for index in range(geometry.classes)]
    starts = [address + slot * geometry.slot_bytes for slot in range(geometry.slots)]
    probe = (address + geometry.slots * geometry.slot_bytes, PROBE_BYTES, device)
    return [(start, size, device) for start in starts for size in sizes] + [probe]


def _short_digest(digest: str | bytes) -> bytes:
    """First eight bytes of a digest given as bytes or hex; other text is hashed."""
    if isinstance(digest, bytes):
        whole = digest
    else:
        try:
            whole = bytes.fromhex(digest)
        except ValueError:
            whole = hashlib.sha256(digest.encode()).digest()
    if len(whole) < DIGEST_BYTES:
        whole = hashlib.sha256(whole).digest()
    return whole[:DIGEST_BYTES]
