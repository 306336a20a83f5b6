"""Requests arrive by a scenario, and the numbers of actors are fixed, or a policy's to choose.

One deployment of emulated devices with a budget of 8. The policies go first, so that nothing of
what the controller knows comes from the runs that it is compared with; then every split of the
budget stays as it is for a whole run. All runs get the same requests at the same moments, start
from idle, and prefix caches are their own. Policies begin at the middle split, and the time until
they have left it counts.

Figures of the summary: ``attainment`` is the share of requests answered within both targets, of the
worse policy; ``changes`` the most changes of the membership that a policy made in one phase;
``lost`` the requests that failed under the policies. Judged by ``attainment``, drawn by
``slo_report``.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import attainment as judging
from benchmarks import slo_model, slo_report
from benchmarks.attainment import Change, Targets
from benchmarks.load import Request
from benchmarks.open_load import OpenLoad
from benchmarks.report import make_report, write_report
from benchmarks.scenarios import Scenario, prompt_ids
from benchmarks.slo_runs import BUDGET, MIDDLE, Run, plan, split_name, summary
from benchmarks.stage import Stage, bench_spec, commit_window, deployment, others_cpu, watched
from cluster.preflight import check_model
from cluster.spec import ClusterSpec
from cluster.status import ChangeReport

NAME = "bench-slo"
SLOTS = 128
ROOM = 1024
"""Tokens of a request, prompt and answer, that the embedded model is set up for."""

TARGETS = Targets(ttft_s=4.0, tpot_s=1.1)

DEVICES = (
    "emulate.attention={a_s: 3.7e-5, b_s: 26.0e-3}",
    "emulate.ffn={a_s: 1.32e-3, b_s: 4.0e-3}",
    "emulate.transfer={a_s: 0.0, b_s: 2.0e-3}",
    "lanes=2",
)
"""Per layer. Chosen in the planner's simulator so that the scenario's phases want different splits,
and so slow that the machine's own work hides behind them."""

SET_UP = (
    "attention.max=7",
    "ffn.max=7",
    f"attention.engine={{max_model_len: {ROOM}, max_num_seqs: {SLOTS}, enforce_eager: true, "
    "kv_cache_memory_bytes: 134217728}",
    # Three copies of each expert: of one copy each, 2 of 8 experts are the share of the busiest of
    # 5, 6 or 7 actors as much as that of 4.
    "ffn.redundant_experts=16",
    "membership.drain_s=8",
    # Queues are what is measured here; nobody is lost because he is slow.
    "membership.silence_s=20",
    "frontend.max_requests=8192",
    "metrics.port=0",
    "autoscaler.mode=on",
    "autoscaler.interval_s=2",
    "autoscaler.window_s=10",
    f"autoscaler.min_total={BUDGET}",
    f"autoscaler.max_total={BUDGET}",
    "autoscaler.max_step=3",
    "autoscaler.cooldown_s=18",
    "autoscaler.shrink_cooldown_s=40",
)
WARM_UP_S = 12.0
SETTLE_S = 4.0
STREAM_INTERVAL = 4
"""Tokens per message after the first: a message per token would take the cores that the devices'
own work needs, and TPOT needs the first and the last."""

STALL_S = 3600.0
"""Who waits in an overload waits to the end: giving up is no failure of the deployment."""

LOOK_S = 0.2
WHOLE_S = 300.0
"""How long the deployment may take to be whole at a split, starting processes included."""


