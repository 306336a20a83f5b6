"""Real client, wire and worker with toy kernels: what each side's metrics say of what happened."""

import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from actors.errors import FrameError
from actors.experts_client import ExpertsClient
from actors.ffn import FFNWorker
from actors.lanes import LaneChooser
from actors.metrics import catalogue
from actors.metrics.attention import AttentionMetrics
from actors.metrics.config import MetricsConfig
from actors.metrics.ffn import FFNMetrics
from actors.telemetry import RIDE_COLUMNS, STEP_COLUMNS
from actors.transport.endpoint import Endpoint
from actors.transport.hops import STAGES
from tests.actors.holders import DIGEST, GEOMETRY, question, table

pytestmark = pytest.mark.timeout(120)

LAYERS = 2


class ToyShard:
    """Answers zeros after a while; expert 3 exists nowhere."""

    num_experts = 4
    experts = dict.fromkeys(range(LAYERS), (0, 1, 2))
    allocated_bytes = 4096

    def __init__(self, compute_s: float):
        self.compute_s = compute_s

    def warm_up(self):
        """Nothing to warm."""

    def compute(self, layer, x, ids, weights, rows, out=None):
        if (ids == 3).any():
            raise FrameError("no expert 3 here", code="unknown_expert")
        time.sleep(self.compute_s)
        return torch.zeros_like(x) if out is None else out.zero_()


class Scheduler:
    """What is read of vLLM's."""

    def __init__(self):
        self.running = [1, 2]
        self.kv_cache_manager = SimpleNamespace(usage=0.25)

    def get_request_counts(self):
        return len(self.running), 1

    def _preempt_request(self, request, timestamp):
        return f"{request} at {timestamp}"


