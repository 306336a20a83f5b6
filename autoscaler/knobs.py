"""What of a policy can be turned, and how far: ranges from its parameters' own constraints.

Also the settings of the spec's autoscaler section that replays depend on. Not for searching: see
``tune``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from actors.errors import AffluxError
from autoscaler import registry
from autoscaler.replay import Scenario
from autoscaler.settings import make_timing

SETTINGS: Mapping[str, tuple[float, float]] = {
    "cooldown_s": (5.0, 120.0),
    "shrink_cooldown_s": (10.0, 600.0),
    "window_s": (10.0, 120.0),
}
"""Keys of the spec's autoscaler section that are turned along with the policy's parameters."""

OTHERS: Mapping[str, tuple[float, float]] = {"interval_s": (1.0, 30.0), "max_step": (1, 8)}
"""Those that are turned when a range is given."""

WIDE = 4.0
"""Ranges reach to so many times the default, and down to such a part of it, within its bounds."""

_LOG = 10.0  # ranges over more than this factor are searched on a logarithmic scale


class BadRange(AffluxError):
    """A range that can't be searched; says what is wrong with it."""

    code = "bad_range"


@dataclass(frozen=True)
class Knob:
    """One thing to turn.

    Args:
        name: of a parameter of the policy, dotted for inner ones, or of a setting.
        kind: of its values.
        low, high: inclusive; for "choice" nan.
        choices: for "choice".
    """

    name: str
    kind: Literal["int", "float", "choice"]
    low: float = math.nan
    high: float = math.nan
    choices: tuple[Any, ...] = ()

    @property
    def log(self) -> bool:
        """Whether it is searched on a logarithmic scale."""
        return self.low > 0 and self.high / self.low > _LOG

    @property
    def is_setting(self) -> bool:
        """Whether it belongs to the autoscaler section and not to the policy."""
        return self.name in SETTINGS or self.name in OTHERS


def knobs(
    policy: str,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    fixed: Sequence[str] = (),
) -> list[Knob]:
    """All that a search turns.

    Args:
        policy: a name, as ``registry.find`` takes it.
        ranges: name -> least and most, for what has another range than the usual, or none.
        fixed: names that are left as they are; a prefix of a dotted name stands for all below it.

    Raises:
        BadPolicy: there is no such policy.
        BadRange: a range that is empty, or a name that neither the policy nor the settings have.
    """
    given = dict(ranges or {})
    fields = registry.find(policy).Parameters.model_fields
    found = [knob for name, field in fields.items() if (knob := _of_field(name, field)) is not None]
    found += [Knob(name, "float", *bounds) for name, bounds in SETTINGS.items()]
    by_name = {knob.name: knob for knob in found}
    for name, (low, high) in given.items():
        head = name.partition(".")[0]
        if not (head in fields or name in SETTINGS or name in OTHERS):
            known = ", ".join([*fields, *SETTINGS, *OTHERS])
            raise BadRange(f"{policy} has nothing called {name!r} to turn; it has {known}")
        if not (low < high and math.isfinite(low) and math.isfinite(high)):
            raise BadRange(f"the range of {name} is {low:g}:{high:g}; expected least < most")
        by_name[name] = replace(_kinded(name, fields, low, high), low=low, high=high)
    kept = [
        knob
        for knob in by_name.values()
        if knob.name in given
        or not any(knob.name == one or knob.name.startswith(one + ".") for one in fixed)
    ]
    if not kept:
        raise BadRange(f"{policy} has nothing to turn; give --range NAME=LEAST:MOST")
    return kept


def with_settings(scenario: Scenario, values: Mapping[str, float]) -> Scenario:
    """The scenario under other settings; names that are none are left alone."""
    timing, limits = scenario.timing, scenario.limits
    window = values.get("window_s", scenario.window)
    return replace(
        scenario,
        timing=make_timing(
            values.get("interval_s", timing.interval),
            window,
            values.get("cooldown_s", timing.cooldown),
            values.get("shrink_cooldown_s", timing.shrink_cooldown),
        ),
        limits=replace(limits, max_step=int(values.get("max_step", limits.max_step))),
        window=window,
    )


def nested(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with dotted names put into their places; the base is not changed."""
    result = {
        key: nested(value, {}) if isinstance(value, dict) else value for key, value in base.items()
    }
    for name, value in values.items():
        *path, last = name.split(".")
        place = result
        for key in path:
            place = place.setdefault(key, {})
        place[last] = value
    return result


def _of_field(name: str, field: FieldInfo) -> Knob | None:
    """The knob of a parameter; None for what can't be searched without a range."""
    kind = field.annotation
    if get_origin(kind) is Literal:
        return Knob(name, "choice", choices=get_args(kind))
    if kind is bool:
        return Knob(name, "choice", choices=(False, True))
    default = field.get_default(call_default_factory=False)
    number = isinstance(default, int | float) and not isinstance(default, bool)
    if kind not in (int, float) or not number:
        return None
    low, high = _bounds(field, float(default), whole=kind is int)
    if not low < high:
        return None
    return Knob(name, "int" if kind is int else "float", low, high)


def _bounds(field: FieldInfo, default: float, whole: bool) -> tuple[float, float]:
    low = high = math.nan
    open_low = open_high = False
    for rule in field.metadata:
        for name in ("ge", "gt", "le", "lt"):
            bound: Any = getattr(rule, name, None)
            if bound is None:
                continue
            if name in ("ge", "gt"):
                low, open_low = float(bound), name == "gt"
            else:
                high, open_high = float(bound), name == "lt"
    if math.isnan(high) or (default > 0 and high > WIDE * default):
        high, open_high = max(WIDE * default, default + (WIDE if whole else 0.0)), False
    if math.isnan(low) or default / WIDE > low:
        low, open_low = default / WIDE, False
    edge = 1.0 if whole else 0.05 * (high - low)
    low, high = low + edge * open_low, high - edge * open_high
    return (math.ceil(low), math.floor(high)) if whole else (low, high)


def _kinded(name: str, fields: Mapping[str, FieldInfo], low: float, high: float) -> Knob:
    """By the parameter's type; inner ones, of which nothing is known here, by the numbers."""
    if name == "max_step" or (name in fields and fields[name].annotation is int):
        return Knob(name, "int")
    if name in SETTINGS or name in OTHERS or name in fields:
        return Knob(name, "float")
    return Knob(name, "int" if float(low).is_integer() and float(high).is_integer() else "float")
