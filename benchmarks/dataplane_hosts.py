"""A hop between two hosts beside plain TCP on the same link, in one run.

Two hosts made of this one (``hosts``: a veth pair each, a bridge between); one process on each.
Per size and round, in turn:

    ours  everything but expert compute, over NIXL's TCP: x, ids and weights copied from user
          tensors, the frame posted, polled, checked and viewed, the answer copied and sent back
    tcp   the same bytes each way over one socket with TCP_NODELAY, as sockperf and iperf3 do it:
          no header, no check, nothing done with them

Needs root. One machine's cores and memory carry both ends: the ratio counts, not the figures.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.dataplane import HIDDEN, TOKENS, TOP_K, Effort, next_arrival
from benchmarks.hosts import command_line, hosts
from benchmarks.report import make_report, print_summary, print_table, write_report

_PORT = 7777
_DEADLINE_S = 30.0
_CLONE_NEWNET = 0x40000000
_NAMES = ("attention", "ffn")


class _Side:
    """One of the two processes; the first asks, the second answers."""

    def __init__(self, number: int, host_pid: int, addresses: tuple[str, str], pipe: Connection):
        enter(host_pid)
        os.environ["UCX_NET_DEVICES"] = "eth0"
        import torch

        from actors.transport.endpoint import Endpoint
        from actors.transport.geometry import Geometry

        torch.set_num_threads(1)
        self.first, self.pipe = number == 0, pipe
        self.peer = _NAMES[1 - number]
        geometry = Geometry(HIDDEN, TOP_K, torch.bfloat16, max(TOKENS), 1)
        self.endpoint = Endpoint(_NAMES[number], geometry, b"benchmark digest", ucx_tls="tcp,self")
        pipe.send(self.endpoint.offer(self.peer))
        self.endpoint.connect(pipe.recv())
        self.socket = self._meet(addresses)
        self.buffer = bytearray(geometry.slot_bytes)
        pipe.send("ready")
        pipe.recv()

    def _meet(self, addresses: tuple[str, str]) -> socket.socket:
        if self.first:
            with socket.create_server((addresses[0], _PORT)) as server:
                self.pipe.send("listening")
                end = server.accept()[0]
        else:
            self.pipe.recv()
            end = socket.create_connection((addresses[0], _PORT), timeout=_DEADLINE_S)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.settimeout(_DEADLINE_S)
        return end

    def exchange(self, kind: str, tokens: int, times: int) -> list[float]:
        """Seconds per exchange, as the first side sees it."""
        return self._tcp(tokens, times) if kind == "tcp" else self._ours(tokens, times)

    def _tcp(self, tokens: int, times: int) -> list[float]:
        geometry = self.endpoint.geometry
        out = geometry.layout(tokens, tokens * TOP_K, dense=True).nbytes
        back = geometry.answer_bytes(tokens)
        view = memoryview(self.buffer)
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            if self.first:
                self.socket.sendall(view[:out])
            left = back if self.first else out
            while left:
                left -= self.socket.recv_into(view[:left])
            if not self.first:
                self.socket.sendall(view[:back])
            taken.append(time.perf_counter() - start)
        return taken

    def _ours(self, tokens: int, times: int) -> list[float]:
        import torch

        with torch.inference_mode():
            if not self.first:
                for _ in range(times):
                    question = self._arrival()
                    now = time.monotonic_ns()
                    self.endpoint.combine(
                        question, question.x, compute_start_ns=now, compute_end_ns=now
                    )
                return []
            x = torch.randn(tokens, HIDDEN).to(torch.bfloat16)
            ids = torch.randint(0, 64, (tokens, TOP_K), dtype=torch.int32)
            weights, out = torch.rand(tokens, TOP_K), torch.empty_like(x)
            taken = []
            for step in range(times):
                start = time.perf_counter()
                self.endpoint.dispatch(
                    self.peer, 0, layer=3, step=step, epoch=1, x=x, ids=ids, weights=weights
                )
                out.copy_(self._arrival().x)
                taken.append(time.perf_counter() - start)
            if not torch.equal(out, x):
                raise RuntimeError("the answer differs from what was sent")
            return taken

    def _arrival(self) -> Any:
        return next_arrival(self.endpoint, self.peer)


def enter(pid: int) -> None:
    """Join a host's network; for good."""
    with open(f"/proc/{pid}/ns/net", "rb") as space:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(space.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "can't join a host's network")


