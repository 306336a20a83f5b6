"""How fast a hop is: ours beside raw NIXL and beside memcpy, in one run.

Two processes, each pinned to a core, exchange frames of several sizes. Per size and round, in
turn, so that other load on the machine hits all alike:

    ours      everything but expert compute: x, ids and weights are copied from user tensors, the
              header is packed, the frame posted, polled, checked and viewed, the answer copied
              into the send slot, posted, polled, and copied out
    in place  the same without the three copies, as kernels that write and read slots do it
    raw       a NIXL ping-pong of the same bytes: NIXL's default settings, ordinary memory, one
              reused handle per side
    tuned     the same over our wire's settings (shared memory without UCX error handling) and
              huge pages: what our frames cost beyond the transport they use
    memcpy    one copy of x

``bandwidth_ratio_8mib`` is in place against raw, ``..._to_tuned_raw`` against tuned, and
``..._with_copies`` is ours, three 8 MiB copies included, against raw.

Figures are the least of the rounds' medians, because this may run beside other work; the median
over all rounds is in ``details``. Not a benchmark of expert kernels: see ``decode``.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HIDDEN, TOP_K = 2048, 8
TOKENS = (1, 8, 64, 256, 2048)
LARGEST = max(TOKENS)  # 2048 x 2048 bf16 = 8 MiB
_DEADLINE_S = 30.0
_KINDS = ("ours", "in_place", "raw", "tuned")
_SERVER, _CLIENT = "ffn", "attention"


@dataclass(frozen=True)
class Effort:
    """How often to measure; the default takes about 20 s on an idle machine."""

    rounds: int = 15
    small: int = 150  # exchanges per round up to 64 tokens
    large: int = 8  # exchanges per round above
    budget_s: float = 90.0  # on a busy machine: fewer rounds rather than longer

    def exchanges(self, tokens: int) -> int:
        return self.small if tokens <= 64 else self.large * (4 if tokens <= 256 else 1)


class _Raw:
    """A NIXL ping-pong without frames: one write, one notification, one reused handle."""

    def __init__(self, name: str, tuned: bool):
        import torch
        from nixl._api import nixl_agent, nixl_agent_config

        from actors.transport.geometry import Geometry
        from actors.transport.slots import SlotBuffer
        from actors.transport.wire import LOCAL, Wire, local_wire_usable

        geometry = Geometry(HIDDEN, TOP_K, torch.bfloat16, LARGEST, 1)
        self._wire = None
        if tuned and local_wire_usable():
            self._wire = Wire(f"{name}-tuned", LOCAL)
            self._agent: Any = self._wire._agent
        else:
            self._agent = nixl_agent(
                f"{name}-raw", nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
            )
        if tuned:
            self._send, self._receive = SlotBuffer(geometry).bytes, SlotBuffer(geometry).bytes
            self._send.zero_()
            self._receive.zero_()
        else:
            size = geometry.slot_bytes
            self._send = torch.zeros(size, dtype=torch.uint8)
            self._receive = torch.zeros(size, dtype=torch.uint8)
        self._agent.register_memory([self._send])
        self._agent.register_memory([self._receive])
        self._peer = ""
        self._target = 0
        binding = __import__(type(self._agent.agent).__module__, fromlist=["nixlAgent"])
        self._ok = binding.NIXL_SUCCESS
        self._write = binding.NIXL_WRITE

    def offer(self) -> tuple[bytes, int]:
        return self._agent.get_agent_metadata(), self._receive.data_ptr()

    def connect(self, offer: tuple[bytes, int]) -> None:
        metadata, self._target = offer
        peer = self._agent.add_remote_agent(metadata)
        self._peer = peer.decode() if isinstance(peer, bytes) else peer

    def ping_pong(self, nbytes: int, times: int, first: bool) -> list[float]:
        """Seconds per exchange; ``nbytes`` is what this side writes."""
        native = self._agent.agent
        local = self._agent.prep_xfer_dlist("", [(self._send.data_ptr(), nbytes, 0)], "DRAM")
        remote = self._agent.prep_xfer_dlist(self._peer, [(self._target, nbytes, 0)], "DRAM")
        handle = native.makeXferReq(
            self._write, local._handle, [0], remote._handle, [0], b"", [], False
        )
        note, ok = b"n" * 100, self._ok

        def post() -> None:
            state = native.postXferReq(handle, note)
            while state != ok:
                state = native.getXferStatus(handle)

        def wait() -> None:
            deadline = time.monotonic() + _DEADLINE_S
            while not native.getNotifs({}):
                if time.monotonic() > deadline:
                    raise TimeoutError("raw NIXL peer did not answer")

        taken = []
        for _ in range(times):
            start = time.perf_counter()
            if first:
                post()
                wait()
            else:
                wait()
                post()
            taken.append(time.perf_counter() - start)
        native.releaseXferReq(handle)
        return taken


def next_arrival(endpoint: Any, peer: str) -> Any:
    """The next frame that an endpoint gets.

    Raises:
        TimeoutError: there is none in time. AffluxError: the peer refused ours.
    """
    arrivals = endpoint.wait(_DEADLINE_S)
    if not arrivals:
        raise TimeoutError(f"{peer} did not answer within {_DEADLINE_S} s")
    arrivals[0].raise_if_refused()
    return arrivals[0]


class _Side:
    """One of the two processes: an endpoint and two raw agents, connected to the other side."""

    def __init__(self, name: str, peer: str, pipe: Connection):
        import torch

        from actors.transport.endpoint import Endpoint
        from actors.transport.geometry import Geometry

        torch.set_num_threads(1)
        self.peer = peer
        self.first = name == _CLIENT
        self.pipe = pipe
        self.endpoint = Endpoint(
            name, Geometry(HIDDEN, TOP_K, torch.bfloat16, LARGEST, 1), b"benchmark digest"
        )
        self.raw = {"raw": _Raw(name, tuned=False), "tuned": _Raw(name, tuned=True)}
        pipe.send((self.endpoint.offer(peer), {k: raw.offer() for k, raw in self.raw.items()}))
        offer, raws = pipe.recv()
        self.endpoint.connect(offer)
        for kind, raw in self.raw.items():
            raw.connect(raws[kind])
        pipe.send("ready")
        pipe.recv()

    def exchange(self, kind: str, tokens: int, times: int) -> list[float]:
        import torch

        if kind in self.raw:
            layout = self.endpoint.geometry.layout(tokens, tokens * TOP_K, dense=True)
            answer = self.endpoint.geometry.answer_bytes(tokens)
            nbytes = layout.nbytes if self.first else answer
            return self.raw[kind].ping_pong(nbytes, times, self.first)
        with torch.inference_mode():
            if self.first:
                return self._ask(kind == "in_place", tokens, times)
            return self._answer(kind == "in_place", times)

    def _arrival(self) -> Any:
        return next_arrival(self.endpoint, self.peer)

    def _ask(self, in_place: bool, tokens: int, times: int) -> list[float]:
        import torch

        x = torch.randn(tokens, HIDDEN).to(torch.bfloat16)
        ids = torch.randint(0, 64, (tokens, TOP_K), dtype=torch.int32)
        weights = torch.rand(tokens, TOP_K)
        out = torch.empty_like(x)
        if in_place:
            views = self.endpoint.send_views(self.peer, 0, tokens, tokens * TOP_K, True)
            for view, value in zip(views[:3], (x, ids, weights), strict=True):
                view.copy_(value)
            x, ids, weights = views[:3]
        taken = []
        for step in range(times):
            start = time.perf_counter()
            self.endpoint.dispatch(
                self.peer, 0, layer=3, step=step, epoch=1, x=x, ids=ids, weights=weights
            )
            answer = self._arrival()
            if not in_place:
                out.copy_(answer.x)
            taken.append(time.perf_counter() - start)
        if not in_place and not torch.equal(out, x):
            raise RuntimeError("the answer differs from what was sent")
        return taken

    def _answer(self, in_place: bool, times: int) -> list[float]:
        for _ in range(times):
            question = self._arrival()
            now = time.monotonic_ns()
            out = None if in_place else question.x
            self.endpoint.combine(question, out, compute_start_ns=now, compute_end_ns=now)
        return []


def _pin(core: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[core % len(allowed)]})


def _serve(pipe: Connection) -> None:
    """The FFN process: does what it is told until told to stop."""
    _pin(1)
    side = _Side(_SERVER, _CLIENT, pipe)
    while (command := pipe.recv()) is not None:
        side.exchange(*command)
    side.endpoint.close()


def _drive(pipe: Connection, results: Connection, tokens: tuple[int, ...], effort: Effort) -> None:
    """The attention process: measures, and tells the other side what comes."""
    import torch

    _pin(0)
    side = _Side(_CLIENT, _SERVER, pipe)

    def measure(kind: str, size: int, times: int) -> list[float]:
        pipe.send((kind, size, times))
        return side.exchange(kind, size, times)

    figures: dict[int, dict[str, list[list[float]]]] = {}
    for size in tokens:
        times = effort.exchanges(size)
        figures[size] = {kind: [] for kind in (*_KINDS, "memcpy")}
        source = torch.randn(size, HIDDEN).to(torch.bfloat16)
        target = torch.empty_like(source)
        for kind in _KINDS:
            measure(kind, size, max(2, times // 10))  # first touch, caches, UCX lanes
        deadline = time.monotonic() + effort.budget_s / len(tokens)
        for number in range(effort.rounds):
            if number and time.monotonic() > deadline:
                break
            for kind in _KINDS:
                figures[size][kind].append(measure(kind, size, times))
            figures[size]["memcpy"].append(_timed(partial(target.copy_, source), times))
    pipe.send(None)
    results.send((figures, side.endpoint.hops()[_SERVER]))
    side.endpoint.close()


def _timed(work: Callable[[], object], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def _measure(tokens: tuple[int, ...], effort: Effort) -> tuple[dict, dict]:
    """Run both processes; raises RuntimeError when one of them dies or hangs."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    results, sender = context.Pipe(duplex=False)
    workers = [
        context.Process(target=_drive, args=(ours, sender, tokens, effort), daemon=True),
        context.Process(target=_serve, args=(theirs,), daemon=True),
    ]
    try:
        for worker in workers:
            worker.start()
        ours.close()
        theirs.close()
        sender.close()
        deadline = time.monotonic() + 300
        while not results.poll(0.2):
            if time.monotonic() > deadline:
                raise RuntimeError("the benchmark did not finish within 300 s")
            if any(worker.exitcode not in (None, 0) for worker in workers):
                raise RuntimeError("a benchmark process died; its error is above")
        return results.recv()
    finally:
        for worker in workers:
            worker.join(5)
            if worker.is_alive():
                worker.kill()


