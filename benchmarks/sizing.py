"""Theory against simulation over a grid of workloads: where is the best ratio, and what is lost?

Every workload is one family of lengths (fixed, geometric, lognormal, correlated, two-humped, and
the Azure and Mooncake traces where they are), one batch and one set of latencies. The simulated
side is the closed loop with barrier of arXiv 2601.21351, replayed by ``planner.lockstep``, at
numbers of attention workers around the optimum; its top is compared with the barrier-aware theory
for as many lanes and with the skewness of the lengths. Beside it stand the theory with normal
contexts, the papers' (which leaves the round trip of a lane out), the mean field, and the naive
load mu_P + mu_D: how much throughput each would lose. A few workloads are run in the full simulator
as well, to show that the replay is the same thing.

The simulated top has an error of its own, which is large where the top is flat: runs with other
lengths are added until the standard error of the mean of their tops is small, or there are many.
Batches of 16, of which the theory's normal loads are no fair description, are counted apart.

So that whole numbers don't hide what is compared, r is made from A attention and F > 1 FFN workers
where it is small, F chosen for about 30 attention workers at the optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import make_report, print_summary, print_table, write_report
from planner.latency import PRESETS, Latencies, Linear
from planner.lengths import Empirical, Fixed, Geometric, LogNormal
from planner.loads import Closed
from planner.lockstep import Replay, replay_closed_loop
from planner.moments import Moments
from planner.pairs import Independent, LogNormalJoint
from planner.peaks import Peak, peak_of, value_at
from planner.points import points
from planner.reproduce import Table, mapping, reproduce_cases
from planner.sensitivity import naive_cost
from planner.setting import Setting
from planner.simulator import Cluster, simulate
from planner.sizing import optimum
from planner.skewness import load_skewness
from planner.traces import read_trace
from planner.workload import Workload

WITHIN = 0.10
BATCHES = (16, 32, 64, 256, 512)
SMALL = 16
"""A batch up to this is reported beside the grid, not in it."""
TRACES = {"azure": "azure23_conv.csv", "mooncake": "mooncake_conv.jsonl"}

_WORKERS = 30  # attention workers at the optimum: whole numbers then are 3 % apart
_SURE = 0.025  # relative standard error of the simulated optimum that is good enough
_BLOCKS = 2, 10  # runs with other lengths, least and most
_FLAT = 0.005  # a loss below this is no reason to call a ratio wrong
_SKEWED = 0.35  # skewness of a lane's context beyond which it is no normal
_CHECKED_IN_SIMULATOR = 6
_SLOTS = 512  # small batches vary more: they get more replicas

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Times:
    """A set of latencies, relative to a mean attention time of 1000.

    Args:
        name: for people.
        ratio: where the attention time meets the FFN time.
        b_attention, b_ffn: shares of the attention time that don't depend on the load.
        transfer: transfer time at that ratio, as a share of the attention time; half of it fixed.
        transfer_load: what it grows with.
    """

    name: str
    ratio: float
    b_attention: float
    b_ffn: float
    transfer: float
    transfer_load: Any


TIMES = (
    Times("paper", 0, 0, 0, 0, "attention"),
    Times("few attention", 2, 0.2, 0.3, 0.05, "ffn"),
    Times("fixed attention", 5, 0.5, 0.2, 0.1, "attention"),
    Times("context-bound", 10, 0.05, 0.1, 0.05, "ffn"),
    Times("many attention", 20, 0.2, 0.05, 0.1, "attention"),
    Times("very many", 35, 0.1, 0.3, 0.02, "ffn"),
    Times("weight-bound FFN, slow network", 6, 0.1, 0.7, 0.3, "ffn"),
)


@dataclass(frozen=True)
class Item:
    """One workload of the grid.

    Args:
        family: of lengths.
        workload, batch, lanes, ffn, latencies: what is simulated.
        times: name of the set of latencies.
        seed: of the lengths drawn.
        check: run it in the full simulator too.
    """

    family: str
    workload: Workload
    batch: int
    lanes: int
    ffn: int
    latencies: Latencies
    times: str
    seed: int
    check: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}, B = {self.batch}, {self.lanes} lanes, {self.times}"


@dataclass(frozen=True)
class Outcome:
    """What came of one workload; ratios are A/F, shares 0..1.

    Attributes:
        name, family, workload, batch, lanes, ffn, times: the item.
        theta, naive_load: mean context of a slot, and mu_P + mu_D, in tokens.
        spread: standard deviation of a lane's attention time over its mean.
        skewness: of a lane's context.
        theory: barrier-aware r* with the lanes' round trip and the skewness of the context.
        gaussian: the same with a normal context, as in the papers.
        idealised: the papers' barrier-aware r*, without the round trip.
        mean_field: mean-field r* without it.
        simulated: at the top of the simulated curve.
        uncertain: standard error of it, relative; None after a single run (quick).
        error: simulated over theory, less one.
        loss: simulated throughput lost by taking the theory's ratio.
        gaussian_loss, idealised_loss, mean_field_loss: the same for theirs.
        naive: r* of the same theory with mu_P + mu_D for theta.
        naive_loss: simulated throughput lost by it.
        step_error: simulated over expected time of a step at the theory's ratio, less one.
        simulator_error: step time of the full simulator over the replay's, less one; None: not run.
        bound_by: the slowest stage at the theory's ratio.
        within, gaussian_within: whether the error is at most 10 %.
        why: what is different where it is not.
    """

    name: str
    family: str
    workload: str
    batch: int
    lanes: int
    ffn: int
    times: str
    theta: float
    naive_load: float
    spread: float
    skewness: float
    theory: float
    gaussian: float
    idealised: float
    mean_field: float
    simulated: float
    uncertain: float | None
    error: float
    loss: float
    gaussian_loss: float
    idealised_loss: float
    mean_field_loss: float
    naive: float
    naive_loss: float
    step_error: float
    simulator_error: float | None
    bound_by: str
    within: bool
    gaussian_within: bool
    why: str


@dataclass(frozen=True)
class GridResult:
    """All outcomes.

    Attributes:
        outcomes: one per workload.
        traces: which recorded traces took part.
    """

    outcomes: tuple[Outcome, ...]
    traces: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Flat figures."""
        rows = [o for o in self.outcomes if o.batch > SMALL]
        small = [o for o in self.outcomes if o.batch <= SMALL]
        checked = [abs(o.simulator_error) for o in rows if o.simulator_error is not None]
        traced = [o.naive_loss for o in rows if o.family in TRACES]
        return {
            "grid_size": len(rows),
            "grid_within_10pct": sum(o.within for o in rows) / len(rows),
            "grid_within_10pct_gaussian": sum(o.gaussian_within for o in rows) / len(rows),
            "small_batches": len(small),
            "small_batches_within_10pct": sum(o.within for o in small) / max(1, len(small)),
            "small_batches_worst_loss": max((o.loss for o in small), default=0.0),
            "grid_worst_uncertainty": max((o.uncertain or 0.0) for o in rows),
            "grid_worst_error": max(abs(o.error) for o in rows),
            "grid_median_error": float(np.median([abs(o.error) for o in rows])),
            "grid_worst_loss": max(o.loss for o in rows),
            "grid_median_loss": float(np.median([o.loss for o in rows])),
            "grid_worst_step_error": max(abs(o.step_error) for o in rows),
            "grid_traces": ", ".join(self.traces) or "none",
            "gaussian_worst_loss": max(o.gaussian_loss for o in rows),
            "idealised_worst_loss": max(o.idealised_loss for o in rows),
            "mean_field_worst_loss": max(o.mean_field_loss for o in rows),
            "naive_worst_loss": max(o.naive_loss for o in rows),
            "naive_worst_loss_traces": max(traced) if traced else None,
            "replay_to_simulator": max(checked) if checked else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"traces": list(self.traces), "outcomes": [asdict(o) for o in self.outcomes]}

    def tables(self) -> list[Table]:
        """(title, columns, rows) for a terminal."""
        columns = (
            "", "n", "within 10 %", "median", "worst", "lost", "no round trip", "mean field",
        )  # fmt: skip
        found: list[Table] = []
        for title, key in (
            ("lengths", lambda o: o.family),
            ("latencies", lambda o: o.times),
            ("batch", lambda o: f"B = {o.batch}"),
            ("lanes", lambda o: f"{o.lanes} lanes"),
        ):
            there = [o for o in self.outcomes if title == "batch" or o.batch > SMALL]
            names = list(dict.fromkeys(map(key, there)))
            rows = [_row(name, [o for o in there if key(o) == name]) for name in names]
            found.append((f"Theory and simulation by {title}", columns, rows))
        naive = [
            _naive_row(f, self.outcomes) for f in dict.fromkeys(o.family for o in self.outcomes)
        ]
        found.append(
            (
                "Sizing with mu_P + mu_D: simulated throughput lost",
                ("lengths", "theta", "mu_P + mu_D", "quotient", "median", "worst", "worst at"),
                naive,
            )
        )
        outside = [o for o in self.outcomes if not o.within and o.batch > SMALL]
        outside.sort(key=lambda o: -abs(o.error))
        rows = [
            (o.name, f"{o.theory:.2f}", f"{o.simulated:.2f}", _percent(o.uncertain or 0.0),
             _percent(o.error),
             _percent(o.loss), o.why)
            for o in outside
        ]  # fmt: skip
        found.append(
            (
                "Outside of 10 %, and why",
                ("workload", "theory", "simulated", "+-", "error", "throughput lost", "why"),
                rows or [("none", *[""] * 6)],
            )
        )
        return found