class Pair:
    """An attention side without vLLM, and an FFN worker."""

    def __init__(self, compute_s: float = 0.002, expert_tokens: bool = False):
        config = MetricsConfig("tiny", expert_tokens=expert_tokens)
        self.endpoint = Endpoint("attention-0", GEOMETRY, DIGEST)
        self.client = ExpertsClient(
            self.endpoint, LaneChooser(None), max_tokens=16, timeout=30.0, wait_s=30.0
        )
        self.engine = SimpleNamespace(
            client=self.client,
            endpoint=self.endpoint,
            core=SimpleNamespace(scheduler=Scheduler()),
            vllm_config=SimpleNamespace(
                cache_config=SimpleNamespace(
                    kv_cache_size_tokens=None, num_gpu_blocks=10, block_size=16
                ),
                scheduler_config=SimpleNamespace(max_num_seqs=32),
            ),
            observer=None,
        )
        self.attention = AttentionMetrics(config, "attention-0")
        self.attention.watch(self.engine)  # type: ignore[arg-type]
        self.worker = FFNWorker(
            ToyShard(compute_s),  # type: ignore[arg-type]
            Endpoint("ffn-a", GEOMETRY, DIGEST),
            epoch=1,
        )
        self.ffn = FFNMetrics(config, "ffn-a")
        self.ffn.watch(self.worker)
        self.worker.start()
        self.meet()
        self.use(1)

    def meet(self) -> None:
        theirs = self.worker.endpoint.offer("attention-0")
        self.worker.endpoint.connect(self.endpoint.offer("ffn-a"))
        self.endpoint.connect(theirs)
        self.client.peer_joined("ffn-a")

    def use(self, epoch: int) -> None:
        self.client.adopt(table(epoch, *["a"] * 4, layers=LAYERS))

    def step(self, tokens: int = 12, experts: int = 3, busy_s: float = 0.0) -> None:
        """All layers of one step, as the engine would take it."""
        began = time.perf_counter()
        self.client.step_tokens = tokens
        self.client.step_load = (tokens - 3, tokens - 4, 100 * tokens)
        self.client.begin_step(1)
        self.client.begin_lane(0)
        for layer in range(LAYERS):
            x, weights, ids = question(tokens, experts)
            time.sleep(busy_s)
            self.client.combine(self.client.dispatch(layer, x, weights, ids))
        cache = SimpleNamespace(queries=tokens, hits=tokens // 2)
        stats = SimpleNamespace(prefix_cache_stats=cache)
        quiet = SimpleNamespace(scheduler_stats=None)
        self.engine.observer(began, {0: SimpleNamespace(scheduler_stats=stats), 1: quiet})

    def close(self) -> None:
        self.worker.stop()
        self.worker.endpoint.close()
        self.endpoint.close()
        self.attention.close()
        self.ffn.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def scrape(metrics) -> dict:
    """(name, own label values) -> value, as a reader sees it over HTTP."""
    with urllib.request.urlopen(f"http://{metrics.address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in catalogue.WHO)): (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def series_of(side: catalogue.Side, *opted: str) -> set[str]:
    """Sample names that a side's page shows."""
    names: set[str] = set()
    for metric in catalogue.of(side).values():
        if metric.opt_in and metric.name not in opted:
            continue
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names.update(metric.name + suffix for suffix in suffixes)
    return names


def test_every_metric_has_series_before_anything_happens(pair):
    attention, ffn = scrape(pair.attention), scrape(pair.ffn)
    assert {name for name, *_ in attention} == series_of("attention")
    assert {name for name, *_ in ffn} == series_of("ffn")
    assert not pair.attention.families.missing
    assert not pair.ffn.families.missing
    for direction in catalogue.DIRECTIONS:
        assert attention["afd_transport_bytes_total", direction, "shm"] == 0
        assert attention["afd_transport_frames_total", direction, "auto"] == 0
    for kind in catalogue.FAULTS:
        assert attention["afd_faults_total", kind] == 0
    for reason in ("stale_epoch", "unknown_expert", "digest_mismatch"):
        assert ffn["afd_transport_refusals_total", reason] == 0
    assert attention["afd_transport_hop_seconds_count", "total"] == 0


def test_pages_before_the_engine_is_built():
    config = MetricsConfig("tiny")
    for metrics in (AttentionMetrics(config, "attention-0"), FFNMetrics(config, "ffn-a")):
        try:
            assert scrape(metrics)
        finally:
            metrics.close()


def test_steps(pair):
    for _ in range(5):
        pair.step(tokens=12, busy_s=0.01)
    seen = scrape(pair.attention)
    stats = pair.client.stats
    assert seen["afd_attention_step_seconds_count",] == 5
    assert seen["afd_attention_batch_tokens_sum",] == 60
    assert seen["afd_attention_batch_tokens_bucket", "8.0"] == 0
    assert seen["afd_attention_batch_tokens_bucket", "16.0"] == 5
    assert seen["afd_attention_lanes_sum",] == 5
    step, compute, wait = (
        seen[f"afd_attention_{part}_seconds_sum",] for part in ("step", "compute", "wait")
    )
    assert step == pytest.approx(compute + wait)
    assert compute >= 5 * LAYERS * 0.01
    assert wait >= 5 * LAYERS * 0.002 * 0.9
    assert wait == pytest.approx(stats.idle_seconds)
    assert seen["afd_attention_prefix_cache_queries_total",] == 60
    assert seen["afd_attention_prefix_cache_hits_total",] == 30
    assert seen["afd_attention_requests_running",] == 2
    assert seen["afd_attention_requests_waiting",] == 1
    assert seen["afd_attention_kv_cache_usage_ratio",] == 0.25
    assert seen["afd_attention_kv_cache_tokens",] == 40
    assert seen["afd_attention_kv_cache_capacity_tokens",] == 160
    frames = 5 * LAYERS
    asked = GEOMETRY.layout(12, 24, True).nbytes
    assert seen["afd_transport_frames_total", "dispatch", "shm"] == frames
    assert seen["afd_transport_frames_total", "combine", "shm"] == frames
    assert seen["afd_transport_bytes_total", "dispatch", "shm"] == frames * asked
    answered = frames * GEOMETRY.answer_bytes(12)
    assert seen["afd_transport_bytes_total", "combine", "shm"] == answered
    for stage in STAGES:
        assert seen["afd_transport_hop_seconds_count", stage] == frames
    assert seen["afd_transport_hop_seconds_sum", "compute"] >= frames * 0.002
    out = seen["afd_transport_seconds_total", "dispatch", "shm"]
    assert out == pytest.approx(seen["afd_transport_hop_seconds_sum", "wire_out"])


def test_a_step_without_tokens_is_no_step(pair):
    pair.engine.observer(time.perf_counter(), {})
    assert scrape(pair.attention)["afd_attention_step_seconds_count",] == 0


def test_preemptions_are_counted_where_vllm_makes_them(pair):
    assert pair.engine.core.scheduler._preempt_request("r", timestamp=3) == "r at 3"
    assert scrape(pair.attention)["afd_attention_preemptions_total",] == 1


def test_rides(pair):
    for _ in range(8):
        pair.step(tokens=12)
    pair.worker.stop()  # so that the last ride is counted
    seen = scrape(pair.ffn)
    rides = 8 * LAYERS
    assert seen["afd_ffn_step_seconds_count",] == rides
    assert seen["afd_ffn_batch_tokens_sum",] == rides * 12
    assert seen["afd_ffn_boarding_wait_seconds_count",] == rides
    assert seen["afd_ffn_compute_seconds_sum",] >= rides * 0.002
    assert seen["afd_ffn_step_seconds_sum",] >= seen["afd_ffn_compute_seconds_sum",]
    busy = seen["afd_ffn_busy_seconds_total",]
    assert busy == pytest.approx(seen["afd_ffn_step_seconds_sum",])
    assert seen["afd_ffn_idle_seconds_total",] > 0
    assert seen["afd_ffn_queue_depth",] == 0
    assert seen["afd_ffn_experts",] == 3 * LAYERS
    assert seen["afd_ffn_weight_bytes",] == 4096
    assert 1.0 <= seen["afd_ffn_expert_load_balance_ratio",] <= 3.0
    assert seen["afd_table_epoch",] == 1


def test_refusals_by_reason(pair):
    with pytest.raises(Exception, match="no expert 3 here"):
        pair.step(tokens=16, experts=4)
    pair.worker.min_epoch = 9
    seen = scrape(pair.ffn)
    assert seen["afd_transport_refusals_total", "unknown_expert"] == 1
    assert seen["afd_transport_refusals_total", "stale_epoch"] == 0
    assert seen["afd_table_epoch",] == 9
    assert scrape(pair.attention)["afd_faults_total", "refused"] == 1


def test_expert_tokens_only_when_asked_for():
    pair = Pair(compute_s=0.0, expert_tokens=True)
    try:
        for _ in range(8):  # one of them is a sample
            pair.step(tokens=16)
        seen = scrape(pair.ffn)
        assert {name for name, *_ in seen} == series_of("ffn", "afd_ffn_expert_tokens_total")
        counts = {key[1:]: v for key, v in seen.items() if key[0] == "afd_ffn_expert_tokens_total"}
        assert set(counts) == {(str(e), str(layer)) for layer in range(LAYERS) for e in range(3)}
        assert sum(counts.values()) == 8 * 16 * 2 * LAYERS
    finally:
        pair.close()


def test_what_a_new_table_costs(pair):
    for _ in range(20):
        pair.step()
    assert scrape(pair.attention)["afd_commit_pause_seconds_count",] == 0
    pair.use(2)
    pair.step(busy_s=0.03)
    seen = scrape(pair.attention)
    assert seen["afd_table_epoch",] == 2
    assert seen["afd_commit_pause_seconds_count",] == 1
    # a step that took 60 ms longer; requests wait in between, so the gap counts as well
    assert 0.05 < seen["afd_commit_pause_seconds_sum",] < 5.0
    pair.engine.core.scheduler.running.clear()
    pair.step()
    pair.use(3)
    time.sleep(0.3)
    pair.step()
    pause = scrape(pair.attention)["afd_commit_pause_seconds_sum",]
    assert pause - seen["afd_commit_pause_seconds_sum",] < 0.25  # nobody waited meanwhile


def test_a_peer_that_comes_again_takes_nothing_away(pair):
    pair.step()
    before = scrape(pair.attention)
    pair.endpoint.disconnect("ffn-a")
    assert_not_fallen(before, gone := scrape(pair.attention))
    pair.worker.endpoint.disconnect("attention-0")
    pair.meet()
    pair.step()
    assert_not_fallen(gone, after := scrape(pair.attention))
    assert after["afd_transport_frames_total", "combine", "shm"] == 2 * LAYERS


def assert_not_fallen(before: dict, after: dict) -> None:
    gauges = {m.name for m in catalogue.METRICS if m.kind == "gauge"}
    fallen = [key for key, value in before.items() if key[0] not in gauges and after[key] < value]
    assert not fallen


def test_scrapes_while_steps_run_and_membership_changes(pair):
    """Totals never fall, no scrape fails, and no step is lost to a reader."""
    done = threading.Event()

    def read(metrics) -> int:
        before = scrape(metrics)
        scrapes = 1
        while not done.is_set():
            after = scrape(metrics)
            assert after.keys() >= before.keys()
            assert_not_fallen(before, after)
            before = after
            scrapes += 1
        return scrapes

    def change():
        names = 0
        while not done.is_set():
            names += 1
            pair.endpoint.offer(f"ffn-{names}")
            pair.endpoint.disconnect(f"ffn-{names}")
            pair.use(1 + names)

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read, metrics) for metrics in (pair.attention, pair.ffn)]
        changing = pool.submit(change)
        try:
            for _ in range(150):
                pair.step()
        finally:
            done.set()
        assert all(reader.result() > 2 for reader in readers)
        changing.result()
    assert scrape(pair.attention)["afd_attention_step_seconds_count",] == 150
    assert pair.worker.failure is None


