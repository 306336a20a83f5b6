"""Processes are killed and frozen while requests stream; nothing may be lost.

Two parts, both on 2 attention and 3 FFN actors. *Scenarios*: one kind of loss, several times, under
a steady load with the warm workers ready: an attention actor killed, an FFN actor killed whose
experts have no other holder, the same with another holder, an FFN actor frozen with another holder.
*Random run*: victims of every kind drawn by seed, SIGSTOP included, each as soon as the deployment
is whole again after the one before; a frozen process is woken up once others have taken over, to
see that it does no harm. Tokens (float32) are compared one by one with an undisturbed run of the
same requests on the same deployment.

A frontend's streams end with it by nature, so frontends are hit only when asked for, and the
streams that one carried are counted apart (``cut_by_frontend``).

Figures of the summary, worst of all repetitions, medians beside them (``_p50``): ``gap_*_s``: the
longest token gap that the loss caused (``gaps.gap_after``; after the loss of a manager, in the
random run, the longest until whole again). ``detect_s``: from the signal to the manager's repair.
``recover_s``: from the signal until all actors serve again and no change is under way.
``gap_max_s`` and ``gap_p99_s`` are those of the random run, replacements included.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.disturb import KINDS, Blow, How, Kind, schedule, strike, wake
from benchmarks.gaps import (
    failures,
    figures,
    gap_after,
    longest_between,
    token_gaps,
    wrong_tokens,
)
from benchmarks.load import Request, Stream, make_requests
from benchmarks.report import (
    make_report,
    print_failures,
    print_summary,
    print_table,
    write_report,
)
from benchmarks.stage import Stage, bench_spec, deployment, others_cpu, watched
from benchmarks.timeline import Count, Mark, draw

NAME = "bench-chaos"
COUNTS = (2, 3)
SETTLE_S = 2.0
HARM_S = 2.0
"""How long a frozen process that woke up is given to do harm before the next blow."""

CUT_S = 5.0
"""A stream that a dead frontend carried ends at most this long after it."""


@dataclass(frozen=True)
class Scenario:
    """One kind of loss. ``replicas``: holders of each expert."""

    name: str
    kind: Kind
    how: How
    replicas: int


SCENARIOS = (
    Scenario("attention", "attention", "kill", 1),
    Scenario("ffn_no_replica", "ffn", "kill", 1),
    Scenario("ffn_replica", "ffn", "kill", 2),
    Scenario("ffn_frozen", "ffn", "freeze", 2),
)


@dataclass
class Hit:
    """A blow and what followed; times are Unix seconds, None for what did not happen.

    ``scenario`` is empty in the random run; ``gap`` is filled in when the streams have ended.
    """

    scenario: str
    kind: Kind
    how: How
    victim: str
    at: float
    detected: float | None = None
    recovered: float | None = None
    woken: float | None = None
    gap: float | None = None

    @property
    def detect_s(self) -> float | None:
        """Seconds until the manager knew."""
        return None if self.detected is None else self.detected - self.at

    @property
    def recover_s(self) -> float | None:
        """Seconds until whole again."""
        return None if self.recovered is None else self.recovered - self.at


@dataclass
class Act:
    """A load with what happened under it."""

    streams: list[Stream] = field(default_factory=list)
    reference: list[Stream] = field(default_factory=list)
    hits: list[Hit] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)

    def end(self, streams: list[Stream]) -> None:
        """Take the streams and say what each hit did to them."""
        self.streams = streams
        gaps = token_gaps(streams)
        for hit in self.hits:
            if hit.kind == "manager" and hit.recovered is not None:
                # nothing is to be felt of it at any time, not even of what its successor does
                hit.gap = longest_between(gaps, hit.at, hit.recovered)
            else:
                hit.gap = gap_after(gaps, hit.at)


def run(
    json_path: Path | None = None,
    png_path: Path | None = None,
    *,
    kills: int = 20,
    seed: int = 1,
    requests: int = 300,
    repeats: int = 3,
    concurrency: int = 8,
    warm_workers: int = 1,
    timeout_s: float = 2.0,
    frontend: bool = False,
    emulate: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole benchmark; prints tables, writes JSON when a path is given, and the picture.

    Args:
        png_path: the timeline; by default beside the JSON, else ./chaos.png.
        kills: blows of the random run; 0 leaves it out.
        seed: draws the requests and the victims.
        requests: the random run sends at least so many.
        repeats: repetitions of each scenario; 0 leaves them out.
        timeout_s: the deadline after which a silent FFN actor counts as lost.
        frontend: hit frontends too; there are two of them then.
        emulate: use emulated devices.
        overrides: further ``key=value`` of the spec.

    Raises:
        ValueError: neither kills nor repeats.
        AffluxError: a deployment did not start.
    """
    if kills <= 0 and repeats <= 0:
        raise ValueError("nothing to do: kills and repeats are both 0")
    console = Console()
    company = others_cpu()
    asked = make_requests(seed, 4 * concurrency)
    kinds: tuple[Kind, ...] = (*KINDS, "frontend") if frontend else KINDS
    blows = schedule(kills, seed, kinds)
    acts: list[Act] = []
    random_act: Act | None = None
    emulated = emulate
    for replicas in (1, 2):
        scenarios = [s for s in SCENARIOS if s.replicas == replicas] * (repeats > 0)
        if not scenarios and not (blows and replicas == 1):
            continue
        spec = bench_spec(
            NAME,
            attention=COUNTS[0],
            ffn=COUNTS[1],
            warm_workers=warm_workers,
            min_replicas=replicas,
            timeout_s=timeout_s,
            emulate=emulate,
            overrides=[f"frontend.replicas={1 + frontend}", *overrides],
        )
        emulated = spec.emulate is not None
        with deployment(spec, console) as stage, Progress(console=console, transient=True) as bar:
            play = _Play(stage, console, bar, asked, concurrency)
            if scenarios:
                acts.append(play.scenarios(scenarios, repeats))
            if blows and replicas == 1:
                random_act = play.random(blows, requests)
            stage.unclean = not all(map(_clean, [*acts, *filter(None, [random_act])]))
    summary = _summary(acts, random_act, seed, timeout_s, concurrency, emulated)
    summary["cpu_in_use_before_percent"] = company
    report = make_report("chaos", summary, _details(acts, random_act))
    _print(report)
    write_report(report, json_path)
    picture = png_path or (json_path.with_suffix(".png") if json_path else Path("chaos.png"))
    shown = random_act or acts[0]
    draw(
        picture,
        f"afflux bench chaos: {len(shown.hits)} processes killed or frozen while requests stream",
        shown.streams,
        shown.counts,
        [mark for hit in shown.hits for mark in _marks(hit)],
        emulated=emulated,
    )
    console.print(f"timeline: {picture}", highlight=False)
    return report


