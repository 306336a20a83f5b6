"""``Latencies`` from measurements: telemetry rows, or the JSON of the decode benchmark.

Stage times become curves (``regression``). Where whole steps were measured too, the curves are
calibrated on them: each stage by a factor that stays near one as far as its own points were clear,
and by what a step takes outside of its layers (scheduling, sampling). That is added to the
attention side, which is what it keeps busy. A ``FitReport`` says how well each part fits and how
well the whole predicts. Not for deciding anything from the times: that is ``sizing``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from planner.curves import Linear, PiecewiseLinear
from planner.errors import PlannerError
from planner.latency import STAGES, Latencies
from planner.measurements import (
    Sample,
    benchmark_samples,
    model_entry,
    read_row,
    read_telemetry,
)
from planner.regression import Fit, fit_attention, fit_line, fit_piecewise

__all__ = [
    "Fit",
    "FitReport",
    "StepCheck",
    "fit_attention",
    "fit_line",
    "fit_piecewise",
    "latencies_from_benchmark",
    "latencies_from_telemetry",
    "read_telemetry",
    "step_time",
]

_STEP_SIGMA = 0.05
"""Relative error of the steps measured most often that is taken for noise."""
_STAGE_SIGMA = 0.1
"""How far off a stage's times may be at least, relative: running means, disturbed now and then."""
_MOST_FACTOR = 10.0
_SUSPICIOUS = 0.15
"""|log| of a calibration factor that a reader should hear of."""
_MOST_STEPS = 32


@dataclass(frozen=True)
class StepCheck:
    """A measured step of one attention and one FFN worker beside what the latencies say.

    Args:
        requests: in the step, all lanes together.
        lanes: it ran in.
        tokens: context tokens of all requests; None where that was not measured.
        measured: time of the step.
        predicted: by what was fitted to all steps (``step_time``, with ``FitReport.overhead`` as
            the time outside of the layers).
        held_out: by the same fit without this step; None with fewer than three steps.
    """

    requests: float
    lanes: int
    tokens: float | None
    measured: float
    predicted: float
    held_out: float | None = None

    @property
    def error(self) -> float:
        """Relative error of the prediction; above 0 where it is too slow."""
        return self.predicted / self.measured - 1.0


@dataclass(frozen=True)
class FitReport:
    """How well latencies describe what they were fitted to.

    Args:
        stages: stage -> its fit, before calibration.
        factors: stage -> what calibration on whole steps multiplied it by; 1.0 without steps.
        overhead: time of a step outside of its layers: once, and per request.
        steps: predictions of the measured steps.
        notes: what a reader must know before trusting the numbers.
        unit: of all times.
        source: of the measurements.
        joint: the latencies with the overhead in ``outside``, for a simulation of joint steps.
    """

    stages: Mapping[str, Fit]
    factors: Mapping[str, float]
    overhead: tuple[float, float]
    steps: tuple[StepCheck, ...]
    notes: tuple[str, ...]
    unit: str
    source: str
    joint: Latencies

    @property
    def step_error(self) -> float | None:
        """Greatest |relative error| over the measured steps; None without any."""
        return max((abs(step.error) for step in self.steps), default=None)

    def lines(self) -> list[str]:
        """Plain text for a terminal, one line each."""
        out = [f"fitted to {self.source}, times in {self.unit}"]
        for stage, fit in self.stages.items():
            out.append(
                f"{stage}: {_describe(fit)}; {fit.n} points, {fit.outliers} outliers, "
                f"error {fit.median_relative_error:.0%} median {fit.max_relative_error:.0%} most, "
                f"r2 {fit.r2:.3f}; calibrated by {self.factors[stage]:.2f}"
            )
        if self.steps:
            once, each = self.overhead
            out.append(f"outside of the layers: {once:.3g} per step, {each:.3g} per request")
        for step in self.steps:
            held = ""
            if step.held_out is not None:
                held = f", {step.held_out / step.measured - 1:+.0%} when left out of the fit"
            out.append(
                f"step of {step.requests:g} in {step.lanes} lanes: measured {step.measured:.4g}, "
                f"predicted {step.predicted:.4g} ({step.error:+.0%}{held})"
            )
        return out + [f"note: {note}" for note in self.notes]


