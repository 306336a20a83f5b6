"""Memory lent to readers: whole or not at all, and nothing is left registered."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from actors.errors import PeerLost
from actors.transport import reads
from actors.transport.reads import Access, Reader, Shelf

ROWS, BYTES = 8, 8 << 20
TRANSPORTS = [pytest.param(None, id="shared-memory"), pytest.param("tcp,self", id="tcp")]


def regions(address: int, rows: int = ROWS, size: int = BYTES) -> list[tuple[int, int]]:
    return [(address + row * size, size) for row in range(rows)]


def lend(pipe: Connection, ucx_tls: str | None) -> None:
    """Lend a tensor; at every word from the pipe report what is left of the loan and lend anew."""
    shelf = Shelf("lender", ucx_tls=ucx_tls)
    tensor = torch.arange(ROWS, dtype=torch.uint8)[:, None].repeat(1, BYTES)
    while True:
        access = shelf.lend([tensor], 60.0)
        pipe.send((access, tensor.data_ptr()))
        pipe.recv()
        back = [shelf.take_back(access.token), shelf.take_back(access.token)]
        pipe.send((back, len(shelf), threading.active_count()))


class Lender:
    """A process that lends."""

    def __init__(self, ucx_tls: str | None):
        self.ucx_tls = ucx_tls
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=lend, args=(theirs, ucx_tls), daemon=True)
        self.process.start()
        theirs.close()
        self.access: Access
        self.access, self.address = self.receive()

    def receive(self) -> Any:
        assert self.pipe.poll(60)
        return self.pipe.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def reader(self) -> Reader:
        return Reader("reader", self.access, ucx_tls=self.ucx_tls)


@pytest.fixture(scope="module", params=TRANSPORTS)
def lender(request) -> Iterator[Lender]:
    lender = Lender(request.param)
    yield lender
    lender.process.kill()
    lender.process.join()


def test_rows_are_read_in_any_order(lender):
    wanted = [5, 0, 7]
    into = [torch.full((2, BYTES), 99, dtype=torch.uint8), torch.empty(1, BYTES, dtype=torch.uint8)]
    source = [regions(lender.address)[row] for row in wanted]
    with lender.reader() as reader:
        for _ in range(2):
            reader.read(source, into)
            assert [int(row[0]) for t in into for row in t] == wanted
            assert all(bool((row == row[0]).all()) for t in into for row in t)
        with pytest.raises(ValueError, match=r"3 regions of .* can't fill 2 rows"):
            reader.read(source, into[:1])
        reader.read([], [])
    lender.pipe.send("end the loan")
    back, loans, threads = lender.receive()
    assert (back, loans) == ([True, False], 0)
    assert threads == 1
    lender.access, lender.address = lender.receive()


def test_a_frozen_lender_is_given_up(lender, monkeypatch):
    if lender.ucx_tls is None:
        pytest.skip("shared memory is read without the lender's help")
    monkeypatch.setattr(reads, "_GRACE_S", 0.2)
    into = [torch.empty(ROWS, BYTES, dtype=torch.uint8)]
    try:
        with lender.reader() as reader:
            lender.signal(signal.SIGSTOP)
            with pytest.raises(PeerLost, match="did not end within") as caught:
                reader.read(regions(lender.address), into)
            assert caught.value.code == "read_timeout"
    finally:
        lender.signal(signal.SIGCONT)


def read_for_long(lender: Lender) -> None:
    into = [torch.empty(ROWS, BYTES, dtype=torch.uint8)]
    deadline = time.monotonic() + 20
    with lender.reader() as reader:
        while time.monotonic() < deadline:
            reader.read(regions(lender.address), into)


def test_a_lender_that_dies_while_it_is_read(lender):
    killer = threading.Timer(0.2, lender.signal, [signal.SIGKILL])
    killer.start()
    with pytest.raises(PeerLost):
        read_for_long(lender)
    killer.join()
    with pytest.raises(PeerLost):
        read_for_long(lender)


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def read_once(access: Access, tensor: torch.Tensor) -> torch.Tensor:
    into = torch.empty_like(tensor)
    with Reader("reader", access) as reader:
        reader.read([(tensor.data_ptr(), tensor.nbytes)], [into.view(1, -1)])
    return into


def test_a_loan_runs_out(monkeypatch):
    shelf = Shelf("lender")
    tensor = torch.rand(1024)
    keeps, ends = shelf.lend([tensor], 60.0), shelf.lend([tensor], 0.0)
    assert torch.equal(read_once(keeps, tensor), tensor)

    def ended() -> bool:
        try:
            read_once(ends, tensor)
        except PeerLost as error:
            return error.code == "loan_ended"
        return False

    assert wait_for(ended)
    assert len(shelf) == 2  # the memory stays for a while, for a read under way
    monkeypatch.setattr(reads, "_LINGER_S", 0.0)
    assert wait_for(lambda: len(shelf) == 1)
    assert not shelf.take_back(ends.token)
    assert torch.equal(read_once(keeps, tensor), tensor)
    assert shelf.take_back(keeps.token)
    assert len(shelf) == 0
    again = shelf.lend([tensor], 60.0)
    shelf.close()
    assert not shelf.take_back(again.token)
    assert not any("lends" in thread.name for thread in threading.enumerate())


def test_a_loan_that_ends_while_it_is_read(monkeypatch):
    shelf = Shelf("lender")
    tensor, other = torch.rand(1024), torch.rand(16)
    access, stays = shelf.lend([tensor], 60.0), shelf.lend([other], 60.0)
    real = Reader._copy

    def copy(self: Reader, source: Any, target: Any, into: Any) -> None:
        real(self, source, target, into)
        if source[0][1] == tensor.nbytes:
            shelf.take_back(access.token)

    monkeypatch.setattr(Reader, "_copy", copy)
    with pytest.raises(PeerLost) as caught:
        read_once(access, tensor)
    assert caught.value.code == "loan_ended"
    assert torch.equal(read_once(stays, other), other)
    shelf.close()
