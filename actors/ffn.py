"""The FFN actor: answers frames with the partial sums of the experts it holds.

``FFNWorker`` is the loop (poll, board, compute, answer) on a thread of its own; ``FFNActor`` is
what Ray calls. Neither keeps anything of a request: a frame that comes again is computed again.
The wire is in ``transport/``, who rides with whom in ``boarding.py``, the kernels in ``shard.py``.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actors.boarding import board
from actors.errors import AffluxError, FrameError, PeerLost, PeerTimeout
from actors.transport.backoff import Backoff
from actors.transport.geometry import MAX_LANES, Geometry
from actors.transport.hops import Histogram

if TYPE_CHECKING:
    from actors.shard import ExpertShard
    from actors.transport.endpoint import Arrival, Endpoint, Offer

logger = logging.getLogger(__name__)

_STOP_DEADLINE_S = 10.0
_FLUSH = 256


@dataclass(frozen=True)
class FFNConfig:
    """What an FFN actor needs to know. Crosses Ray.

    Args:
        name: actor name, unique among all peers.
        model: folder of the checkpoint.
        experts: layer -> global ids of the experts to hold.
        dtype: torch dtype name, or "auto" as vLLM takes it; equal on the attention side.
        max_frame_tokens: most tokens of a frame; equal on the attention side.
        lanes: most lanes of an attention peer; equal on the attention side.
        merge_tokens: most tokens of a kernel call for several frames.
        threads: torch threads for the kernels; None leaves torch's choice.
        engine_args: further engine arguments for vLLM.
        device: "cpu" or a CUDA device.
        ucx_tls: UCX transport list; None leaves UCX's choice.
    """

    name: str
    model: str
    experts: Mapping[int, Sequence[int]]
    dtype: str = "auto"
    max_frame_tokens: int = 512
    lanes: int = MAX_LANES
    merge_tokens: int = 128
    threads: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    ucx_tls: str | None = None


@dataclass
class ServeStats:
    """Counts of one worker since it began; times in nanoseconds, summed over frames or rides."""

    frames: int = 0
    rides: int = 0
    tokens: int = 0
    pairs: int = 0
    refused: int = 0
    lost_peers: int = 0
    busy_ns: int = 0
    boarding_ns: int = 0


class FFNWorker:
    """Serves a shard over an endpoint until stopped.

    Args:
        shard: what computes.
        endpoint: where frames come from; peers may join and leave while the loop runs.
        merge_tokens: see ``FFNConfig``.
        threads: see ``FFNConfig``; set inside the loop's own thread.
    """

    def __init__(
        self,
        shard: ExpertShard,
        endpoint: Endpoint,
        *,
        merge_tokens: int = 128,
        threads: int | None = None,
    ):
        self.shard = shard
        self.endpoint = endpoint
        self.stats = ServeStats()
        self.failure: BaseException | None = None
        self._merge_tokens = merge_tokens
        self._threads = threads
        self._waiting: list[Arrival] = []
        self._stages = {"boarding": _Stage(), "compute": _Stage()}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self.serve, name="ffn-serve", daemon=True)
        self._began_ns = time.monotonic_ns()

    def start(self) -> None:
        """Begin to serve on a thread of its own."""
        self._began_ns = time.monotonic_ns()
        self._thread.start()

    def stop(self) -> None:
        """End after the ride in progress; raises AffluxError if that takes too long."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_DEADLINE_S)
            if self._thread.is_alive():
                raise AffluxError(
                    f"the serving loop did not end within {_STOP_DEADLINE_S:g} s: "
                    "a kernel call is stuck; end the process",
                    code="stop_timeout",
                )

    def check(self) -> None:
        """Raise AffluxError (``actor_failed``) if the loop has died."""
        if self.failure is not None:
            raise AffluxError(
                f"the serving loop died of {type(self.failure).__name__}: {self.failure}",
                code="actor_failed",
            ) from self.failure

    def serve(self) -> None:
        """The loop itself; returns after ``stop``, or with ``failure`` set."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        backoff = Backoff()
        try:
            with torch.inference_mode():
                while not self._stopping.is_set():
                    if self.turn():
                        backoff.reset()
                    else:
                        backoff.pause()
        except BaseException as error:
            logger.exception("the serving loop died")
            self.failure = error

    def turn(self) -> bool:
        """Take in what has arrived and serve the oldest ride; False when there was none.

        Looking again before every ride lets new frames board rides that have not left yet.
        """
        for frame in self.endpoint.poll():
            # A frame sent again lies in the same slot: its predecessor's content is gone.
            self._waiting = [f for f in self._waiting if not _same_slot(f, frame)]
            self._waiting.append(frame)
        if not self._waiting:
            return False
        ride = board(self._waiting, self._merge_tokens)[0]
        self._waiting = [f for f in self._waiting if not any(f is other for other in ride)]
        self._serve_ride(ride)
        return True

    def snapshot(self) -> dict[str, Any]:
        """Counts, seconds and histograms as plain data; callable from any thread."""
        stats = self.stats
        elapsed = (time.monotonic_ns() - self._began_ns) / 1e9
        busy = stats.busy_ns / 1e9
        return {
            "frames": stats.frames,
            "rides": stats.rides,
            "tokens": stats.tokens,
            "pairs": stats.pairs,
            "refused": stats.refused,
            "lost_peers": stats.lost_peers,
            "busy_seconds": busy,
            "idle_seconds": max(elapsed - busy, 0.0),
            "boarding_seconds": stats.boarding_ns / 1e9,
            "hops": {name: stage.snapshot() for name, stage in self._stages.items()},
        }

    def _serve_ride(self, ride: list[Arrival]) -> None:
        start = time.monotonic_ns()
        try:
            self._compute(ride)
        except Exception as error:  # one bad frame must not end the loop
            if len(ride) > 1:
                for frame in ride:
                    self._serve_ride([frame])
            elif isinstance(error, PeerLost):
                self._lose(ride[0].peer, error)
            else:
                self._refuse(ride[0], error)
            return
        end = time.monotonic_ns()
        stats = self.stats
        stats.rides += 1
        for frame in ride:
            header = frame.header
            stats.frames += 1
            stats.tokens += header.tokens
            stats.pairs += header.pairs
            stats.boarding_ns += start - frame.back_ns
            self._stages["boarding"].add(start - frame.back_ns)
            self._stages["compute"].add(end - start)
            try:
                self.endpoint.combine(frame, compute_start_ns=start, compute_end_ns=end)
            except PeerLost as error:
                self._lose(frame.peer, error)
            except PeerTimeout as error:  # its deadline, not ours, decides what happens next
                logger.warning("no answer to %s: %s", frame.peer, error)
        stats.busy_ns += time.monotonic_ns() - start

    def _compute(self, ride: list[Arrival]) -> None:
        """Leave each frame's answer in its send slot."""
        layer = ride[0].header.layer
        outs = [self.endpoint.result_view(frame, frame.header.tokens) for frame in ride]
        if len(ride) == 1:  # kernels read the receive slot and the sum lands in the send slot
            self.shard.compute(layer, *_question(ride[0]), outs[0])
            return
        questions = [_question(frame) for frame in ride]
        x, ids, weights, rows = zip(*questions, strict=True)
        sizes = [frame.header.tokens for frame in ride]
        result = self.shard.compute(
            layer, torch.cat(x), torch.cat(ids), torch.cat(weights), _shifted_rows(rows, sizes)
        )
        for out, part in zip(outs, result.split(sizes), strict=True):
            out.copy_(part)

    def _refuse(self, frame: Arrival, error: Exception) -> None:
        self.stats.refused += 1
        if isinstance(error, FrameError):
            code, text = error.code, error.message
        else:
            code, text = "compute_failed", f"{type(error).__name__}: {error}"
            logger.error("frame of %s failed", frame.peer, exc_info=error)
        try:
            self.endpoint.refuse(frame, code, text)
        except PeerLost as lost:
            self._lose(frame.peer, lost)

    def _lose(self, peer: str, error: PeerLost) -> None:
        """An attention actor died: drop its frames that still wait, and its slots."""
        logger.warning("lost peer %s: %s", peer, error)
        self.stats.lost_peers += 1
        self._waiting = [frame for frame in self._waiting if frame.peer != peer]
        if peer in self.endpoint.lost:  # a successor of the same name may already be connected
            self.endpoint.disconnect(peer)