def run(
    json_path: Path | None = None,
    *,
    tokens: tuple[int, ...] = TOKENS,
    effort: Effort | None = None,
) -> dict:
    """Measure, print a table, write JSON when a path is given; returns the report.

    Args:
        tokens: frame sizes; the summary wants 64 and 2048 among them.
        effort: how often to measure.

    Raises:
        RuntimeError: a process died or hung.
    """
    from actors.transport.geometry import Geometry
    from benchmarks.report import make_report, print_summary, print_table, write_report

    figures, hops = _measure(tokens, effort or Effort())
    best = {
        size: {k: 1e6 * min(map(statistics.median, rounds)) for k, rounds in kinds.items()}
        for size, kinds in figures.items()
    }
    pooled = {
        size: {
            kind: 1e6 * statistics.median([value for values in rounds for value in values])
            for kind, rounds in kinds.items()
        }
        for size, kinds in figures.items()
    }
    summary: dict[str, Any] = {}
    if 64 in best:
        summary |= {
            "rtt_us_p50_64x2048": best[64]["ours"],
            "rtt_in_place_us_p50_64x2048": best[64]["in_place"],
            "raw_rtt_us_p50": best[64]["raw"],
            "raw_tuned_rtt_us_p50": best[64]["tuned"],
            "memcpy_us_p50": best[64]["memcpy"],
            "rtt_us_p50_64x2048_all_rounds": pooled[64]["ours"],
            "raw_rtt_us_p50_all_rounds": pooled[64]["raw"],
        }
    if LARGEST in best:
        large = best[LARGEST]
        geometry = Geometry(HIDDEN, TOP_K, "bfloat16", LARGEST, 1)  # pyright: ignore[reportArgumentType]
        moved = geometry.layout(LARGEST, LARGEST * TOP_K, True).nbytes
        moved += geometry.answer_bytes(LARGEST)
        summary |= {
            "bandwidth_ratio_8mib": large["raw"] / large["in_place"],
            "bandwidth_ratio_8mib_to_tuned_raw": large["tuned"] / large["in_place"],
            "bandwidth_ratio_8mib_with_copies": large["raw"] / large["ours"],
            "bandwidth_gb_s_8mib": moved / large["in_place"] / 1e3,
            "raw_bandwidth_gb_s_8mib": moved / large["raw"] / 1e3,
            "raw_tuned_bandwidth_gb_s_8mib": moved / large["tuned"] / 1e3,
        }
    details = {
        "least_round_median_us": {str(size): kinds for size, kinds in best.items()},
        "median_of_all_us": {str(size): kinds for size, kinds in pooled.items()},
        "hops": hops,
    }
    report = make_report("dataplane", summary, details)
    columns = ("tokens x 2048 bf16", *_KINDS, "memcpy")
    rows = [(str(size), *(best[size][kind] for kind in columns[1:])) for size in best]
    print_table("round trip, us (least round median)", columns, rows)
    print_summary(report)
    write_report(report, json_path)
    return report


def main() -> None:
    """Command line: ``python -m benchmarks.dataplane --json FILE``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, default=None, help="file for the report")
    run(parser.parse_args().json)


if __name__ == "__main__":
    main()
