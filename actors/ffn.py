"""The FFN actor: answers frames with the partial sums of the experts it holds.

``FFNWorker`` is the loop (poll, board, compute, answer) on a thread of its own; ``FFNActor`` is
what Ray calls, from several threads. Neither keeps anything of a request: a frame that comes again
is computed again. What is held may change while frames are served: ``grow`` and ``keep``.
The wire is in ``transport/``, who rides with whom in ``boarding.py``, the kernels in ``shard.py``.
"""

from __future__ import annotations

import gc
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
from actors.emulate import Emulation, sleep_rest
from actors.errors import AffluxError, FrameError, PeerLost, PeerTimeout
from actors.metrics.config import MetricsConfig
from actors.telemetry import no_telemetry
from actors.transport.backoff import Backoff
from actors.transport.geometry import DEPTH, MAX_LANES, Geometry
from actors.transport.hops import Histogram

if TYPE_CHECKING:
    from actors.metrics.ffn import FFNMetrics
    from actors.metrics.rows import Rows
    from actors.shard import ExpertShard
    from actors.transport.endpoint import Arrival, Endpoint, Offer
    from actors.weights import WeightOffer, WeightSource

logger = logging.getLogger(__name__)

_STOP_DEADLINE_S = 10.0
_FLUSH = 256
_SAMPLE_STEPS = 8
_REFUSALS = ("stale_epoch", "unknown_expert", "unknown_layer", "bad_frame", "compute_failed")

Experts = Mapping[int, Sequence[int]]


