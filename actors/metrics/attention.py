"""The attention actor's metrics: one row per engine step, and what is read when somebody asks.

``stepped`` runs on the engine's thread after every step and does little more than note a row. The
rest are totals that engine, client, scheduler and endpoint keep anyway, read on the exporter's
thread; a reading may be a step old. The same rows are what ``telemetry`` tells. Not the place for
anything of requests: the frontend sees them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.lanes import SizeTimes
from actors.metrics import catalogue
from actors.metrics.config import MetricsConfig
from actors.metrics.exporter import Exporter, registry_page
from actors.metrics.families import Distribution, Families, Reading, Rising, Value
from actors.metrics.rows import Rows
from actors.telemetry import STEP_COLUMNS, StepLog
from actors.transport.hops import STAGES

if TYPE_CHECKING:
    from actors.engine import AttentionEngine

_STEP = (
    "afd_attention_batch_tokens",
    "afd_attention_step_seconds",
    "afd_attention_compute_seconds",
    "afd_attention_wait_seconds",
    "afd_attention_lanes",
)
_ROW = (
    "tokens",
    "step",
    "compute",
    "wait",
    "lanes",
    "at",
    "requests",
    "decoding",
    "prefill_tokens",
    "context",
    "epoch",
    "interrupted",
    "layers",
    "hops",
)
_ORDER = [_ROW.index(column) for column in STEP_COLUMNS]
_ENGINE = (
    "afd_attention_requests_running",
    "afd_attention_requests_waiting",
    "afd_attention_kv_cache_usage_ratio",
    "afd_attention_kv_cache_tokens",
    "afd_attention_kv_cache_capacity_tokens",
    "afd_attention_preemptions_total",
    "afd_attention_prefix_cache_queries_total",
    "afd_attention_prefix_cache_hits_total",
)
_CLIENT = (
    "afd_attention_steps_repeated_total",
    "afd_faults_total",
    "afd_transport_resends_total",
    "afd_table_epoch",
)
_WIRE = (
    "afd_transport_bytes_total",
    "afd_transport_seconds_total",
    "afd_transport_frames_total",
    "afd_transport_hop_seconds",
)
_HOP_EDGES_US = tuple(edge * 1e6 for edge in catalogue.HOP_S)


class AttentionMetrics:
    """Metrics of one attention actor, served from the moment this is made.

    Args:
        config: see ``MetricsConfig``.
        actor_id: label of every series.

    Raises:
        AffluxError: see ``Exporter``.
    """

    def __init__(self, config: MetricsConfig, actor_id: str):
        who = {"model_name": config.model_name, "role": "attention", "actor_id": actor_id}
        self.families = families = Families("attention", who)
        buckets = [catalogue.of("attention")[name].buckets for name in _STEP]
        self._log = StepLog()
        self._rows = Rows(buckets, extra=len(_ROW) - len(_STEP), tap=self._log_rows)
        self._pause = families["afd_commit_pause_seconds"]
        families.collect_from(self._read_steps, _STEP)
        families.collect_from(self._read_engine, _ENGINE)
        families.collect_from(self._read_client, _CLIENT)
        families.collect_from(self._read_wire, _WIRE)
        self._engine: AttentionEngine | None = None
        self._rising = Rising()
        self._usual = SizeTimes()
        self._steps = self._interrupted = self._epoch = 0
        self._preemptions = self._queries = self._hits = 0
        self._idle = self._ended = self._layers = self._hops = 0.0
        self._busy = False
        self._exporter = Exporter(config.host, 0, {"/metrics": registry_page(families.registry)})

    @property
    def address(self) -> str:
        """ "host:port" as bound."""
        return self._exporter.address

    def watch(self, engine: AttentionEngine) -> None:
        """Begin to report on an engine, before its first step."""
        self._count_preemptions(engine.core.scheduler)
        self._engine = engine
        engine.observer = self.stepped

    def close(self) -> None:
        """Stop serving; idempotent."""
        self._exporter.close()

    # -- the engine's thread ---------------------------------------------------------------------

    def stepped(self, began: float, outputs: dict[int, Any]) -> None:
        """Note a step that has just ended.

        Args:
            began: ``time.perf_counter()`` when it began.
            outputs: what it returned, ``EngineCoreOutputs`` by client.
        """
        ended = time.perf_counter()
        engine = self._engine
        if engine is None or engine.client.stats.steps == self._steps:
            return  # nothing was scheduled
        client = engine.client
        stats = client.stats
        self._steps = stats.steps
        seconds = ended - began
        wait = min(stats.idle_seconds - self._idle, seconds)
        self._idle = stats.idle_seconds
        tokens, load, epoch = client.step_tokens, client.step_load, client.epoch
        layers, hops = stats.compute_seconds, stats.wait_seconds
        self._rows.add(
            tokens,
            seconds,
            seconds - wait,
            wait,
            client.lanes,
            ended,
            load[0],
            load[1],
            tokens - load[1],
            load[2],
            epoch,
            stats.interrupted != self._interrupted,
            layers - self._layers,
            hops - self._hops,
        )
        self._layers, self._hops = layers, hops
        for message in outputs.values():
            if message.scheduler_stats is not None:
                cache = message.scheduler_stats.prefix_cache_stats
                self._queries += cache.queries
                self._hits += cache.hits
        if stats.interrupted != self._interrupted:  # it waited for a table; no commit's fault
            self._interrupted = stats.interrupted
        elif epoch != self._epoch and self._epoch:
            gap = began - self._ended if self._busy else 0.0
            self._pause.observe(max(0.0, gap + seconds - self._usual(tokens)))
        else:
            self._usual.add(tokens, seconds)
        self._epoch = epoch
        self._busy = bool(engine.core.scheduler.running)
        self._ended = ended

    def _count_preemptions(self, scheduler: Any) -> None:
        """vLLM keeps no total of them, so the scheduler's method is wrapped; its calls are rare."""
        preempt = scheduler._preempt_request

        def counting(*args: Any, **kwargs: Any) -> Any:
            self._preemptions += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counting

    # -- whoever asks ----------------------------------------------------------------------------

    def _log_rows(self, rows: np.ndarray) -> None:
        self._log.take(rows[:, _ORDER])

    def telemetry(self, since: int = 0) -> dict[str, Any]:
        """Steps above ``since`` (see ``StepLog.since``), and what the engine is at now.

        Returns:
            besides: ``role``, ``epoch``, ``running`` and ``waiting`` requests, ``slots``,
            ``kv_usage`` (0 to 1), ``kv_tokens`` (capacity), ``layer_count``; totals since the
            start: ``preemptions``, ``prefix_queries``, ``prefix_hits``, and ``wire``: ``frames``,
            ``tokens`` in them, ``hops`` that were timed, ``bytes_out``, ``bytes_back``,
            ``seconds`` by stage (see ``transport.hops``).
        """
        self._rows.flush()
        facts = {"role": "attention", **self._log.since(since)}
        engine = self._engine
        if engine is None:
            nothing = dict.fromkeys(("epoch", "running", "waiting", "slots", "layer_count"), 0)
            return facts | nothing | {"kv_usage": 0.0, "kv_tokens": 0, "wire": None}
        running, waiting = engine.core.scheduler.get_request_counts()
        table = engine.client.table
        return facts | {
            "epoch": engine.client.epoch,
            "running": running,
            "waiting": waiting,
            "slots": engine.vllm_config.scheduler_config.max_num_seqs,
            "kv_usage": engine.core.scheduler.kv_cache_manager.usage,
            "kv_tokens": _capacity(engine),
            "layer_count": len(table.layers) if table is not None else 0,
            "preemptions": self._preemptions,
            "prefix_queries": self._queries,
            "prefix_hits": self._hits,
            "wire": _wire(engine),
        }

    # -- the exporter's threads ------------------------------------------------------------------

    def _read_steps(self) -> Iterator[Reading]:
        for name, (counts, total) in zip(_STEP, self._rows.read(), strict=True):
            yield Distribution(name, (), counts, total)

    def _read_engine(self) -> Iterator[Reading]:
        if self._engine is None:
            return
        scheduler = self._engine.core.scheduler
        running, waiting = scheduler.get_request_counts()
        usage = scheduler.kv_cache_manager.usage
        capacity = _capacity(self._engine)
        values = (
            running,
            waiting,
            usage,
            usage * capacity,
            capacity,
            self._preemptions,
            self._queries,
            self._hits,
        )
        for name, value in zip(_ENGINE, values, strict=True):
            yield Value(name, (), value)

    def _read_client(self) -> Iterator[Reading]:
        if self._engine is None:
            return
        client = self._engine.client
        yield Value("afd_attention_steps_repeated_total", (), client.stats.interrupted)
        yield Value("afd_transport_resends_total", (), client.stats.resent)
        yield Value("afd_table_epoch", (), client.epoch)
        for kind, count in client.adoption.fault_counts.items():
            yield Value("afd_faults_total", (kind,), count)

    def _read_wire(self) -> Iterator[Reading]:
        if self._engine is None:
            return
        stages = {stage: ([0] * (len(_HOP_EDGES_US) + 1), 0.0) for stage in STAGES}
        for traffic in self._engine.endpoint.traffic():
            name, hops = traffic.transport, traffic.hops.stages
            for direction, frames, nbytes, stage in (
                ("dispatch", traffic.dispatch_frames, traffic.dispatch_bytes, "wire_out"),
                ("combine", traffic.combine_frames, traffic.combine_bytes, "wire_back"),
            ):
                labels = (direction, name)
                seconds = self._rising((stage, name), hops[stage].sum_us * 1e-6)
                yield Value("afd_transport_frames_total", labels, frames)
                yield Value("afd_transport_bytes_total", labels, nbytes)
                yield Value("afd_transport_seconds_total", labels, seconds)
            for stage, histogram in hops.items():
                counts, total = stages[stage]
                added = histogram.counts_below(_HOP_EDGES_US)
                counts = [a + b for a, b in zip(counts, added, strict=True)]
                stages[stage] = counts, total + histogram.sum_us * 1e-6
        for stage, (counts, total) in stages.items():
            # What the split between the two ways guesses may be corrected later (``hops``).
            total = self._rising((stage,), total)
            yield Distribution("afd_transport_hop_seconds", (stage,), counts, total)


def _capacity(engine: AttentionEngine) -> int:
    """Context tokens that the KV cache holds."""
    cache = engine.vllm_config.cache_config
    return cache.kv_cache_size_tokens or cache.num_gpu_blocks * cache.block_size


def _wire(engine: AttentionEngine) -> dict[str, Any]:
    """Totals of all wires of an engine's endpoint; see ``AttentionMetrics.telemetry``."""
    stats = engine.client.stats
    totals: dict[str, Any] = {"frames": stats.frames, "tokens": stats.tokens}
    totals |= {"hops": 0, "bytes_out": 0, "bytes_back": 0}
    seconds = dict.fromkeys(STAGES, 0.0)
    for traffic in engine.endpoint.traffic():
        totals["hops"] += traffic.hops.stages["total"].count
        totals["bytes_out"] += traffic.dispatch_bytes
        totals["bytes_back"] += traffic.combine_bytes
        for stage, histogram in traffic.hops.stages.items():
            seconds[stage] += histogram.sum_us * 1e-6
    return {**totals, "seconds": seconds}
