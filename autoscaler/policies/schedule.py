"""Bounds by the time of day around another policy: more before the morning, fewer at night."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, time, timedelta
from typing import ClassVar, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import ConfigDict, Field, field_validator, model_validator

from autoscaler import policy
from autoscaler.limits import BadLimits, Limits, nearest
from autoscaler.policies.inner import Inner, counts_of
from autoscaler.policy import Proposal, View
from autoscaler.reasons import Reason

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60


class Window(policy.Parameters):
    """Bounds for some hours of some days; what is null is bounded by the limits alone."""

    model_config = ConfigDict(
        validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )

    days: tuple[Day, ...] = DAYS
    """Days on which it begins: mon, tue, wed, thu, fri, sat, sun."""

    start: time = Field(default=time(0), alias="from")
    """Time of day at which it begins, as in 08:00."""

    end: time = Field(default=time(0), alias="to")
    """Time of day at which it ends; at or before ``from`` it is the next day's."""

    min_attention: int | None = Field(default=None, ge=1)
    """The fewest attention workers."""

    max_attention: int | None = Field(default=None, ge=1)
    """The most attention workers."""

    min_ffn: int | None = Field(default=None, ge=1)
    """The fewest FFN workers."""

    max_ffn: int | None = Field(default=None, ge=1)
    """The most FFN workers."""

    @field_validator("start", "end", mode="before")
    @classmethod
    def _clock(cls, value: object) -> object:
        """YAML reads 20:00 without quotes as the number 1200: minutes, for a time of day."""
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= DAY_MINUTES:
            return time(value // 60 % 24, value % 60)
        if value == "24:00":
            return time(0)
        if not isinstance(value, (str, time)):
            raise ValueError("expected a time of day, as in '20:00'")
        return value

    @field_validator("start", "end")
    @classmethod
    def _local(cls, value: time) -> time:
        if value.tzinfo is not None:
            raise ValueError("give a time without a zone; the policy's zone holds")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> Window:
        for role in ("attention", "ffn"):
            least, most = getattr(self, f"min_{role}"), getattr(self, f"max_{role}")
            if least is not None and most is not None and least > most:
                raise ValueError(
                    f"min_{role} is {least} and max_{role} {most}; expected min <= max"
                )
        return self

    def holds(self, now: datetime) -> bool:
        """Whether a local time is in the window."""
        today, yesterday = DAYS[now.weekday()], DAYS[(now - timedelta(days=1)).weekday()]
        clock = now.time()
        if self.start < self.end:
            return today in self.days and self.start <= clock < self.end
        return (today in self.days and clock >= self.start) or (
            yesterday in self.days and clock < self.end
        )

    def narrow(self, limits: Limits) -> Limits:
        """The limits within this window; where both can't be met, the limits win."""
        attention = _within(limits.attention, self.min_attention, self.max_attention)
        ffn = _within(limits.ffn, self.min_ffn, self.max_ffn)
        # A total that is bounded tightly may leave room for one role's bounds only.
        for a, f in ((attention, ffn), (attention, limits.ffn), (limits.attention, ffn)):
            try:
                return replace(limits, attention=a, ffn=f)
            except BadLimits:
                continue
        return limits

    def __str__(self) -> str:
        return f"{','.join(self.days)} {self.start:%H:%M}-{self.end:%H:%M}"


class ScheduleParameters(policy.Parameters):
    """Windows, and what decides within them."""

    inner: Inner = Inner()
    """The policy that decides within the bounds: {policy: NAME, parameters: {...}}."""

    windows: tuple[Window, ...] = ()
    """The first that holds counts; outside of all of them there are the limits alone."""

    zone: str = "UTC"
    """Time zone of the windows, as in Europe/Berlin; daylight saving time is followed."""

    @field_validator("zone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(
                f"there is no time zone {value!r}; expected one like Europe/Berlin"
            ) from error
        return value


class Schedule:
    """The inner policy within the bounds of the hour; the inner one plans within them as well."""

    name: ClassVar[str] = "schedule"
    Parameters: ClassVar[type[policy.Parameters]] = ScheduleParameters

    def __init__(self, parameters: ScheduleParameters):
        self.parameters = parameters
        self._inner = parameters.inner.make()
        self._zone = ZoneInfo(parameters.zone)

    def propose(self, view: View) -> Proposal | None:
        """What the inner policy wants, brought within the bounds of the window that holds."""
        now = datetime.fromtimestamp(view.wall, self._zone)
        window = next((w for w in self.parameters.windows if w.holds(now)), None)
        if window is None:
            return self._inner.propose(view)
        limits = window.narrow(view.limits)
        proposal = self._inner.propose(replace(view, limits=limits))
        wanted = counts_of(proposal, view.there)
        if wanted is None:
            return proposal
        bounded = nearest(wanted, limits)
        if bounded == wanted:
            return proposal
        detail = f"{window}: {bounded}; {self.parameters.inner.policy} wants {wanted}"
        return Proposal(*bounded, Reason.FIXED, detail)


def _within(bounds: tuple[int, int], least: int | None, most: int | None) -> tuple[int, int]:
    """A window's bounds, no wider than the limits' and never outside of them."""
    low, high = bounds
    narrowed = (max(low, min(high, least or low)), min(high, max(low, most or high)))
    return narrowed if narrowed[0] <= narrowed[1] else bounds
