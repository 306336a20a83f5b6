"""Fits find the lines behind measurements; latencies from a benchmark predict its steps."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.fitting import (
    fit_attention,
    fit_line,
    fit_piecewise,
    latencies_from_benchmark,
    latencies_from_telemetry,
    read_telemetry,
    step_time,
)
from planner.latency import Latencies, Linear, PiecewiseLinear

DECODE = Path(__file__).parents[2] / "benchmarks" / "results" / "decode.json"
LAYERS = {"balanced": 24, "ffn_heavy": 8}

SLOPES = st.floats(1e-6, 1e3)
INTERCEPTS = st.floats(0, 1e3)
LOADS = st.lists(st.integers(1, 2000), min_size=2, max_size=30, unique=True)


def noisy(rng: np.random.Generator, times: np.ndarray, sigma: float = 0.03) -> np.ndarray:
    return times * np.exp(rng.normal(0, sigma, times.shape))


# -- lines ---------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(SLOPES, INTERCEPTS, LOADS, st.booleans(), st.booleans())
def test_an_exact_line_is_found(
    a: float, b: float, loads: list[int], robust: bool, relative: bool
) -> None:
    x = np.array(loads, dtype=float)
    fit = fit_line(x, a * x + b, robust=robust, relative=relative)
    assert fit.curve(x) == pytest.approx(a * x + b, rel=1e-5)
    assert fit.max_relative_error < 1e-5
    assert (fit.n, fit.outliers) == (len(x), 0)
    if len(x) > 2:
        assert fit.a_ci is not None
        assert fit.a_ci[0] <= fit.a_ci[1]


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.floats(3, 1e4), st.integers(1, 6))
def test_outliers_do_not_move_a_robust_line(seed: int, factor: float, count: int) -> None:
    rng = np.random.default_rng(seed)
    x = np.linspace(1, 256, 30)
    y = noisy(rng, 2 * x + 100)
    y[rng.choice(30, count, replace=False)] *= factor
    fit = fit_line(x, y, relative=True)
    assert fit.curve(np.array([1.0, 64, 256])) == pytest.approx([102, 228, 612], rel=0.1)
    assert fit.outliers >= count
    plain = fit_line(x, y, relative=True, robust=False)
    assert plain.outliers == 0


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.floats(0, 1e4)), min_size=2, max_size=20),
    st.booleans(),
)
def test_coefficients_are_never_negative(points: list[tuple[float, float]], robust: bool) -> None:
    x, y = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    if len(set(x.tolist())) < 2:
        with pytest.raises(PlannerError, match="different loads"):
            fit_line(x, y)
        return
    for fit in (
        fit_line(x, y, robust=robust),
        fit_piecewise(x, y, 1, robust=robust),
        fit_attention(x, x[::-1], y, robust=robust),
    ):
        assert fit.curve.intercept >= 0 and fit.curve.slope(0.0) >= 0 and fit.per_request >= 0
        assert math.isfinite(fit.rmse) and fit.rmse >= 0


def test_a_falling_line_becomes_flat() -> None:
    fit = fit_line([1, 2, 3, 4], [4, 3, 2, 1], robust=False)
    assert fit.curve.slope(0.0) == 0 and fit.curve.intercept == pytest.approx(2.5)


def test_the_interval_of_a_slope_holds_it() -> None:
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        x = np.linspace(1, 100, 20)
        fit = fit_line(x, 3 * x + 50 + rng.normal(0, 5, 20), robust=False)
        assert fit.a_ci is not None and fit.b_ci is not None
        held += fit.a_ci[0] <= 3 <= fit.a_ci[1]
    assert 180 <= held <= 199  # 95 %


def test_relative_errors_keep_small_loads_right() -> None:
    x = np.array([1.0, 2, 4, 8, 1000, 2000, 4000])
    y = np.array([10.0, 11, 13, 17, 1300, 2700, 5300])
    by_size = fit_line(x, y, robust=False, relative=True).curve(1.0)
    assert abs(by_size - 10) < abs(fit_line(x, y, robust=False).curve(1.0) - 10)


def test_many_points_at_one_load_do_not_hide_the_others() -> None:
    x = np.array([64.0] * 50 + [8.0, 128.0])
    fit = fit_line(x, 2 * x + 10)
    assert fit.curve(8.0) == pytest.approx(26) and fit.outliers == 0


def test_fifty_thousand_points_are_few() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(1, 512, 50_000).astype(float)
    fit = fit_piecewise(x, noisy(rng, 5 * x + 300), relative=True)
    assert fit.curve(256.0) == pytest.approx(1580, rel=0.02)


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        ([1, 2], [1], r"shapes \(2,\) and \(1,\)"),
        ([1, 2], [1, -1], "time -1.0 at point 1"),
        ([1, 2], [math.nan, 1], "time nan at point 0"),
        ([-1, 2], [1, 1], "load -1.0 at point 0"),
        ([3, 3, 3], [1, 2, 3], "at least 2 different loads"),
        ([], [], "at least 2 different loads"),
    ],
)
def test_points_that_give_no_line_are_refused(x: list, y: list, words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        fit_line(x, y)


# -- joined lines, two loads ---------------------------------------------------------------------


@settings(max_examples=8)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0, 100), st.sampled_from([8, 16, 64]))
def test_exact_joined_lines_are_found(s0: float, s1: float, b: float, knot: int) -> None:
    x = np.array([1.0, 2, 4, 8, 16, 32, 64, 128, 256])
    y = b + s0 * np.minimum(x, knot) + s1 * np.maximum(0, x - knot)
    assert fit_piecewise(x, y, [knot]).curve(x) == pytest.approx(y, rel=1e-5)
    assert fit_piecewise(x, y, 2).curve(x) == pytest.approx(y, rel=1e-4)


def test_a_knot_has_to_pay() -> None:
    rng = np.random.default_rng(3)
    x = np.repeat([1.0, 2, 4, 8, 16, 32, 64, 128], 4)
    assert isinstance(fit_piecewise(x, noisy(rng, 3 * x + 20), relative=True).curve, Linear)
    bent = fit_piecewise(x, noisy(rng, 20 + 9 * np.minimum(x, 16) + x), 1, relative=True).curve
    assert isinstance(bent, PiecewiseLinear) and bent.points[1][0] in (8, 16, 32)


def test_knots_outside_are_refused() -> None:
    for knots in ([0.0], [4.0], [9.0], [math.nan]):
        with pytest.raises(PlannerError, match="not all between 0 and the greatest load, 4"):
            fit_piecewise([1, 2, 4], [1, 2, 4], knots)


@settings(max_examples=40)
@given(st.floats(1e-3, 1), st.floats(0.01, 10), INTERCEPTS)
def test_context_and_requests_are_told_apart(a: float, c: float, b: float) -> None:
    requests = np.array([1.0, 8, 64, 1, 8, 64])
    tokens = requests * np.array([40.0, 40, 40, 500, 500, 500])
    fit = fit_attention(tokens, requests, a * tokens + c * requests + b)
    assert fit.curve.slope(0.0) == pytest.approx(a, rel=1e-4)
    assert fit.per_request == pytest.approx(c, rel=1e-3)
    assert fit.curve.intercept == pytest.approx(b, rel=1e-3, abs=1e-3)
    assert fit.not_varied == ""


def test_what_was_not_varied_is_said() -> None:
    n = np.array([1.0, 8, 64])
    alike = fit_attention(40 * n, n, 3 * n + 5)
    assert (alike.not_varied, alike.per_request) == ("context", pytest.approx(3))
    assert alike.curve.slope(0.0) == 0 and alike.curve.intercept == pytest.approx(5)
    fixed = fit_attention(100 * n, np.full(3, 8.0), 2 * n + 5)
    assert fixed.not_varied == "requests" and fixed.per_request == 0
    assert fixed.curve(np.array([0.0, 100])) == pytest.approx([5, 7])


# -- telemetry -----------------------------------------------------------------------------------

TRUE = Latencies(
    attention=Linear(2e-6, 1e-3),
    ffn=Linear(2e-4, 2e-3),
    transfer=Linear(1e-5, 5e-4),
    attention_per_request=5e-5,
    prefill=Linear(3e-5, 1e-3),
)
ONCE, EACH = 3e-3, 2e-5  # of a step, outside of its layers


def telemetry(sigma: float = 0.0, seed: int = 0, steps: bool = True) -> list[dict]:
    rng = np.random.default_rng(seed)

    def took(time: float) -> float:
        return float(time * np.exp(rng.normal(0, sigma)))

    rows: list[dict] = []
    for n in (1, 4, 16, 64, 128):
        for context in (50, 400):
            t = n * context
            time = took(TRUE.t_attention(t, n))
            rows.append({"stage": "attention", "load": t, "requests": n, "seconds": time})
            rows.append({"stage": "ffn", "load": n, "seconds": took(TRUE.t_ffn(n)) / 10})
            rows[-1]["layers"] = 10
            rows.append({"stage": "transfer", "load": n, "seconds": took(TRUE.t_transfer(n))})
            rows.append({"stage": "prefill", "load": t, "seconds": took(TRUE.t_prefill(t))})
            if steps:
                time = took(step_time(TRUE, t, n) + ONCE + EACH * n)
                rows.append({"stage": "step", "load": t, "requests": n, "seconds": time})
    return rows


def test_exact_telemetry_gives_back_the_system() -> None:
    latencies, report = latencies_from_telemetry(telemetry(), max_knots=0)
    assert latencies.linear and latencies.unit == "s"
    for n, t in ((2.0, 100.0), (100.0, 30_000.0)):
        expected = TRUE.t_attention(t, n) + ONCE + EACH * n
        assert latencies.t_attention(t, n) == pytest.approx(expected, rel=0.01)
        assert latencies.t_ffn(n) == pytest.approx(TRUE.t_ffn(n), rel=0.01)
        assert latencies.t_transfer(n) == pytest.approx(TRUE.t_transfer(n), rel=0.02)
        assert latencies.t_prefill(t) == pytest.approx(TRUE.t_prefill(t), rel=0.01)
    assert report.overhead == (pytest.approx(ONCE, rel=0.05), pytest.approx(EACH, rel=0.2))
    assert report.step_error is not None and report.step_error < 0.01
    assert report.notes == ()


def test_lanes_share_what_falls_once_per_step() -> None:
    one, _ = latencies_from_telemetry(telemetry(), lanes=1)
    two, _ = latencies_from_telemetry(telemetry(), lanes=2)
    assert one.attention.intercept - two.attention.intercept == pytest.approx(ONCE / 2, rel=0.05)


@settings(max_examples=5)
@given(st.integers(0, 2**16))
def test_noisy_telemetry_still_predicts_steps(seed: int) -> None:
    latencies, report = latencies_from_telemetry(telemetry(0.05, seed))
    for n, context in ((32, 50), (100, 300)):
        truth = step_time(TRUE, n * context, n) + ONCE + EACH * n
        assert step_time(latencies, n * context, n) == pytest.approx(truth, rel=0.12)
    assert all(step.held_out is not None for step in report.steps)


def test_stages_that_measure_too_much_are_calibrated() -> None:
    rows = telemetry(0.02)
    for row in rows:
        if row["stage"] == "ffn":
            row["seconds"] *= 1.6
    latencies, report = latencies_from_telemetry(rows)
    assert step_time(latencies, 6400, 128) == pytest.approx(
        step_time(TRUE, 6400, 128) + ONCE + EACH * 128, rel=0.08
    )
    assert report.factors["ffn"] < 0.9
    assert any(note.startswith("ffn is 0.") for note in report.notes)


def test_a_step_measured_once_counts_less_than_those_measured_often() -> None:
    exact = telemetry(steps=False)
    steps = [row for row in telemetry() if row["stage"] == "step"]
    odd = {**steps[0], "load": 9 * steps[0]["load"], "seconds": 1.6 * steps[0]["seconds"]}

    def worst(times: int) -> float:
        rows = exact + steps * times + [odd]
        _, report = latencies_from_telemetry(rows, max_knots=0)
        return max(abs(step.error) for step in report.steps if step.tokens != odd["load"])

    assert worst(6) < worst(1) and worst(6) < 0.02


def test_steps_of_several_lanes_overlap() -> None:
    assert step_time(TRUE, 0, 64, 2) == pytest.approx(2 * TRUE.t_ffn(32.0))
    alone = TRUE.t_attention(0, 1) + TRUE.t_ffn(1) + TRUE.t_transfer(1)
    assert step_time(TRUE, 0, 1, 1) == pytest.approx(alone)


def test_what_happens_outside_of_the_layers_does_not_overlap() -> None:
    rows = telemetry(steps=False)
    for n in (8, 32, 64, 128):
        for lanes in (1, 2, 4):
            time = step_time(TRUE, 50 * n, n, lanes, ONCE + EACH * n)
            rows.append({"stage": "step", "load": 50 * n, "requests": n, "seconds": time})
            rows[-1]["lanes"] = lanes
    latencies, report = latencies_from_telemetry(rows, lanes=2)
    assert report.step_error is not None and report.step_error < 0.01
    assert report.overhead[0] == pytest.approx(ONCE, rel=0.05)
    assert latencies.attention.intercept == pytest.approx(1e-3 + ONCE / 2, rel=0.05)


def test_without_steps_the_report_says_so() -> None:
    latencies, report = latencies_from_telemetry(telemetry(steps=False), max_knots=0)
    assert latencies.t_ffn(50.0) == pytest.approx(TRUE.t_ffn(50.0), rel=1e-4)
    assert report.step_error is None and report.overhead == (0, 0)
    assert any("no whole step" in note for note in report.notes)


def test_attention_may_come_without_requests_or_without_tokens() -> None:
    rows = [row for row in telemetry(steps=False) if row["stage"] != "prefill"]
    tokens = [{k: v for k, v in r.items() if k != "requests"} for r in rows]
    assert latencies_from_telemetry(tokens)[0].attention_per_request == 0
    counts = [
        {k: v for k, v in r.items() if k != "load" or r["stage"] != "attention"} for r in rows
    ]
    latencies, report = latencies_from_telemetry(counts)
    assert latencies.attention.slope(0.0) == 0 and latencies.attention_per_request > 0
    assert any("does not grow with context" in note for note in report.notes)
    assert any("prefill was not measured" in note for note in report.notes)


def test_many_steps_are_summed_up() -> None:
    rng = np.random.default_rng(0)
    rows = telemetry(steps=False)
    for n in rng.integers(1, 129, 3000).tolist():
        time = step_time(TRUE, 50 * n, n) + ONCE + EACH * n
        rows.append({"stage": "step", "load": 50 * n, "requests": n, "seconds": time})
    _, report = latencies_from_telemetry(rows)
    assert len(report.steps) <= 32 and report.step_error is not None and report.step_error < 0.02


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"stage": "atention"}, "row 1: stage is 'atention'"),
        ({"stage": "ffn", "load": 3}, "row 1: has no seconds"),
        ({"stage": "ffn", "seconds": 3}, "row 1: has no load"),
        ({"stage": "ffn", "requests": 2, "seconds": 3}, "row 1: .*'ffn' needs its load"),
        ({"stage": "ffn", "load": 3, "seconds": -1}, "row 1: seconds is -1"),
        ({"stage": "ffn", "load": math.nan, "seconds": 1}, "row 1: load is nan"),
        ({"stage": "ffn", "load": "3", "seconds": 1}, "row 1: load is '3'"),
        ({"stage": "ffn", "load": 3, "seconds": 1, "layers": 0.5}, "row 1: layers is 0.5"),
        ({"stage": "step", "load": 3, "seconds": 1}, "row 1: a step needs its requests"),
        ({"stage": "ffn", "load": 3, "seconds": 1}, "no measurement of stage 'attention'"),
    ],
)
def test_rows_are_refused_with_number_and_key(row: dict, words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        latencies_from_telemetry([row])


def test_a_stage_at_one_load_is_refused_by_name() -> None:
    rows = [r for r in telemetry() if r["stage"] != "ffn" or r["load"] == 4]
    with pytest.raises(PlannerError, match=r"^ffn: a fit needs at least 2 different loads"):
        latencies_from_telemetry(rows)
    with pytest.raises(PlannerError, match="lanes is 0"):
        latencies_from_telemetry(telemetry(), lanes=0)


def test_telemetry_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in telemetry()) + "\n\n")
    assert list(read_telemetry(path)) == telemetry()
    path.write_text('{"stage": "ffn"}\n[1]\n')
    with pytest.raises(PlannerError, match=r"t\.jsonl:2: found list"):
        list(read_telemetry(path))
    path.write_text("{\n")
    with pytest.raises(PlannerError, match=r"t\.jsonl:1: not JSON"):
        list(read_telemetry(path))
    with pytest.raises(PlannerError, match="can't be read"):
        list(read_telemetry(tmp_path / "none.jsonl"))


# -- the decode benchmark ------------------------------------------------------------------------


@pytest.mark.parametrize("model", LAYERS)
def test_the_recorded_benchmark_predicts_its_steps(model: str) -> None:
    latencies, report = latencies_from_benchmark(DECODE, model, layers=LAYERS[model])
    assert len(report.steps) >= 5
    assert report.step_error is not None and report.step_error < 0.12
    assert np.median([abs(step.error) for step in report.steps]) < 0.05
    assert all(0.85 < factor < 1.15 for factor in report.factors.values())
    for step in report.steps:  # of the result itself, not only of the report
        if step.lanes == 1:
            time = step_time(latencies, 0, step.requests)
            assert time == pytest.approx(step.predicted)
    assert Latencies.from_json(latencies.to_json()) == latencies
    assert any("does not grow with context" in note for note in report.notes)
    assert f"model {model}" in report.lines()[0]


def test_the_benchmark_names_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match=r"expected one of balanced, ffn_heavy"):
        latencies_from_benchmark(DECODE)
    with pytest.raises(PlannerError, match="model is 'huge'"):
        latencies_from_benchmark(DECODE, "huge")
    path = tmp_path / "bench.json"
    report = {"details": {"tiny": {"rows": [{"batch": 1}]}}}
    path.write_text(json.dumps(report))
    with pytest.raises(PlannerError, match="doesn't say how many layers"):
        latencies_from_benchmark(path)
    with pytest.raises(PlannerError, match="rows are not those of the decode benchmark"):
        latencies_from_benchmark(path, layers=4)
    path.write_text("[]")
    with pytest.raises(PlannerError, match="afflux bench decode"):
        latencies_from_benchmark(path)
    path.write_text("{")
    with pytest.raises(PlannerError, match="afflux bench decode"):
        latencies_from_benchmark(path)


def test_samples_of_a_benchmark_are_used_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    report = {"details": {"tiny": {"rows": [], "samples": telemetry()}}}
    path.write_text(json.dumps(report))
    latencies, fitted = latencies_from_benchmark(path)
    assert latencies == latencies_from_telemetry(telemetry(), source=latencies.source)[0]
    assert fitted.source == "bench.json, model tiny"