@dataclass(frozen=True)
class FFNConfig:
    """What an FFN actor needs to know. Crosses Ray.

    Args:
        name: actor name, unique among all peers.
        model: folder of the checkpoint.
        experts: layer -> global ids of the experts to hold at first.
        dtype: torch dtype name, or "auto" as vLLM takes it; equal on the attention side.
        max_frame_tokens: most tokens of a frame; equal on the attention side.
        lanes: most lanes of an attention peer; equal on the attention side.
        merge_tokens: most tokens of a kernel call for several frames.
        threads: torch threads for the kernels; None leaves torch's choice.
        engine_args: further engine arguments for vLLM.
        device: "cpu" or a CUDA device.
        ucx_tls: UCX transport list; None leaves UCX's choice.
        offers: actors whose memory may be read instead of the checkpoint, see ``grow``.
        emulate: an emulated device whose kernels take their modelled time.
        epoch: frames under an older expert table are refused, see ``keep``.
        metrics: export metrics, see ``metrics.ffn``; None exports none.
        secret: shared by the deployment's actors, see ``transport.trust``; never logged.
        address: of this node in the cluster; see ``transport.interfaces``.
    """

    name: str
    model: str
    experts: Experts
    dtype: str = "auto"
    max_frame_tokens: int = 512
    lanes: int = MAX_LANES
    merge_tokens: int = 128
    threads: int | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    ucx_tls: str | None = None
    offers: Sequence[WeightOffer] = ()
    emulate: Emulation | None = None
    epoch: int = 0
    metrics: MetricsConfig | None = None
    secret: bytes = field(default=b"", repr=False)
    address: str | None = None


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
        emulate: see ``FFNConfig``.
        epoch: see ``min_epoch``.
    """

    def __init__(
        self,
        shard: ExpertShard,
        endpoint: Endpoint,
        *,
        merge_tokens: int = 128,
        threads: int | None = None,
        emulate: Emulation | None = None,
        epoch: int = 0,
    ):
        self.shard = shard
        self.endpoint = endpoint
        self.stats = ServeStats()
        self.min_epoch = epoch
        """Frames of an older epoch are refused with ``stale_epoch``; may be set from any thread."""
        self.failure: BaseException | None = None
        self.ended = threading.Event()
        """Set when the loop has returned or died."""
        self.rides: Rows | None = None
        """Takes in step ns, compute ns, tokens and pairs of every ride; None: nobody asks."""
        self.refusals = dict.fromkeys(_REFUSALS, 0)
        """Refused frames by code."""
        self._emulated = emulate.ffn if emulate is not None else None
        self._loads: dict[int, np.ndarray] = {}
        self._merge_tokens = merge_tokens
        self._threads = threads
        self._waiting: list[Arrival] = []
        self._served: set[tuple[str, int, int, int]] = set()
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
        # Set even when it is the default: a loader on another thread changes the default meanwhile.
        torch.set_num_threads(self._threads or torch.get_num_threads())
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
        finally:
            self.ended.set()

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
        if len(self._waiting) > 1:  # a batch's next piece was sent ahead, but goes behind others
            self._waiting.sort(key=self._was_served)
        ride = board(self._waiting, self._merge_tokens)[0]
        self._waiting = [f for f in self._waiting if not any(f is other for other in ride)]
        self._served = {_batch(frame) for frame in ride}
        self._serve_ride(ride)
        return True

    def _was_served(self, frame: Arrival) -> bool:
        """Whether another piece of the same batch was on the last ride."""
        return _batch(frame) in self._served

    @property
    def busy_s(self) -> float:
        """Seconds spent on rides that have ended."""
        return self.stats.busy_ns / 1e9

    @property
    def idle_s(self) -> float:
        """All other seconds since the start."""
        return max((time.monotonic_ns() - self._began_ns) / 1e9 - self.busy_s, 0.0)

    @property
    def queued(self) -> int:
        """Frames that wait for a ride."""
        return len(self._waiting)

    def boarding(self) -> Histogram:
        """How long frames waited for their ride; a copy, from any thread."""
        return self._stages["boarding"].copy()

    def snapshot(self) -> dict[str, Any]:
        """Counts, seconds and histograms as plain data; callable from any thread."""
        stats = self.stats
        return {
            "frames": stats.frames,
            "rides": stats.rides,
            "tokens": stats.tokens,
            "pairs": stats.pairs,
            "refused": stats.refused,
            "lost_peers": stats.lost_peers,
            "busy_seconds": self.busy_s,
            "idle_seconds": self.idle_s,
            "boarding_seconds": stats.boarding_ns / 1e9,
            "hops": {name: stage.snapshot() for name, stage in self._stages.items()},
        }

    def loads(self) -> dict[int, list[int]]:
        """Pairs per expert of each layer that was asked for, about: every eighth step counts for
        eight. Callable from any thread."""
        return {layer: counts.tolist() for layer, counts in sorted(self._loads.copy().items())}

    def _serve_ride(self, ride: list[Arrival]) -> None:
        if any(frame.header.epoch < self.min_epoch for frame in ride):
            ride = self._refuse_stale(ride)
            if not ride:
                return
        start, began = time.monotonic_ns(), time.perf_counter()
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
        if self._emulated is not None:
            pairs = sum(frame.header.pairs for frame in ride)
            sleep_rest(began, self._emulated(pairs))
        end = time.monotonic_ns()
        stats = self.stats
        stats.rides += 1
        tokens = pairs = 0
        for frame in ride:
            header = frame.header
            tokens += header.tokens
            if header.step % _SAMPLE_STEPS == 0:
                self._count(frame)
            stats.frames += 1
            pairs += header.pairs
            stats.boarding_ns += start - frame.back_ns
            self._stages["boarding"].add(start - frame.back_ns)
            self._stages["compute"].add(end - start)
            try:
                self.endpoint.combine(frame, compute_start_ns=start, compute_end_ns=end)
            except PeerLost as error:
                self._lose(frame.peer, error)
            except PeerTimeout as error:  # its deadline, not ours, decides what happens next
                logger.warning("no answer to %s: %s", frame.peer, error)
        stats.tokens += tokens
        stats.pairs += pairs
        spent = time.monotonic_ns() - start
        stats.busy_ns += spent
        if self.rides is not None:
            self.rides.add(spent, end - start, tokens, pairs)

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

    def _count(self, frame: Arrival) -> None:
        """Note which experts a frame asked for."""
        if frame.ids is None:
            return
        layer = frame.header.layer
        counts = self._loads.get(layer)
        if counts is None:
            counts = self._loads[layer] = np.zeros(self.shard.num_experts, dtype=np.int64)
        # Its ids lie in the slot until the answer has left: count before that.
        counts += _SAMPLE_STEPS * np.bincount(frame.ids.cpu().numpy().ravel(), None, len(counts))

    def _refuse_stale(self, ride: list[Arrival]) -> list[Arrival]:
        """The frames of a ride that may be computed; the others get an answer that says why."""
        oldest, going = self.min_epoch, []
        for frame in ride:
            epoch = frame.header.epoch
            if epoch >= oldest:
                going.append(frame)
                continue
            text = f"frame of epoch {epoch}, this actor serves epoch {oldest} and later"
            self._refuse(frame, FrameError(text, code="stale_epoch"))
        return going

    def _refuse(self, frame: Arrival, error: Exception) -> None:
        self.stats.refused += 1
        if isinstance(error, FrameError):
            code, text = error.code, error.message
        else:
            code, text = "compute_failed", f"{type(error).__name__}: {error}"
            logger.error("frame of %s failed", frame.peer, exc_info=error)
        self.refusals[code] = self.refusals.get(code, 0) + 1
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
        self._source: WeightSource | None = None
        self._note: dict[str, Any] | None = None
        self._changing = threading.Lock()
        self._metrics: FFNMetrics | None = None

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
            self._metrics = _export(config)
            self._worker = self._load(config)
            if self._metrics is not None:
                self._metrics.watch(self._worker)
        except BaseException as error:
            self.state, self._error = "failed", str(error)
            raise
        _spare_the_collector()
        self._worker.start()
        self.state = "ready"
        return self.info()

    def _load(self, config: FFNConfig) -> FFNWorker:
        self.state = "importing"
        from actors.shard import ExpertShard
        from actors.transport.endpoint import Endpoint
        from actors.weights import WeightSource

        self.state = "loading"
        shard = ExpertShard(
            config.model,
            {},
            dtype=config.dtype,
            engine_args=config.engine_args,
            threads=config.threads,
            device=config.device,
        )
        source = self._source = WeightSource(shard, config.name, config.ucx_tls)
        source.grow(config.experts, config.offers, background=False)
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
            secret=config.secret,
        )
        return FFNWorker(
            shard,
            endpoint,
            merge_tokens=config.merge_tokens,
            threads=config.threads,
            emulate=config.emulate,
            epoch=config.epoch,
        )

    def grow(self, experts: Experts, offers: Sequence[WeightOffer] = ()) -> dict[str, Any]:
        """Hold these experts too; idempotent. Frames are served meanwhile.

        Args:
            experts: layer -> global ids.
            offers: what other actors ``export``; read where that is expected to be quicker than
                the checkpoint, which also has whatever can't be read.

        Returns:
            ``seconds``, ``bytes``, ``source`` and more, see ``WeightSource.grow``.

        Raises:
            CheckpointError, UnsupportedModel, ValueError: see ``ExpertShard.grow``.
        """
        source = self._running_source()
        with self._changing:
            return source.grow(experts, offers)

    def export(self, experts: Experts) -> WeightOffer:
        """Let others read these experts from this actor's memory, until ``unexport`` or for two
        minutes; see ``WeightSource.export``.

        Raises:
            AffluxError: code ``nothing_to_export``.
        """
        return self._running_source().export(experts)

    def unexport(self, token: str) -> bool:
        """Take an offer back; False when it is unknown or has ended by itself."""
        return self._running_source().unexport(token)

    def keep(self, experts: Experts, epoch: int) -> dict[str, Any]:
        """Drop every expert that is not named, and from now on refuse frames of older epochs.

        Idempotent. The epoch counts at once: what is dropped is asked for by stale frames only.

        Args:
            experts: layer -> global ids, all held; a layer left out keeps none.
            epoch: the oldest expert table that is still served.

        Returns:
            ``seconds`` and ``bytes`` of memory given back.

        Raises:
            AffluxError: code ``stale_epoch``; a newer epoch was kept before.
            ValueError: an expert that is not held; nothing has changed then.
        """
        worker = self._running()
        began = time.monotonic()
        with self._changing:
            if epoch < worker.min_epoch:
                raise AffluxError(
                    f"asked to keep experts for epoch {epoch}; this actor has moved on to epoch "
                    f"{worker.min_epoch}",
                    code="stale_epoch",
                )
            worker.shard.check_held(experts)
            worker.min_epoch = epoch
            nbytes = worker.shard.keep(experts)
            return {"seconds": time.monotonic() - began, "bytes": nbytes}

    def loads(self) -> dict[int, list[int]]:
        """Pairs per expert of each layer since the start, see ``FFNWorker.loads``."""
        return self._running().loads()

    def telemetry(self, since: int = 0) -> dict[str, Any]:
        """Totals since the start, whatever ``since`` says; see ``FFNMetrics.telemetry``.

        Raises:
            AffluxError: code ``no_telemetry``.
        """
        if self._metrics is None:
            raise no_telemetry(self.state)
        return self._metrics.telemetry()

    def watch(self, seen: int = 0, timeout_s: float = 2.0) -> dict[str, Any]:
        """State and epoch; returns at once when the serving loop has ended, else after a while.

        An FFN actor finds no faults in others: ``faults`` is empty and ``number`` is 0, for
        whatever ``seen``.
        """
        if self._worker is not None:
            self._worker.ended.wait(timeout_s)
        elif self.state != "failed":
            time.sleep(timeout_s)
        state, error = self._health()
        epoch = self._worker.min_epoch if self._worker is not None else None
        return {"state": state, "error": error, "epoch": epoch, "faults": [], "number": 0}

    def remember(self, note: Mapping[str, Any]) -> None:
        """Keep a note of the manager's for its successor; the newest ``number`` wins."""
        if self._note is None or note["number"] >= self._note["number"]:
            self._note = dict(note)

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
        worker, config, metrics = self._worker, self._config, self._metrics
        state, error = self._health()
        facts: dict[str, Any] = {
            "role": "ffn",
            "state": state,
            "error": error,
            "pid": os.getpid(),
            "host": platform.node(),
            "node": platform.node(),
            "note": self._note,
            "metrics": metrics.address if metrics is not None else None,
        }
        if worker is None or config is None:
            return facts
        shard = worker.shard
        held_bytes = shard.allocated_bytes
        return (
            facts
            | {
                "name": config.name,
                "model": config.model,
                "digest": shard.checkpoint.digest,
                "dtype": str(shard.dtype).removeprefix("torch."),
                "epoch": worker.min_epoch,
                "experts": {layer: list(ids) for layer, ids in shard.experts.items()},
                "allocated_bytes": held_bytes,
                "held_bytes": held_bytes,
                "grow": self._source.last if self._source is not None else None,
                "exports": self._source.exports if self._source is not None else 0,
                "loads": worker.loads(),
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
        """End the loop, close the connections and give the experts' memory back; idempotent."""
        if self._worker is not None and self.state != "stopped":
            self._worker.stop()
            self._worker.endpoint.close()
            if self._source is not None:
                self._source.close()
            self._worker.shard.keep({})
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        self.state = "stopped"

    def _running_source(self) -> WeightSource:
        self._running()
        assert self._source is not None  # made before the worker
        return self._source

    def _health(self) -> tuple[str, str | None]:
        """(state, error), the serving loop's death included."""
        failure = self._worker.failure if self._worker is not None else None
        return ("failed", str(failure)) if failure is not None else (self.state, self._error)

    def _running(self) -> FFNWorker:
        if self._worker is None or self.state == "stopped":
            raise AffluxError(f"FFN actor is {self.state}, not ready", code="not_running")
        self._worker.check()
        return self._worker


def _export(config: FFNConfig) -> FFNMetrics | None:
    if config.metrics is None:
        return None
    from actors.metrics.ffn import FFNMetrics

    return FFNMetrics(config.metrics, config.name)


def preload() -> None:
    """Import and initialise whatever any FFN actor needs, before its model is known.

    For warm processes. Builds no layer, so the process may still become an attention actor.
    """
    from vllm.platforms import current_platform

    import actors.shard  # noqa: F401
    from actors.transport.endpoint import Endpoint

    if current_platform.is_cpu():
        import vllm.v1.worker.cpu_model_runner  # noqa: F401

        # The first agent of a process loads UCX, which takes longer than all the others together.
        # Not for a GPU: UCX would begin to use CUDA before the devices are chosen.
        Endpoint("preload", Geometry(64, 1, torch.float32, 1, 1), b"preload!").close()
    _spare_the_collector()


def _spare_the_collector() -> None:
    """Leave out of later garbage collections what is here to stay.

    vLLM and torch bring so many objects that looking through them all would stop the serving
    thread for 0.3 s each time.
    """
    gc.collect()
    gc.freeze()


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

    def copy(self) -> Histogram:
        self._flush()
        twin = Histogram()
        with self._lock:
            twin.merge(self._histogram)
        return twin

    def _flush(self) -> None:
        with self._lock:
            pending, self._pending = self._pending, []
            if pending:
                self._histogram.add(np.array(pending) / 1e3)


def _same_slot(first: Arrival, second: Arrival) -> bool:
    a, b = first.header, second.header
    return first.peer == second.peer and a.lane == b.lane and a.chunk % DEPTH == b.chunk % DEPTH


def _batch(frame: Arrival) -> tuple[str, int, int, int]:
    """What all pieces of a batch have in common."""
    header = frame.header
    return frame.peer, header.lane, header.step, header.layer


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
