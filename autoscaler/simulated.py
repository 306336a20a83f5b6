"""Lets the controller's core decide in the planner's simulator, tick by tick as it would live.

What a live controller asks the manager for follows from the snapshot here: a change is under way
while workers start or drain. Not for running simulations: see ``replay``.
"""

from __future__ import annotations

import math
from dataclasses import replace

from autoscaler.core import Core, Situation
from autoscaler.model import Model
from autoscaler.policy import Decision
from planner.control import Snapshot, Target

_MOMENTS = ("theta", "nu2", "prompt_mean", "output_mean", "prefix_hit", "imbalance")


class Simulated:
    """A core as a ``planner.control.Policy``.

    Args:
        core: decides; its times are in the simulation's unit.
        model: what the core is told of stage times; its moments follow the snapshots, the newest
            that are known. None tells it nothing.
        wall: Unix time of the simulation's start, for policies that know the time of day.

    Attributes:
        decisions: one per tick, in order of time.
    """

    def __init__(self, core: Core, model: Model | None = None, wall: float = 0.0):
        self.decisions: list[Decision] = []
        self._core = core
        self._model = model
        self._wall = wall

    def decide(self, snapshot: Snapshot) -> Target | None:
        """The core's target for this snapshot."""
        if self._model is not None:
            self._model = with_moments(self._model, snapshot)
        situation = Situation(changing=_changing(snapshot))
        wall = self._wall + snapshot.now
        decision = self._core.tick(snapshot, self._model, situation, wall)
        self.decisions.append(decision)
        return None if decision.target is None else Target(*decision.target)


def with_moments(model: Model, snapshot: Snapshot) -> Model:
    """The model with the moments of a snapshot's load, as far as it knows them."""
    known = {
        name: value for name in _MOMENTS if math.isfinite(value := float(getattr(snapshot, name)))
    }
    if math.isfinite(snapshot.context):  # those that run come first, as in the live calibrator
        known["theta"] = snapshot.context
    return replace(model, **known) if known else model  # type: ignore[arg-type]


def _changing(snapshot: Snapshot) -> str:
    """What is under way, in words; empty when nothing is."""
    parts = (
        (snapshot.attention_preparing, "attention starting"),
        (snapshot.ffn_preparing, "FFN under way"),
        (snapshot.attention_draining, "attention draining"),
    )
    return ", ".join(f"{count} {what}" for count, what in parts if count)