def test_telemetry_of_steps(pair):
    before = pair.attention.telemetry()
    assert before["number"] == 0 and before["wire"]["frames"] == 0
    began = time.perf_counter()
    for _ in range(3):
        pair.step(tokens=12, busy_s=0.01)
    told = pair.attention.telemetry()
    assert (told["number"], told["missed"], told["epoch"]) == (3, 0, 1)
    assert began <= told["began"] <= told["clock"]
    steps = dict(zip(STEP_COLUMNS, told["steps"].T, strict=True))
    assert (steps["at"] <= told["clock"]).all() and (steps["at"] > began).all()
    assert steps["step"] == pytest.approx(steps["compute"] + steps["wait"])
    assert (steps["compute"] >= LAYERS * 0.01).all()
    assert (steps["layers"] >= 0.99 * (LAYERS - 1) * 0.01).all()
    assert (steps["layers"] <= steps["compute"]).all()
    # with one lane there is nothing else to do while a hop is waited for
    assert steps["hops"].sum() == pytest.approx(pair.client.stats.wait_seconds)
    assert (steps["lanes"] == 1).all() and (steps["tokens"] == 12).all()
    assert (steps["requests"] == 9).all() and (steps["decoding"] == 8).all()
    assert (steps["prefill_tokens"] == 4).all() and (steps["context"] == 1200).all()
    assert (steps["epoch"] == 1).all() and not steps["interrupted"].any()
    assert (told["running"], told["waiting"], told["slots"]) == (2, 1, 32)
    assert (told["kv_usage"], told["kv_tokens"], told["layer_count"]) == (0.25, 160, LAYERS)
    assert told["prefix_queries"] == 36
    wire = told["wire"]
    assert wire["frames"] == wire["hops"] == 3 * LAYERS and wire["tokens"] == 36 * LAYERS
    seconds = wire["seconds"]
    parts = sum(value for stage, value in seconds.items() if stage != "total")
    assert parts == pytest.approx(seconds["total"], rel=0.01)
    pair.step()
    later = pair.attention.telemetry(told["number"])
    assert len(later["steps"]) == 1 and later["incarnation"] == told["incarnation"]
    seen = scrape(pair.attention)
    assert seen["afd_attention_step_seconds_count",] == 4, "a scrape does not take from it"