class FFNActor:
    """What Ray calls. Undecorated: the cluster wraps it with resources and a name."""

    def __init__(self) -> None:
        self.state = "idle"
        self._error: str | None = None
        self._config: FFNConfig | None = None
        self._worker: FFNWorker | None = None

    def start(self, config: FFNConfig) -> dict[str, Any]:
        """Load the experts and begin to serve; returns ``info()``.

        Raises:
            CheckpointError, UnsupportedModel, ValueError: see ``ExpertShard``.
            AffluxError: code ``already_started``.
        """
        if self._worker is not None:
            raise AffluxError(
                f"FFN actor {config.name} was started before; start a new actor instead",
                code="already_started",
            )
        self._config = config
        try:
            self._worker = self._load(config)
        except BaseException as error:
            self.state, self._error = "failed", str(error)
            raise
        self._worker.start()
        self.state = "ready"
        return self.info()

    def _load(self, config: FFNConfig) -> FFNWorker:
        self.state = "importing"
        from actors.shard import ExpertShard
        from actors.transport.endpoint import Endpoint

        self.state = "loading"
        shard = ExpertShard(
            config.model,
            config.experts,
            dtype=config.dtype,
            engine_args=config.engine_args,
            threads=config.threads,
            device=config.device,
        )
        geometry = Geometry(
            hidden=shard.hidden,
            top_k=shard.top_k,
            dtype=shard.dtype,
            max_tokens=config.max_frame_tokens,
            lanes=config.lanes,
        )
        endpoint = Endpoint(
            config.name,
            geometry,
            shard.checkpoint.digest,
            device=config.device,
            ucx_tls=config.ucx_tls,
        )
        return FFNWorker(shard, endpoint, merge_tokens=config.merge_tokens, threads=config.threads)

    def offer(self, peer: str) -> Offer:
        """This side's half of a connection with the attention actor ``peer``."""
        return self._running().endpoint.offer(peer)

    def connect(self, offer: Offer) -> None:
        """Complete a connection; raises PeerMismatch when the peer serves something else."""
        self._running().endpoint.connect(offer)

    def disconnect(self, peer: str) -> None:
        """Forget an attention actor."""
        self._running().endpoint.disconnect(peer)

    def info(self) -> dict[str, Any]:
        """Plain facts about this actor."""
        worker, config = self._worker, self._config
        facts: dict[str, Any] = {
            "role": "ffn",
            "state": self.state,
            "error": self._error,
            "pid": os.getpid(),
            "host": platform.node(),
            "node": platform.node(),
        }
        if worker is None or config is None:
            return facts
        if worker.failure is not None:
            facts |= {"state": "failed", "error": str(worker.failure)}
        shard = worker.shard
        return (
            facts
            | {
                "name": config.name,
                "model": config.model,
                "digest": shard.checkpoint.digest,
                "dtype": str(shard.dtype).removeprefix("torch."),
                "experts": {layer: list(ids) for layer, ids in shard.experts.items()},
                "allocated_bytes": shard.allocated_bytes,
                "peers": sorted(worker.endpoint.peers),
            }
            | worker.snapshot()
        )

    def ping(self) -> str:
        """State; raises AffluxError when the serving loop has died."""
        if self._worker is not None:
            self._worker.check()
        return self.state

    def stop(self) -> None:
        """End the loop and close the connections; idempotent."""
        if self._worker is not None and self.state != "stopped":
            self._worker.stop()
            self._worker.endpoint.close()
        self.state = "stopped"

    def _running(self) -> FFNWorker:
        if self._worker is None or self.state == "stopped":
            raise AffluxError(f"FFN actor is {self.state}, not ready", code="not_running")
        self._worker.check()
        return self._worker


