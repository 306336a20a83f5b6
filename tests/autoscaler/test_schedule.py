"""Bounds by the time of day."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from autoscaler import registry
from autoscaler.limits import Counts, Limits
from autoscaler.policies.schedule import DAYS, ScheduleParameters, Window
from autoscaler.reasons import Reason
from tests.autoscaler.views import NONSENSE, all_limits, counts, snapshot, view

STATIC = {"policy": "static"}


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def window(**given: Any) -> Window:
    return Window.model_validate(given)


@pytest.mark.parametrize(
    ("given", "inside", "outside"),
    [
        # 2026-03-02 is a Monday
        ({"from": "08:00", "to": "20:00"}, ["2026-03-02T08:00"], ["2026-03-02T20:00"]),
        (
            {"days": ["mon"], "from": "22:00", "to": "06:00"},
            ["2026-03-02T22:00", "2026-03-03T05:59"],
            ["2026-03-02T05:00", "2026-03-03T06:00", "2026-03-03T23:00"],
        ),
        ({"days": ["mon"]}, ["2026-03-02T00:00", "2026-03-02T23:59"], ["2026-03-03T00:00"]),
        ({"days": ["sun"], "from": "23:00", "to": "01:00"}, ["2026-03-02T00:30"], []),
        ({"days": []}, [], ["2026-03-02T12:00"]),
    ],
)
def test_when_a_window_holds(given: dict[str, Any], inside: list[str], outside: list[str]):
    for text in inside:
        assert window(**given).holds(datetime.fromisoformat(text))
    for text in outside:
        assert not window(**given).holds(datetime.fromisoformat(text))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("{from: 08:00, to: 20:30}", "08:00-20:30"),
        ("{from: '08:00', to: '20:30'}", "08:00-20:30"),
        ("{from: 9:05, to: 24:00}", "09:05-00:00"),
        ("{from: 00:00, to: '24:00'}", "00:00-00:00"),
    ],
)
def test_times_of_day_in_yaml(text: str, shown: str):
    # YAML 1.1 takes 20:30 for a number to the base of 60.
    assert str(window(**yaml.safe_load(text))).endswith(shown)


@pytest.mark.parametrize("value", ["8", "25:00", 1441, -1, True, 8.5, "08:00+02:00", None])
def test_what_is_no_time_of_day_is_refused(value: object):
    with pytest.raises(ValidationError):
        window(**{"from": value})


def test_the_zone_and_its_summer_time_are_followed():
    policy = registry.make(
        "schedule",
        {
            "inner": STATIC,
            "zone": "Europe/Berlin",
            "windows": [{"from": "08:00", "to": "20:00", "min_attention": 6}],
        },
    )

    def attention(text: str) -> int | None:
        return policy.propose(view(wall=at(text))).attention

    # 08:00 in Berlin is 07:00 UTC in winter and 06:00 UTC in summer.
    assert [attention(t) for t in ("2026-01-05T06:59", "2026-01-05T07:00")] == [None, 6]
    assert [attention(t) for t in ("2026-07-06T05:59", "2026-07-06T06:00")] == [None, 6]


@pytest.mark.parametrize(
    ("given", "inner", "limits", "result"),
    [
        ({"min_ffn": 6}, {}, Limits(), (4, 6)),
        ({"max_ffn": 2}, {}, Limits(), (4, 2)),
        ({"min_attention": 5, "max_ffn": 3}, {"attention": 2, "ffn": 8}, Limits(), (5, 3)),
        ({"min_attention": 2}, {"attention": 3}, Limits(), (3, 4)),
        # the limits win
        ({"min_attention": 20}, {}, Limits(), (8, 4)),
        ({"max_attention": 1}, {}, Limits(attention=(3, 8)), (3, 4)),
        ({"min_attention": 8, "min_ffn": 8}, {}, Limits(max_total=9), (8, 1)),
        # a fixed budget keeps its sum
        ({"min_attention": 6}, {}, Limits(min_total=8, max_total=8), (6, 2)),
        ({"max_attention": 2}, {}, Limits(min_total=8, max_total=8), (2, 6)),
    ],
)
def test_bounds(given: dict[str, Any], inner: dict[str, int], limits: Limits, result):
    policy = registry.make(
        "schedule", {"inner": {**STATIC, "parameters": inner}, "windows": [given]}
    )
    proposal = policy.propose(view(limits=limits))
    there = view().there
    got = Counts(proposal.attention or there.attention, proposal.ffn or there.ffn)
    assert got == Counts(*result)


def test_the_first_window_counts_and_its_word_is_explained():
    windows = [
        {"days": ["mon"], "min_attention": 6},
        {"min_attention": 7},
    ]
    policy = registry.make("schedule", {"inner": STATIC, "windows": windows})
    monday, tuesday = (policy.propose(view(wall=at(f"2026-03-0{day}T12:00"))) for day in (2, 3))
    assert (monday.attention, tuesday.attention) == (6, 7)
    assert monday.reason is Reason.FIXED
    assert monday.detail == "mon 00:00-00:00: 6A4F; static wants 4A4F"


def test_outside_of_all_windows_the_inner_policy_is_alone():
    policy = registry.make("schedule", {"inner": STATIC})
    assert policy.propose(view()) == registry.make("static").propose(view())


def test_the_inner_policy_plans_within_the_window():
    windows = [{"max_attention": 4}]
    policy = registry.make("schedule", {"windows": windows})
    seen = view(snapshot(ttft=9.0))
    for _ in range(3):
        proposal = policy.propose(seen)
    assert proposal.attention == 4


def test_parameters_survive_being_written_and_read():
    given = ScheduleParameters.model_validate(
        {"windows": [{"days": ["sat"], "from": "10:00", "to": "12:30", "max_ffn": 3}]}
    )
    written = given.model_dump(mode="json")
    assert written["windows"][0]["from"] == "10:00:00"
    assert ScheduleParameters.model_validate(written) == given


@given(NONSENSE)
def test_nonsense_of_the_inner_policy_is_handed_on(answer: object):
    policy = registry.make("schedule", {"inner": STATIC, "windows": [{"min_attention": 6}]})

    class Inner:
        def propose(self, view: object) -> object:
            return answer

    policy._inner = Inner()  # type: ignore[attr-defined]
    got = policy.propose(view())
    untouched = got is answer
    whole = all(type(n) is int for n in (getattr(got, "attention", ""), getattr(got, "ffn", "")))
    assert untouched or whole


@given(all_limits(), st.data())
def test_proposals_respect_limits_and_window(limits: Limits, data: st.DataObject):
    bound = st.none() | st.integers(1, 10)
    given = {
        f"{side}_{role}": data.draw(bound) for side in ("min",) for role in ("attention", "ffn")
    }
    there = data.draw(counts(limits))
    policy = registry.make("schedule", {"inner": STATIC, "windows": [given]})
    seen = snapshot(attention=there.attention, ffn=there.ffn)
    wall = data.draw(st.floats(0.0, 4e9))
    proposal = policy.propose(view(seen, limits, wall=wall))
    got = Counts(proposal.attention or there.attention, proposal.ffn or there.ffn)
    assert limits.allow(got)
    narrow = window(**given).narrow(limits)
    assert narrow.allow(got)


def test_every_day_has_a_name():
    assert len(set(DAYS)) == 7