def step_time(
    latencies: Latencies, tokens: float, requests: float, lanes: int = 1, outside: float = 0.0
) -> float:
    """Time of a step of one attention and one FFN worker: all lanes once through all layers.

    M lanes take M * max(t_A, t_C, t_F, (t_A + t_C + t_F) / M): the papers' pipeline (arXiv
    2601.21351) with a lane's own round trip as a bound.

    Args:
        tokens: context tokens of all requests.
        requests: in the step, cut evenly into ``lanes``.
        outside: time before and after the layers, when no lane is under way; leave it at 0 for
            latencies whose attention holds that time.
    """
    n = requests / lanes
    attention = latencies.t_attention(tokens / lanes, n)
    ffn, transfer = latencies.t_ffn(n), latencies.t_transfer(n)
    longest = max(attention, ffn, transfer)
    return outside + max(lanes * longest, attention + ffn + transfer)


def latencies_from_telemetry(
    rows: Iterable[Mapping[str, Any]],
    *,
    lanes: int = 1,
    max_knots: int = 2,
    source: str = "telemetry",
) -> tuple[Latencies, FitReport]:
    """Fit telemetry rows.

    Args:
        rows: one measurement each: ``stage`` ("attention", "ffn", "transfer", "prefill" or "step"),
            ``seconds``, ``load`` (context tokens for attention and step, requests for ffn and
            transfer, prompt tokens for prefill), ``requests`` (needed for step, useful for
            attention: all rows of it or none), ``lanes`` (of a step, 1 if absent), ``layers`` (if
            the seconds are of one layer: how many a step has). Attention, ffn and transfer are per
            lane; a step is whole, of one attention worker with one FFN worker.
        lanes: that the result will be used with. A step's time outside of its layers falls once
            per step, so a lane carries that part of it.
        max_knots: of the FFN curve, which bends while a growing batch still wakes more experts; 0
            fits a line, as closed forms need it.
        source: of the rows, for people.

    Raises:
        PlannerError: a row is malformed (names its number and key), or a stage has too little data.
    """
    samples = [read_row(number, row) for number, row in enumerate(rows, start=1)]
    return _fit(samples, lanes, max_knots, source, [])


def latencies_from_benchmark(
    path: str | Path,
    model: str | None = None,
    *,
    layers: int | None = None,
    lanes: int = 1,
    max_knots: int = 2,
) -> tuple[Latencies, FitReport]:
    """Fit the JSON of ``afflux bench decode``.

    A model's entry may hold ``samples``, rows as for ``latencies_from_telemetry``, which are used
    as they are. Else the curves come from what the engine's lane chooser had measured per layer
    (``stage_seconds``, running means) and from the hop histograms, and the context of a request is
    not known.

    Args:
        path: the benchmark's file.
        model: which of its models; may be left out when there is one.
        layers: of the model, where the file does not say (``layers``).
        lanes: as for ``latencies_from_telemetry``.
        max_knots: as for ``latencies_from_telemetry``.

    Returns:
        Latencies in seconds whose ``weights_share`` is 0: one FFN worker can't show it.

    Raises:
        PlannerError: not such a file, no such model, layers unknown; names what is missing.
    """
    name, entry = model_entry(path, model)
    source = f"{Path(path).name}, model {name}"
    if isinstance(entry.get("samples"), list):
        return latencies_from_telemetry(
            entry["samples"], lanes=lanes, max_knots=max_knots, source=source
        )
    layers = layers if layers is not None else entry.get("layers")
    if not isinstance(layers, int) or layers < 1:
        raise PlannerError(
            f"{path}: model {name} doesn't say how many layers it has, and its times are per "
            f"layer; pass layers (got {layers!r})"
        )
    try:
        samples, notes = benchmark_samples(entry["rows"], layers)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PlannerError):
            raise
        raise PlannerError(
            f"{path}: model {name}: rows are not those of the decode benchmark ({error!r})"
        ) from error
    return _fit(samples, lanes, max_knots, source, notes)


# -- fit and calibration -------------------------------------------------------------------------


