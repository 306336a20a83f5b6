"""A long batch through an FFN actor in one frame and in pieces, in one run.

An attention side's client and an FFN actor's worker, a process and a core each, with a layer of
random experts. First between two hosts made of this one (``hosts``), over TCP; then without them,
over shared memory. Per frame size and round, in turn:

    ahead   the batch dispatched as always: the next piece is on its way while one is computed
    in turn every piece dispatched when the last one's answer is there

Needs root. One machine's cores carry both ends and the network between: the ratio counts.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.dataplane_hosts import enter, take
from benchmarks.hosts import command_line, hosts
from benchmarks.models import BALANCED, make_model
from benchmarks.report import make_report, print_summary, print_table, write_report

SHAPE = BALANCED | {"hidden_size": 2048, "moe_intermediate_size": 64, "num_hidden_layers": 1}
"""Wide rows and slim experts, so that wire and experts take about as long on two cores."""

TOKENS = 2048
FRAMES = (2048, 1024, 512, 256, 128)
"""Most tokens of a frame; the first takes the whole batch."""

WAYS = ("ahead", "in turn")

Rounds = dict[tuple[int, str], list[float]]
"""Per tokens of a frame and way, each round's median in seconds."""

_NAMES = ("attention", "ffn")
_DEADLINE_S = 120.0


@dataclass(frozen=True)
class Effort:
    """How often to measure; the default takes about two minutes."""

    rounds: int = 12
    exchanges: int = 3
    frames: Sequence[int] = FRAMES


def _serve(model: str, host: int | None, pipe: Connection) -> None:
    _prepare(1, host)
    from actors.ffn import FFNWorker
    from actors.shard import ExpertShard

    shard = ExpertShard(model, {0: range(SHAPE["num_experts"])}, dtype="bfloat16", threads=1)
    endpoint = _endpoint(1, host, pipe)
    worker = FFNWorker(shard, endpoint, threads=1)
    worker.start()
    pipe.send("ready")
    pipe.recv()
    worker.stop()
    endpoint.close()


def _ask(host: int | None, pipe: Connection) -> None:
    _prepare(0, host)
    import torch

    from actors.experts_client import ExpertsClient
    from actors.lanes import LaneChooser
    from actors.table import ExpertTable

    torch.set_num_threads(1)
    experts, top_k = SHAPE["num_experts"], SHAPE["num_experts_per_tok"]
    endpoint = _endpoint(0, host, pipe)
    client = ExpertsClient(endpoint, LaneChooser(1), max_tokens=TOKENS, timeout=_DEADLINE_S)
    client.adopt(ExpertTable(1, {0: ((_NAMES[1],),) * experts}))
    x = torch.randn(TOKENS, SHAPE["hidden_size"]).to(torch.bfloat16)
    ids = torch.rand(TOKENS, experts).topk(top_k).indices.to(torch.int32)
    weights = torch.rand(TOKENS, top_k)
    pipe.send("ready")
    whole = None
    with torch.inference_mode():
        while (command := pipe.recv()) is not None:
            way, client.max_tokens, times = command
            size = TOKENS if way == "ahead" else client.max_tokens
            taken = []
            for _ in range(times):
                client.begin_step(1)
                start = time.perf_counter()
                out = torch.cat(
                    [
                        client.combine(client.dispatch(0, *piece))
                        for piece in zip(*(t.split(size) for t in (x, weights, ids)), strict=True)
                    ]
                )
                taken.append(time.perf_counter() - start)
            whole = out if whole is None else whole
            # another number of rows may take another kernel, hence not bit for bit
            if not torch.allclose(out, whole, rtol=0.02, atol=0.02):
                raise RuntimeError("pieces came to something else than the whole")
            pipe.send(taken)
    client.stop()
    endpoint.close()


def _prepare(number: int, host: int | None) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    os.environ["UCX_NET_DEVICES"] = "lo" if host is None else "eth0"
    if host is not None:
        enter(host)