class _Play:
    """What is done to one deployment."""

    def __init__(
        self,
        stage: Stage,
        console: Console,
        bar: Progress,
        requests: Sequence[Request],
        concurrency: int,
    ):
        self._stage = stage
        self._console = console
        self._bar = bar
        self._requests = requests
        self._concurrency = concurrency
        self._reference: list[Stream] | None = None

    def scenarios(self, scenarios: Sequence[Scenario], repeats: int) -> Act:
        """Each scenario ``repeats`` times under one steady load."""
        act = Act(reference=self._undisturbed())
        task = self._bar.add_task("scenarios", total=repeats * len(scenarios))
        load = self._stage.load(self._requests, concurrency=self._concurrency)
        try:
            load.wait_done(self._concurrency, 120.0)
            with watched(self._stage) as counts:
                for scenario in scenarios:
                    for turn in range(repeats):
                        self._bar.update(task, description=f"{scenario.name} {turn + 1}")
                        self._stage.wait_whole(*COUNTS, warm=True)
                        time.sleep(SETTLE_S)
                        which = (turn + 0.5) / repeats
                        blow = Blow(turn, scenario.kind, scenario.how, which, 0.0)
                        act.hits.append(self._hit(blow, scenario.name))
                        self._bar.advance(task)
            act.counts = sorted(counts, key=lambda count: count.at)
            load.stop()
            act.end(load.streams())
        finally:
            load.close()
        self._bar.remove_task(task)
        return act

    def random(self, blows: Sequence[Blow], minimum: int) -> Act:
        """All blows in order, over at least ``minimum`` requests."""
        act = Act(reference=self._undisturbed())
        self._stage.wait_whole(*COUNTS)
        task = self._bar.add_task("random", total=len(blows))
        load = self._stage.load(self._requests, concurrency=self._concurrency, minimum=minimum)
        try:
            load.wait_done(self._concurrency, 120.0)
            with watched(self._stage) as counts:
                for blow in blows:
                    self._bar.update(task, description=f"blow {blow.number + 1}")
                    load.wait_done(int(blow.after * minimum), 600.0)
                    act.hits.append(self._hit(blow, ""))
                    self._bar.advance(task)
                    time.sleep(SETTLE_S)
                self._bar.update(task, description="last streams")
                load.stop()
                act.end(load.streams(600.0))
            act.counts = sorted(counts, key=lambda count: count.at)
        finally:
            load.close()
        self._bar.remove_task(task)
        return act

    def _undisturbed(self) -> list[Stream]:
        if self._reference is None:
            task = self._bar.add_task("undisturbed run", total=None)
            self._stage.wait_whole(*COUNTS, warm=True)
            self._reference = self._stage.reference(self._requests, self._concurrency)
            self._bar.remove_task(task)
        return self._reference

    def _hit(self, blow: Blow, scenario: str) -> Hit:
        """Do it, and wait until the deployment is whole again."""
        victim, pid = self._victim(blow)
        hit = Hit(scenario, blow.kind, blow.how, victim, strike(pid, blow.how))
        gone = victim if blow.how != "hiccup" else ""
        if blow.kind == "frontend":
            hit.recovered = self._stage.wait_frontends(self._stage.spec.frontend.replicas, pid)
        else:
            manager = pid if blow.kind == "manager" else None
            hit.recovered = self._stage.wait_whole(*COUNTS, without=gone, manager_not=manager)
        hit.detected = self._repair_after(hit.at)
        if blow.how == "freeze":
            if wake(pid):
                hit.woken = time.time()
            time.sleep(HARM_S)
        self._tell(hit)
        return hit

    def _victim(self, blow: Blow) -> tuple[str, int]:
        """Name and process of what the blow hits."""
        if blow.kind == "frontend":
            pids = {f"frontend {pid}": pid for pid in self._stage.frontends()}
        else:
            pids = self._stage.pids(blow.kind)
        name = blow.pick(list(pids))
        return name, pids[name]

    def _repair_after(self, at: float) -> float | None:
        """When the manager began to mend what happened at ``at``."""
        mending = [c for c in self._stage.changes() if c.verb in ("repair", "replace")]
        return min((c.started_at for c in mending if c.started_at >= at), default=None)

    def _tell(self, hit: Hit) -> None:
        whole = "not whole again" if hit.recover_s is None else f"whole in {hit.recover_s:.1f} s"
        known = "" if hit.detect_s is None else f", known in {hit.detect_s:.3f} s"
        woken = ", woken" if hit.woken else ""
        what = f"{hit.how} {hit.victim}"
        self._console.print(f"{what:<24} {whole}{known}{woken}", highlight=False)


