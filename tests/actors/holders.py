"""Toy FFN actors on threads, over real NIXL: expert ``e`` of layer ``l`` multiplies by a factor."""

import threading
import time

import torch

from actors.errors import PeerLost
from actors.table import ExpertTable
from actors.transport.endpoint import Endpoint
from actors.transport.geometry import Geometry
from actors.transport.link import Arrival

HIDDEN, TOP_K, MAX_TOKENS = 32, 2, 16
GEOMETRY = Geometry(HIDDEN, TOP_K, torch.float32, MAX_TOKENS, 4)
DIGEST = "ab" * 32


def factor(layer: int, expert: torch.Tensor) -> torch.Tensor:
    """What an expert multiplies by: powers of two, so that sums in any order are exact."""
    return torch.exp2((expert + layer) % 5 - 2.0)


def expected(layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[T, H]: what the experts make of x together."""
    return x * (weights * factor(layer, ids)).sum(1, keepdim=True)


def question(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [T, H], weights and ids [T, K] of small whole numbers; ids differ within a row."""
    x = torch.randint(-8, 8, (tokens, HIDDEN)).float()
    weights = torch.randint(1, 4, (tokens, TOP_K)).float()
    ids = torch.stack([torch.randperm(experts)[:TOP_K] for _ in range(tokens)]).to(torch.int32)
    return x, weights, ids


class Holder:
    """One FFN actor. Switch ``working`` off to freeze it; set ``refuse`` to have it refuse.

    Attributes:
        served: headers of the answered questions.
        damaged: questions that changed while they lay here.
    """

    def __init__(self, name: str, **options):
        self.name = name
        self.endpoint = Endpoint(name, GEOMETRY, DIGEST, **options)
        self.served: list = []
        self.damaged = 0
        self.working = threading.Event()
        self.working.set()
        self.has_frame = threading.Event()
        self.refuse: str | None = None
        self.delay_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def meet(self, asker: Endpoint) -> None:
        theirs = asker.offer(self.name)
        mine = self.endpoint.offer(asker.name)
        self.endpoint.connect(theirs)
        asker.connect(mine)

    @property
    def pairs(self) -> int:
        return sum(header.pairs for header in self.served)

    def stop(self) -> None:
        self._stopping.set()
        self.working.set()
        self._thread.join(10)
        self.endpoint.close()

    def _serve(self) -> None:
        while not self._stopping.is_set():
            for arrival in self.endpoint.poll():
                self.has_frame.set()
                before = [t.clone() for t in (arrival.x, arrival.ids, arrival.weights)]
                self.working.wait()
                time.sleep(self.delay_s)
                if self._stopping.is_set():
                    return
                now = (arrival.x, arrival.ids, arrival.weights)
                self.damaged += not all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
                try:
                    self._answer(arrival)
                except PeerLost:
                    continue
            time.sleep(0)

    def _answer(self, arrival: Arrival) -> None:
        if self.refuse is not None:
            self.endpoint.refuse(arrival, self.refuse, "not today")
            return
        header, start = arrival.header, time.monotonic_ns()
        scale = arrival.weights * factor(header.layer, arrival.ids)
        if arrival.rows is None:
            out = arrival.x * scale.sum(1, keepdim=True)
        else:
            out = torch.zeros_like(arrival.x)
            out.index_add_(0, arrival.rows, arrival.x[arrival.rows] * scale[:, None])
        self.served.append(header)
        self.endpoint.combine(
            arrival, out, compute_start_ns=start, compute_end_ns=time.monotonic_ns()
        )


def table(epoch: int, *experts: str, layers: int = 2) -> ExpertTable:
    """The same holders in every layer: ``table(1, "a b", "b")`` has two experts, one replicated."""
    holders = tuple(tuple(f"ffn-{name}" for name in held.split()) for held in experts)
    return ExpertTable(epoch, dict.fromkeys(range(layers), holders))