def grid(
    quick: bool = False,
    jobs: int | None = None,
    seed: int = 0,
    traces: Path | None = None,
    progress: Progress | None = None,
) -> GridResult:
    """Theory and simulation for every workload of the grid.

    Args:
        quick: every fifth workload and shorter runs, to see it work.
        jobs: processes; None: one per core.
        seed: of the lengths.
        traces: folder of the recorded traces; None: ../shared/data of the checkout. Where they are
            missing, correlated lognormals of similar means stand in for them.
        progress: told what is done and the share of all that is, 0..1.

    Raises:
        PlannerError: a trace that can't be read, or jobs below 1.
    """
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" if traces is None else traces
    items, used = grid_items(folder, seed)
    if quick:
        items = items[::5]
    items = _with_checks(items)
    outcomes = []
    with mapping(jobs) as run:
        for outcome in run(_Run(quick), items):
            outcomes.append(outcome)
            if progress is not None:
                progress(outcome.name, len(outcomes) / len(items))
    return GridResult(tuple(outcomes), used)


def grid_items(traces: Path, seed: int) -> tuple[list[Item], tuple[str, ...]]:
    """The workloads of the grid, and the traces that were found."""
    families, used = _families(traces)
    items = []
    for f, (family, variants) in enumerate(families.items()):
        for b, batch in enumerate(BATCHES):
            for t, times in enumerate(TIMES):
                # neighbours in the grid differ in lanes and moments, so that all meet
                workload = variants[(b + t) % len(variants)]
                lanes = 2 + (f + b + t) % 2
                ffn, latencies = _latencies(times, workload.moments(), batch)
                items.append(Item(family, workload, batch, lanes, ffn, latencies, times.name, seed))
    return items, used