# -- what came of it -------------------------------------------------------------------------------


def _clean(act: Act) -> bool:
    failed = sum(bool(stream.error) for stream in act.streams) - len(_cut(act))
    whole = all(hit.recovered is not None for hit in act.hits)
    return not failed and not wrong_tokens(act.streams, act.reference) and whole


def _cut(act: Act) -> list[Stream]:
    """Streams that a frontend took along when it was killed."""
    ends = [hit.at for hit in act.hits if hit.kind == "frontend"]
    return [
        stream
        for stream in act.streams
        if stream.error and any(stream.sent < at <= stream.ended <= at + CUT_S for at in ends)
    ]


def _summary(
    acts: Sequence[Act],
    random_act: Act | None,
    seed: int,
    timeout_s: float,
    concurrency: int,
    emulated: bool,
) -> dict[str, Any]:
    main = random_act or _joined(acts)
    cut = _cut(main)
    summary: dict[str, Any] = figures(main.streams, main.reference)
    summary["failed"] -= len(cut)
    summary["cut_by_frontend"] = len(cut)
    summary["kills"] = len(random_act.hits) if random_act else 0
    summary["seed"] = seed
    hits = [hit for act in acts for hit in act.hits]
    for scenario in SCENARIOS:
        found = [hit.gap for hit in hits if hit.scenario == scenario.name and hit.gap is not None]
        summary |= _worst(f"gap_{scenario.name}", found)
    managers = [hit.gap for hit in main.hits if hit.kind == "manager" and hit.gap is not None]
    summary |= _worst("gap_manager", managers)
    # From the scenarios, where nothing else is going on; else from the random run
    killed = [h for h in hits or main.hits if h.how == "kill" and h.kind in ("attention", "ffn")]
    frozen = [h for h in hits or main.hits if h.how == "freeze"]
    summary |= _worst("detect", _numbers(hit.detect_s for hit in killed))
    summary |= _worst("detect_frozen", _numbers(hit.detect_s for hit in frozen))
    summary |= _worst("recover", _numbers(hit.recover_s for hit in killed))
    everything = [*hits, *(random_act.hits if random_act else [])]
    summary |= {
        "not_whole_again": sum(hit.recovered is None for hit in everything),
        "scenario_sent": sum(len(act.streams) for act in acts),
        "scenario_failed": sum(bool(s.error) for act in acts for s in act.streams),
        "scenario_wrong_tokens": sum(len(wrong_tokens(a.streams, a.reference)) for a in acts),
        "undisturbed_gap_p99_s": figures(main.reference, main.reference)["gap_p99_s"],
        "undisturbed_gap_max_s": figures(main.reference, main.reference)["gap_max_s"],
        "timeout_s": timeout_s,
        "concurrency": concurrency,
        "dtype": "float32",
        "compared": "token by token with an undisturbed run",
        "emulation": emulated,
    }
    bad = ("failed", "wrong_tokens", "scenario_failed", "scenario_wrong_tokens", "not_whole_again")
    summary["clean"] = not any(summary[key] for key in bad)
    return summary