def _fit(
    samples: Sequence[Sample], lanes: int, max_knots: int, source: str, notes: list[str]
) -> tuple[Latencies, FitReport]:
    if lanes < 1:
        raise PlannerError(f"lanes is {lanes}, expected at least 1")
    fits: dict[str, Fit] = {}
    for stage in STAGES:
        found = [sample for sample in samples if sample.stage == stage]
        if found:
            fits[stage] = _fit_stage(stage, found, max_knots)
        elif stage != "prefill":
            raise PlannerError(f"no measurement of stage {stage!r}, at two loads or more needed")
    attention = fits["attention"]
    if attention.not_varied == "context":
        notes.append(
            "attention does not grow with context here, because all requests had about the same: "
            "measure at two prompt lengths"
        )
    elif attention.not_varied == "requests":
        notes.append("attention's time per request is in its intercept: measure at two batch sizes")
    base = Latencies(
        attention=attention.curve,
        ffn=fits["ffn"].curve,
        transfer=fits["transfer"].curve,
        attention_per_request=attention.per_request,
        prefill=fits["prefill"].curve if "prefill" in fits else Linear(0.0, 0.0),
        source=source,
    )
    if "prefill" not in fits:
        notes.append("prefill was not measured and counts as 0")
    steps = _typical([sample for sample in samples if sample.stage == "step"])
    calibration, checks = _calibrated(base, fits, steps)
    if not steps:
        notes.append("no whole step was measured: time outside of the layers is not in")
    notes += [
        f"{stage} is {factor:.2f} times what its own measurements say, to meet the measured steps"
        for stage, factor in calibration.factors.items()
        if abs(math.log(factor)) > _SUSPICIOUS
    ]
    joint = calibration.apply(base)
    report = FitReport(
        stages=fits,
        factors={stage: calibration.factors.get(stage, 1.0) for stage in fits},
        overhead=(calibration.once, calibration.each),
        steps=tuple(checks),
        notes=tuple(notes),
        unit=base.unit,
        source=source,
        joint=joint,
    )
    return joint.folded(lanes), report


def _fit_stage(stage: str, samples: Sequence[Sample], max_knots: int) -> Fit:
    seconds = [sample.seconds for sample in samples]
    loads = [sample.load for sample in samples]
    try:
        if stage == "ffn":
            return fit_piecewise(_known(loads), seconds, max_knots, relative=True)
        if stage != "attention":
            return fit_line(_known(loads), seconds, relative=True)
        requests = [sample.requests for sample in samples]
        if all(count is None for count in requests):
            return fit_line(_known(loads), seconds, relative=True)
        if all(load is None for load in loads):  # as many tokens each: not to be told apart
            loads = list(requests)
        return fit_attention(_known(loads), _known(requests), seconds, relative=True)
    except PlannerError as error:
        raise PlannerError(f"{stage}: {error}") from error


def _typical(steps: Sequence[Sample]) -> list[Sample]:
    """Steps of about the same load as one, their median: a hiccup is no step to calibrate on."""
    groups: dict[tuple[float, ...], list[Sample]] = {}
    for step in steps:
        context = round(2 * math.log2(step.load)) if step.load else -1
        groups.setdefault((_step_load(step)[1], step.lanes, context), []).append(step)
    middles = []
    for key in sorted(groups):
        group = groups[key]
        known = [step.load for step in group if step.load is not None]
        middle = float(np.median([step.seconds for step in group]))
        load = float(np.mean(known)) if known else None
        middles.append(replace(group[0], seconds=middle, load=load, count=len(group)))
    picked = np.linspace(0, len(middles) - 1, min(len(middles), _MOST_STEPS)).astype(int)
    return [middles[index] for index in picked]


def _known(values: Sequence[float | None]) -> list[float]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        raise PlannerError(
            f"{len(values) - len(known)} of {len(values)} rows lack a load (or requests) that the "
            "others have"
        )
    return known


@dataclass(frozen=True)
class _Calibration:
    """What measured steps add: factors of the stages, time per step outside of its layers."""

    attention: float = 1.0
    ffn: float = 1.0
    transfer: float = 1.0
    once: float = 0.0
    each: float = 0.0

    @property
    def factors(self) -> dict[str, float]:
        return {"attention": self.attention, "ffn": self.ffn, "transfer": self.transfer}

    def apply(self, base: Latencies) -> Latencies:
        scaled = base.scaled(attention=self.attention, ffn=self.ffn, transfer=self.transfer)
        return replace(scaled, outside=Linear(self.each, self.once))


def _step_load(step: Sample) -> tuple[float, float]:
    assert step.requests is not None  # ``read_row`` sees to that
    return step.load or 0.0, step.requests