def _run_side(number: int, host_pid: int, addresses: tuple[str, str], pipe: Connection) -> None:
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[number % os.cpu_count()]})  # type: ignore[operator]
    side = _Side(number, host_pid, addresses, pipe)
    while (command := pipe.recv()) is not None:
        pipe.send(side.exchange(*command))
        while not pipe.poll(0):  # TCP sends only while somebody looks after it
            side.endpoint.poll()
    side.endpoint.close()


def run(json_path: Path | None = None, effort: Effort | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON when a path is given; returns the report.

    Raises:
        RuntimeError: hosts can't be made here, or a process died.
    """
    effort = effort or Effort()
    figures: dict[int, dict[str, list[list[float]]]] = {}
    with hosts(2) as made:
        context = mp.get_context("spawn")
        pipes, workers = [], []
        addresses = (made[0].address, made[1].address)
        for number, host in enumerate(made):
            mine, theirs = context.Pipe()
            worker = context.Process(
                target=_run_side, args=(number, host.pid, addresses, theirs), daemon=True
            )
            worker.start()
            theirs.close()
            pipes.append(mine)
            workers.append(worker)
        try:
            offers = [take(pipe) for pipe in pipes]
            for pipe, offer in zip(pipes, reversed(offers), strict=True):
                pipe.send(offer)
            pipes[1].send(take(pipes[0]))  # it listens
            for pipe in pipes:
                take(pipe)
                pipe.send("go")
            for tokens in TOKENS:
                figures[tokens] = _size(pipes, tokens, effort)
            for pipe in pipes:
                pipe.send(None)
        finally:
            for worker in workers:
                worker.join(5)
                worker.kill()
    return _report(figures, json_path)


def _size(pipes: list[Any], tokens: int, effort: Effort) -> dict[str, list[list[float]]]:
    times = effort.exchanges(tokens)
    found: dict[str, list[list[float]]] = {"ours": [], "tcp": []}
    deadline = time.monotonic() + effort.budget_s / len(TOKENS)
    for number in range(effort.rounds + 1):
        if number > 1 and time.monotonic() > deadline:
            break
        for kind, rounds in found.items():
            for pipe in pipes:
                pipe.send((kind, tokens, max(2, times // 10) if number == 0 else times))
            taken, _ = (take(pipe) for pipe in pipes)
            if number:  # the first one connects and touches memory
                rounds.append(taken)
    return found


def take(pipe: Any) -> Any:
    """What a process says next; raises RuntimeError when it says nothing any more."""
    if not pipe.poll(120):
        raise RuntimeError("a benchmark process hangs")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a benchmark process died; its error is above") from None


def _report(
    figures: dict[int, dict[str, list[list[float]]]], json_path: Path | None
) -> dict[str, Any]:
    from actors.transport.geometry import Geometry

    best = {
        tokens: {kind: 1e6 * min(map(statistics.median, rounds)) for kind, rounds in kinds.items()}
        for tokens, kinds in figures.items()
    }
    geometry = Geometry(HIDDEN, TOP_K, "bfloat16", max(TOKENS), 1)  # type: ignore[arg-type]
    rows = []
    for tokens, kinds in best.items():
        moved = geometry.layout(tokens, tokens * TOP_K, True).nbytes + geometry.answer_bytes(tokens)
        rows.append(
            (
                str(tokens),
                kinds["ours"],
                kinds["tcp"],
                kinds["ours"] / kinds["tcp"],
                moved / kinds["ours"] / 1e3,
                moved / kinds["tcp"] / 1e3,
            )
        )
    columns = ("tokens x 2048 bf16", "ours us", "tcp us", "ratio", "ours GB/s", "tcp GB/s")
    print_table("round trip between two hosts, us (least round median)", columns, rows)
    small, large = best[64], best[max(TOKENS)]
    summary = {
        "rtt_us_p50_64x2048": small["ours"],
        "tcp_rtt_us_p50_64x2048": small["tcp"],
        "rtt_ratio_1x2048": best[1]["ours"] / best[1]["tcp"],
        "rtt_ratio_64x2048": small["ours"] / small["tcp"],
        "bandwidth_ratio_8mib": large["tcp"] / large["ours"],
    }
    details = {"least_round_median_us": {str(size): kinds for size, kinds in best.items()}}
    report = make_report("dataplane_hosts", summary, details)
    print_summary(report)
    write_report(report, json_path)
    return report


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__ or ""))
