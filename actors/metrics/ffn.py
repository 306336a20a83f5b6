"""The FFN actor's metrics: one row per ride, and what is read when somebody asks.

The serving loop notes a row after every ride; the rest are totals that worker, shard and endpoint
keep anyway. Not a place for arithmetic on rides: that is the reader's, on the exporter's thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from actors.metrics import catalogue
from actors.metrics.balance import Balance
from actors.metrics.config import MetricsConfig
from actors.metrics.exporter import Exporter, registry_page
from actors.metrics.families import Distribution, Families, Reading, Rising, Value
from actors.metrics.rows import Rows
from actors.telemetry import RideSums

if TYPE_CHECKING:
    from actors.ffn import FFNWorker

_RIDE = ("afd_ffn_step_seconds", "afd_ffn_compute_seconds", "afd_ffn_batch_tokens")
_WORKER = (
    "afd_ffn_boarding_wait_seconds",
    "afd_ffn_busy_seconds_total",
    "afd_ffn_idle_seconds_total",
    "afd_ffn_queue_depth",
    "afd_ffn_experts",
    "afd_ffn_weight_bytes",
    "afd_table_epoch",
    "afd_transport_refusals_total",
)
_BALANCE = "afd_ffn_expert_load_balance_ratio"
_TOKENS = "afd_ffn_expert_tokens_total"
_ENDPOINT_REFUSALS = ("digest_mismatch", "bad_dtype", "bad_frame")
_HOP_EDGES_US = tuple(edge * 1e6 for edge in catalogue.HOP_S)
_SECONDS = 1e-9


class FFNMetrics:
    """Metrics of one FFN actor, served from the moment this is made.

    Args:
        config: see ``MetricsConfig``.
        actor_id: label of every series.

    Raises:
        AffluxError: see ``Exporter``.
    """

    def __init__(self, config: MetricsConfig, actor_id: str):
        who = {"model_name": config.model_name, "role": "ffn", "actor_id": actor_id}
        self.families = families = Families("ffn", who)
        buckets = [catalogue.of("ffn")[name].buckets for name in _RIDE]
        self._sums = RideSums()
        self._rows = Rows(buckets, (_SECONDS, _SECONDS, 1.0, 1.0), extra=1, tap=self._sums.take)
        self._worker: FFNWorker | None = None
        self._rising = Rising()
        self._balance = Balance()
        self._with_tokens = config.expert_tokens
        families.collect_from(self._read_rides, _RIDE)
        families.collect_from(self._read_worker, _WORKER)
        experts = (_BALANCE, _TOKENS) if config.expert_tokens else (_BALANCE,)
        families.collect_from(self._read_experts, experts)
        self._exporter = Exporter(config.host, 0, {"/metrics": registry_page(families.registry)})

    @property
    def address(self) -> str:
        """ "host:port" as bound."""
        return self._exporter.address

    def watch(self, worker: FFNWorker) -> None:
        """Begin to report on a worker, before it starts."""
        self._worker = worker
        worker.rides = self._rows

    def close(self) -> None:
        """Stop serving; idempotent."""
        self._exporter.close()

    def telemetry(self) -> dict[str, Any]:
        """What the worker has done since it began, see ``RideSums.totals``.

        Returns:
            besides: ``role``, ``number`` (= ``rides``), ``frames``, ``tokens``, ``pairs``,
            ``busy_s``, ``idle_s``, ``boarding_s``, ``queued`` frames, ``epoch`` (the oldest that
            is served) and ``experts``: layer -> pairs by expert, about.
        """
        self._rows.flush()
        facts = {"role": "ffn", "number": 0, "missed": 0, **self._sums.totals()}
        worker = self._worker
        if worker is None:
            return facts
        stats = worker.stats
        return facts | {
            "number": stats.rides,
            "rides": stats.rides,
            "frames": stats.frames,
            "tokens": stats.tokens,
            "pairs": stats.pairs,
            "busy_s": worker.busy_s,
            "idle_s": worker.idle_s,
            "boarding_s": stats.boarding_ns / 1e9,
            "queued": worker.queued,
            "epoch": worker.min_epoch,
            "experts": worker.loads(),
        }

    def _read_rides(self) -> Iterator[Reading]:
        for name, (counts, total) in zip(_RIDE, self._rows.read(), strict=True):
            yield Distribution(name, (), counts, total)

    def _read_worker(self) -> Iterator[Reading]:
        worker = self._worker
        if worker is None:
            return
        boarding = worker.boarding()
        yield Distribution(
            "afd_ffn_boarding_wait_seconds",
            (),
            boarding.counts_below(_HOP_EDGES_US),
            boarding.sum_us * 1e-6,
        )
        yield Value("afd_ffn_busy_seconds_total", (), worker.busy_s)
        # A ride counts as busy when it ends, so what looked idle meanwhile has to be taken back.
        yield Value("afd_ffn_idle_seconds_total", (), self._rising("idle", worker.idle_s))
        yield Value("afd_ffn_queue_depth", (), worker.queued)
        held = sum(len(ids) for ids in worker.shard.experts.values())
        yield Value("afd_ffn_experts", (), held)
        yield Value("afd_ffn_weight_bytes", (), worker.shard.allocated_bytes)
        yield Value("afd_table_epoch", (), worker.min_epoch)
        refused = dict(worker.refusals)
        for code in _ENDPOINT_REFUSALS:  # those that never reached the worker
            refused[code] = refused.get(code, 0) + worker.endpoint.counters[code]
        for code, count in refused.items():
            yield Value("afd_transport_refusals_total", (code,), count)

    def _read_experts(self) -> Iterator[Reading]:
        worker = self._worker
        if worker is None:
            return
        loads, experts = worker.loads(), worker.shard.experts
        yield Value(_BALANCE, (), self._balance(loads, experts))
        if self._with_tokens:
            for layer, ids in experts.items():
                counts = loads.get(layer)
                for expert in ids:
                    count = counts[expert] if counts is not None else 0
                    yield Value(_TOKENS, (str(layer), str(expert)), count)
