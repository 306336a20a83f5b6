"""Links between two processes are measured by writes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest

pytest.importorskip("nixl")

from actors.errors import PeerLost, PeerTimeout
from actors.transport.link_probe import LinkProbe


def other_end(pipe: Connection) -> None:
    probe = LinkProbe("other", "tcp,self")
    pipe.send(probe.offer())
    while (seconds := pipe.recv()) is not None:
        probe.attend(seconds)
        pipe.send("done")


@pytest.fixture(scope="module")
def other() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=other_end, args=(theirs,), daemon=True)
    process.start()
    yield mine
    mine.send(None)
    process.join(20)
    assert process.exitcode == 0


def test_latency_and_rate_then_nobody_attends(other: Connection) -> None:
    offer = other.recv()
    probe = LinkProbe("one", "tcp,self")
    try:
        other.send(3.0)
        found = probe.measure(offer, 3.0)
        assert 1e-6 < found.latency_s < 0.1, "of one machine"
        assert 1e7 < found.bytes_per_s < 1e12
        assert other.recv() == "done"
        with pytest.raises((PeerTimeout, PeerLost)):
            probe.measure(offer, 0.3)
        other.send(5.0)
        again = probe.measure(offer, 5.0)
        assert again.bytes_per_s > 1e7, "a pair can be measured again"
        assert other.recv() == "done"
    finally:
        probe.close()


def test_rest_ends_attending() -> None:
    probe = LinkProbe("alone", "tcp,self")
    try:
        probe.rest()
        probe.attend(100.0)
    finally:
        probe.close()