def run(
    scenario: Scenario,
    json_path: Path | None = None,
    png_path: Path | None = None,
    *,
    only: Sequence[str] = (),
    targets: Targets = TARGETS,
    warm_workers: int = 3,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole benchmark; prints tables, writes JSON when a path is given, and the picture.

    Args:
        scenario: see ``scenarios``.
        png_path: by default beside the JSON, else ./slo.png.
        only: see ``plan``.
        overrides: further ``key=value`` of the spec.

    Raises:
        AffluxError: the deployment did not start, or could not be brought to a split.
        ValueError: ``only`` names nothing.
    """
    console = Console()
    runs = plan(only)
    spec = slo_spec(targets, warm_workers, overrides)
    company = others_cpu()

    def report_of(done: Sequence[Run]) -> dict[str, Any]:
        return make_report(
            "slo",
            summary(scenario, done, targets) | {"cpu_in_use_before_percent": company},
            slo_report.details(scenario, done, spec),
        )

    for note in scenario.notes:
        console.print(f"note: {note}", highlight=False)
    with deployment(spec, console) as stage, Progress(console=console, transient=True) as bar:
        task = bar.add_task("warming up", total=len(runs))
        _warm_up(stage, scenario)
        for count, one in enumerate(runs, 1):
            bar.update(task, description=f"{scenario.name}: {one.name}")
            _perform(stage, scenario, one, targets)
            console.print(slo_report.line(one), highlight=False)
            # a whole comparison takes over an hour: what has been measured is not to be lost
            write_report(report_of(runs[:count]), json_path)
            bar.advance(task)
        stage.unclean = any(one.lost or one.refused for one in runs)
    checkpoint = check_model(spec)
    for one in runs:
        with suppress(ValueError):  # somebody's own spec, without emulated devices
            one.simulated = slo_model.repeat(scenario, spec, targets, one, checkpoint)
    report = report_of(runs)
    slo_report.print_runs(report, scenario, runs)
    write_report(report, json_path)
    picture = png_path or (json_path.with_suffix(".png") if json_path else Path("slo.png"))
    slo_report.draw(picture, scenario, runs, targets)
    console.print(f"picture: {picture}", highlight=False)
    return report


def slo_spec(targets: Targets, warm_workers: int, overrides: Sequence[str]) -> ClusterSpec:
    """The deployment: the embedded model on emulated devices, its controller on, its targets."""
    return bench_spec(
        NAME,
        attention=MIDDLE[0],
        ffn=MIDDLE[1],
        warm_workers=warm_workers,
        timeout_s=30.0,
        overrides=(
            *DEVICES,
            *SET_UP,
            f"slo.ttft_s={targets.ttft_s}",
            f"slo.tpot_s={targets.tpot_s}",
            *overrides,
        ),
    )


# -- one run -------------------------------------------------------------------------------------


def _perform(stage: Stage, scenario: Scenario, one: Run, targets: Targets) -> None:
    """Bring the deployment to the run's first split, then send the scenario."""
    from autoscaler import launch

    name = stage.spec.name
    launch.pause(name)
    _bring(stage, one.begin)
    if one.policy:
        launch.set_policy(name, one.name, one.parameters)
    known = max((change.number for change in stage.changes()), default=-1)
    decided = max((report.number for report in launch.decisions(name, limit=1)), default=0)
    with watched(stage) as counts:
        load = _load(stage, scenario)
        try:
            _until(lambda: load.progress().sent > 0, 60.0)
            one.began = time.time() - scenario.asked[0].at
            if one.policy:
                launch.resume(name)
            _until(lambda: time.time() >= one.began + scenario.seconds, math.inf)
            launch.pause(name)  # no load any more is none of the scenario's shifts
            _until(lambda: load.progress().done == len(scenario.asked), one.drain_s)
            load.stop()
            streams = load.streams(60.0)
        finally:
            load.close()
            launch.pause(name)
    one.model = launch.model(name)
    one.outcomes = judging.judge(scenario, streams, targets, one.began)
    one.counts = list(counts)
    seconds = math.ceil(max([scenario.seconds, *(s.ended - one.began for s in streams)]))
    one.rate = [0] * (seconds + 1)
    for stream in streams:
        for at in stream.times:
            one.rate[min(max(0, int(at - one.began)), seconds)] += 1
    changes = [change for change in stage.changes() if change.number > known]
    _note_changes(one, changes)
    if one.policy:
        reports = launch.decisions(name, since=decided, limit=1000)
        one.decisions = [report.model_dump(mode="json") for report in reports]


def _bring(stage: Stage, split: tuple[int, int]) -> None:
    """To a split, whole, with its warm workers, and nothing left of the run before."""
    report = stage.scale(*split)
    if report.phase not in ("done", "noop"):
        raise RuntimeError(f"could not scale to {split_name(split)}: {report.error}")
    if stage.wait_whole(*split, warm=True, timeout_s=WHOLE_S) is None:
        raise RuntimeError(f"{split_name(split)} was not whole, with warm workers, in time")
    time.sleep(SETTLE_S)


def _load(stage: Stage, scenario: Scenario) -> OpenLoad:
    requests = [
        Request(tuple(prompt_ids(asked, _vocabulary(stage.spec))), asked.output, asked.at)
        for asked in scenario.asked
    ]
    # What an earlier run has left in prefix caches is not this run's
    extra = {"cache_salt": uuid.uuid4().hex, "stream_interval": STREAM_INTERVAL}
    return OpenLoad(
        stage.url, stage.spec.served_name, requests, concurrency=1, stall_s=STALL_S, extra=extra
    )


def _warm_up(stage: Stage, scenario: Scenario) -> None:
    """A few seconds of the beginning, so that the first run meets no first times."""
    first = [asked for asked in scenario.asked if asked.at < WARM_UP_S]
    load = _load(stage, Scenario("", tuple(first), scenario.phases[:1], WARM_UP_S))
    try:
        _until(lambda: load.progress().done == len(first), 3 * WARM_UP_S)
        load.stop()
        load.streams(60.0)
    finally:
        load.close()


def _note_changes(one: Run, reports: Sequence[ChangeReport]) -> None:
    """What of the changes came about: those of one membership, one after the other."""
    attention, ffn = one.begin
    for report in sorted(reports, key=lambda report: commit_window(report)[1]):
        if report.phase == "rolled_back":
            one.refused.append(f"{report.text}: {report.error}")
        if report.phase != "done" or report.verb not in ("scale", "flip", "retire"):
            continue
        roles = _roles(report)
        attention += roles[0]
        ffn += roles[1]
        committed = commit_window(report)[1]
        took = committed - report.started_at
        one.changes.append(Change(committed - one.began, attention, ffn, round(took, 3)))


def _roles(report: ChangeReport) -> tuple[int, int]:
    """How many attention and FFN actors more there are by a change; names begin with the role."""

    def balance(role: str) -> int:
        more = sum(name.startswith(role) for name in report.started)
        return more - sum(name.startswith(role) for name in report.retired)

    return balance("attention"), balance("ffn")


def _until(done: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _vocabulary(spec: ClusterSpec) -> int:
    return int(check_model(spec).config["vocab_size"])