def _joined(acts: Sequence[Act]) -> Act:
    """Several acts with the same requests as one, to count streams in."""
    return Act(
        streams=[stream for act in acts for stream in act.streams],
        reference=acts[0].reference,
        hits=[hit for act in acts for hit in act.hits],
    )


def _worst(name: str, values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {f"{name}_s": None}
    return {f"{name}_s": round(max(values), 3), f"{name}_p50_s": round(median(values), 3)}


def _numbers(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _details(acts: Sequence[Act], random_act: Act | None) -> dict[str, Any]:
    everything = [*acts, *([random_act] if random_act else [])]
    return {
        "hits": [
            asdict(hit) | {"detect_s": hit.detect_s, "recover_s": hit.recover_s}
            for act in everything
            for hit in act.hits
        ],
        "failures": [row for act in everything for row in failures(act.streams)],
        "wrong": [
            asdict(act.streams[index])
            for act in everything
            for index in wrong_tokens(act.streams, act.reference)[:20]
        ],
        "undisturbed": [figures(act.reference, act.reference) for act in everything],
    }


def _print(report: dict[str, Any]) -> None:
    rows = [
        (
            hit["scenario"] or "random",
            f"{hit['how']} {hit['victim']}",
            hit["gap"],
            hit["detect_s"],
            hit["recover_s"],
            _end_of(hit),
        )
        for hit in report["details"]["hits"]
    ]
    columns = ("part", "what", "gap s", "detected s", "whole s", "frozen one")
    print_table("chaos: every blow", columns, rows)
    print_failures(report["details"]["failures"])
    print_summary(report)


def _end_of(hit: Mapping[str, Any]) -> str:
    """What became of a frozen process."""
    if hit["how"] != "freeze":
        return ""
    return "woke up" if hit["woken"] else "ended"


def _marks(hit: Hit) -> list[Mark]:
    marks = [Mark(hit.how, hit.at, hit.victim, end=hit.recovered)]
    if hit.woken:
        marks.append(Mark("wake", hit.woken, ""))
    return marks
