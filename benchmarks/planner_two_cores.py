"""AFD or aggregation on two cores: what the planner predicts from kernels, then what happens.

Per setting (model, batch, context) the planner says from each side's own times how many tokens per
second one attention and one FFN process will make, and how many plain vLLM with two threads; then
both are run and measured. The prediction never sees a run: it is made of what ``kernels`` measured,
just before, model by model, unless a file of it is given.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import kernels
from benchmarks.kernel_engines import PlainDecoding, SplitDecoding
from benchmarks.models import make_model
from benchmarks.processes import Remote
from benchmarks.report import make_report, print_summary, print_table, write_report
from benchmarks.split import FFNHost, FFNPool
from planner.errors import PlannerError
from planner.explore.kernels.measured import MeasuredDB
from planner.explore.model import Model, read_model
from planner.explore.two_cores import Comparison, compare

SETTINGS: Mapping[str, Sequence[tuple[int, int]]] = {
    "balanced": ((8, 48), (8, 1000), (32, 48), (32, 512), (128, 48)),
    "ffn_heavy": ((8, 48), (32, 512), (100, 48), (256, 48)),
    "even": ((16, 256), (64, 48), (64, 256), (128, 48), (200, 48)),
}
"""(Requests, tokens of each) by model; some lie between what ``kernels`` measures."""
STEPS, WARM_STEPS = 16, 8
"""Decode steps of a run that count, and those before them, in which the runtime tries its lanes."""
REPEATS = 3


@dataclass(frozen=True)
class Row:
    """One setting: tokens per second, predicted and measured.

    Args:
        model, batch, context: the setting; context is the mean over the run.
        lanes: of AFD, predicted and most often taken.
    """

    model: str
    batch: int
    context: float
    afd_predicted: float
    afd_measured: float
    aggregated_predicted: float
    aggregated_measured: float
    lanes_predicted: int
    lanes_measured: int

    @property
    def afd_error(self) -> float:
        """Signed share of what was measured."""
        return self.afd_predicted / self.afd_measured - 1

    @property
    def aggregated_error(self) -> float:
        """Signed share of what was measured."""
        return self.aggregated_predicted / self.aggregated_measured - 1

    @property
    def predicted(self) -> float:
        """AFD over aggregated."""
        return self.afd_predicted / self.aggregated_predicted

    @property
    def measured(self) -> float:
        """AFD over aggregated."""
        return self.afd_measured / self.aggregated_measured

    @property
    def right(self) -> bool:
        """Whether the predicted winner won."""
        return (self.predicted > 1) == (self.measured > 1)


class _Both:
    """Both ways of serving one model, ready to run."""

    def __init__(self, model: str, place: kernels.Place, compiled: bool):
        config = kernels.attention_config("attention", model, place.dtype, compiled)
        arguments = kernels.engine_args(compiled)
        self.processes: list[Remote] = []
        try:
            self.plain = self._process(
                functools.partial(PlainDecoding, model, place.dtype, arguments),
                threads=2,
                cores=place.both,
            )
            self.split = self._process(functools.partial(SplitDecoding, config), cores=place.of(0))
            host = self._process(FFNHost, cores=place.of(1))
            self.pool = FFNPool(
                [host], model, 1, 1, dtype=place.dtype,
                max_frame_tokens=kernels.MAX_FRAME_TOKENS,
            )  # fmt: skip
            self.plain.ready()
            self.split.ready()
            self.pool.connect(self.split, config.name)
            self.split.adopt(self.pool.table)
        except BaseException:
            self.close()
            raise

    def _process(self, make: Any, **options: Any) -> Remote:
        self.processes.append(Remote(make, **options))
        return self.processes[-1]

    def close(self) -> None:
        for process in self.processes:
            process.kill()

    def rates(self, batch: int, context: int) -> tuple[float, float, int]:
        """Tokens/s of AFD and of plain vLLM, in turns, medians; and AFD's lanes."""
        afd: list[float] = []
        plain: list[float] = []
        self.split.forget_times()
        for repeat in range(REPEATS):
            for engine, rates in ((self.split, afd), (self.plain, plain)):
                steps = engine.decode(batch, context, WARM_STEPS + STEPS, repeat)
                rates.append(batch / statistics.median(steps[WARM_STEPS:]))
        lanes = self.split.facts()["lanes"][-STEPS:]
        return statistics.median(afd), statistics.median(plain), statistics.mode(lanes)