def run(
    json_path: Path | str | None,
    png_path: Path | str | None = None,
    quick: bool = False,
    jobs: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The published cases and the grid: prints tables, writes JSON and PNG, returns the report."""

    def part(start: float, share: float) -> Progress | None:
        if progress is None:
            return None
        return lambda text, done: progress(text, start + share * done)

    cases = reproduce_cases(part(0.0, 0.4), seed, jobs, quick)
    found = grid(quick, jobs, seed, progress=part(0.4, 0.6))
    for title, columns, rows in [*cases.tables(), *found.tables()]:
        print_table(title, columns, rows)
    report = make_report(
        "sizing",
        {"quick": quick, "seed": seed, **cases.summary(), **found.summary()},
        {"reproduction": cases.to_dict(), "grid": found.to_dict()},
    )
    print_summary(report)
    write_report(report, json_path)
    if png_path is not None:
        draw(found, png_path)
    return report


def draw(found: GridResult, path: Path | str) -> None:
    """Simulated against theoretical ratio, and what each rule loses; small batches too."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    theory = np.array([o.theory for o in found.outcomes])
    ends = np.array([theory.min() * 0.8, theory.max() * 1.25])
    left.fill_between(ends, ends * 0.9, ends * 1.1, color="#e6e6e6", label="within 10 %")
    for lanes, colour in ((2, "#2f6db5"), (3, "#d9772b")):
        rows = [o for o in found.outcomes if o.lanes == lanes]
        left.scatter(
            [o.theory for o in rows], [o.simulated for o in rows], s=12, color=colour,
            label=f"{lanes} lanes", alpha=0.75, linewidths=0,
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="best A/F by the barrier-aware theory")
    for axis in (left.xaxis, left.yaxis):
        axis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100]))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    left.set(ylabel="best A/F in the simulation", title=f"{len(found.outcomes)} workloads")
    left.legend(frameon=False)
    shares = np.arange(1, len(found.outcomes) + 1) / len(found.outcomes)
    for label, name in (
        ("barrier, lanes, skewness", "loss"),
        ("barrier, lanes", "gaussian_loss"),
        ("barrier, no round trip", "idealised_loss"),
        ("mean field", "mean_field_loss"),
        ("mu_P + mu_D", "naive_loss"),
    ):
        losses = np.sort([getattr(o, name) for o in found.outcomes])
        right.step(100 * losses, shares, where="post", label=label)
    right.set(xlabel="simulated throughput lost, %", ylabel="share of workloads")
    right.set(title="What each rule loses", xlim=(0, None), ylim=(0, 1.01))
    right.legend(frameon=False, loc="lower right")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# -- the grid's workloads ------------------------------------------------------------------------


