"""Measured kernels: read, looked up, refused; and what two cores are predicted to do with them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.errors import PlannerError
from planner.explore.kernels.base import Load, NotCovered, Provenance, Side, Sides
from planner.explore.kernels.measured import MeasuredDB
from planner.explore.kernels.measured_file import Table
from planner.explore.model import model_from_config
from planner.explore.two_cores import afd_step, aggregated_step, compare

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 160,
    "intermediate_size": 1024,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 10,
    "vocab_size": 4096,
}
LAYERS = 10
BATCHES, CONTEXTS = (1, 2, 4, 8, 16, 32, 64), (100, 300)
HOP_ATTENTION, HOP_WIRE, HOP_FFN = 20e-6, 30e-6, 10e-6


def layers_s(threads: int, batch: float, context: float) -> float:
    return (2e-3 + 1e-4 * batch + 1e-7 * batch * context) / threads


def outside_s(threads: int, batch: float) -> float:
    return 1e-3 + 2e-5 * batch / threads


def experts_s(threads: int, held: float, tokens: float) -> float:
    return (held * 1e-4 + 1e-4 * tokens * held / 16) / threads


def written(folder: Path, **changed) -> Path:
    entry = {
        "config": CONFIG,
        "attention": [
            {"threads": t, "batch": b, "context": c, "layers_s": layers_s(t, b, c),
             "outside_s": outside_s(t, b)}
            for t in (1, 2) for b in BATCHES for c in CONTEXTS if b * c < 15_000
        ],
        "experts": [
            {"threads": t, "held": held, "tokens": n, "seconds": experts_s(t, held, n)}
            for t, held in ((1, 16), (1, 8), (2, 16)) for n in BATCHES
        ],
        "hop": [
            {"tokens": n, "attention_s": HOP_ATTENTION, "wire_s": HOP_WIRE, "ffn_s": HOP_FFN}
            for n in BATCHES
        ],
    } | changed  # fmt: skip
    path = folder / "kernels.json"
    path.write_text(
        json.dumps({"summary": {"machine": "a machine"}, "details": {"models": {"toy": entry}}})
    )
    return path


@pytest.fixture
def db(tmp_path: Path) -> MeasuredDB:
    return MeasuredDB(written(tmp_path))


MODEL = model_from_config("by another name", CONFIG)


def load(batch: float, context: float) -> Load:
    return Load(decode=np.array([batch]), context=np.array([context]))


def only(time) -> tuple[float, Provenance]:
    ((how, part),) = time.parts.items()
    return float(np.sum(part)), how


def test_what_was_measured_is_given_back(db: MeasuredDB):
    seconds, how = only(db.attention(MODEL, 2, Sides(), load(8, 300)))
    assert how is Provenance.MEASURED
    assert seconds == pytest.approx(layers_s(2, 8, 300) + outside_s(2, 8))
    seconds, how = only(db.experts(MODEL, 1, 2, Sides(), np.array([32.0])))
    assert how is Provenance.MEASURED
    assert seconds == pytest.approx(experts_s(1, 8, 32))
    assert "a machine" in db.name and list(db.models) == ["toy"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> MeasuredDB:
    return MeasuredDB(written(tmp_path_factory.mktemp("kernels")))


@given(batch=st.floats(1, 32), context=st.floats(100, 300))
def test_between_measurements_lines(shared: MeasuredDB, batch: float, context: float):
    time = shared.layers(MODEL, 1, Sides(), load(batch, context))
    # bilinear in batch and context, as what was written is
    assert float(time.seconds[0]) == pytest.approx(layers_s(1, batch, context), rel=1e-6)
    assert set(time.parts) <= {Provenance.MEASURED, Provenance.INTERPOLATED}


def test_each_load_of_an_array_has_its_own_provenance(db: MeasuredDB):
    time = db.experts(MODEL, 1, 1, Sides(), np.array([0.0, 8.0, 12.0]))
    assert time.seconds == pytest.approx([0.0, experts_s(1, 16, 8), experts_s(1, 16, 12)])
    assert time.parts[Provenance.INTERPOLATED].tolist()[:2] == [0.0, 0.0]
    assert time.parts[Provenance.MEASURED].tolist()[2] == 0.0


@pytest.mark.parametrize(("batch", "context"), [(8, 301), (65, 100), (0.5, 100), (64, 299)])
def test_outside_is_refused_unless_allowed(tmp_path: Path, batch: float, context: float):
    path = written(tmp_path)
    with pytest.raises(NotCovered, match="allow-extrapolation"):
        MeasuredDB(path).attention(MODEL, 1, Sides(), load(batch, context))
    free = MeasuredDB(path, allow_extrapolation=True)
    time = free.layers(MODEL, 1, Sides(), load(batch, context))
    assert set(time.parts) == {Provenance.EXTRAPOLATED}
    if batch < 64:  # its column has one context only, which no line goes through
        assert float(time.seconds[0]) == pytest.approx(layers_s(1, batch, context))


def test_refusals_say_what_is_there(db: MeasuredDB, tmp_path: Path):
    other = model_from_config("other", CONFIG | {"hidden_size": 1024})
    with pytest.raises(NotCovered, match=r"other is not in kernels\.json, which has toy"):
        db.attention(other, 1, Sides(), load(8, 100))
    with pytest.raises(NotCovered, match=r"over 4 GPUs .*1, 2"):
        db.attention(MODEL, 4, Sides(), load(8, 100))
    with pytest.raises(NotCovered, match="experts held"):
        db.experts(MODEL, 1, 4, Sides(), np.array([8.0]))
    with pytest.raises(NotCovered, match="decode steps only"):
        db.attention(MODEL, 1, Sides(), Load(np.array([8.0]), np.array([100.0]), np.array([9.0])))
    with pytest.raises(NotCovered, match="router on the ffn side"):
        db.experts(MODEL, 1, 1, Sides(router=Side.FFN), np.array([8.0]))
    with pytest.raises(NotCovered, match="2 attention ranks"):
        db.exchange(MODEL, 1, 2, 2, 1, np.array([8.0]))
    with pytest.raises(PlannerError, match="expected as many"):
        db.exchange(MODEL, 2, 1, 1, 1, np.array([8.0]))
    with pytest.raises(PlannerError, match="1 to 16 groups"):
        db.experts(MODEL, 1, 17, Sides(), np.array([8.0]))
    assert float(np.sum(db.exchange(MODEL, 2, 1, 2, 1, np.array([8.0])).seconds)) == 0.0


@pytest.mark.parametrize(
    "text", ["no json", "[]", "{}", '{"summary": {"machine": ""}, "details": {"models": {"m": 1}}}']
)
def test_other_files_are_refused(tmp_path: Path, text: str):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(PlannerError, match="afflux bench kernels"):
        MeasuredDB(path)
    with pytest.raises(PlannerError, match="can't be read"):
        MeasuredDB(tmp_path / "none.json")


@pytest.mark.parametrize("bad", [-1.0, None, True, "3", float("nan")])
def test_a_row_without_a_time_is_refused(tmp_path: Path, bad):
    rows = [{"threads": 1, "held": 16, "tokens": 4, "seconds": bad}]
    with pytest.raises(PlannerError, match="seconds is"):
        MeasuredDB(written(tmp_path, experts=rows))


def test_repeated_places_have_their_mean():
    table = Table.of([(1, 10, 2.0), (1, 10, 4.0), (1, 20, 6.0)])
    assert table.at(1, 10) == (3.0, Provenance.MEASURED)
    assert table.at(1, 15) == (4.5, Provenance.INTERPOLATED)
    assert table.at(1, 0)[0] == 0.0  # the line goes on, but no time is negative


def test_aggregated_is_both_sides_one_after_the_other(db: MeasuredDB):
    step = aggregated_step(db, MODEL, 32, 100)
    attention = layers_s(2, 32, 100) + outside_s(2, 32)
    assert step.seconds == pytest.approx(attention + experts_s(2, 16, 32))
    assert step.lanes == 1
    assert step.shares == {Provenance.MEASURED: 1.0}


def by_hand(batch: int, context: float, lanes: int) -> tuple[float, float]:
    """(layers as the runtime's chooser sees them, the step) of AFD by its definition."""
    n = batch / lanes
    attention = layers_s(1, n, context) + LAYERS * HOP_ATTENTION
    ffn = experts_s(1, 16, n) + LAYERS * HOP_FFN
    chain = attention + ffn + LAYERS * HOP_WIRE
    longest = max(attention, ffn)
    overlap = lanes * longest + (chain - longest) / LAYERS
    return max(lanes * longest, chain), outside_s(1, batch) + max(overlap, chain)


@pytest.mark.parametrize("batch", [4, 8, 32])
def test_afd_takes_the_lanes_that_pay(db: MeasuredDB, batch: int):
    most = min(4, batch // 4)
    layers = {lanes: by_hand(batch, 100, lanes)[0] for lanes in range(1, most + 1)}
    step = afd_step(db, MODEL, batch, 100)
    assert step.seconds == pytest.approx(by_hand(batch, 100, step.lanes)[1], rel=1e-6)
    assert layers[step.lanes] <= min(layers.values()) / (1 - 0.03)
    assert step.lanes == 1 if batch == 4 else step.lanes > 1
    assert set(step.parts) == {"attention", "a2f", "ffn", "f2a", "outside"}


def test_the_winner_is_who_makes_more_tokens(tmp_path: Path):
    slow = [
        {"threads": t, "held": 16, "tokens": n, "seconds": experts_s(1, 16, n)}
        for t in (1, 2) for n in BATCHES
    ]  # fmt: skip
    usual = compare(MeasuredDB(written(tmp_path)), MODEL, 32, 100)
    assert usual.winner == "aggregated" and usual.aggregated_rate > usual.afd_rate
    assert usual.afd_rate == pytest.approx(32 / usual.afd.seconds)
    # experts that gain nothing from a second core, and attention as before
    serial = compare(MeasuredDB(written(tmp_path, experts=slow)), MODEL, 32, 100)
    assert serial.aggregated_rate < usual.aggregated_rate
    assert serial.afd_rate == usual.afd_rate
    with pytest.raises(PlannerError, match="at least 1"):
        compare(MeasuredDB(written(tmp_path)), MODEL, 0, 100)
