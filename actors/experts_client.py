"""The attention side of the remote call: a layer's pairs to FFN actors, their answers added up.

Knows the endpoint and what ``adoption`` says about the expert table; knows nothing of vLLM. One
object per attention process, used from the one thread that runs the engine's steps (``adopt``,
``peer_joined`` and ``stop`` from any). A frame has a deadline; a holder that misses it, is lost or
refuses is masked, and what it did not answer goes to the other holders at once. Where there are
none the step is interrupted; the runner repeats it under a newer table.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from actors.adoption import Adoption, Fault
from actors.emulate import Emulation, sleep_rest
from actors.errors import AffluxError, PeerLost, PeerRefused, PeerTimeout, StepInterrupted
from actors.lanes import LaneChooser, current_lane, yield_lane
from actors.routing import shares
from actors.table import ExpertTable
from actors.tickets import Part, Piece, Ticket
from actors.transport.backoff import Backoff
from actors.transport.endpoint import Arrival, Endpoint
from actors.transport.frame import FrameHeader
from actors.transport.geometry import DEPTH

PROBE_SECONDS = 0.02
_NAP_SECONDS = 2e-4  # of a lane that waits for an emulated wire; others may be due before it
_NOT_HELD = frozenset({"unknown_expert", "unknown_layer"})


@dataclass
class ClientStats:
    """Totals since start, seconds and counts; read by telemetry.

    ``wait_seconds`` is summed over lanes, other lanes' work included; ``idle_seconds`` is the time
    in which no lane had anything to do, waits for a table included.
    """

    steps: int = 0
    frames: int = 0
    tokens: int = 0
    resent: int = 0
    interrupted: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    idle_seconds: float = 0.0


class ExpertsClient:
    """Dispatches hidden states to the FFN actors of the table and combines their partial sums.

    Args:
        endpoint: connected to every actor of the table that is adopted.
        chooser: told the measured stage times, so that it can choose lanes.
        max_tokens: rows per frame; longer batches travel in several.
        timeout: seconds that a frame may take from dispatch to combine.
        wait_s: seconds that an interrupted step waits for a newer table.
        emulate: modelled times of attention and wire, or None for the real ones alone.

    Attributes:
        lanes: of the newest step.
        step_tokens: of the newest step; set by the runner.
        step_load: likewise: requests, those of them with one token, context tokens of all.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        chooser: LaneChooser,
        *,
        max_tokens: int,
        timeout: float,
        wait_s: float = 60.0,
        emulate: Emulation | None = None,
    ):
        self.endpoint = endpoint
        self.chooser = chooser
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.emulate = emulate
        self.stats = ClientStats()
        self.adoption = Adoption(endpoint, wait_s)
        self._step = 0
        self.lanes = 1
        self.step_tokens = 0
        self.step_load: tuple[int, int, int] = (0, 0, 0)
        self._flying: dict[int, Piece] = {}  # slot -> piece
        # (actor, slot) -> the unanswered frame there. Neither our send slot nor the
        # receive slot may be used for another frame before the answer is here.
        self._owed: dict[tuple[str, int], Part] = {}
        self._parked: dict[int, Ticket] = {}
        self._park_number = 0
        self._resumed: dict[int, float] = {}
        self._began: dict[int, float] = {}
        self._context: dict[int, int] = {}
        self._last_heard: dict[str, FrameHeader] = {}
        self._backoff = Backoff()
        self._idle_since = 0.0  # since when every lane has waited; 0.0 while one computes

    # -- any thread ----------------------------------------------------------------------------

    def adopt(self, table: ExpertTable) -> "Future[int]":
        """Use ``table`` from the next step on; see ``Adoption.adopt``."""
        return self.adoption.adopt(table)

    def peer_joined(self, peer: str) -> None:
        """A peer was connected; if it was masked it is used again from the next step on."""
        self.adoption.joined(peer)

    def stop(self) -> None:
        """End a wait for a table; the step in progress fails."""
        self.adoption.stop()

    @property
    def epoch(self) -> int:
        """Epoch in use; 0 before the first table."""
        return self.adoption.epoch

    @property
    def table(self) -> ExpertTable | None:
        """The table in use."""
        return self.adoption.table

    @property
    def faults(self) -> list[Fault]:
        """Newest faults, oldest first."""
        return list(self.adoption.faults)

    def on_fault(self, callback: Callable[[Fault], None] | None) -> None:
        """Have ``callback`` called on the engine's thread with every new fault."""
        self.adoption.on_fault = callback

    # -- one step ------------------------------------------------------------------------------

    def begin_step(self, lane_count: int) -> None:
        """Start a step: adopt a pending table, forget what an earlier failed step left behind."""
        before = self.adoption.version
        self.adoption.use_pending()
        if before != self.adoption.version:
            self._forget_gone()
        self._step += 1
        self.lanes = lane_count
        self._idle_since = 0.0
        self._flying.clear()
        self._parked.clear()
        self._resumed.clear()
        self.stats.steps += 1

    def begin_lane(self, context: int) -> None:
        """The running lane starts its forward pass; ``context`` is its requests' tokens so far."""
        lane = current_lane()
        now = self._began[lane] = time.perf_counter()
        if self._idle_since:
            self._end_idleness(now)
        self._context[lane] = context

    def await_change(self, interrupted: StepInterrupted) -> None:
        """Wait until a repetition of an interrupted step may succeed; see ``Adoption``."""
        self.stats.interrupted += 1
        began = time.perf_counter()
        try:
            self.adoption.await_change(interrupted)
        finally:
            self.stats.idle_seconds += time.perf_counter() - began

    def dispatch(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> Ticket:
        """Send one layer's rows to the actors that hold their experts; does not wait.

        More rows than a frame holds travel in pieces, ``DEPTH`` of them at a time: an actor
        computes one while the next comes in and the last one's answer leaves.

        Args:
            layer: layer index.
            x: [T, H] in the model's dtype.
            weights: [T, K] routing weights.
            ids: [T, K] global expert ids.

        Raises:
            StepInterrupted: an expert that is asked for has no live holder.
            AffluxError: no table was adopted, or it lacks this layer.
        """
        lane = current_lane()
        routes = self.adoption.routes
        if routes is None:
            raise AffluxError(
                "no expert table: the manager has not published one to this attention actor",
                code="no_table",
            )
        if layer not in routes.layers:
            raise AffluxError(
                f"layer {layer} is not in the expert table of epoch {self.epoch}, which has layers "
                f"{routes.table.layers}",
                code="no_layer",
            )
        resumed = self._resumed.get(lane)
        if self.emulate is not None:
            began = self._began.get(lane, 0.0) if resumed is None else resumed
            sleep_rest(began, self.emulate.attention(self._context.get(lane, 0)))
        ticket = self._cut(lane, layer, x, weights.to(torch.float32), ids.to(torch.int32))
        for piece in ticket.pieces[:DEPTH]:
            self._send_piece(piece)
        if resumed is not None:  # what one more lane costs this side, the hop's own work included
            spent = time.perf_counter() - resumed
            self.stats.compute_seconds += spent
            self.chooser.times.attention.add(x.shape[0], spent)
        return ticket

    def combine(self, ticket: Ticket) -> torch.Tensor:
        """Wait for a ticket's answers, letting other lanes run meanwhile, and add them up.

        Returns:
            [T, H] in the dtype of the dispatched rows.

        Raises:
            StepInterrupted: an actor refused the epoch, or pairs have no live holder left.
            PeerRefused: an actor could not compute a frame.
        """
        began = answered = time.perf_counter()
        pieces = ticket.pieces
        for index, piece in enumerate(pieces):
            self._await(piece)
            answered = time.perf_counter()
            if self._idle_since:
                self._end_idleness(answered)
            self._measure(piece, answered, alone=len(pieces) == 1)
            self._add_up(piece)
            del self._flying[piece.slot]
            if index + DEPTH < len(pieces):  # into the slots that were read just now
                self._send_piece(pieces[index + DEPTH])
        self.stats.wait_seconds += answered - began
        self._resumed[pieces[0].lane] = answered
        return ticket.out

    # -- sending -------------------------------------------------------------------------------

    def _cut(
        self, lane: int, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> Ticket:
        """A ticket, in pieces of about equal size where it does not fit a frame."""
        epoch, slot = self.epoch, self.endpoint.geometry.slot
        out = torch.empty_like(x)
        tokens = x.shape[0]
        if tokens <= self.max_tokens:
            piece = Piece(lane, layer, self._step, epoch, x, weights, ids, out, slot(lane, 0), 0)
            return Ticket(out, [piece])
        count = -(-tokens // self.max_tokens)
        size = -(-tokens // count)
        split = zip(*(whole.split(size) for whole in (x, weights, ids, out)), strict=True)
        pieces = [
            Piece(lane, layer, self._step, epoch, *rows, slot(lane, number), number)  # type: ignore[call-arg]
            for number, rows in enumerate(split)
        ]
        return Ticket(out, pieces)

    def _send_piece(self, piece: Piece) -> None:
        piece.sent_at = time.perf_counter()
        piece.deadline = piece.sent_at + self.timeout
        piece.version = self.adoption.version
        self._flying[piece.slot] = piece
        self._send(piece, None)
        if piece.version != self.adoption.version:
            self._reroute(piece)

    def _send(self, piece: Piece, pairs: np.ndarray | None) -> None:
        """Send pairs of the piece (flat indices, ascending; None: all) to their holders."""
        route = self.adoption.routes.layers[piece.layer]  # type: ignore[union-attr]
        actors = self.adoption.routes.actors  # type: ignore[union-attr]
        if pairs is None and route.sole is not None:
            self._post(piece, Part(actors[route.sole]))
        else:
            # Host-side routing: the pair lists are small next to the hidden states.
            ids = piece.ids.cpu().numpy()
            tokens, top_k = ids.shape
            owners = route.owners(ids, self._step, pairs)
            if not route.complete and (owners < 0).any():
                asked = ids.reshape(-1) if pairs is None else ids.reshape(-1)[pairs]
                raise self._no_holder(piece, sorted(set(asked[owners < 0].tolist())))
            for share in shares(owners, top_k, pairs):
                whole = len(share.rows) == tokens
                rows = None if whole else torch.from_numpy(share.rows).to(piece.x.device)
                self._post(piece, Part(actors[share.owner], share, rows))
        piece.chunk += DEPTH  # the same slot
        piece.sent += 1

    def _post(self, piece: Piece, part: Part) -> None:
        """Add a part to a piece and send it, or queue it behind its slot's earlier frame."""
        part.step, part.layer, part.chunk = piece.step, piece.layer, piece.chunk
        piece.parts.append(part)
        piece.missing += 1
        self._launch(piece, part)

    def _launch(self, piece: Piece, part: Part) -> None:
        actor, lane = part.actor, piece.lane
        slot = (actor, piece.slot)
        part.sent_at = time.perf_counter()
        part.deadline = part.sent_at + self.timeout
        if slot in self._owed and self._still_owed(slot):
            piece.queued.append(part)
            piece.disturbed = True
            return
        for other in piece.parts if piece.sent else ():  # its answer lies in the same slot
            if other.actor == actor and other.partial is not None:
                other.partial = other.partial.clone()
        x, ids, weights = piece.x, piece.ids, piece.weights
        share, rows = part.share, None
        try:
            if share is not None:
                slot_x, slot_ids, slot_weights, rows = self.endpoint.send_views(
                    actor, lane, len(share.rows), len(share.pairs), dense=False, chunk=part.chunk
                )
                assert rows is not None  # not dense
                if part.rows is None:
                    slot_x.copy_(x)
                else:
                    torch.index_select(x, 0, part.rows, out=slot_x)
                picked = torch.from_numpy(share.pairs).to(x.device)
                torch.index_select(ids.reshape(-1), 0, picked, out=slot_ids)
                torch.index_select(weights.reshape(-1), 0, picked, out=slot_weights)
                rows.copy_(torch.from_numpy(share.local))
                x, ids, weights = slot_x, slot_ids, slot_weights
            part.session = self.endpoint.dispatch(
                actor,
                lane,
                layer=part.layer,
                step=part.step,
                epoch=piece.epoch,
                x=x,
                ids=ids,
                weights=weights,
                rows=rows,
                chunk=part.chunk,
            )
        except PeerLost as error:
            self._mask_lost(piece, actor, error)
            return
        except PeerTimeout as error:  # its slot is stuck
            self.adoption.mask(actor, "silent", self._detail(piece, actor, error.message))
            return
        self._owed[slot] = part
        self.stats.frames += 1
        self.stats.tokens += x.shape[0]
        if self.emulate is not None:
            tokens = x.shape[0]
            back = self.endpoint.geometry.answer_bytes(tokens)
            out = back + ids.numel() * (8 if rows is None else 12)
            part.wire_s = self.emulate.transfer(out) + self.emulate.transfer(back)
            piece.ready_at = max(piece.ready_at, part.sent_at + part.wire_s)

    def _still_owed(self, slot: tuple[str, int]) -> bool:
        """Whether the earlier frame's answer may still come: not when the peer came anew."""
        if self.endpoint.session(slot[0]) == self._owed[slot].session:
            return True
        del self._owed[slot]
        return False

    def _send_queued(self, piece: Piece) -> None:
        queued, piece.queued = piece.queued, []
        for part in queued:
            self._launch(piece, part)

    def _forget_gone(self) -> None:
        """Drop what is kept for peers that left or came anew."""
        self._owed = {
            slot: part
            for slot, part in self._owed.items()
            if self.endpoint.session(slot[0]) == part.session
        }
        peers = {*self.endpoint.peers, *self.adoption.masked}
        self._last_heard = {a: h for a, h in self._last_heard.items() if a in peers}

    # -- when a holder fails -------------------------------------------------------------------

    def _reroute(self, piece: Piece) -> None:
        """Send what masked holders did not answer to others."""
        while piece.version != self.adoption.version:
            piece.version = self.adoption.version
            masked = self.adoption.masked
            bad = [p for p in piece.parts if p.partial is None and p.actor in masked]
            if not bad:
                continue
            piece.parts = [part for part in piece.parts if part not in bad]
            piece.queued = [part for part in piece.queued if part not in bad]
            piece.missing -= len(bad)
            piece.disturbed = True
            self.stats.resent += len(bad)
            pairs = [part.share.pairs for part in bad if part.share is not None]
            whole = len(pairs) < len(bad)
            self._send(piece, None if whole else np.sort(np.concatenate(pairs)))
            waiting = [part.deadline for part in piece.parts if part.partial is None]
            piece.deadline = min(waiting, default=piece.deadline)

    def _expire(self, piece: Piece, now: float) -> None:
        """Mask the holders whose deadline has passed."""
        piece.deadline = now + self.timeout
        for part in piece.parts:
            if part.partial is not None:
                continue
            if now <= part.deadline:
                piece.deadline = min(piece.deadline, part.deadline)
                continue
            rows = piece.x.shape[0] if part.share is None else len(part.share.rows)
            text = f"no answer from {part.actor}, {rows} tokens, within {self.timeout:g} s"
            self.adoption.mask(part.actor, "silent", self._detail(piece, part.actor, text))

    def _probe(self, piece: Piece) -> None:
        """A peer that died with our frame in its slot says nothing: touch it."""
        for part in piece.parts:
            if part.partial is not None or part in piece.queued:
                continue
            try:
                session = self.endpoint.probe(part.actor)
            except PeerLost as error:
                self._mask_lost(piece, part.actor, error)
            else:
                if session != part.session:  # disconnected and connected anew meanwhile
                    self._launch(piece, part)

    def _mask_lost(self, piece: Piece, actor: str, error: PeerLost) -> None:
        self.adoption.mask(actor, "lost", self._detail(piece, actor, error.message))

    def _detail(self, piece: Piece, actor: str, what: str) -> str:
        heard = self._last_heard.get(actor)
        return (
            f"{what} (layer {piece.layer} of step {piece.step}, lane {piece.lane}; "
            f"last frame from {actor}: {heard.describe() if heard else 'none'})"
        )

    def _no_holder(self, piece: Piece, absent: list[int]) -> StepInterrupted:
        reasons = "; ".join(
            f"{fault.peer} {fault.kind}: {fault.detail}" for fault in self.adoption.masked.values()
        )
        return StepInterrupted(
            f"experts {absent} of layer {piece.layer} have no live holder under epoch "
            f"{self.epoch}: {reasons}"
        )

    def _refused(self, piece: Piece, arrival: Arrival) -> AffluxError | None:
        """What a refusal means for the step; None when the other holders can help."""
        code, text = arrival.error or ("", "")
        what = f"{arrival.peer} refused ({code}): {text}"
        detail = self._detail(piece, arrival.peer, what)
        if code == "stale_epoch":
            return StepInterrupted(detail, code=code)
        if code not in _NOT_HELD:
            return PeerRefused(detail)
        self.adoption.mask(arrival.peer, "refused", detail)
        return None

    # -- waiting -------------------------------------------------------------------------------

    def _await(self, piece: Piece) -> None:
        self._backoff.reset()
        next_probe = piece.sent_at + PROBE_SECONDS
        while True:
            if piece.version != self.adoption.version:
                self._reroute(piece)
            if piece.queued:
                self._send_queued(piece)
            if not piece.missing and (
                self.emulate is None or time.perf_counter() >= piece.ready_at
            ):
                return
            if self._take_arrivals():
                self._backoff.reset()
                continue
            now = time.perf_counter()
            if not self._idle_since:
                self._idle_since = now
            if now > piece.deadline and piece.missing:
                self._expire(piece, now)
                continue
            if now > next_probe:
                next_probe = now + PROBE_SECONDS
                self._probe(piece)
                if piece.version != self.adoption.version:
                    continue
            sent = self.stats.frames
            yield_lane()
            if self.stats.frames != sent:
                self._backoff.reset()
            elif now < piece.ready_at:  # the other lanes wait as well, or there are none
                time.sleep(min(piece.ready_at - now, _NAP_SECONDS))
            else:
                self._backoff.pause()

    def _end_idleness(self, now: float) -> None:
        """A lane goes on."""
        self.stats.idle_seconds += now - self._idle_since
        self._idle_since = 0.0

    def _take_arrivals(self) -> bool:
        arrivals = self.endpoint.poll()
        failure: AffluxError | None = None
        for arrival in arrivals:
            header = arrival.header
            self._last_heard[arrival.peer] = header
            slot = (arrival.peer, self.endpoint.geometry.slot(header.lane, header.chunk))
            part = self._owed.get(slot)
            if (
                part is None
                or header.step != part.step
                or header.layer != part.layer
                or header.chunk != part.chunk
            ):
                continue  # nobody waits for it
            del self._owed[slot]
            piece = self._flying.get(slot[1])
            if piece is None or part not in piece.parts:
                continue  # a late answer: its holder was masked or its step has failed
            if arrival.error is not None:
                failure = self._refused(piece, arrival) or failure
                continue
            part.header, part.partial = header, arrival.x
            piece.missing -= 1
            if self.emulate is not None:  # the wire delays the question, hence all that follows
                at_peer = (header.reply_ns - header.recv_ns) * 1e-9
                piece.ready_at = max(piece.ready_at, part.sent_at + part.wire_s + at_peer)
        if failure is not None:  # only now: every arrival has to be taken in
            raise failure
        return bool(arrivals)

    def _add_up(self, piece: Piece) -> None:
        first = piece.parts[0]
        if len(piece.parts) == 1 and first.rows is None:
            piece.out.copy_(first.partial)  # type: ignore[arg-type]
            return
        # In float32 and in the table's order: one rounding, and the same sum whoever is first.
        total = torch.zeros(piece.x.shape, dtype=torch.float32, device=piece.x.device)
        for part in piece.parts:
            partial = part.partial.to(torch.float32)  # type: ignore[union-attr]
            if part.rows is None:
                total += partial
            else:
                total.index_add_(0, part.rows, partial)
        piece.out.copy_(total)

    def _measure(self, piece: Piece, answered: float, alone: bool) -> None:
        if piece.disturbed:
            return
        rows = piece.x.shape[0]
        elapsed = answered - piece.sent_at
        slowest = 0.0
        for part in piece.parts:
            header = part.header
            slowest = max(slowest, (header.end_ns - header.start_ns) * 1e-9)  # type: ignore[union-attr]
        times = self.chooser.times
        times.ffn.add(rows, slowest)
        # with several lanes the answer may have waited for our own turn, a piece for another one
        if self.lanes == 1 and alone:
            times.transfer.add(rows, max(0.0, elapsed - slowest))

    # -- tickets inside a compiled graph ----------------------------------------------------------

    def park(self, ticket: Ticket) -> int:
        """Keep a ticket under a number that a tensor can carry through a compiled graph."""
        self._park_number += 1
        self._parked[self._park_number] = ticket
        return self._park_number

    def unpark(self, number: int) -> Ticket:
        """Take back a parked ticket."""
        return self._parked.pop(number)
