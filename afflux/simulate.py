"""``afflux simulate``: a deployment of a given size, event by event.

Words in, tables, JSON, pictures and traces out; the numbers come from ``planner.simulator``.
"""

import csv
import itertools
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afflux.planning import (
    OUTPUT,
    Batch,
    JsonFile,
    LatencyName,
    ModelName,
    PngFile,
    TraceFile,
    WorkloadText,
    enough_requests,
    number,
    one,
    print_given,
    read_latencies,
    read_requests,
    require,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from planner.events import Failure, Scale
    from planner.loads import Load
    from planner.points import Point
    from planner.records import RequestRecord, Result, Sink
    from planner.setting import Setting
    from planner.simulator import Cluster
    from planner.traces import Trace
    from planner.workload import Workload

EPILOG = (
    "For example: afflux simulate --attention 8 --ffn 1 --batch 256 --workload "
    "fixed:100,geometric:500 --latency deepseek-v3-npu --png run.png. Times are in the unit of the "
    "latencies. What each number means: docs/planner.md."
)
SCALE_FORM = "AT:ROLE=N, as in 30:attention=+1 or 60:ffn=2"
FAIL_FORM = "AT:ROLE, as in 30:ffn, 30:attention or 30:attention-2"
RECORDED = "recorded"
LOAD, PREFILL, CHANGES = "Load", "Prefill", "Changes and losses"
"""Panels of the help."""
OPEN_REQUESTS = 10_000
COLUMNS = (
    "number",
    "arrival",
    "first_token",
    "finished",
    "prompt",
    "output",
    "worker",
    "replays",
    "ttft",
    "tpot",
)


class Boarding(StrEnum):
    """When an FFN worker starts: with all lanes of one number, or with what has come."""

    barrier = "barrier"
    asynchronous = "asynchronous"


class Sends(StrEnum):
    """Whether a worker computes on while it sends."""

    overlapped = "overlapped"
    blocking = "blocking"


class Prefill(StrEnum):
    """Where prompts are computed."""

    none = "none"
    colocated = "colocated"
    disaggregated = "disaggregated"


def simulate(
    attention: Annotated[int, typer.Option("--attention", min=1, help="Attention workers.")],
    ffn: Annotated[
        int, typer.Option("--ffn", min=1, help="FFN workers, which share the experts.")
    ] = 1,
    batch: Batch = None,
    trace: TraceFile = None,
    workload: WorkloadText = None,
    latency: LatencyName = None,
    model: ModelName = None,
    lanes: Annotated[int, typer.Option(min=1, help="Lanes in flight per attention worker.")] = 2,
    boarding: Annotated[
        Boarding,
        typer.Option(
            help="barrier: the FFN side waits for that lane of every attention worker, as in the "
            "papers; asynchronous: it takes what has come."
        ),
    ] = Boarding.barrier,
    joint_steps: Annotated[
        bool,
        typer.Option(
            "--joint-steps",
            help="The lanes of a worker are one step, as in afflux's actors; with --boarding "
            "asynchronous.",
        ),
    ] = False,
    sends: Annotated[
        Sends, typer.Option(help="Whether a worker computes on while it sends, or waits.")
    ] = Sends.overlapped,
    layers: Annotated[
        int, typer.Option(min=1, help="Rounds to the FFN side per step, each its share of it.")
    ] = 1,
    imbalance: Annotated[
        float, typer.Option(min=1.0, help="Load of the busiest FFN worker over the mean.")
    ] = 1.0,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE|recorded",
            help="Requests per unit of time: Poisson, or the trace at that rate; recorded: the "
            "trace as it was. Without it every free slot is refilled at once.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many arrive; without a rate, how many each attention worker gets.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    until: Annotated[
        float | None, typer.Option(help="Stop at this time.", rich_help_panel=LOAD)
    ] = None,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh",
            help="Without a rate: slots start with new requests, as in the paper's simulator, "
            "instead of in the middle of a long run.",
            rich_help_panel=LOAD,
        ),
    ] = False,
    kv_tokens: Annotated[
        int | None,
        typer.Option(
            "--kv-tokens",
            min=1,
            help="KV cache of an attention worker; with a rate.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(
            "--max-queue",
            min=0,
            help="Requests that wait at most; with a rate.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    prefill: Annotated[
        Prefill,
        typer.Option(
            help="none: contexts are there at once; colocated: chunks ride in decode steps; "
            "disaggregated: workers of their own.",
            rich_help_panel=PREFILL,
        ),
    ] = Prefill.none,
    prefill_workers: Annotated[
        int,
        typer.Option(
            "--prefill-workers",
            min=0,
            help="With --prefill disaggregated.",
            rich_help_panel=PREFILL,
        ),
    ] = 0,
    prefill_chunk: Annotated[
        int,
        typer.Option(
            "--prefill-chunk",
            min=1,
            help="Prompt tokens per step and lane at most.",
            rich_help_panel=PREFILL,
        ),
    ] = 512,
    prefill_time: Annotated[
        float | None,
        typer.Option(
            "--prefill-time",
            help="Per uncached prompt token, instead of --latency's.",
            rich_help_panel=PREFILL,
        ),
    ] = None,
    kv_time: Annotated[
        float,
        typer.Option(
            "--kv-time", help="To move the KV of a token; disaggregated.", rich_help_panel=PREFILL
        ),
    ] = 0.0,
    scale: Annotated[
        list[str] | None,
        typer.Option(
            "--scale",
            metavar="AT:ROLE=N",
            help="30:attention=+1; repeatable.",
            rich_help_panel=CHANGES,
        ),
    ] = None,
    fail: Annotated[
        list[str] | None,
        typer.Option(
            "--fail",
            metavar="AT:ROLE",
            help="30:ffn or 30:attention-2; repeatable.",
            rich_help_panel=CHANGES,
        ),
    ] = None,
    prepare: Annotated[
        float,
        typer.Option(
            help="Time until a started worker can serve; serving goes on.", rich_help_panel=CHANGES
        ),
    ] = 0.0,
    pause: Annotated[
        float, typer.Option(help="For which a change stops everything.", rich_help_panel=CHANGES)
    ] = 0.0,
    drain: Annotated[
        float | None,
        typer.Option(
            help="After which a retiring worker's requests are replayed elsewhere.",
            rich_help_panel=CHANGES,
        ),
    ] = None,
    detect: Annotated[
        float, typer.Option(help="Until a loss is noticed.", rich_help_panel=CHANGES)
    ] = 0.0,
    recover: Annotated[
        float,
        typer.Option(
            help="Until survivors hold a lost FFN worker's experts.", rich_help_panel=CHANGES
        ),
    ] = 0.0,
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed gives the same run.", rich_help_panel=LOAD)
    ] = 0,
    steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps per lane in the picture and the Chrome trace.",
            rich_help_panel=OUTPUT,
        ),
    ] = 6,
    json_file: JsonFile = None,
    png_file: PngFile = None,
    chrome_trace: Annotated[
        Path | None,
        typer.Option(
            "--chrome-trace",
            metavar="FILE",
            dir_okay=False,
            help="A few steps for chrome://tracing or ui.perfetto.dev.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    requests_csv: Annotated[
        Path | None,
        typer.Option(
            "--requests-csv",
            metavar="FILE",
            dir_okay=False,
            help="A row per completed request.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> None:
    """Simulate a deployment: throughput, latencies and idle shares, event by event."""
    try:
        events: list[Scale | Failure] = [parse_scale(text) for text in scale or ()]
        events += [parse_failure(text, detect, recover) for text in fail or ()]
        per_time = parse_rate(rate, trace)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if joint_steps and boarding is Boarding.barrier:
        raise typer.BadParameter(
            "--joint-steps is how workers that don't wait for each other go on: give --boarding "
            "asynchronous too",
            param_hint="'--boarding'",
        )
    if rate is None and (kv_tokens is not None or max_queue is not None):
        raise typer.BadParameter(
            "--kv-tokens and --max-queue limit who is admitted; without a rate all slots are full",
            param_hint="'--rate'",
        )
    lengths, recorded = read_requests(trace, workload)
    latencies = read_latencies(latency, model, None if joint_steps else lanes)
    slots = require(batch, "--batch", "256")

    from rich.console import Console

    from planner.events import ChangeTimes
    from planner.latency import Linear
    from planner.simulator import Cluster

    if prefill_time is not None:
        latencies = replace(latencies, prefill=Linear(prefill_time, 0.0))
    cluster = Cluster(
        latencies,
        attention,
        ffn,
        slots,
        lanes,
        boarding=boarding.value,
        steps="joint" if joint_steps else "independent",
        layers=layers,
        imbalance=imbalance,
        kv_tokens=kv_tokens,
        max_queue=max_queue,
        prefill=prefill.value,
        prefill_chunk=prefill_chunk,
        prefill_workers=prefill_workers,
        kv_transfer=Linear(kv_time, 0.0),
        sends=sends.value,
        changes=ChangeTimes(prepare, prepare, pause, math.inf if drain is None else drain),
    )
    run = _load(cluster, lengths, recorded, per_time, requests, until, fresh)
    console = Console()
    print_given(console, lengths, latencies)
    if prefill is not Prefill.none and latencies.t_prefill(1000.0) == 0:
        typer.echo("note: these latencies have no prefill time; --prefill-time gives one", err=True)
    pictured = png_file is not None or chrome_trace is not None
    result = _simulate(run, events, seed, steps if pictured else 0, requests_csv)
    _finish(console, run, result, json_file, png_file, chrome_trace)


@dataclass(frozen=True)
class Run:
    """What is simulated.

    Attributes:
        closed: every free slot is refilled at once.
        text: the load in words.
        total: requests that will arrive; None: not known.
        until: when the run is cut off; None: when all is done.
        middle: a time at which things are likely to be steady, for the recorded steps.
    """

    cluster: "Cluster"
    workload: "Workload"
    load: "Load"
    closed: bool
    text: str
    total: int | None
    until: float | None
    middle: float


def _load(
    cluster: "Cluster",
    lengths: "Workload",
    recorded: "Trace | None",
    rate: float | str | None,
    requests: int | None,
    until: float | None,
    fresh: bool,
) -> Run:
    """The load, and what can be said of it beforehand."""
    from planner.errors import PlannerError
    from planner.loads import Arrivals, Poisson, replay
    from planner.traces import prefix_reuse

    if rate is None:
        return _closed(cluster, lengths, requests, until, fresh)
    unit = cluster.latencies.unit
    cut = math.inf if until is None else until
    if recorded is None:
        assert isinstance(rate, float)  # parse_rate refuses "recorded" without a trace
        total = OPEN_REQUESTS if requests is None and until is None else requests
        text = f"Poisson arrivals, {number(rate)} requests/{one(unit)}"
        last = min(cut, math.inf if total is None else total / rate)
        poisson = Poisson(lengths, rate, total)
        return Run(cluster, lengths, poisson, False, text, total, until, last / 2)
    if isinstance(rate, str) and unit != "s":
        raise PlannerError(
            f"the times of {recorded.source} are in seconds and the latencies in {unit}: give the "
            f"--rate as a number of requests per {one(unit)}"
        )
    trace = recorded if isinstance(rate, str) else recorded.scaled(rate)
    arrivals = replay(trace, None if trace.blocks is None else prefix_reuse(trace))
    # At a rate that was given in requests per unit, the times are in that unit as well
    load = Arrivals(
        itertools.islice(iter(arrivals.items), requests),
        unit=arrivals.unit if isinstance(rate, str) else unit,
    )
    total = min(requests or len(trace), len(trace))
    text = f"arrivals of the trace, {number(trace.rate)} requests/{one(unit)}"
    last = min(cut, float(trace.arrival[total - 1]))
    return Run(cluster, lengths, load, False, text, total, until, last / 2)


def _closed(
    cluster: "Cluster", lengths: "Workload", requests: int | None, until: float | None, fresh: bool
) -> Run:
    """The papers' load: no arrivals, every free slot is refilled at once."""
    from planner.loads import Closed

    if requests is None and until is None:
        requests = enough_requests(cluster.batch * cluster.lanes, lengths.mean_output)
    count = "" if requests is None else f", {requests:,} requests per attention worker"
    text = f"every free slot refilled at once{count}"
    total = None if requests is None else requests * cluster.attention
    load = Closed(lengths, requests, stationary=not fresh)
    # A few tens of steps after the start the lanes have fallen into turn
    middle = 20 * theory(cluster, lengths).tpot
    return Run(cluster, lengths, load, True, text, total, until, middle)


def theory(cluster: "Cluster", lengths: "Workload") -> "Point":
    """What the barrier-aware form says of a cluster whose slots are always full."""
    from planner.points import point

    return point(setting_of(cluster, lengths), cluster.attention, cluster.ffn)


def setting_of(cluster: "Cluster", lengths: "Workload") -> "Setting":
    """The same as sizing is given it."""
    from planner.setting import Setting
    from planner.skewness import load_skewness

    latencies = cluster.latencies
    return Setting(
        lengths.moments(),
        latencies.folded(cluster.lanes) if latencies.outside(1.0) > 0 else latencies,
        cluster.batch,
        lanes=cluster.lanes,
        imbalance=cluster.imbalance,
        skewness=load_skewness(lengths),
    )


def _simulate(
    run: Run, events: "list[Scale | Failure]", seed: int, steps: int, csv_file: Path | None
) -> "Result":
    """Simulate, with a progress bar; completed requests go to the CSV as they come."""
    from afflux.progress import WorkProgress
    from planner.simulator import simulate as simulate_it

    groups = run.cluster.lanes
    if run.cluster.boarding == "asynchronous":
        groups *= run.cluster.attention
    done = itertools.count(1)
    with _csv_rows(csv_file) as write, WorkProgress() as progress:

        def completed(record: "RequestRecord") -> None:
            write(record)
            count = next(done)
            if count % 256 == 0:
                shares = [count / run.total] if run.total else []
                shares += [record.finished / run.until] if run.until else []
                progress("simulating", min(1.0, max(shares, default=0.0)))

        return simulate_it(
            run.cluster,
            run.load,
            seed=seed,
            until=run.until,
            events=events,
            sink=completed,
            spans=steps * groups,
            spans_since=run.middle,
        )


@contextmanager
def _csv_rows(file: Path | None) -> "Iterator[Sink]":
    """What writes a row per request as it comes, so that a long run needs no memory for them."""
    if file is None:
        yield lambda record: None
        return
    from planner.errors import PlannerError

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise PlannerError(f"cannot write {file}: {error.strerror or error}") from None
    with stream:
        rows = csv.writer(stream)
        rows.writerow(COLUMNS)

        def write(record: "RequestRecord") -> None:
            decode = record.finished - record.first_token
            tpot = decode / (record.output - 1) if record.output > 1 else math.nan
            row = (*record, record.first_token - record.arrival, tpot)
            # Nobody saw the first token of a request that was under way at the start
            rows.writerow("" if cell != cell else cell for cell in row)

        yield write


def _finish(
    console: "Console",
    run: Run,
    result: "Result",
    json_file: Path | None,
    png_file: Path | None,
    chrome_trace: Path | None,
) -> None:
    """Show the result and write what was asked for."""
    from afflux import simulate_report

    simulate_report.show(console, run, result)
    write_json(
        json_file,
        "simulate",
        simulate_report.summary(run, result),
        simulate_report.details(run, result),
    )
    if chrome_trace is not None:
        from planner.spans import to_chrome_trace

        write_text(chrome_trace, json.dumps(to_chrome_trace(result.spans, result.unit)) + "\n")
    if png_file is not None:
        simulate_report.draw(png_file, run, result)


def parse_rate(text: str | None, trace: Path | None) -> float | str | None:
    """Requests per unit of time, ``recorded``, or None for no arrivals at all.

    Raises:
        ValueError: neither; or ``recorded`` without a trace.
    """
    if text is None:
        return None
    if text.strip().lower() == RECORDED:
        if trace is None:
            raise ValueError("--rate recorded needs --trace FILE; give a number of requests")
        return RECORDED
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(
            f"--rate is {text!r}; expected requests per unit of time above 0, or 'recorded'"
        )
    return rate


def parse_scale(text: str) -> "Scale":
    """``30:attention=+1`` (a difference) or ``60:ffn=2`` (a target).

    Raises:
        ValueError: anything else, or what cannot be; the text shows what is expected.
    """
    from planner.events import Scale

    match = re.fullmatch(r"([^:]+):(attention|ffn)=([+-]?)([0-9]+)", text.strip())
    if match is None:
        raise ValueError(f"cannot read --scale {text!r}; expected {SCALE_FORM}")
    at, role, sign, count = match.groups()
    change = int(sign + count)
    time = _time(at, f"--scale {text!r}", SCALE_FORM)
    if role == "attention":
        return Scale(time, attention=change, relative=bool(sign))
    return Scale(time, ffn=change, relative=bool(sign))


def parse_failure(text: str, detect: float = 0.0, recover: float = 0.0) -> "Failure":
    """``30:ffn``, ``30:attention`` (the fullest one) or ``30:attention-2``.

    Raises:
        ValueError: anything else, or what cannot be; the text shows what is expected.
    """
    from planner.events import Failure

    match = re.fullmatch(r"([^:]+):(?:(ffn)|attention(?:-([0-9]+))?)", text.strip())
    if match is None:
        raise ValueError(f"cannot read --fail {text!r}; expected {FAIL_FORM}")
    at, ffn, worker = match.groups()
    time = _time(at, f"--fail {text!r}", FAIL_FORM)
    if ffn:
        return Failure(time, "ffn", detect=detect, recover=recover)
    return Failure(time, "attention", detect=detect, worker=int(worker) if worker else None)


def _time(word: str, given: str, form: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{word!r} in {given} is no time; expected {form}") from None
