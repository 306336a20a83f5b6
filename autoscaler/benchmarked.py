"""The latency model of a decode benchmark, and how well it predicts the steps that were measured.

The benchmark has what a live deployment seldom gives: whole steps of one attention worker with one
FFN worker, one setting at a time, so ``planner.fitting`` calibrates on them. Not for live telemetry
(``calibrate``) or recordings (``recorded``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from autoscaler.calibrate import MOST_ERROR
from autoscaler.model import Model
from autoscaler.policy import System
from autoscaler.predict import predict_step
from planner.fitting import FitReport, latencies_from_benchmark
from planner.measurements import model_entry


@dataclass(frozen=True)
class Setting:
    """A setting of the benchmark: TPOT as measured, median of its turns, and as predicted.

    Args:
        requests: that decode together, in so many ``lanes``.
        context: tokens of each; nan where that was not measured.
        observed, predicted: seconds.
        held_out: predicted by a fit without this setting; nan where there are too few for one.
    """

    requests: float
    lanes: int
    context: float
    observed: float
    predicted: float
    held_out: float = math.nan

    @property
    def error(self) -> float:
        """Relative, above 0 where the prediction is too slow."""
        return self.predicted / self.observed - 1.0

    @property
    def held_out_error(self) -> float:
        """Likewise, of the fit without it."""
        return self.held_out / self.observed - 1.0


@dataclass(frozen=True)
class Benchmarked:
    """A model of the benchmark's engine, and its predictions."""

    model: Model
    settings: tuple[Setting, ...]
    report: FitReport

    @property
    def held_out_error(self) -> float:
        """Median of |held-out errors|; nan without any."""
        errors = [abs(s.held_out_error) for s in self.settings if math.isfinite(s.held_out)]
        return median(errors) if errors else math.nan


def model_of(
    path: str | Path, name: str | None = None, *, layers: int | None = None
) -> Benchmarked:
    """The model of a benchmark's engine.

    Args:
        path: the JSON of ``afflux bench decode``.
        name: of one of its models; may be left out where there is one.
        layers: of it, where the file does not say.

    Raises:
        PlannerError: see ``latencies_from_benchmark``.
    """
    _, entry = model_entry(path, name)
    _, report = latencies_from_benchmark(path, name, layers=layers)
    layers = layers or int(entry.get("layers") or 1)
    base = Model(
        report.joint,
        layers=layers,
        samples={stage: fit.n for stage, fit in report.stages.items()},
        intervals=_intervals(report),
    )
    settings = []
    for step in report.steps:
        context = math.nan if step.tokens is None else step.tokens / step.requests
        one = replace(base, lanes=step.lanes, theta=0.0 if math.isnan(context) else context)
        system = System(math.ceil(step.requests), lanes=step.lanes)
        predicted = predict_step(one, system, 1, 1, step.requests)
        held_out = math.nan
        if step.held_out is not None:  # of planner.fitting's own formula, which differs by little
            held_out = predicted * step.held_out / step.predicted
        settings.append(
            Setting(step.requests, step.lanes, context, step.measured, predicted, held_out)
        )
    errors = [abs(setting.error) for setting in settings]
    error = median(errors) if errors else math.nan
    why = "no whole step was measured" if not errors else ""
    if error > MOST_ERROR:
        why = f"predicted TPOT is off by {error:.0%} in the median of {len(errors)} settings"
    model = replace(base, error=error, reliable=not why, why=why)
    return Benchmarked(model, tuple(settings), report)


def _intervals(report: FitReport) -> dict[str, tuple[float, float]]:
    found = {}
    for stage, fit in report.stages.items():
        factor = report.factors[stage]
        for name, interval in (("a", fit.a_ci), ("b", fit.b_ci)):
            if interval is not None:
                found[f"{stage}.{name}"] = (factor * interval[0], factor * interval[1])
    return found