class _Steps:
    """Measured steps, and what the uncalibrated stages take in a lane of each: arrays of [steps],
    because a calibration predicts them all some hundred times."""

    def __init__(self, base: Latencies, steps: Sequence[Sample]):
        tokens, requests = np.array([_step_load(step) for step in steps]).T
        self.measured = np.array([step.seconds for step in steps])
        counts = np.array([step.count for step in steps], dtype=float)
        # What was measured once among what was measured often is known less well
        self.sigma = _STEP_SIGMA * np.sqrt(counts.max() / counts)
        self.requests = requests
        self.lanes = np.array([step.lanes for step in steps], dtype=float)
        self.attention = base.t_attention(tokens / self.lanes, requests / self.lanes)
        self.ffn = base.t_ffn(requests / self.lanes)
        self.transfer = base.t_transfer(requests / self.lanes)

    def predict(self, by: _Calibration) -> Any:
        """``step_time`` of all steps, by stages multiplied and with the time outside of layers."""
        outside = by.once + by.each * self.requests
        attention = by.attention * self.attention
        ffn, transfer = by.ffn * self.ffn, by.transfer * self.transfer
        longest = np.maximum(np.maximum(attention, ffn), transfer)
        return outside + np.maximum(self.lanes * longest, attention + ffn + transfer)


def _calibrate(
    steps: _Steps, holds: Any, counted: Any, start: _Calibration | None = None
) -> _Calibration:
    """Least squares over relative step errors, with every factor held near 1 as firmly as the
    stage's own points were clear (maximum a posteriori with a lognormal prior).

    Args:
        holds: [3] standard deviations of the log factors.
        counted: [steps] bools; the steps to calibrate on.
        start: a solution of nearly the same steps.
    """
    unit_once = float(steps.measured.min())
    unit_each = float(np.min(steps.measured / steps.requests))

    def of(vector: Any) -> _Calibration:
        attention, ffn, transfer = (float(value) for value in np.exp(vector[:3]))
        once, each = float(vector[3]) * unit_once, float(vector[4]) * unit_each
        return _Calibration(attention, ffn, transfer, once, each)

    def residuals(vector: Any) -> Any:
        errors = np.log(steps.predict(of(vector)) / steps.measured)[counted]
        return np.concatenate([errors / steps.sigma[counted], vector[:3] / holds])

    reach = math.log(_MOST_FACTOR)
    bounds = ([-reach] * 3 + [0.0, 0.0], [reach] * 3 + [1.0, 1.0])
    if start is None:
        # max() in the model makes valleys with kinks, so from several places
        starts = [[0.0, 0.0, 0.0, once, each] for once in (0.01, 0.3) for each in (0.01, 0.2)]
    else:
        logs = [math.log(factor) for factor in start.factors.values()]
        starts = [[*logs, start.once / unit_once, start.each / unit_each]]
    found = [
        least_squares(residuals, np.clip(place, *bounds), bounds=bounds, loss="soft_l1")
        for place in starts
    ]
    return of(min(found, key=lambda result: float(result.cost)).x)


def _calibrated(
    base: Latencies, fits: Mapping[str, Fit], samples: Sequence[Sample]
) -> tuple[_Calibration, list[StepCheck]]:
    if not samples:
        return _Calibration(), []
    steps = _Steps(base, samples)
    holds = np.array([_hold(fits[stage]) for stage in ("attention", "ffn", "transfer")])
    everything = np.ones(len(samples), dtype=bool)
    calibration = _calibrate(steps, holds, everything)
    predicted = steps.predict(calibration)
    checks = []
    for index, sample in enumerate(samples):
        held_out = None
        if len(samples) > 2:
            others = everything.copy()
            others[index] = False
            without = _calibrate(steps, holds, others, calibration)
            held_out = float(steps.predict(without)[index])
        tokens, requests = sample.load, float(steps.requests[index])
        checks.append(
            StepCheck(
                requests, sample.lanes, tokens, sample.seconds, float(predicted[index]), held_out
            )
        )
    return calibration, checks


def _hold(fit: Fit) -> float:
    # few points are met more closely than they are known
    few = math.sqrt(fit.n / max(1.0, fit.n - 2.0))
    return max(_STAGE_SIGMA, fit.median_relative_error) * few


def _describe(fit: Fit) -> str:
    curve = fit.curve
    if isinstance(curve, PiecewiseLinear):
        return "lines through " + ", ".join(f"{x:g}: {t:.3g}" for x, t in curve.points)
    assert isinstance(curve, Linear)
    each = f" + {fit.per_request:.3g} per request" if fit.per_request else ""
    interval = f" (95 %: {fit.a_ci[0]:.3g} to {fit.a_ci[1]:.3g})" if fit.a_ci else ""
    return f"{curve.a:.3g} per unit{interval} + {curve.b:.3g}{each}"
