"""A peer in a process of its own, for tests: answers every question with twice its input."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from actors.transport.endpoint import Endpoint, Offer
from actors.transport.geometry import Geometry

GEOMETRY = Geometry(64, 2, torch.float32, 32, 2)
DIGEST = "ab" * 32


def serve(pipe: Connection, name: str, peers: list[str], ucx_tls: str | None = None) -> None:
    """Meet ``peers``, then echo until the pipe says stop."""
    torch.set_num_threads(1)
    endpoint = Endpoint(name, GEOMETRY, DIGEST, ucx_tls=ucx_tls)
    pipe.send([endpoint.offer(peer) for peer in peers])
    for offer in pipe.recv():
        endpoint.connect(offer)
    pipe.send("connected")
    while not pipe.poll():
        for question in endpoint.wait(0.05):
            if question.header.layer == 99:
                endpoint.refuse(question, "unknown_layer", "layer 99 is not here")
                continue
            if question.header.layer == 77:  # swallow it
                continue
            start = time.monotonic_ns()
            out = question.x * 2
            endpoint.combine(
                question, out, compute_start_ns=start, compute_end_ns=time.monotonic_ns()
            )
    endpoint.close()


class Peer:
    """The parent's handle of such a process."""

    def __init__(self, name: str, peers: list[str], ucx_tls: str | None = None):
        context = mp.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, name, peers, ucx_tls), daemon=True
        )
        self.process.start()
        theirs.close()

    def offers(self) -> list[Offer]:
        return self._receive()

    def connect(self, offers: list[Offer]) -> None:
        self.pipe.send(offers)
        if self._receive() != "connected":
            raise RuntimeError(f"{self.name} did not connect")

    def _receive(self):
        if not self.pipe.poll(60):
            raise TimeoutError(f"{self.name} says nothing")
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)

    def stop(self) -> None:
        with suppress(ProcessLookupError, BrokenPipeError):  # a test may have killed it
            if self.process.is_alive():
                os.kill(self.process.pid or 0, signal.SIGCONT)
                self.pipe.send("stop")
                self.process.join(10)
        if self.process.is_alive():
            self.kill()


def meet(endpoint: Endpoint, *peers: Peer) -> None:
    """Connect an endpoint with peers that offered to it alone."""
    for peer in peers:
        (theirs,) = peer.offers()
        mine = endpoint.offer(peer.name)
        endpoint.connect(theirs)
        peer.connect([mine])
