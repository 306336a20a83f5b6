"""Fits the latency model to what actors and frontends tell while they serve.

Stage times come from the stages themselves, so that they hold for any numbers of workers: attention
from engine steps, experts from kernel calls, transfer from hops. (``planner.fitting`` calibrates on
whole steps of one attention with one FFN worker, which a live system seldom has.) What remains is
checked: each window's TPOT against what the model of before had predicted for it; where that is off
by a steady factor, all stages are, as on a machine that others use too.

Pure: all data and time come with the calls. Not for windows and percentiles (``telemetry``), fits
(``stage_fits``) or predictions (``predict``).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from autoscaler.measured import Measured
from autoscaler.model import Check, Model
from autoscaler.policy import System
from autoscaler.predict import context_of, predict_step
from autoscaler.priors import Prior
from autoscaler.samples import Floats
from autoscaler.stage_fits import fit_lane, fit_stage
from planner.control import Snapshot
from planner.curves import Linear
from planner.latency import Latencies
from planner.regression import Fit

FORGET_S = 1800.0
"""Age at which a measurement goes, even of a load that was not seen since."""
FEWEST = {"attention": 6, "ffn": 6, "transfer": 3}
"""Samples of a stage that its times may rest on; fewer do where there is a prior."""
LEAST_SPAN = 1.5
"""Greatest over least load that a slope needs; less does where there is a prior."""
MOST_BEYOND = 4.0
"""How far from the measured loads the present one may be, as a factor."""
MOST_ERROR = 0.25
CHECKS = 24
"""Windows that are kept for people."""
RECENT, LEAST_CHECKS = 8, 3
"""Windows that the error is the median of, and the fewest that make one."""
CHECK_S, LEAST_WINDOW = 5.0, 4.0
LEAST_GAPS = 30
"""Times between tokens that a window needs to be compared."""
MOST_LEVEL = 2.0
_NO_TIME = Linear(0.0, 0.0)


class Calibrator:
    """Belongs to one deployment.

    Args:
        layers: MoE layers of the model.
        top_k: experts per token.
        prior: what is believed at first.
    """

    def __init__(self, layers: int, top_k: int, prior: Prior | None = None):
        self._layers = layers
        self._prior = prior
        self._measured = Measured(layers, top_k)
        self._raw: Model | None = None
        self._level = 1.0
        self._checks: deque[Check] = deque(maxlen=CHECKS)
        self._ratios: deque[float] = deque(maxlen=RECENT)
        self._checked = -math.inf

    def take(self, name: str, batch: Mapping[str, Any], now: float) -> None:
        """Take in what an actor or a frontend told; see ``Measured.take``."""
        self._measured.take(name, batch, now)

    # -- what it comes to ------------------------------------------------------------------------

    def model(self, snapshot: Snapshot, system: System, now: float) -> Model | None:
        """The model for the present load; the one before is compared with the window first.

        Args:
            snapshot: of the window up to now; gives contexts, moments and imbalance.
            system: see ``predict``.
            now: on the clock of the calls of ``take``.

        Returns:
            None while a stage was never measured and there is no prior.
        """
        self._measured.forget(now - FORGET_S)
        self._compare(snapshot, system, now)
        fitted = self._fitted()
        if fitted is None:
            return None
        latencies, fits = fitted
        raw = Model(latencies, lanes=self._measured.lanes, layers=self._layers)
        self._raw = raw = self._with_load(raw, snapshot)
        level = self._level
        errors = [abs(check.error) for check in self._checks][-RECENT:]
        model = replace(
            raw,
            latencies=latencies.scaled(attention=level, ffn=level, transfer=level, prefill=level),
            level=level,
            error=float(np.median(errors)) if len(errors) >= LEAST_CHECKS else math.nan,
            samples=self._measured.counts,
            intervals=_intervals(fits, level),
            checks=tuple(self._checks),
        )
        doubts = self._doubts(model, fits, snapshot)
        return replace(model, reliable=not doubts, why="; ".join(doubts))

    def _with_load(self, model: Model, snapshot: Snapshot) -> Model:
        """Moments of the live load: contexts of those that run, else of those that have ended."""
        old = self._raw or model
        prompt, output, cached = self._measured.lengths
        return replace(
            model,
            theta=_known(snapshot.context, snapshot.theta, old.theta),
            nu2=_known(snapshot.nu2, old.nu2),
            prompt_mean=_known(prompt, snapshot.prompt_mean),
            output_mean=_known(output, snapshot.output_mean),
            prefix_hit=_known(cached, snapshot.prefix_hit, 0.0),
            imbalance=max(1.0, _known(snapshot.imbalance, old.imbalance)),
        )

    # -- fits ------------------------------------------------------------------------------------

    def _fitted(self) -> tuple[Latencies, dict[str, Fit]] | None:
        """Latencies as the stages were measured, and the fits of those that were."""
        measured, prior = self._measured, self._believed
        tokens, requests, lanes, seconds, outside, classes = measured.attention.columns()
        served, kernels, rides = measured.ffn.columns()
        frames, hops, ways = measured.transfer.columns()
        if self._prior is not None and self._prior.emulated:
            # Hops are measured on the real wire; the emulated one takes its time beside it.
            hops = np.maximum(hops, self._prior.latencies.transfer(frames))
        found = {
            "attention": fit_lane(tokens, requests, seconds, classes, prior),
            "outside": fit_stage(requests * lanes, outside, classes, None),
            "ffn": fit_stage(served, kernels, rides, prior.ffn if prior else None, curved=True),
            "transfer": fit_stage(frames, hops, ways, prior.transfer if prior else None),
        }
        fits = {stage: fit for stage, fit in found.items() if fit is not None}
        if prior is None and not FEWEST.keys() <= fits.keys():
            return None
        latencies = prior or Latencies(_NO_TIME, _NO_TIME, _NO_TIME)
        curves: dict[str, Any] = {stage: fit.curve for stage, fit in fits.items()}
        if "attention" in fits:
            curves["attention_per_request"] = fits["attention"].per_request
        latencies = replace(latencies, **curves, source="telemetry" if curves else latencies.source)
        prefill = self._prefill_fit(latencies)
        if prefill is not None:
            fits["prefill"] = prefill
            latencies = replace(latencies, prefill=prefill.curve)
        return latencies, fits

    @property
    def _believed(self) -> Latencies | None:
        return None if self._prior is None else self._prior.latencies

    def _prefill_fit(self, latencies: Latencies) -> Fit | None:
        """What chunks of prompts add to the attention of a step."""
        chunk, others, requests, lanes, seconds, classes = self._measured.prefill.columns()
        if not len(chunk):
            return None
        alone = lanes * latencies.t_attention(others / lanes, requests / lanes)
        added = np.maximum(seconds - np.where(requests > 0, alone, 0.0), 0.0)
        prior = self._believed
        return fit_stage(chunk, added, classes, prior.prefill if prior else None)

    # -- checks ----------------------------------------------------------------------------------

    def _compare(self, snapshot: Snapshot, system: System, now: float) -> None:
        """Hold the last model against a window's TPOT, and learn by what factor it is off."""
        requests = snapshot.batch * self._measured.lanes_mean
        whole = not (
            snapshot.attention_preparing or snapshot.attention_draining or snapshot.ffn_preparing
        )
        if (
            self._raw is None
            or not whole
            or min(snapshot.attention, snapshot.ffn) < 1
            or not requests > 0
            or not snapshot.itl.mean > 0
            or snapshot.itl.count < LEAST_GAPS
            or snapshot.window < LEAST_WINDOW
            or now - self._checked < max(CHECK_S, snapshot.window / 2)
        ):
            return
        self._checked = now
        raw = self._with_load(self._raw, snapshot)
        running = requests * snapshot.attention
        predicted = predict_step(raw, system, snapshot.attention, snapshot.ffn, running)
        observed = snapshot.itl.mean
        self._checks.append(
            Check(
                now,
                snapshot.attention,
                snapshot.ffn,
                running,
                context_of(raw),
                self._level * predicted,
                observed,
            )
        )
        self._ratios.append(observed / predicted)
        level = float(np.median(self._ratios))
        self._level = min(max(level, 1 / MOST_LEVEL), MOST_LEVEL)

    def _doubts(self, model: Model, fits: Mapping[str, Fit], snapshot: Snapshot) -> list[str]:
        """Why nothing should be derived from the model."""
        doubts = []
        tokens, requests, *_ = self._measured.attention.columns()
        # under a flood every step has prompts: those loads were measured too
        _, others, decoding, lanes, *_ = self._measured.prefill.columns()
        loads, *_ = self._measured.ffn.columns()
        if self._prior is None:
            for stage, fewest in FEWEST.items():
                if model.samples[stage] < fewest:
                    doubts.append(f"{stage}: {model.samples[stage]} samples, {fewest} are needed")
            if _span(loads) < LEAST_SPAN:
                doubts.append(
                    f"ffn: loads of {loads.min():.3g} to {loads.max():.3g} requests show no slope"
                )
            if fits["attention"].not_varied in ("context", "load"):
                doubts.append("attention: contexts of one length show no slope")
        far = max(
            _beyond(snapshot.kv_tokens, np.append(tokens, others / lanes)),
            _beyond(snapshot.batch, np.append(requests, decoding / lanes)),
        )
        if far > MOST_BEYOND:
            doubts.append(f"the present load is {far:.1f} times outside of what was measured")
        if model.error > MOST_ERROR:
            doubts.append(
                f"predicted TPOT was off by {model.error:.0%} in the median of the last "
                f"{min(RECENT, len(model.checks))} windows"
            )
        return doubts


def _intervals(fits: Mapping[str, Fit], level: float) -> dict[str, tuple[float, float]]:
    found = {}
    for stage, fit in fits.items():
        for name, interval in (("a", fit.a_ci), ("b", fit.b_ci)):
            if interval is not None:
                found[f"{stage}.{name}"] = (level * interval[0], level * interval[1])
    return found


def _known(*values: float) -> float:
    """The first that is a number; nan if none is."""
    return next((value for value in values if math.isfinite(value)), math.nan)


def _span(loads: Floats) -> float:
    return float(loads.max() / loads.min()) if len(loads) and loads.min() > 0 else 1.0


def _beyond(load: float, loads: Floats) -> float:
    """By what factor a load is outside of others; 1 inside, and where nothing is known."""
    loads = loads[loads > 0]
    if not load > 0 or not len(loads):
        return 1.0
    return max(1.0, load / float(loads.max()), float(loads.min()) / load)