def _families(folder: Path) -> tuple[dict[str, list[Workload]], tuple[str, ...]]:
    wide = LogNormal(300, 0.6)
    families: dict[str, list[Workload]] = {
        "fixed": [
            Independent(Fixed(200), Fixed(100), "P 200, D 100"),
            Independent(Fixed(1000), Fixed(400), "P 1000, D 400"),
        ],
        "geometric": [
            Independent(Fixed(100), Geometric(500), "P 100, D ~500"),
            Independent(Fixed(1000), Geometric(100), "P 1000, D ~100"),
            Independent(Geometric(500), Geometric(500), "P ~500, D ~500"),
        ],
        "lognormal": [
            Independent(LogNormal(1155, 1.1), LogNormal(211, 0.8), "P 1155, D 211"),
            Independent(wide, LogNormal(400, 1.2), "P 300, D 400"),
        ],
        "correlated": [
            LogNormalJoint(LogNormal(800, 1.0), LogNormal(250, 0.9), 0.6, "P 800, D 250, 0.6"),
            LogNormalJoint(wide, LogNormal(300, 0.7), 0.9, "P 300, D 300, 0.9"),
        ],
        "anticorrelated": [
            LogNormalJoint(LogNormal(800, 1.0), LogNormal(250, 0.9), -0.6, "P 800, D 250, -0.6"),
            LogNormalJoint(wide, LogNormal(300, 0.7), -0.9, "P 300, D 300, -0.9"),
        ],
        "two-humped": [
            Independent(Empirical((100, 4000), (8, 2)), Geometric(200), "P 100 or 4000, D ~200"),
            Independent(Fixed(300), Empirical((20, 800), (7, 3)), "P 300, D 20 or 800"),
        ],
    }
    stand_ins: dict[str, Workload] = {
        "azure": LogNormalJoint(LogNormal(1155, 1.1), LogNormal(211, 0.9), -0.3, "stand-in"),
        "mooncake": LogNormalJoint(LogNormal(12035, 0.9), LogNormal(343, 0.8), 0.1, "stand-in"),
    }
    used = []
    for name, file in TRACES.items():
        if (folder / file).exists():
            families[name] = [read_trace(folder / file).workload()]
            used.append(file)
        else:
            families[f"{name}, stand-in"] = [stand_ins[name]]
    return families, tuple(used)


def _latencies(times: Times, moments: Moments, batch: int) -> tuple[int, Latencies]:
    """F and the latencies; the transfer's slope is for a system F times as large."""
    paper = replace(PRESETS["deepseek-v3-npu"], transfer_load="attention")
    if not times.ratio:
        ratio = optimum(Setting(moments, paper, batch), "mean-field").ratio
        if 1.5 <= ratio <= 45:
            return max(1, round(_WORKERS / ratio)), paper
        # beyond what is worth simulating: the same with experts that are slower or faster
        slope = (float(paper.attention(batch * moments.theta)) - 100.0) / (10 * batch)
        return 3, replace(paper, ffn=Linear(max(slope, 1.0 / batch), 100.0))
    ffn = max(1, round(_WORKERS / times.ratio))
    load = batch * times.ratio if times.transfer_load == "ffn" else batch
    copies = ffn if times.transfer_load == "ffn" else 1
    half = 500.0 * times.transfer
    return ffn, Latencies(
        attention=Linear(
            1000.0 * (1 - times.b_attention) / (batch * moments.theta), 1000.0 * times.b_attention
        ),
        ffn=Linear(1000.0 * (1 - times.b_ffn) / (times.ratio * batch), 1000.0 * times.b_ffn),
        transfer=Linear(half / (load * copies), half),
        unit="cycles",
        source=times.name,
        transfer_load=times.transfer_load,
    )


