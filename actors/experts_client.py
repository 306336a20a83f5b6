"""The attention side of the remote call: a layer's pairs to FFN actors, their answers added up.

Knows the expert table and the endpoint; knows nothing of vLLM. One object per attention process,
used from the one thread that runs the engine's steps. A step never waits longer than its deadline
for a frame: the error then names the layer, the peer and the last frame heard from it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from actors.errors import AffluxError, PeerTimeout
from actors.lanes import LaneChooser, current_lane, yield_lane
from actors.table import ExpertTable
from actors.transport.backoff import Backoff
from actors.transport.endpoint import Arrival, Endpoint
from actors.transport.frame import FrameHeader

PROBE_SECONDS = 0.02


@dataclass(slots=True)
class Part:
    """What one FFN actor was asked in one chunk of a ticket."""

    actor: str
    rows: torch.Tensor | None  # rows of the chunk that the answer belongs to; None = all of them
    answer: Arrival | None = None


@dataclass(slots=True)
class Ticket:
    """One layer of one lane on its way through the experts."""

    lane: int
    layer: int
    step: int
    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor
    out: torch.Tensor | None = None
    start: int = 0  # first row of the chunk in flight
    stop: int = 0
    chunk: int = 0
    parts: list[Part] = field(default_factory=list)
    missing: int = 0
    sent_at: float = 0.0
    deadline: float = 0.0


@dataclass
class ClientStats:
    """Totals since start, seconds and counts; read by telemetry."""

    steps: int = 0
    frames: int = 0
    tokens: int = 0
    compute_seconds: float = 0.0
    wait_seconds: float = 0.0


class ExpertsClient:
    """Dispatches hidden states to the FFN actors of the table and combines their partial sums.

    Args:
        endpoint: connected to every actor of the table that is adopted.
        chooser: told the measured stage times, so that it can choose lanes.
        max_tokens: rows per frame; longer batches travel in several.
        timeout: seconds that a frame may take from dispatch to combine.
    """

    def __init__(
        self, endpoint: Endpoint, chooser: LaneChooser, *, max_tokens: int, timeout: float
    ):
        self.endpoint = endpoint
        self.chooser = chooser
        self.max_tokens = max_tokens
        self.timeout = timeout
        self.stats = ClientStats()
        self.table: ExpertTable | None = None
        self._pending: ExpertTable | None = None
        # layer -> sole holder of all its experts, or the index of the holder of each expert
        self._sole: dict[int, str | None] = {}
        self._owner: dict[int, np.ndarray] = {}
        self._actors: tuple[str, ...] = ()
        self._step = 0
        self._lanes = 1
        self._flying: dict[int, Ticket] = {}  # lane -> ticket
        self._parked: dict[int, Ticket] = {}
        self._park_number = 0
        self._resumed: dict[int, float] = {}
        self._last_heard: dict[str, FrameHeader] = {}
        self._backoff = Backoff()

    # -- table ---------------------------------------------------------------------------------

    def adopt(self, table: ExpertTable) -> None:
        """Use ``table`` from the next step on. Callable from any thread."""
        self._pending = table

    @property
    def epoch(self) -> int:
        """Epoch in use; 0 before the first table."""
        return self.table.epoch if self.table else 0

    def _use(self, table: ExpertTable) -> None:
        unknown = [a for a in table.actors if a not in self.endpoint.peers]
        if unknown:
            raise AffluxError(
                f"expert table of epoch {table.epoch} names {unknown}, but this attention actor is "
                f"connected to {sorted(self.endpoint.peers)} only; connect them first",
                code="unknown_peer",
            )
        self._actors = table.actors
        index = {actor: i for i, actor in enumerate(self._actors)}
        for layer, experts in table.holders.items():
            first = [holders[0] for holders in experts]
            self._sole[layer] = first[0] if len(set(first)) == 1 else None
            self._owner[layer] = np.array([index[a] for a in first], dtype=np.int64)
        self.table = table

    # -- one step ------------------------------------------------------------------------------

    def begin_step(self, lane_count: int) -> None:
        """Start a step: adopt a pending table, forget what an earlier failed step left behind."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._use(pending)
        self._step += 1
        self._lanes = lane_count
        self._flying.clear()
        self._parked.clear()
        self._resumed.clear()
        self.stats.steps += 1

    def dispatch(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> Ticket:
        """Send one layer's rows to the actors that hold their experts; does not wait.

        Args:
            layer: layer index.
            x: [T, H] in the model's dtype.
            weights: [T, K] routing weights.
            ids: [T, K] global expert ids.

        Raises:
            PeerLost: the transport says that a holder is gone.
            AffluxError: no table was adopted, or it lacks this layer.
        """
        lane = current_lane()
        if self.table is None:
            raise AffluxError(
                "no expert table: the manager has not published one to this attention actor",
                code="no_table",
            )
        if layer not in self._owner:
            raise AffluxError(
                f"layer {layer} is not in the expert table of epoch {self.epoch}, which has layers "
                f"{self.table.layers}",
                code="no_layer",
            )
        ticket = Ticket(lane, layer, self._step, x, weights.to(torch.float32), ids.to(torch.int32))
        self._send_chunk(ticket)
        resumed = self._resumed.get(lane)
        if resumed is not None:  # what one more lane costs this side, the hop's own work included
            spent = time.perf_counter() - resumed
            self.stats.compute_seconds += spent
            self.chooser.times.attention.add(x.shape[0], spent)
        return ticket

    def _send_chunk(self, ticket: Ticket) -> None:
        start, stop = ticket.stop, min(ticket.stop + self.max_tokens, ticket.x.shape[0])
        ticket.start, ticket.stop = start, stop
        whole = stop - start == ticket.x.shape[0]
        x = ticket.x if whole else ticket.x[start:stop]
        ids = ticket.ids if whole else ticket.ids[start:stop]
        weights = ticket.weights if whole else ticket.weights[start:stop]
        ticket.parts = []
        ticket.sent_at = time.perf_counter()
        ticket.deadline = ticket.sent_at + self.timeout
        self._flying[ticket.lane] = ticket
        sole = self._sole[ticket.layer]
        if sole is not None:
            ticket.parts.append(Part(sole, None))
            ticket.missing = 1
            self._post(ticket, sole, x, ids, weights, None)
            return
        # Host-side routing: the pair lists are small next to the hidden states.
        owner = self._owner[ticket.layer][ids.cpu().numpy()]
        sends = list(_by_owner(owner))
        ticket.missing = len(sends)
        for index, pairs, rows, local in sends:
            actor = self._actors[index]
            complete = len(rows) == x.shape[0]
            part = Part(actor, None if complete else torch.from_numpy(rows).to(x.device))
            ticket.parts.append(part)
            slot = self.endpoint.send_views(actor, ticket.lane, len(rows), len(pairs), dense=False)
            slot_x, slot_ids, slot_weights, slot_rows = slot
            assert slot_rows is not None  # not dense
            if part.rows is None:
                slot_x.copy_(x)
            else:
                torch.index_select(x, 0, part.rows, out=slot_x)
            picked = torch.from_numpy(pairs).to(x.device)
            torch.index_select(ids.reshape(-1), 0, picked, out=slot_ids)
            torch.index_select(weights.reshape(-1), 0, picked, out=slot_weights)
            slot_rows.copy_(torch.from_numpy(local))
            self._post(ticket, actor, *slot)

    def _post(
        self,
        ticket: Ticket,
        actor: str,
        x: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        rows: torch.Tensor | None,
    ) -> None:
        self.stats.frames += 1
        self.stats.tokens += x.shape[0]
        self.endpoint.dispatch(
            actor,
            ticket.lane,
            layer=ticket.layer,
            step=ticket.step,
            epoch=self.epoch,
            x=x,
            ids=ids,
            weights=weights,
            rows=rows,
            chunk=ticket.chunk,
        )

    def combine(self, ticket: Ticket) -> torch.Tensor:
        """Wait for a ticket's answers, letting other lanes run meanwhile, and add them up.

        Returns:
            [T, H] in the dtype of the dispatched rows.

        Raises:
            PeerTimeout: an actor did not answer within the deadline.
            PeerRefused: an actor answered with an error.
            PeerLost: the transport says that an actor is gone.
        """
        began = time.perf_counter()
        while True:
            self._await(ticket)
            answered = time.perf_counter()
            self._measure(ticket, answered)
            out = self._add_up(ticket)
            if ticket.stop == ticket.x.shape[0]:
                break
            ticket.chunk += 1
            self._send_chunk(ticket)
        self._flying.pop(ticket.lane, None)
        self.stats.wait_seconds += answered - began
        self._resumed[ticket.lane] = answered
        return out

    def _await(self, ticket: Ticket) -> None:
        self._backoff.reset()
        next_probe = ticket.sent_at + PROBE_SECONDS
        while ticket.missing:
            if self._take_arrivals():
                self._backoff.reset()
                continue
            now = time.perf_counter()
            if now > ticket.deadline:
                self._raise_timeout(ticket)
            if now > next_probe:  # a peer that died with our frame in its slot says nothing
                next_probe = now + PROBE_SECONDS
                for part in ticket.parts:
                    if part.answer is None:
                        self.endpoint.probe(part.actor)
            sent = self.stats.frames
            yield_lane()
            if self.stats.frames == sent:  # the other lanes wait as well, or there are none
                self._backoff.pause()
            else:
                self._backoff.reset()

    def _take_arrivals(self) -> bool:
        arrivals = self.endpoint.poll()
        for arrival in arrivals:
            header = arrival.header
            self._last_heard[arrival.peer] = header
            ticket = self._flying.get(header.lane)
            if (
                ticket is None
                or header.step != ticket.step
                or header.layer != ticket.layer
                or header.chunk != ticket.chunk
            ):
                continue  # a late answer to a step that has failed
            arrival.raise_if_refused()
            for part in ticket.parts:
                if part.actor == arrival.peer and part.answer is None:
                    part.answer = arrival
                    ticket.missing -= 1
        return bool(arrivals)

    def _add_up(self, ticket: Ticket) -> torch.Tensor:
        rows = ticket.stop - ticket.start
        whole = rows == ticket.x.shape[0]
        if ticket.out is None:
            ticket.out = torch.empty_like(ticket.x)
        target = ticket.out if whole else ticket.out[ticket.start : ticket.stop]
        first = ticket.parts[0]
        if len(ticket.parts) == 1 and first.rows is None:
            target.copy_(first.answer.x)  # type: ignore[union-attr]
            return ticket.out
        # In float32 and in the table's order: one rounding, and the same sum whoever is first.
        total = torch.zeros((rows, ticket.x.shape[1]), dtype=torch.float32, device=ticket.x.device)
        for part in ticket.parts:
            partial = part.answer.x.to(torch.float32)  # type: ignore[union-attr]
            if part.rows is None:
                total += partial
            else:
                total.index_add_(0, part.rows, partial)
        target.copy_(total)
        return ticket.out

    def _measure(self, ticket: Ticket, answered: float) -> None:
        rows = ticket.stop - ticket.start
        elapsed = answered - ticket.sent_at
        slowest = 0.0
        for part in ticket.parts:
            header = part.answer.header  # type: ignore[union-attr]
            slowest = max(slowest, (header.end_ns - header.start_ns) * 1e-9)
        times = self.chooser.times
        times.ffn.add(rows, slowest)
        if self._lanes == 1:  # with several lanes the answer may have waited for our own turn
            times.transfer.add(rows, max(0.0, elapsed - slowest))

    def _raise_timeout(self, ticket: Ticket) -> None:
        silent = [part.actor for part in ticket.parts if part.answer is None]
        heard = "; ".join(
            f"last frame from {actor}: "
            + (self._last_heard[actor].describe() if actor in self._last_heard else "none")
            for actor in silent
        )
        raise PeerTimeout(
            f"no answer from {', '.join(silent)} for layer {ticket.layer} of step {ticket.step}, "
            f"lane {ticket.lane}, {ticket.stop - ticket.start} tokens, within {self.timeout:g} s "
            f"({heard})"
        )

    # -- tickets inside a compiled graph ----------------------------------------------------------

    def park(self, ticket: Ticket) -> int:
        """Keep a ticket under a number that a tensor can carry through a compiled graph."""
        self._park_number += 1
        self._parked[self._park_number] = ticket
        return self._park_number

    def unpark(self, number: int) -> Ticket:
        """Take back a parked ticket."""
        return self._parked.pop(number)


def _by_owner(
    owner: np.ndarray,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Group the pairs of a chunk by the FFN actor that owns their expert.

    Args:
        owner: [T, K] index of the owner of each (token, expert) pair.

    Yields:
        (owner, pairs, rows, local): flat indices of its pairs [P], the rows of the chunk that they
        belong to [R] int64 without repeats, and for each pair its place in ``rows`` [P] int32.
    """
    top_k = owner.shape[1]
    flat = owner.reshape(-1)
    for index in np.unique(flat):
        pairs = np.nonzero(flat == index)[0]
        of_row = pairs // top_k  # ascending, so repeats are neighbours
        first = np.empty(len(of_row), dtype=bool)
        first[:1] = True
        np.not_equal(of_row[1:], of_row[:-1], out=first[1:])
        yield int(index), pairs, of_row[first], (np.cumsum(first) - 1).astype(np.int32)
