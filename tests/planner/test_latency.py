"""Curves keep their promises at any load; latencies refuse the impossible and survive JSON."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.latency import (
    PRESETS,
    Curve,
    Latencies,
    Linear,
    PiecewiseLinear,
    Tabulated,
    load_latencies,
)

SIZES = st.floats(0, 1e6)
BAD = [-1.0, -1e-12, math.nan, math.inf, "1", None, True]


@st.composite
def points(draw: st.DrawFn) -> tuple[tuple[float, float], ...]:
    loads = draw(st.lists(st.integers(0, 10_000), min_size=2, max_size=6, unique=True))
    rises = draw(st.lists(st.floats(0, 100), min_size=len(loads), max_size=len(loads)))
    return tuple(zip(map(float, sorted(loads)), np.cumsum(rises).tolist(), strict=True))


LINES = st.builds(Linear, st.floats(0, 1e3), st.floats(0, 1e3))
PIECES = st.builds(PiecewiseLinear, points())
TABLES = st.builds(Tabulated, points(), extrapolate=st.just(True))
CURVES = st.one_of(LINES, PIECES, TABLES)


# -- curves --------------------------------------------------------------------------------------


@given(CURVES, SIZES, SIZES)
def test_curves_never_fall_and_are_never_negative(curve: Curve, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0 <= curve(low) <= curve(high) * (1 + 1e-9) + 1e-9
    assert curve.slope(low) >= 0


@given(CURVES, st.lists(SIZES, min_size=1, max_size=5))
def test_an_array_gives_what_its_numbers_give(curve: Curve, loads: list[float]) -> None:
    many = curve(np.array([loads, loads]))
    assert many.shape == (2, len(loads))
    assert many[1] == pytest.approx([curve(load) for load in loads])


@given(PIECES)
def test_a_piecewise_curve_goes_through_its_points(curve: PiecewiseLinear) -> None:
    for load, time in curve.points:
        assert curve(load) == pytest.approx(time)


@given(CURVES, st.floats(0.1, 10), SIZES)
def test_scaling_both_parts_multiplies_the_time(curve: Curve, factor: float, load: float) -> None:
    expected = pytest.approx(factor * curve(load), rel=1e-9, abs=1e-6)
    assert curve.scaled(factor, factor)(load) == expected


@given(LINES, SIZES)
def test_scaling_one_part_leaves_the_other(line: Linear, load: float) -> None:
    assert line.scaled(slope=2)(load) == pytest.approx(2 * line.a * load + line.b)
    assert line.scaled(intercept=3)(load) == pytest.approx(line.a * load + 3 * line.b)


def test_a_piecewise_curve_goes_on_beyond_its_points() -> None:
    curve = PiecewiseLinear(((1, 2), (3, 4), (5, 10)))
    assert curve(7.0) == 16
    assert curve(0.0) == curve.intercept == 1
    assert [curve.slope(load) for load in (0, 1, 3, 9)] == [1, 1, 3, 3]
    steep = PiecewiseLinear(((10, 1), (20, 21)))
    assert steep(0.0) == steep.intercept == 0  # never below zero


def test_a_table_refuses_what_it_does_not_cover() -> None:
    table = Tabulated(((1, 2), (3, 4)))
    assert table(1.0) == 2
    assert table(np.array([1.0, 3.0])).tolist() == [2, 4]
    with pytest.raises(PlannerError, match=r"load 4 .*covers 1 to 3"):
        table(4.0)
    with pytest.raises(PlannerError, match=r"load 0\.5 .*covers 1 to 3"):
        table(np.array([2.0, 0.5]))
    with pytest.raises(PlannerError, match="nan"):
        table(math.nan)
    assert Tabulated(table.points, extrapolate=True)(4.0) == 5


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 1e3)), min_size=2, max_size=20))
def test_a_table_of_noisy_measurements_rises(measured: list[tuple[int, float]]) -> None:
    if len({load for load, _ in measured}) < 2:
        with pytest.raises(PlannerError, match="two points"):
            Tabulated.rising(measured)
        return
    table = Tabulated.rising(measured)
    times = [time for _, time in table.points]
    assert times == sorted(times)
    assert min(t for _, t in measured) - 1e-9 <= times[0]
    assert times[-1] <= max(t for _, t in measured) + 1e-9


def test_a_table_keeps_what_rises_already() -> None:
    assert Tabulated.rising([(5, 4), (1, 1), (3, 2), (3, 3)]).points == ((1, 1), (3, 2.5), (5, 4))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_line_refuses_coefficients_by_name(name: str, bad: object) -> None:
    with pytest.raises(PlannerError, match=rf"^{name} is .*at least 0"):
        Linear(**{"a": 1.0, "b": 1.0, name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given_points", "words"),
    [
        (((1, 1),), "at least two points, got 1"),
        (((1, 1), (1, 2)), "load of point 1 is 1"),
        (((1, 2), (2, 1)), "time of point 1 is 1.*slope would be negative"),
        (((1, 1), (2, math.nan)), "time of point 1 is nan"),
        (((-1, 1), (2, 2)), "load of point 0 is -1"),
        (((1, 1), (2, 2, 3)), "pairs of"),
        (3, "pairs of"),
    ],
)
def test_points_are_refused_with_the_reason(given_points: object, words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        PiecewiseLinear(given_points)  # type: ignore[arg-type]


# -- latencies -----------------------------------------------------------------------------------

LATENCIES = st.builds(
    Latencies,
    attention=CURVES,
    ffn=CURVES,
    transfer=CURVES,
    attention_per_request=st.floats(0, 10),
    prefill=CURVES,
    unit=st.sampled_from(["s", "cycles"]),
    source=st.text(max_size=10),
    transfer_load=st.sampled_from(["ffn", "attention"]),
    weights_share=st.floats(0, 1),
)


@given(LATENCIES)
def test_json_gives_back_an_equal_object(latencies: Latencies) -> None:
    assert Latencies.from_json(latencies.to_json()) == latencies


def test_numbers_of_numpy_survive_json() -> None:
    latencies = Latencies(Linear(np.int64(1), np.float64(2)), Linear(1), Linear(1))
    assert Latencies.from_json(latencies.to_json()) == latencies


def test_the_paper_is_a_preset() -> None:
    paper = PRESETS["deepseek-v3-npu"]
    assert paper.linear and paper.unit == "cycles"
    assert paper.t_attention(256 * 600.0, 256) == pytest.approx(0.00165 * 153600 + 50)
    assert paper.t_ffn(np.array([256.0])) == pytest.approx(0.083 * 256 + 100)
    assert paper.t_transfer(256.0) == pytest.approx(0.022 * 256 + 20)
    assert paper.t_prefill(100.0) == 0
    assert load_latencies("deepseek-v3-npu") is paper


def test_requests_cost_the_attention_side_too() -> None:
    latencies = Latencies(Linear(2, 1), Linear(1), Linear(0), attention_per_request=10)
    assert latencies.t_attention(100.0, 3) == 231
    many = latencies.t_attention(np.array([100.0, 200.0]), np.array([3.0, 4.0]))
    assert many.tolist() == [231, 441]


def test_a_worker_with_some_experts_reads_only_their_weights() -> None:
    latencies = Latencies(Linear(0), Linear(1, 100), Linear(0), weights_share=0.8)
    assert latencies.t_ffn(10.0) == 110
    assert latencies.t_ffn(10.0, share=0.25) == pytest.approx(10 + 20 + 80 / 4)
    for share in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(PlannerError, match="share of the experts is"):
            latencies.t_ffn(10.0, share=share)


@given(LATENCIES, st.floats(1, 1e4), st.floats(0.01, 1))
def test_holding_fewer_experts_is_never_slower(
    latencies: Latencies, requests: float, share: float
) -> None:
    assert 0 <= latencies.t_ffn(requests, share) <= latencies.t_ffn(requests)


def test_another_device_or_unit_is_a_factor() -> None:
    base = Latencies(Linear(2, 1), Linear(3, 1), Linear(1, 1), attention_per_request=4)
    other = base.scaled(attention=2, ffn=0.5, transfer=3, unit="ms")
    assert other.t_attention(10.0, 2) == 2 * base.t_attention(10.0, 2)
    assert other.t_ffn(10.0) == 0.5 * base.t_ffn(10.0)
    assert other.t_transfer(10.0) == 3 * base.t_transfer(10.0)
    assert (other.unit, base.scaled().unit) == ("ms", "s")


def test_only_lines_count_as_linear() -> None:
    line, table = Linear(1), Tabulated(((0, 1), (1, 2)))
    assert Latencies(line, line, line, prefill=table).linear
    assert not Latencies(line, table, line).linear


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["attention_per_request", "weights_share"])
def test_latencies_refuse_numbers_by_name(name: str, bad: object) -> None:
    line = Linear(1)
    with pytest.raises(PlannerError, match=f"^{name} is"):
        Latencies(line, line, line, **{name: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "bad", "words"),
    [
        ("weights_share", 1.1, "weights_share is 1.1, expected 0 to 1"),
        ("transfer_load", "both", "transfer_load is 'both'"),
        ("unit", "", "unit is ''"),
        ("ffn", 3.0, r"ffn is 3\.0, expected a curve"),
    ],
)
def test_latencies_refuse_what_they_cannot_mean(field: str, bad: object, words: str) -> None:
    line = Linear(1)
    fields = {"attention": line, "ffn": line, "transfer": line, field: bad}
    with pytest.raises(PlannerError, match=words):
        Latencies(**fields)  # type: ignore[arg-type]


# -- files ---------------------------------------------------------------------------------------


def _paper(**changes: object) -> str:
    data = json.loads(PRESETS["deepseek-v3-npu"].to_json())
    return json.dumps({k: v for k, v in {**data, **changes}.items() if v is not None})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "found 'list'"),
        (_paper(format="other"), "found 'other'"),
        (_paper(version=2), "version 2"),
        (_paper(ffn=None), "missing ffn"),
        (_paper(atention=1), "unknown atention"),
        (_paper(ffn={"kind": "linear", "a": -0.1}), r"^ffn: a is -0\.1"),
        (_paper(ffn={"kind": "linear", "a": 0.1, "b": math.nan}), "^ffn: b is nan"),
        (_paper(ffn={"kind": "linear", "b": 0.1}), "^ffn: missing a"),
        (_paper(ffn={"kind": "linear", "a": 0.1, "c": 1}), "^ffn: unknown c"),
        (_paper(ffn={"kind": "cubic"}), "ffn is .*one of linear, piecewise, tabulated"),
        (_paper(ffn=[1, 2]), "ffn is .*one of linear"),
        (_paper(transfer={"kind": "piecewise", "points": [[0, 1], [1]]}), "^transfer: points are"),
        (_paper(weights_share="much"), "weights_share is 'much'"),
    ],
)
def test_files_are_refused_with_the_place(text: str, words: str) -> None:
    with pytest.raises(PlannerError, match=words):
        Latencies.from_json(text)


def test_a_file_may_leave_out_what_has_a_default() -> None:
    data = json.loads(_paper())
    short = {k: data[k] for k in ("format", "version", "attention", "ffn", "transfer")}
    assert Latencies.from_json(json.dumps(short)).unit == "s"


def test_a_file_is_loaded_and_errors_name_it(tmp_path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(_paper())
    assert load_latencies(path) == load_latencies(str(path)) == PRESETS["deepseek-v3-npu"]
    path.write_text("{}")
    with pytest.raises(PlannerError, match=r"mine\.json: expected JSON"):
        load_latencies(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(PlannerError, match="not text"):
        load_latencies(path)
    with pytest.raises(PlannerError, match=r"'nowhere'.*deepseek-v3-npu.*No such file"):
        load_latencies("nowhere")


def test_a_curve_from_elsewhere_works_but_is_not_written() -> None:
    class Square:
        intercept = 0.0

        def __call__(self, load):
            return load * load

        def slope(self, load: float) -> float:
            return 2 * load

        def scaled(self, slope: float = 1.0, intercept: float = 1.0) -> "Square":
            return self

    latencies = Latencies(Linear(1), Square(), Linear(1))
    assert latencies.t_ffn(3.0) == 9
    with pytest.raises(PlannerError, match="ffn: a Square can't be written"):
        latencies.to_json()
