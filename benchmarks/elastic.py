"""Requests stream while the numbers of attention and FFN actors change on a script.

1A1F -> 2A1F -> 2A3F -> 1A2F -> 3A1F -> 1A1F, then a flip each way, then cycles up and down if asked
for. Tokens (float32) are compared one by one with an undisturbed run of the same requests on the
same deployment before anything changed.

Figures of the summary: ``commit_pause_ms`` is the worst commit's pause (``gaps.commit_pause``: the
longest token gap of any running stream from the begin of the commit to 0.2 s after its end, less
the median token gap of all streams around it); ``flip_s`` is the slower flip, from the command to
the end of the commit, which is when the actor serves in its new role.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.gaps import commit_pause, failures, figures, token_gaps, until, wrong_tokens
from benchmarks.leaks import Snapshot, growth, snapshot
from benchmarks.load import Stream, make_requests
from benchmarks.plain_ray import make_and_end
from benchmarks.report import (
    make_report,
    print_failures,
    print_summary,
    print_table,
    write_report,
)
from benchmarks.stage import Stage, bench_spec, commit_window, deployment, others_cpu
from benchmarks.timeline import Count, Mark, draw
from cluster.status import ChangeReport, Role

NAME = "bench-elastic"
START = (1, 1)
SCRIPT = ((2, 1), (2, 3), (1, 2), (3, 1), (1, 1))
FLIP_AT = (2, 2)
FLIPS: tuple[tuple[Role, Role, tuple[int, int]], ...] = (
    ("ffn", "attention", (3, 1)),
    ("attention", "ffn", (2, 2)),
)
CYCLE = ((2, 2), (1, 1))
LEAKS = ("rss_mib", "files", "threads", "shm", "groups")
SETTLE_S = 2.0
MANAGER_PROCESS = "ray::Manager"
OWNER_PROCESS = "ray::Owner"


@dataclass
class Step:
    """One command and what it did. Times are Unix seconds."""

    text: str
    counts: tuple[int, int]
    asked: float
    report: ChangeReport

    @property
    def done(self) -> bool:
        """It was committed and released."""
        return self.report.phase == "done"

    @property
    def is_flip(self) -> bool:
        """It turns an actor into one of the other role."""
        return self.report.verb == "flip"

    @property
    def committed_at(self) -> float:
        """When what was asked for began to serve."""
        return commit_window(self.report)[1]

    @property
    def commit_s(self) -> float:
        """Length of the commit in seconds."""
        return self.report.seconds.get("commit", 0.0)

    @property
    def took(self) -> float:
        """Seconds from the command until what was asked for served."""
        return self.committed_at - self.asked


@dataclass
class Run:
    """What a run leaves behind.

    ``snapshots``: one per cycle; ``still``: likewise, as long, under the same load without changes;
    ``plain``: likewise, while Ray alone makes and ends as many actors; ``script_ended``: when
    cycles began, in Unix seconds; ``company``: the machine's CPU time in use before it all, in
    percent.
    """

    steps: list[Step] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    reference: list[Stream] = field(default_factory=list)
    still: list[Snapshot] = field(default_factory=list)
    plain: list[Snapshot] = field(default_factory=list)
    script_ended: float = 0.0
    company: float = 0.0

    def committed(self) -> list[Step]:
        """The steps that changed what serves."""
        return [step for step in self.steps if step.done]


def run(
    json_path: Path | None = None,
    png_path: Path | None = None,
    *,
    concurrency: int = 8,
    hold_s: float = 4.0,
    warm_workers: int = 1,
    cycles: int = 0,
    seed: int = 0,
    emulate: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole benchmark; prints tables, writes JSON when a path is given, and the picture.

    Args:
        png_path: the timeline; by default beside the JSON, else ./elastic.png.
        concurrency: streams at a time.
        hold_s: seconds that each ratio serves before the next command.
        cycles: up and down this often at the end, watching what grows.
        seed: draws the requests.
        emulate: use emulated devices, so that a ratio shows in the rate.
        overrides: further ``key=value`` of the spec.

    Raises:
        AffluxError: the deployment did not start.
    """
    console = Console()
    spec = bench_spec(
        NAME,
        attention=START[0],
        ffn=START[1],
        warm_workers=warm_workers,
        emulate=emulate,
        overrides=overrides,
    )
    done = Run(company=others_cpu())
    with deployment(spec, console) as stage:
        _perform(stage, done, console, concurrency, hold_s, cycles, seed)
        summary = _summary(done, emulated=spec.emulate is not None)
        stage.unclean = not summary["clean"]
    report = make_report("elastic", summary, _details(done))
    _print(report, done)
    write_report(report, json_path)
    picture = png_path or (json_path.with_suffix(".png") if json_path else Path("elastic.png"))
    draw(
        picture,
        "afflux bench elastic: the ratio changes while requests stream",
        until(done.streams, done.script_ended),
        _counts(done),
        _marks(done),
        emulated=spec.emulate is not None,
    )
    console.print(f"timeline: {picture}", highlight=False)
    return report


