"""The search: what is turned and how far, what it finds, and what comes out to be pasted."""

import itertools
from typing import Literal

import pytest
import yaml
from hypothesis import given as for_all
from hypothesis import strategies as st
from pydantic import Field

from autoscaler import policy, registry
from autoscaler.knobs import BadRange, Knob, knobs, nested, with_settings
from autoscaler.policy import Proposal
from autoscaler.reasons import Reason
from autoscaler.tune import Trial, Tuning, front, tune
from cluster.spec import AutoscalerSpec

from .replays import scenario


class FixedParameters(policy.Parameters):
    """All kinds of parameters."""

    attention: int = Field(default=2, ge=1, le=5)
    """Workers."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Not used."""
    wide: float = 3.0
    """Not used."""
    way: Literal["up", "down"] = "up"
    """Not used."""
    calm: bool = False
    """Refused when true."""
    name: str = "x"
    """Not searched."""


class Fixed:
    """As many attention workers as its parameters say."""

    name = "fixed"
    Parameters = FixedParameters

    def __init__(self, parameters: FixedParameters):
        if parameters.calm:
            raise registry.BadPolicy("never calm")
        self.parameters = parameters

    def propose(self, view: object) -> Proposal:
        return Proposal(self.parameters.attention, 2, Reason.FIXED)


FIXED = f"{__name__}:Fixed"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests are not on the path; the registry gets the class as a plug-in would give it."""
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda name: Fixed if name == FIXED else find(name))


def test_ranges_come_from_the_constraints() -> None:
    found = {knob.name: knob for knob in knobs(FIXED)}
    assert found["attention"] == Knob("attention", "int", 1, 5)
    assert found["share"].low == pytest.approx(0.125)
    assert 0.5 < found["share"].high < 1
    assert (found["wide"].low, found["wide"].high) == (0.75, 12.0)
    assert found["way"].choices == ("up", "down")
    assert found["calm"].choices == (False, True)
    assert "name" not in found
    assert {"cooldown_s", "shrink_cooldown_s", "window_s"} <= set(found)


def test_ranges_can_be_given_and_names_fixed() -> None:
    found = {k.name: k for k in knobs(FIXED, {"share": (0.2, 0.3), "max_step": (1, 4)}, ["wide"])}
    assert (found["share"].low, found["share"].high) == (0.2, 0.3)
    assert found["max_step"].kind == "int"
    assert "wide" not in found


def test_inner_parameters_can_be_turned_by_their_dotted_names() -> None:
    found = {k.name: k for k in knobs("predictive", {"inner.parameters.high": (0.6, 0.9)})}
    assert found["inner.parameters.high"].kind == "float"
    values = {"inner.parameters.high": 0.8, "horizon": 60.0}
    made = registry.make("predictive", nested({"inner": {"policy": "slo_feedback"}}, values))
    assert made.parameters.inner.parameters == {"high": 0.8}


@pytest.mark.parametrize(
    ("name", "bounds", "words"),
    [("nothing", (0, 1), "attention"), ("share", (0.5, 0.5), "least < most")],
)
def test_ranges_that_make_no_sense_are_refused(name: str, bounds: tuple, words: str) -> None:
    with pytest.raises(BadRange, match=words):
        knobs(FIXED, {name: bounds})


def test_every_policy_of_ours_can_be_turned_and_made_at_the_ends_of_its_ranges() -> None:
    for name in registry.BUILT_IN:
        for knob in knobs(name):
            assert knob.choices or knob.low < knob.high
            if knob.is_setting or knob.name in ("low", "high"):
                continue  # settings are not the policy's; low and high are about each other
            ends = knob.choices or (knob.low, knob.high)
            for end in ends:
                value = int(end) if knob.kind == "int" else end
                registry.find(name).Parameters.model_validate({knob.name: value})


def test_settings_reach_the_scenario() -> None:
    given = with_settings(
        scenario([5.0]), {"cooldown_s": 7.0, "window_s": 40.0, "max_step": 3, "low": 0.5}
    )
    assert given.timing.cooldown == 7.0
    assert given.window == 40.0
    assert given.limits.max_step == 3
    assert given.timing.least_window == 4.0


def test_a_search_finds_the_cheapest_that_holds() -> None:
    given = scenario([25.0], seconds=8.0, attention=2, ffn=2)
    found = tune(
        given,
        FIXED,
        knobs(FIXED, fixed=["share", "wide", "way", "cooldown_s", "shrink_cooldown_s", "window_s"]),
        trials=8,
        jobs=1,
    )
    assert len(found.trials) == 8
    assert found.trials[0].values == {}
    best = found.chosen(0.0)
    assert best.actor_seconds == min(trial.actor_seconds for trial in found.trials)
    most = found.chosen(2.0)
    assert most.attainment == max(trial.attainment for trial in found.trials)
    assert found.refused >= 1
    again = tune(given, FIXED, found.knobs, trials=8, jobs=1)
    assert again == found


def trial(attainment: float, seconds: float) -> Trial:
    return Trial({}, attainment, seconds, 0, 0, 1.0, 0.1)


@for_all(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 100)), min_size=1, max_size=20))
def test_nothing_beats_the_front(points: list[tuple[float, float]]) -> None:
    trials = [trial(*point) for point in points]
    best = front(trials)
    for one in trials:
        assert any(
            b.attainment >= one.attainment and b.actor_seconds <= one.actor_seconds for b in best
        )
    for before, after in itertools.pairwise(best):
        assert before.actor_seconds < after.actor_seconds
        assert before.attainment < after.attainment


def test_the_section_can_be_pasted_into_a_spec() -> None:
    values = {"low": 0.5, "cooldown_s": 12.0, "max_step": 3}
    turned = [Knob("low", "float"), Knob("cooldown_s", "float"), Knob("max_step", "int")]
    found = Tuning("slo_feedback", {"high": 0.8}, turned, [trial(1, 1)], 0)
    section = found.section(Trial(values, 1.0, 1.0, 0, 0, 1.0, 0.1))
    spec = AutoscalerSpec.model_validate(yaml.safe_load(yaml.safe_dump(section)))
    assert spec.parameters == {"high": 0.8, "low": 0.5}
    assert (spec.cooldown_s, spec.max_step) == (12.0, 3)
    registry.make(spec.policy, spec.parameters)