def _endpoint(number: int, host: int | None, pipe: Connection) -> Any:
    import torch

    from actors.transport.endpoint import Endpoint
    from actors.transport.geometry import Geometry

    width, top_k = SHAPE["hidden_size"], SHAPE["num_experts_per_tok"]
    geometry = Geometry(width, top_k, torch.bfloat16, TOKENS, 1)
    tls = None if host is None else "tcp,self"
    endpoint = Endpoint(_NAMES[number], geometry, b"benchmark digest", ucx_tls=tls)
    pipe.send(endpoint.offer(_NAMES[1 - number]))
    endpoint.connect(pipe.recv())
    return endpoint


def run(json_path: Path | None = None, effort: Effort | None = None) -> dict[str, Any]:
    """Measure, print a table, write JSON when a path is given; returns the report.

    Raises:
        RuntimeError: hosts can't be made here, or a process died.
    """
    effort = effort or Effort()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = str(make_model(Path(folder) / "model", SHAPE))
        made = stack.enter_context(hosts(2))
        found = {
            "tcp": _measure(model, [host.pid for host in made], effort),
            "shared memory": _measure(model, [None, None], effort),
        }
    return _report(found, json_path)


def _measure(model: str, places: Sequence[int | None], effort: Effort) -> Rounds:
    context = mp.get_context("spawn")
    pipes, workers = [], []
    for number, place in enumerate(places):
        mine, theirs = context.Pipe()
        work, given = (_serve, (model, place)) if number else (_ask, (place,))
        worker = context.Process(target=work, args=(*given, theirs), daemon=True)
        worker.start()
        theirs.close()
        pipes.append(mine)
        workers.append(worker)
    try:
        offers = [take(pipe) for pipe in pipes]
        for pipe, offer in zip(pipes, reversed(offers), strict=True):
            pipe.send(offer)
        for pipe in pipes:
            take(pipe)
        asker = pipes[0]
        found: Rounds = {(frame, way): [] for frame in effort.frames for way in WAYS}
        for number in range(effort.rounds + 1):
            for (frame, way), rounds in found.items():
                asker.send((way, frame, effort.exchanges))
                taken = take(asker)
                if number:  # the first one connects and touches memory
                    rounds.append(statistics.median(taken))
        for pipe in pipes:
            pipe.send(None)
        return found
    finally:
        for worker in workers:
            worker.join(10)
            worker.kill()


def _report(found: dict[str, Rounds], json_path: Path | None) -> dict[str, Any]:
    columns = ["tokens per frame", "frames"]
    for wire in found:
        columns += [f"{wire}, ms", "in turn, ms", "gain", "over one frame"]
    rows: list[tuple[Any, ...]] = []
    summary: dict[str, Any] = {}
    for frame in sorted({frame for frame, _ in next(iter(found.values()))}, reverse=True):
        cells: list[Any] = [str(frame), str(-(-TOKENS // frame))]
        for wire, rounds in found.items():
            ahead, in_turn = (rounds[frame, way] for way in WAYS)
            gain, over = _faster(in_turn, ahead), _faster(rounds[TOKENS, "ahead"], ahead)
            cells += [1e3 * min(ahead), 1e3 * min(in_turn), f"{gain:.2f}", f"{over:.2f}"]
            key = f"{frame}_{wire.replace(' ', '_')}"
            summary |= {f"gain_{key}": gain, f"over_one_frame_{key}": over}
        rows.append(tuple(cells))
    print_table(f"{TOKENS} x 2048 bf16 through one layer's experts", tuple(columns), rows)
    details = {
        "round_medians_ms": {
            wire: {
                f"{frame}, {way}": [1e3 * seconds for seconds in taken]
                for (frame, way), taken in rounds.items()
            }
            for wire, rounds in found.items()
        }
    }
    report = make_report("pieces", summary, details)
    print_summary(report)
    write_report(report, json_path)
    return report


def _faster(before: Sequence[float], after: Sequence[float]) -> float:
    """Median over rounds, which lie side by side: a slow minute of the machine slows both."""
    return statistics.median(a / b for a, b in zip(before, after, strict=True))


if __name__ == "__main__":
    sys.exit(command_line(run, __doc__ or ""))