def _with_checks(items: Sequence[Item]) -> list[Item]:
    """Marks some small workloads, far apart in the grid, for the full simulator."""
    small = [i for i, item in enumerate(items) if item.batch <= 64]
    every = max(1, len(small) // _CHECKED_IN_SIMULATOR)
    chosen = set(small[::every][:_CHECKED_IN_SIMULATOR])
    return [replace(item, check=i in chosen) for i, item in enumerate(items)]


# -- one workload --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """``_outcome`` with the effort, to be sent to other processes."""

    quick: bool

    def __call__(self, item: Item) -> Outcome:
        return _outcome(item, self.quick)


def _outcome(item: Item, quick: bool) -> Outcome:
    moments = item.workload.moments()
    lopsided = load_skewness(item.workload)
    setting = Setting(moments, item.latencies, item.batch, item.lanes, skewness=lopsided)
    normal = replace(setting, skewness=0.0)
    papers = replace(normal, lanes=None)
    theory = optimum(setting, ffn=item.ffn)
    idealised = optimum(papers, ffn=item.ffn).ratio
    mean_field = optimum(papers, "mean-field", item.ffn).ratio
    naive = naive_cost(setting, ffn=item.ffn).naive_ratio
    gaussian = optimum(normal, ffn=item.ffn).ratio
    steps = _steps(item, quick)
    rules = (theory.ratio, idealised, mean_field, naive, gaussian)
    replicas = 1 if quick else max(1, _SLOTS // item.batch)
    found, top, uncertain = _simulated(item, steps, rules, replicas, 1 if quick else _BLOCKS[1])
    losses = [max(0.0, 1 - value_at(found.ratio, found.per_instance, r) / top.value) for r in rules]
    expected = points(setting, found.attention.astype(np.float64), item.ffn).tau
    near = int(np.argmin(np.abs(found.ratio - theory.ratio)))
    attention = item.latencies.attention
    mean_time = float(attention(setting.tokens))
    error = top.ratio / theory.ratio - 1
    outcome = Outcome(
        name=item.name,
        family=item.family,
        workload=Path(item.workload.name).name,  # a trace's is its path
        batch=item.batch,
        lanes=item.lanes,
        ffn=item.ffn,
        times=item.times,
        theta=moments.theta,
        naive_load=moments.naive,
        spread=attention.slope(setting.tokens) * setting.tokens_spread / mean_time,
        skewness=lopsided / float(np.sqrt(item.batch)),
        theory=theory.ratio,
        gaussian=gaussian,
        idealised=idealised,
        mean_field=mean_field,
        simulated=top.ratio,
        uncertain=uncertain,
        error=error,
        loss=losses[0],
        gaussian_loss=losses[4],
        idealised_loss=losses[1],
        mean_field_loss=losses[2],
        naive=naive,
        naive_loss=losses[3],
        step_error=float(found.tau[near] / expected[near]) - 1,
        simulator_error=_simulator_error(item, found, near) if item.check else None,
        bound_by=theory.point.bound_by,
        within=bool(abs(error) <= WITHIN),
        gaussian_within=bool(abs(top.ratio / gaussian - 1) <= WITHIN),
        why="",
    )
    return outcome if outcome.within else replace(outcome, why=_why(outcome))


def _simulated(
    item: Item, steps: int, rules: Sequence[float], replicas: int, most: int
) -> tuple[Replay, Peak, float | None]:
    """The simulated curve around its top, the top, and how sure that is (relative)."""
    found = _around_top(item, steps, rules, replicas)
    blocks = [found]
    while len(blocks) < most:
        tops = np.array([peak_of(b.ratio, b.per_instance).ratio for b in blocks])
        error = _standard_error(tops)
        if len(blocks) >= _BLOCKS[0] and error is not None and error <= _SURE:
            break
        blocks.append(_replay(item, found.attention, steps, replicas, len(blocks)))
    tops = np.array([peak_of(b.ratio, b.per_instance).ratio for b in blocks])
    mean = _mean(blocks)
    return mean, peak_of(mean.ratio, mean.per_instance), _standard_error(tops)


def _standard_error(tops: Any) -> float | None:
    if len(tops) < 2:
        return None
    return float(np.std(tops, ddof=1) / np.sqrt(len(tops)) / np.mean(tops))


def _mean(blocks: Sequence[Replay]) -> Replay:
    """Throughputs averaged; the rest follows or is averaged."""

    def mean(name: str) -> Any:
        return np.mean([getattr(block, name) for block in blocks], axis=0)

    return replace(
        blocks[0],
        tau=1.0 / np.mean([1.0 / block.tau for block in blocks], axis=0),
        throughput=mean("throughput"),
        per_instance=mean("per_instance"),
        idle_attention=mean("idle_attention"),
        idle_ffn=mean("idle_ffn"),
        steps=sum(block.steps for block in blocks),
    )


def _replay(item: Item, attention: Any, steps: int, replicas: int, block: int = 0) -> Replay:
    return replay_closed_loop(
        item.workload,
        item.latencies,
        batch=item.batch,
        attention=attention,
        ffn=item.ffn,
        lanes=item.lanes,
        steps=steps,
        replicas=replicas,
        seed=item.seed + (block << 16),
    )


def _around_top(item: Item, steps: int, rules: Sequence[float], replicas: int) -> Replay:
    """The simulated curve around its top; wider where the top is at an end of it."""
    low, high = 0.5 * rules[0] * item.ffn, 1.7 * rules[0] * item.ffn
    for _ in range(3):
        numbers = np.unique(np.round(np.geomspace(max(1.0, low), max(4.0, high), 40)))
        extra = [max(1.0, round(min(r * item.ffn, 3 * high))) for r in rules]
        attention = np.unique(np.append(numbers, extra)).astype(np.int64)
        found = _replay(item, attention, steps, replicas)
        top = peak_of(found.ratio, found.per_instance)
        if top.inside or top.highest * item.ffn <= 1:
            break
        low, high = low / 2, high * 2
    return found


def _steps(item: Item, quick: bool) -> int:
    """How long to simulate: many times what a slot's request stays, as a random step finds it."""
    rng = np.random.default_rng(item.seed)
    output = np.asarray(item.workload.sample(rng, 1 << 16)[1], dtype=np.float64)
    stay = float(np.sum(output**2) / np.sum(output))
    return int(np.clip((4 if quick else 6) * stay, 800, 1500 if quick else 3000))


def _simulator_error(item: Item, found: Replay, at: int) -> float:
    """Step time of the full simulator over the replay's at one number of workers, less one."""
    attention = int(found.attention[at])
    cluster = Cluster(item.latencies, attention, item.ffn, batch=item.batch, lanes=item.lanes)
    stay = max(1.0, item.workload.mean_output)
    steps = max(200.0, 6 * stay)
    load = Closed(item.workload, None, stationary=True)
    until = float(found.tau[at]) * item.lanes * steps
    run = simulate(cluster, load, seed=item.seed + 1, until=until)
    return float(run.step_time / item.lanes / found.tau[at]) - 1


def _why(outcome: Outcome) -> str:
    """The likeliest reason that theory and simulation differ."""
    reasons = []
    if outcome.uncertain and 2 * outcome.uncertain > WITHIN:
        reasons.append(f"the simulated optimum is known to {_percent(outcome.uncertain)} only")
    if abs(outcome.skewness) > _SKEWED:
        reasons.append(f"a lane's context isn't normal: skewness {outcome.skewness:.2f}")
    if abs(outcome.step_error) > 0.01:
        reasons.append(f"step time {_percent(outcome.step_error)} off")
    if outcome.loss < _FLAT:
        reasons.append(f"flat top: {_percent(outcome.loss)} lost")
    return "; ".join(reasons) or f"bound by {outcome.bound_by}"


# -- tables --------------------------------------------------------------------------------------


def _row(name: str, rows: Sequence[Outcome]) -> tuple[Any, ...]:
    """Errors of the optimum, then the most throughput lost by three forms of the theory."""
    return (
        name,
        len(rows),
        _percent(sum(o.within for o in rows) / len(rows)),
        _percent(float(np.median([abs(o.error) for o in rows]))),
        _percent(max((o.error for o in rows), key=abs)),
        _percent(max(o.loss for o in rows)),
        _percent(max(o.idealised_loss for o in rows)),
        _percent(max(o.mean_field_loss for o in rows)),
    )


def _naive_row(family: str, outcomes: Sequence[Outcome]) -> tuple[Any, ...]:
    rows = [o for o in outcomes if o.family == family]
    worst = max(rows, key=lambda o: o.naive_loss)
    return (
        family,
        f"{worst.theta:,.0f}",
        f"{worst.naive_load:,.0f}",
        f"{worst.theta / worst.naive_load:.2f}",
        _percent(float(np.median([o.naive_loss for o in rows]))),
        _percent(worst.naive_loss),
        f"{worst.times}, B = {worst.batch}",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