def test_telemetry_of_rides(pair):
    assert pair.ffn.telemetry()["bins"].shape == (0, len(RIDE_COLUMNS))
    for tokens in (8, 8, 64):
        pair.step(tokens=tokens)
    bins = {"tokens": 0}
    while bins["tokens"] < LAYERS * 80:
        time.sleep(0.001)
        told = pair.ffn.telemetry()
        bins = dict(zip(RIDE_COLUMNS, told["bins"].sum(axis=0), strict=True))
    stats = pair.worker.stats
    rides = stats.rides
    # 64 tokens travel in four frames, two at a time; those that are there together ride together
    assert LAYERS * (2 + 2) <= rides <= LAYERS * (2 + 4)
    assert told["rides"] == told["number"] == bins["rides"] == rides
    assert told["tokens"] == bins["tokens"] == stats.tokens == LAYERS * 80
    assert told["pairs"] == bins["pairs"] == stats.pairs
    assert bins["seconds"] == pytest.approx(told["busy_s"])
    assert told["busy_s"] >= rides * 0.002
    assert set(told["experts"]) <= set(range(LAYERS)) and told["queued"] == 0


def test_telemetry_before_there_is_an_engine():
    config = MetricsConfig("tiny")
    for metrics in (AttentionMetrics(config, "attention-0"), FFNMetrics(config, "ffn-a")):
        try:
            told = metrics.telemetry()
            assert told["number"] == 0 and told["began"] is None
        finally:
            metrics.close()
