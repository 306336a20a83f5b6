"""What metrics cost: decode throughput with them on and scraped, against the same with them off.

One attention and one FFN process on a core each, as in ``decode``. Runs come in pairs, each half
first in turn, because a machine's speed drifts by more than what is measured; what counts is the
median of the pairs' ratios. On: a row per step and per ride, a scrape of both processes every
second. Off: no rows and no scrapes; the plain counters that readers look at are kept in both.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import threading
import tracemalloc
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.engine import AttentionConfig
from actors.ffn import FFNConfig
from actors.metrics.attention import AttentionMetrics
from actors.metrics.config import MetricsConfig
from actors.metrics.rows import Rows
from benchmarks.decode import PROMPT_TOKENS, engine_args, number_format
from benchmarks.models import BALANCED, make_model
from benchmarks.offline import Run, SplitEngine
from benchmarks.processes import Remote
from benchmarks.report import make_report, print_summary, print_table, write_report
from benchmarks.samples import prompts
from benchmarks.split import FFNHost, FFNPool

BATCH = 64
TOKENS = 120
PAIRS = 5
SCRAPE_S = 1.0
TARGET = 0.98
"""Least ratio that is asked for."""
_METRICS = MetricsConfig("bench")
_ATTENTION, _FFN = "attention-0", "ffn1-0"


class MeteredEngine(SplitEngine):
    """The attention side, whose metrics can be switched."""

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self._metrics = AttentionMetrics(_METRICS, config.name)
        self._metrics.watch(self.engine)

    def address(self) -> str:
        return self._metrics.address

    def meter(self, on: bool) -> None:
        """Note the steps that follow, or don't."""
        self.engine.observer = self._metrics.stepped if on else None

    def allocations(self, asked: list[list[int]], tokens: int) -> dict[str, float]:
        """What noting a step allocates, over a run: blocks that stay, and bytes at any moment."""
        note = self._metrics.stepped
        blocks: list[int] = []
        peaks: list[int] = []

        def count(began: float, outputs: dict[int, Any]) -> None:
            before = sys.getallocatedblocks()
            note(began, outputs)
            blocks.append(sys.getallocatedblocks() - before)

        def trace(began: float, outputs: dict[int, Any]) -> None:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            note(began, outputs)
            peaks.append(tracemalloc.get_traced_memory()[1] - before)
            tracemalloc.stop()

        for observer in (count, trace):
            self.engine.observer = observer
            self.generate(asked, tokens)
        self.meter(True)
        return {"blocks": statistics.median(blocks), "bytes": statistics.median(peaks)}


class MeteredHost(FFNHost):
    """The FFN side, whose metrics can be switched."""

    _rows: Rows | None = None

    def start(self, config: FFNConfig) -> dict[str, Any]:
        info = super().start(config)
        self._rows = self._worker(config.name).rides
        return info

    def _worker(self, name: str) -> Any:
        return self.actors[name]._worker

    def meter(self, name: str, on: bool) -> None:
        """Note the rides that follow, or don't."""
        self._worker(name).rides = self._rows if on else None


class _Scraper:
    """Reads pages every second, as Prometheus would, and throws them away."""

    def __init__(self, addresses: Sequence[str]):
        self._urls = [f"http://{address}/metrics" for address in addresses]
        self.scrapes = 0
        self.bytes = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._read_until, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _read_until(self, done: threading.Event) -> None:
        while True:
            self.bytes = sum(len(self._read(url)) for url in self._urls)
            self.scrapes += 1
            if done.wait(SCRAPE_S):
                return

    def _read(self, url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=10) as page:
            return page.read()


def decode_rate(run: Run, batch: int) -> float:
    """Tokens/s over the steps in which the whole batch decoded.

    A mean and not a median, because a scrape costs few steps, and these are what is measured.
    """
    steps = zip(run.step_seconds, run.step_tokens, strict=True)
    full = [seconds for seconds, tokens in steps if tokens == batch][1:]
    return batch * len(full) / sum(full)


def pairs(measure: Callable[[bool], float], count: int) -> list[dict[str, float]]:
    """Rates with metrics on and off, side by side; who goes first alternates."""
    rows = []
    for number in range(count):
        first = number % 2 == 0
        rate = {on: measure(on) for on in (first, not first)}
        rows.append({"on": rate[True], "off": rate[False], "ratio": rate[True] / rate[False]})
    return rows


class _Sides:
    """Both processes of one model, introduced to each other."""

    def __init__(self, model: str):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            raise ValueError(f"the benchmark needs 2 cores, this process may use {len(cores)}")
        dtype = number_format()
        config = AttentionConfig(_ATTENTION, model, dtype, engine_args(eager=True))
        self.host = Remote(MeteredHost, cores=cores[1:2])
        self.engine = Remote(functools.partial(MeteredEngine, config), cores=cores[:1]).ready()
        self.pool = FFNPool([self.host], model, 1, 1, dtype=dtype, metrics=_METRICS)
        self.pool.connect(self.engine, _ATTENTION)
        self.engine.adopt(self.pool.table)

    def meter(self, on: bool) -> None:
        self.engine.meter(on)
        self.host.meter(_FFN, on)

    def addresses(self) -> list[str]:
        return [self.engine.address(), self.pool.info()[0]["metrics"]]

    def close(self) -> None:
        self.engine.kill()
        self.host.kill()


def run(
    json_path: Path | None = None,
    *,
    batch: int = BATCH,
    tokens: int = TOKENS,
    count: int = PAIRS,
) -> dict[str, Any]:
    """The whole benchmark; prints tables, writes JSON when a path is given.

    Args:
        batch: requests decoded together. tokens: of each. count: pairs of runs.
    """
    with tempfile.TemporaryDirectory(prefix="afflux-metrics-") as folder:
        sides = _Sides(str(make_model(Path(folder) / "model", BALANCED)))
        try:
            scraper = _Scraper(sides.addresses())
            asked = prompts(batch, PROMPT_TOKENS, 0)

            def measure(on: bool) -> float:
                sides.meter(on)
                if not on:
                    return decode_rate(sides.engine.generate(asked, tokens), batch)
                with scraper.running():
                    return decode_rate(sides.engine.generate(asked, tokens), batch)

            sides.engine.generate(asked, tokens)  # warm: lanes settle
            rows = pairs(measure, count)
            allocations = sides.engine.allocations(asked, 20)
        finally:
            sides.close()
    ratio = statistics.median(row["ratio"] for row in rows)
    summary = {
        "throughput_ratio": round(ratio, 4),
        "overhead_percent": round(100 * (1 - ratio), 2),
        "within_target": ratio >= TARGET,
        "allocations_per_step": allocations["blocks"],
        "transient_bytes_per_step": allocations["bytes"],
        "tokens_per_second_on": round(statistics.median(row["on"] for row in rows), 1),
        "tokens_per_second_off": round(statistics.median(row["off"] for row in rows), 1),
        "batch": batch,
        "pairs": count,
        "scrapes": scraper.scrapes,
        "scraped_bytes": scraper.bytes,
    }
    report = make_report("metrics", summary, {"pairs": rows})
    print_table(
        "decode tokens/s with metrics on and off",
        ("pair", "on", "off", "ratio"),
        [(n, row["on"], row["off"], f"{row['ratio']:.4f}") for n, row in enumerate(rows, 1)],
    )
    print_summary(report)
    write_report(report, json_path)
    return report
