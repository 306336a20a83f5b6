"""The online fit: what it learns from batches, what it forgets, and when not to trust it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.telemetry import RIDE_COLUMNS
from autoscaler.calibrate import CHECKS, FORGET_S, Calibrator
from autoscaler.model import Model
from autoscaler.policy import System
from autoscaler.predict import predict_step
from autoscaler.priors import Prior
from cluster.request_log import Done, First
from planner.control import Snapshot
from planner.digest import Percentiles
from planner.latency import Latencies, Linear
from tests.autoscaler import told
from tests.autoscaler.views import snapshot

LAYERS, TOP_K = 4, 2
TRUE = Latencies(
    attention=Linear(8e-5, 4e-3),
    ffn=Linear(2e-3, 6e-3),
    transfer=Linear(4e-6, 8e-4),
    prefill=Linear(1e-4, 0.0),
    outside=Linear(1e-4, 5e-3),
)
SYSTEM = System(slots=64, lanes=2)
LOADS = ((4, 60), (8, 100), (16, 150), (24, 300), (32, 500), (12, 900))
"""Requests of a step and context tokens of each."""


class Deployment:
    """Tells of steps and calls that take what ``latencies`` say, with some noise."""

    def __init__(self, latencies: Latencies = TRUE, noise: float = 0.03, lanes: int = 2):
        self.latencies = latencies
        self.lanes = lanes
        self.now = 0.0
        self._noise = noise
        self._rng = np.random.default_rng(7)
        self._number = 100
        self._bins: dict[int, list[float]] = {}
        self._rides = 0
        self._wire = np.zeros(4)

    def tell(
        self, to: Calibrator, loads: Sequence[tuple[int, float]], steps: int = 10, prefill: int = 0
    ) -> None:
        """Two seconds with steps of these loads."""
        self.now += 2.0
        rows = [self._row(*load, prefill=prefill) for load in loads for _ in range(steps)]
        self._number += len(rows)
        frames, tokens, hops, seconds = self._wire
        wire = {
            "frames": frames,
            "tokens": tokens,
            "hops": hops,
            "bytes_out": 0,
            "bytes_back": 0,
            "seconds": {"wire_out": seconds / 2, "wire_back": seconds / 2},
        }
        to.take("attention-0", told.attention(self.now, rows, self._number, wire=wire), self.now)
        bins = np.array([[key, *sums] for key, sums in sorted(self._bins.items())])
        facts: dict[str, Any] = {"bins": bins.reshape(-1, len(RIDE_COLUMNS)), "number": self._rides}
        to.take("ffn-0", told.ffn(self.now, **facts), self.now)

    def _spread(self, seconds: float) -> float:
        return float(seconds * self._rng.lognormal(0.0, self._noise)) if self._noise else seconds

    def _row(self, requests: int, each: float, prefill: int) -> list[float]:
        x, tokens = requests / self.lanes, requests * each
        at = self.latencies
        layers = self.lanes * self._spread(at.t_attention(tokens / self.lanes, x))
        layers += at.t_prefill(prefill) if prefill else 0.0
        outside = self._spread(at.outside(requests))
        for _ in range(self.lanes):
            self._ride(x)
            self._wire += (1, x, 1, self._spread(at.t_transfer(x)) / LAYERS)
        compute, wait = layers + outside, 0.02
        return told.row(
            self.now,
            step=compute + wait,
            compute=compute,
            wait=wait,
            lanes=self.lanes,
            tokens=requests + prefill,
            requests=requests + (prefill > 0),
            decoding=requests,
            prefill_tokens=prefill,
            context=tokens + prefill,
            layers=layers * (LAYERS - 1) / LAYERS,
        )

    def _ride(self, requests: float) -> None:
        pairs, seconds = requests * TOP_K, self._spread(self.latencies.t_ffn(requests)) / LAYERS
        sums = self._bins.setdefault(int(4 * math.log2(pairs)), [0.0] * (len(RIDE_COLUMNS) - 1))
        added = (1, pairs, pairs**2, seconds, seconds**2, pairs * seconds, requests)
        for place, value in enumerate(added):
            sums[place] += value
        self._rides += 1


def seen(**given: Any) -> Snapshot:
    """A window of a system that decodes 16 requests of 150 tokens in 2 lanes."""
    facts: dict[str, Any] = {
        "attention": 1,
        "ffn": 1,
        "batch": 8.0,
        "kv_tokens": 1200.0,
        "itl": Percentiles(),
    }
    return snapshot(**{**facts, **given})


def taught(calibrator: Calibrator | None = None, **given: Any) -> Calibrator:
    """A calibrator that was told of all loads a few times."""
    made = calibrator or Calibrator(LAYERS, TOP_K)
    deployment = Deployment(**given)
    for _ in range(6):
        deployment.tell(made, LOADS)
    deployment.tell(made, LOADS[:3], prefill=100)
    deployment.tell(made, LOADS[:3], prefill=400)
    return made


def fitted(calibrator: Calibrator, now: float = 20.0, **given: Any) -> Model:
    model = calibrator.model(seen(**given), SYSTEM, now)
    assert model is not None
    return model


# -- what it learns ------------------------------------------------------------------------------


def test_coefficients_are_found() -> None:
    model = fitted(taught())
    found = model.latencies
    assert model.reliable, model.why
    assert (model.lanes, model.layers) == (2, LAYERS)
    for tokens, requests in ((500, 4), (4000, 16), (8000, 32)):
        assert found.t_attention(tokens, requests) == pytest.approx(
            TRUE.t_attention(tokens, requests), rel=0.05
        )
    for load in (2, 8, 40):
        assert found.t_ffn(load) == pytest.approx(TRUE.t_ffn(load), rel=0.05)
        assert found.t_transfer(load) == pytest.approx(TRUE.t_transfer(load), rel=0.05)
    assert found.t_prefill(300) == pytest.approx(TRUE.t_prefill(300), rel=0.15)
    assert found.outside(16) == pytest.approx(TRUE.outside(16), rel=0.1)
    assert all(count > 2 for count in model.samples.values())
    for name, true in (("ffn.a", 2e-3), ("attention.a", 8e-5)):
        low, high = model.intervals[name]
        assert low <= true * 1.02 and high >= true * 0.98


def test_hiccups_change_little() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    deployment = Deployment()
    for _ in range(6):
        deployment.tell(calibrator, LOADS)
    deployment.latencies = TRUE.scaled(attention=10.0)
    deployment.tell(calibrator, LOADS[1:2])
    model = fitted(calibrator)
    assert model.latencies.t_attention(4000, 16) == pytest.approx(
        TRUE.t_attention(4000, 16), rel=0.05
    )


def test_a_steady_state_does_not_forget_other_loads() -> None:
    calibrator = taught()
    deployment = Deployment()
    deployment.now = 20.0
    deployment._number = 10_000
    for _ in range(300):
        deployment.tell(calibrator, LOADS[1:2], steps=2)
    model = fitted(calibrator, deployment.now)
    assert model.reliable, model.why
    assert model.latencies.t_ffn(40) == pytest.approx(TRUE.t_ffn(40), rel=0.08)
    assert sum(model.samples.values()) < 300


def test_it_follows_a_device_that_became_slower() -> None:
    calibrator = taught()
    deployment = Deployment(TRUE.scaled(ffn=2.0))
    deployment.now, deployment._number = 20.0, 10_000
    deployment._rides = 10_000
    for _ in range(6):
        deployment.tell(calibrator, LOADS)
    assert fitted(calibrator, 40.0).latencies.t_ffn(16) == pytest.approx(
        2 * TRUE.t_ffn(16), rel=0.08
    )


def test_what_is_old_goes() -> None:
    calibrator = taught()
    assert calibrator.model(seen(), SYSTEM, 20.0 + FORGET_S + 1) is None


def test_first_steps_count_for_nothing() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    slow = [told.row(1.0 + 0.1 * i, layers=9.0, compute=9.0) for i in range(3)]
    began = told.AHEAD + 0.9
    calibrator.take("attention-0", told.attention(3.0, slow, number=3, began=began), 3.0)
    young = [told.row(2.5, layers=9.0, compute=9.0)]
    calibrator.take("attention-0", told.attention(3.1, young, number=4, began=began), 3.1)
    assert calibrator._measured.counts["attention"] == 0
    warm = [told.row(3.5, layers=0.05)]
    calibrator.take("attention-0", told.attention(4.0, warm, number=5, began=began), 4.0)
    assert calibrator._measured.counts["attention"] == 1


def test_steps_that_waited_for_a_table_count_for_nothing() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    rows = [told.row(3.5, interrupted=1.0)]
    calibrator.take("attention-0", told.attention(4.0, rows), 4.0)
    assert calibrator._measured.counts["attention"] == 0


def test_a_batch_that_comes_again_changes_nothing() -> None:
    once, twice = Calibrator(LAYERS, TOP_K), Calibrator(LAYERS, TOP_K)
    one, two = Deployment(noise=0.0), Deployment(noise=0.0)
    for _ in range(4):
        one.tell(once, LOADS)
        two.tell(twice, LOADS)
    before = twice._measured.counts
    rows = [told.row(1.0, layers=9.0)]
    twice.take("attention-0", told.attention(9.0, rows, number=101), 9.0)
    assert twice._measured.counts == before == once._measured.counts


def test_another_life_of_a_process_begins_anew() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    rows = [told.row(1.0)] * 5
    calibrator.take("attention-0", told.attention(2.0, rows), 2.0)
    other = told.attention(4.0, [told.row(3.0, requests=40.0)], number=90, incarnation="b")
    calibrator.take("attention-0", other, 4.0)
    assert calibrator._measured.counts["attention"] == 2


def test_lengths_come_from_requests() -> None:
    calibrator = taught()
    events = [First(n, told.AHEAD, 0.1, 100 + n, 40) for n in range(1, 11)]
    done = [
        Done(11, told.AHEAD, told.AHEAD, 0.1, 0.1, 1.0, 100, 50, 0, "stop", 0),
        Done(12, told.AHEAD, told.AHEAD, 0.1, 0.1, 1.0, 100, 70, 0, "length", 0),
        Done(13, told.AHEAD, told.AHEAD, 0.1, 0.1, 1.0, 100, 999, 0, "abort", 0),
    ]
    calibrator.take("frontend-0", told.frontend(20.0, [*events, *done]), 20.0)
    model = fitted(calibrator)
    assert model.prompt_mean == pytest.approx(105.5)
    assert model.prefix_hit == pytest.approx(40 / 105.5)
    assert model.output_mean == pytest.approx(60.0)


def test_contexts_that_run_come_before_those_that_ended() -> None:
    calibrator = taught()
    assert fitted(calibrator, batch=8.0, kv_tokens=2400.0, theta=90.0).theta == 300.0
    assert fitted(calibrator, batch=0.0, kv_tokens=0.0, theta=90.0).theta == 90.0
    nobody = fitted(calibrator, batch=math.nan, kv_tokens=math.nan, theta=math.nan)
    assert nobody.theta == 90.0  # the last that was known


# -- priors --------------------------------------------------------------------------------------


def test_a_prior_is_what_is_believed_at_first() -> None:
    model = Calibrator(LAYERS, TOP_K, Prior(TRUE)).model(seen(), SYSTEM, 0.0)
    assert model is not None and model.latencies == TRUE and model.reliable


def test_without_anything_there_is_no_model() -> None:
    assert Calibrator(LAYERS, TOP_K).model(seen(), SYSTEM, 0.0) is None


def test_one_load_gives_the_level_and_the_prior_the_shape() -> None:
    calibrator = Calibrator(LAYERS, TOP_K, Prior(TRUE))
    deployment = Deployment(TRUE.scaled(attention=1.5, ffn=1.5, transfer=1.5))
    for _ in range(6):
        deployment.tell(calibrator, LOADS[2:3])
    model = fitted(calibrator)
    assert model.reliable
    for load in (2, 8, 30):
        assert model.latencies.t_ffn(load) == pytest.approx(1.5 * TRUE.t_ffn(load), rel=0.1)
    assert model.latencies.t_attention(4000, 16) == pytest.approx(
        1.5 * TRUE.t_attention(4000, 16), rel=0.1
    )


def test_measurements_override_a_prior_that_is_wrong() -> None:
    wrong = Latencies(Linear(1e-3, 0.0), Linear(1e-5, 0.5), Linear(1e-2, 0.0))
    model = fitted(taught(Calibrator(LAYERS, TOP_K, Prior(wrong))))
    for tokens, requests in ((500, 4), (4000, 16)):
        assert model.latencies.t_attention(tokens, requests) == pytest.approx(
            TRUE.t_attention(tokens, requests), rel=0.08
        )
    assert model.latencies.t_ffn(10) == pytest.approx(TRUE.t_ffn(10), rel=0.08)


def test_an_emulated_wire_is_no_quicker_than_its_line() -> None:
    emulated = replace(TRUE, transfer=Linear(0.0, 0.05))
    model = fitted(taught(Calibrator(LAYERS, TOP_K, Prior(emulated, emulated=True))))
    assert model.latencies.t_transfer(8) == pytest.approx(0.05, rel=0.02)


# -- trust ---------------------------------------------------------------------------------------


def test_too_little_is_unreliable_and_says_so() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    deployment = Deployment()
    for _ in range(2):
        deployment.tell(calibrator, LOADS[1:2])
    model = fitted(calibrator)
    assert not model.reliable
    assert "6 are needed" in model.why and "no slope" in model.why


def test_contexts_of_one_length_are_no_ground_for_others() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    deployment = Deployment()
    for _ in range(6):
        deployment.tell(calibrator, [(4, 100), (8, 100), (16, 100), (32, 100)])
    model = fitted(calibrator)
    assert not model.reliable and "one length" in model.why


def test_a_load_far_outside_is_unreliable() -> None:
    model = fitted(taught(), batch=16.0, kv_tokens=16 * 9000.0)
    assert not model.reliable and "outside" in model.why


def test_a_load_that_was_only_seen_with_prompts_is_not_outside() -> None:
    """In an overload no step is without them, and that is when a model is needed."""
    flood: dict[str, Any] = {"batch": 100.0, "kv_tokens": 100 * 900.0}
    calibrator, deployment = taught(), Deployment()
    assert "outside" in fitted(calibrator, **flood).why
    deployment.now, deployment._number = 30.0, 10_000
    deployment.tell(calibrator, [(200, 900)], prefill=100)
    model = fitted(calibrator, 33.0, **flood)
    assert model.reliable, model.why


def windows(calibrator: Calibrator, factor: float, count: int, start: float = 40.0) -> Model:
    """So many windows whose TPOT is ``factor`` times what the stages give."""
    stages = Model(TRUE, theta=150.0, prompt_mean=100.0, output_mean=100.0, lanes=2, layers=LAYERS)
    observed = factor * predict_step(stages, SYSTEM, 1, 1, 16)
    gaps = Percentiles(500, observed, observed, observed, observed, observed, observed)
    model = fitted(calibrator, start)
    for number in range(count):
        model = fitted(calibrator, start + 10.0 * (number + 1), itl=gaps)
    return model


def test_windows_are_compared_with_what_was_predicted_before() -> None:
    model = windows(taught(), 1.0, 6)
    assert len(model.checks) == 6
    assert model.error < 0.05 and model.reliable
    check = model.checks[-1]
    assert (check.attention, check.ffn, check.running) == (1, 1, pytest.approx(16.0))
    assert check.error == pytest.approx(check.predicted / check.observed - 1)


def test_a_steady_factor_is_learnt() -> None:
    model = windows(taught(), 1.4, 12)
    assert model.checks[0].error == pytest.approx(1 / 1.4 - 1, abs=0.04)
    assert abs(model.checks[-1].error) < 0.05
    assert model.latencies.t_ffn(16) == pytest.approx(1.4 * TRUE.t_ffn(16), rel=0.06)


def test_predictions_that_are_off_make_it_unreliable() -> None:
    model = windows(taught(), 4.0, 8)  # beyond what a factor may correct
    assert model.error > 0.25
    assert not model.reliable and "off by" in model.why


def test_it_recovers_when_predictions_are_right_again() -> None:
    calibrator = taught()
    assert not windows(calibrator, 4.0, 4).reliable
    assert windows(calibrator, 1.0, CHECKS, start=200.0).reliable


@pytest.mark.parametrize(
    "change",
    [
        {"attention_preparing": 1},
        {"attention_draining": 1},
        {"ffn_preparing": -1},
        {"window": 1.0},
        {"batch": math.nan},
        {"batch": 0.0},
        {"attention": 0},
    ],
)
def test_windows_that_say_nothing_are_not_compared(change: dict[str, Any]) -> None:
    calibrator = taught()
    gaps = Percentiles(500, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    fitted(calibrator, 40.0)
    assert not fitted(calibrator, 60.0, **{"itl": gaps, **change}).checks


# -- always --------------------------------------------------------------------------------------


def test_a_refit_is_cheap() -> None:
    calibrator = Calibrator(LAYERS, TOP_K)
    deployment = Deployment()
    rng = np.random.default_rng(1)
    for number in range(80):
        loads = [(int(rng.integers(2, 64)), float(rng.integers(20, 2000))) for _ in range(6)]
        prefill = int(rng.integers(1, 400)) if number % 2 else 0
        deployment.tell(calibrator, loads, steps=3, prefill=prefill)
    took = []
    for number in range(5):
        began = time.process_time()
        fitted(calibrator, 200.0 + number)
        took.append(time.process_time() - began)
    assert sum(calibrator._measured.counts.values()) > 150
    assert min(took) < 0.05


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 200), st.floats(1, 1e5)), min_size=1, max_size=4),
            st.integers(0, 500),
        ),
        max_size=5,
    ),
    st.booleans(),
    st.floats(0, 1e4) | st.just(math.nan),
    st.floats(0, 1e7) | st.just(math.nan),
)
def test_whatever_it_is_told_the_model_is_sound(
    messages: list[tuple[list[tuple[int, float]], int]], prior: bool, batch: float, tokens: float
) -> None:
    calibrator = Calibrator(LAYERS, TOP_K, Prior(TRUE) if prior else None)
    deployment = Deployment(noise=0.3)
    for loads, prefill in messages:
        deployment.tell(calibrator, loads, steps=2, prefill=prefill)
    model = calibrator.model(seen(batch=batch, kv_tokens=tokens), SYSTEM, deployment.now)
    if model is None:
        assert not prior
        return
    assert model.reliable == (not model.why)
    assert model.imbalance >= 1 and model.layers == LAYERS
    for low, high in model.intervals.values():
        assert 0 <= low <= high < math.inf
    assert 0 <= predict_step(model, SYSTEM, 2, 3, 20) < math.inf