class _Stage:
    """A histogram that takes nanoseconds one by one and does its arithmetic for many at once."""

    def __init__(self) -> None:
        self._histogram = Histogram()
        self._pending: list[int] = []
        self._lock = threading.Lock()

    def add(self, nanoseconds: int) -> None:
        self._pending.append(nanoseconds)
        if len(self._pending) >= _FLUSH:
            self._flush()

    def snapshot(self) -> dict[str, Any]:
        self._flush()
        return self._histogram.snapshot()

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
            if pending:
                self._histogram.add(np.array(pending) / 1e3)


def _same_slot(first: Arrival, second: Arrival) -> bool:
    return first.peer == second.peer and first.header.lane == second.header.lane


def _question(
    frame: Arrival,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """x, ids, weights and rows of a DISPATCH; raises FrameError for any other kind."""
    if frame.x is None or frame.ids is None or frame.weights is None:
        raise FrameError(f"an FFN actor expects DISPATCH, not {frame.header.describe()}")
    return frame.x, frame.ids, frame.weights, frame.rows


def _shifted_rows(
    parts: Sequence[torch.Tensor | None], sizes: Sequence[int]
) -> torch.Tensor | None:
    """Row numbers of all pairs, counted over the whole ride; None for a DENSE ride."""
    shifted, before = [], 0
    for rows, size in zip(parts, sizes, strict=True):
        if rows is None:
            return None
        shifted.append(rows + before)
        before += size
    return torch.cat(shifted)