def _perform(
    stage: Stage,
    done: Run,
    console: Console,
    concurrency: int,
    hold_s: float,
    cycles: int,
    seed: int,
) -> None:
    requests = make_requests(seed, 4 * concurrency)
    total = 1 + len(SCRIPT) + 1 + len(FLIPS) + 2 * cycles + (cycles - cycles // 3)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("undisturbed run", total=total)

        def next_is(text: str) -> None:
            bar.update(task, advance=1, description=text)

        stage.wait_whole(*START, warm=True)
        done.reference = stage.reference(requests, concurrency)
        load = stage.load(requests, concurrency=concurrency)
        try:
            next_is("load")
            load.wait_done(concurrency, 120.0)
            for counts in SCRIPT:
                _scale(stage, done, counts, console)
                next_is(done.steps[-1].text)
                time.sleep(hold_s)
            _scale(stage, done, FLIP_AT, console)
            for role, other, after in FLIPS:
                next_is(f"flip to {other}")
                _flip(stage, done, role, other, after, console)
                time.sleep(hold_s)
            done.script_ended = time.time()
            _cycle(stage, done, cycles, next_is)
            next_is("last streams")
            load.stop()
            done.streams = load.streams()
        finally:
            load.close()


def _scale(
    stage: Stage, done: Run, counts: tuple[int, int], console: Console | None = None
) -> None:
    asked = time.time()
    done.steps.append(Step(_ratio(counts), counts, asked, stage.scale(*counts)))
    if console is not None:
        _tell(console, done.steps[-1])


def _flip(
    stage: Stage,
    done: Run,
    role: Role,
    other: Role,
    after: tuple[int, int],
    console: Console,
) -> None:
    """Flip the newest actor of ``role``, once the warm workers that the spec asks for are there."""
    stage.wait_whole(*done.steps[-1].counts, warm=True)
    time.sleep(SETTLE_S)
    victim = stage.names(role)[-1]
    asked = time.time()
    done.steps.append(Step(f"flip to {_ratio(after)}", after, asked, stage.flip(victim, other)))
    _tell(console, done.steps[-1])


def _cycle(stage: Stage, done: Run, cycles: int, next_is: Callable[[str], None]) -> None:
    """Up and down; a snapshot after each time down. The first third is not looked at: caches and
    pools fill then. Afterwards as long without changes, and as many actors by Ray alone."""
    if not cycles:
        return
    up, down = CYCLE
    _scale(stage, done, down)
    began = time.monotonic()
    for number in range(cycles):
        next_is(f"up and down {number + 1} of {cycles}")
        _scale(stage, done, up)
        _scale(stage, done, down)
        stage.wait_whole(*down, warm=True)
        if number >= cycles // 3:
            done.snapshots.append(snapshot(stage.processes(), NAME))

    each = (time.monotonic() - began) / cycles
    for number in range(len(done.snapshots)):
        next_is(f"no changes, {number + 1} of {len(done.snapshots)}")
        time.sleep(each)
        done.still.append(snapshot(stage.processes(), NAME))

    def look(number: int) -> None:
        next_is(f"Ray alone, {number + 1} of {cycles}")
        if number >= cycles // 3:
            done.plain.append(snapshot(stage.processes(), NAME))

    make_and_end(cycles, sum(up) - sum(down), look)


def _growth(done: Run) -> dict[str, Any] | None:
    """``leaks.growth``, with what each process grew by in as long a time without changes, and while
    Ray alone made as many actors; the manager's, which makes actors, is compared with the owner of
    those. ``series_mib``: resident memory of each process after each cycle."""
    if len(done.snapshots) < 2:
        return None
    grown = growth(done.snapshots)
    plain = growth(done.plain)["processes"] if len(done.plain) > 1 else []
    still = growth(done.still)["processes"] if len(done.still) > 1 else []
    by_time = {row["pid"]: row["grown_mib"] for row in still}
    by_pid = {row["pid"]: row["grown_mib"] for row in plain}
    owner = next((row["grown_mib"] for row in plain if row["name"].startswith(OWNER_PROCESS)), None)
    for row in grown["processes"]:
        alone = owner if row["name"].startswith(MANAGER_PROCESS) else by_pid.get(row["pid"])
        row["no_changes_mib"] = by_time.get(row["pid"])
        row["ray_alone_mib"] = alone
    pids = {row["pid"]: f"{row['name']} {row['pid']}" for row in grown["processes"]}
    grown["series_mib"] = {
        name: [
            round(process.rss_bytes / 2**20, 1)
            for snap in done.snapshots
            for key, process in snap.processes.items()
            if key[0] == pid
        ]
        for pid, name in pids.items()
    }
    return grown


# -- what came of it -------------------------------------------------------------------------------


def _summary(done: Run, *, emulated: bool) -> dict[str, Any]:
    found = figures(done.streams, done.reference)
    pauses = [pause for _, pause in _pauses(done)]
    script = done.steps[: len(SCRIPT)]
    flips = [step for step in done.steps if step.is_flip]
    summary: dict[str, Any] = {
        **found,
        "commit_pause_ms": round(max(pauses) * 1e3, 1) if pauses else None,
        "commit_pause_p50_ms": round(median(pauses) * 1e3, 1) if pauses else None,
        "commit_ms": round(max((s.commit_s for s in done.steps), default=0.0) * 1e3, 1),
        "flip_s": round(max((step.took for step in flips if step.done), default=0.0), 2) or None,
        "steps": len(done.steps),
        "steps_done": sum(step.done for step in done.steps),
        "script": " -> ".join(_ratio(counts) for counts in (START, *(s.counts for s in script))),
        "undisturbed_gap_p99_s": figures(done.reference, done.reference)["gap_p99_s"],
        "undisturbed_gap_max_s": figures(done.reference, done.reference)["gap_max_s"],
        "cpu_in_use_before_percent": done.company,
        "dtype": "float32",
        "compared": "token by token with an undisturbed run",
        "emulation": emulated,
    }
    if (grown := _growth(done)) is not None:
        summary |= {f"grown_{key}": grown[key] for key in LEAKS}
        ours = [row["grown_mib"] - (row["ray_alone_mib"] or 0.0) for row in grown["processes"]]
        summary["grown_beside_ray_mib"] = round(max(ours, default=0.0), 2)
    summary["clean"] = (
        not found["failed"] and not found["wrong_tokens"] and all(s.done for s in done.steps)
    )
    return summary


def _pauses(done: Run) -> list[tuple[Step, float]]:
    """Every commit that streams ran through, with its pause in seconds."""
    gaps = token_gaps(done.streams)
    return [(step, commit_pause(gaps, *commit_window(step.report))) for step in done.committed()]


def _details(done: Run) -> dict[str, Any]:
    wrong = wrong_tokens(done.streams, done.reference)
    pauses = {id(step): pause for step, pause in _pauses(done)}
    return {
        "steps": [
            {
                **step.report.model_dump(mode="json"),
                "text": step.text,
                "took_s": round(step.took, 3),
                "pause_ms": round(pauses[id(step)] * 1e3, 1) if id(step) in pauses else None,
                "asked": step.asked,
            }
            for step in done.steps
        ],
        "failures": failures(done.streams),
        "wrong": [asdict(done.streams[index]) for index in wrong[:20]],
        "undisturbed": figures(done.reference, done.reference),
        "growth": _growth(done),
    }


def _print(report: dict[str, Any], done: Run) -> None:
    rows = [
        (
            row["text"],
            row["phase"],
            row["epoch"],
            row["took_s"],
            row["seconds"].get("prepare"),
            row["seconds"].get("commit", 0.0) * 1e3,
            row["pause_ms"],
            row["moved_experts"],
        )
        for row in report["details"]["steps"][: len(SCRIPT) + 1 + len(FLIPS)]
    ]
    columns = ("step", "phase", "epoch", "serves s", "prepare s", "commit ms", "pause ms", "moved")
    print_table("elastic: changes under load", columns, rows)
    if len(done.snapshots) > 1:
        processes = report["details"]["growth"]["processes"]
        print_table(
            f"elastic: growth over {len(done.snapshots)} cycles",
            (
                "process",
                "pid",
                "MiB",
                "grown MiB",
                "files",
                "threads",
                "no changes: grown MiB",
                "Ray alone: grown MiB",
            ),
            [tuple(row.values()) for row in processes],
        )
    print_failures(report["details"]["failures"])
    print_summary(report)


def _counts(done: Run) -> list[Count]:
    return [Count(0.0, *START), *(Count(s.committed_at, *s.counts) for s in done.committed())]


def _marks(done: Run) -> list[Mark]:
    return [
        Mark("change", step.committed_at, step.text, begin=step.asked, end=step.committed_at)
        for step in done.committed()
        if step.committed_at <= done.script_ended
    ]


def _ratio(counts: tuple[int, int]) -> str:
    return f"{counts[0]}A{counts[1]}F"


def _tell(console: Console, step: Step) -> None:
    error = f": {step.report.error}" if step.report.error else f" in {step.took:.2f} s"
    console.print(f"{step.text:<16} {step.report.phase}{error}", highlight=False)