def run(
    json_path: Path | str | None = None,
    *,
    kernels_path: Path | str | None = None,
    models: Sequence[str] = (),
    settings: Mapping[str, Sequence[tuple[int, int]]] = SETTINGS,
    effort: kernels.Effort | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """Predict and run every setting; prints a table, writes JSON when a path is given.

    Args:
        kernels_path: written by ``afflux bench kernels``; None measures each model's kernels before
            its runs, so that both see the machine at nearly the same speed.
        models: names of ``kernels.MODELS``; none: all.
        compiled: engines compile their models; has to be as in the file.

    Raises:
        PlannerError: a setting isn't covered by the file.
        ValueError: an unknown model; fewer than two cores; kernels of another dtype.
    """
    place = kernels.find_place()
    shapes = kernels.chosen_models(models)
    if 2 not in place.threads:
        raise ValueError("this compares two cores; there is a GPU here: hide it to use the cores")
    rows: list[Row] = []
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="afflux-two-cores-") as folder:
        for label, shape in shapes.items():
            path = str(make_model(Path(folder) / label, shape))
            if kernels_path is None:
                entry = kernels.measure(
                    label, path, shape, place, effort or kernels.Effort(), compiled=compiled
                )
                measured[label] = entry
                source = Path(folder) / f"{label}.json"
                write_report(make_report("kernels", {}, {"models": {label: entry}}), source)
            else:
                source = Path(kernels_path)
            found = _predict(MeasuredDB(source), read_model(path), settings[label])
            rows += _run(label, path, place, found, compiled)
    summary = summarise(rows)
    report = make_report(
        "planner_two_cores",
        {**summary, "dtype": place.dtype, "compiled": compiled},
        {"rows": [asdict(row) | _derived(row) for row in rows], "models": measured},
    )
    print_rows(rows)
    print_summary(report)
    write_report(report, json_path)
    return report


def middle(context: int) -> float:
    """Mean context of the steps that count, where the first had ``context``."""
    return context + WARM_STEPS + STEPS / 2


def _predict(
    db: MeasuredDB, model: Model, settings: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Comparison]:
    """All of a model, before anything is run."""
    return {
        (batch, context): compare(db, model, batch, middle(context)) for batch, context in settings
    }


def _run(
    label: str,
    path: str,
    place: kernels.Place,
    predicted: Mapping[tuple[int, int], Comparison],
    compiled: bool,
) -> list[Row]:
    both = _Both(path, place, compiled)
    rows = []
    try:
        for (batch, context), ours in predicted.items():
            afd, plain, lanes = both.rates(batch, context)
            rows.append(
                Row(
                    model=label,
                    batch=batch,
                    context=middle(context),
                    afd_predicted=ours.afd_rate,
                    afd_measured=afd,
                    aggregated_predicted=ours.aggregated_rate,
                    aggregated_measured=plain,
                    lanes_predicted=ours.afd.lanes,
                    lanes_measured=lanes,
                )
            )
    finally:
        both.close()
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The flat figures: winners right, and throughput errors over both ways of all settings."""
    errors = [abs(error) for row in rows for error in (row.afd_error, row.aggregated_error)]
    return {
        "winner_right": sum(row.right for row in rows),
        "winner_settings": len(rows),
        "afd_wins": sum(row.measured > 1 for row in rows),
        "afd_wins_predicted": sum(row.predicted > 1 for row in rows),
        "throughput_median_error": round(statistics.median(errors), 4),
        "throughput_max_error": round(max(errors), 4),
        "afd_median_error": round(statistics.median(abs(row.afd_error) for row in rows), 4),
        "aggregated_median_error": round(
            statistics.median(abs(row.aggregated_error) for row in rows), 4
        ),
    }


def _derived(row: Row) -> dict[str, Any]:
    return {
        "afd_error": row.afd_error,
        "aggregated_error": row.aggregated_error,
        "ratio_predicted": row.predicted,
        "ratio_measured": row.measured,
        "right": row.right,
    }


def print_rows(rows: Sequence[Row]) -> None:
    """Settings as a table."""
    print_table(
        "Two cores, decode tokens/s: predicted from kernels, then measured",
        ("model", "batch", "context", "AFD", "vLLM", "AFD/vLLM", "lanes", "winner"),
        [
            (row.model, row.batch, round(row.context),
             f"{row.afd_predicted:.0f}, {row.afd_measured:.0f} ({row.afd_error:+.0%})",
             f"{row.aggregated_predicted:.0f}, {row.aggregated_measured:.0f} "
             f"({row.aggregated_error:+.0%})",
             f"{row.predicted:.2f}, {row.measured:.2f}",
             f"{row.lanes_predicted}, {row.lanes_measured}",
             "right" if row.right else "wrong")
            for row in rows
        ],
    )  # fmt: skip


def main() -> int:
    """The command line; the exit code says whether the target was met."""
    import argparse
    import sys

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--kernels", type=Path, help="of afflux bench kernels; else measured here")
    parser.add_argument("--model", action="append", default=[], help="repeatable; else all")
    parser.add_argument("--compiled", action="store_true", help="as vLLM does by default")
    parser.add_argument("--seconds", type=float, default=kernels.Effort.seconds)
    given = parser.parse_args()
    try:
        report = run(
            given.json,
            kernels_path=given.kernels,
            models=given.model,
            effort=kernels.Effort(seconds=given.seconds),
            compiled=given.compiled,
        )
    except (PlannerError, ValueError) as error:
        sys.exit(str(error))
    summary = report["summary"]
    lost = summary["winner_settings"] - summary["winner_right"]
    return 0 if lost <= 2 and summary["throughput_median_error"] <= 0.15 else 1


if __name__ == "__main__":
    raise SystemExit(main())
