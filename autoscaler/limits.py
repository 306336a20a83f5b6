"""What a proposal may become: bounds, budget, step caps. A pure function of numbers.

Not for when to act (cool-downs, pauses, stale data): that is ``core``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from actors.errors import AffluxError
from autoscaler.reasons import Reason


class BadLimits(AffluxError):
    """Limits that no numbers of actors can meet, or that contradict each other."""

    code = "bad_limits"


class Counts(NamedTuple):
    """Workers of each role."""

    attention: int
    ffn: int

    @property
    def total(self) -> int:
        """Of both roles."""
        return self.attention + self.ffn

    def __str__(self) -> str:
        return f"{self.attention}A{self.ffn}F"


@dataclass(frozen=True)
class Limits:
    """What every target has to respect.

    Args:
        attention, ffn: least and most workers of the role.
        min_total, max_total: of both roles together; equal ones fix the budget, so that only the
            ratio can move, both legs or neither. None: the sum of the roles' bounds.
        max_step: most workers of one role that one decision adds or takes away.
        weight_attention, weight_ffn: price or power of a worker, in any unit, for policies that
            choose between roles.

    Raises:
        BadLimits: names the values that don't fit together.
    """

    attention: tuple[int, int] = (1, 8)
    ffn: tuple[int, int] = (1, 8)
    min_total: int | None = None
    max_total: int | None = None
    max_step: int = 2
    weight_attention: float = 1.0
    weight_ffn: float = 1.0

    def __post_init__(self) -> None:
        for role in ("attention", "ffn"):
            low, high = getattr(self, role)
            if not 1 <= low <= high:
                raise BadLimits(f"{role} is bounded by {low}..{high}; expected 1 <= least <= most")
        low, high = self.total
        if low > high or high < self.attention[0] + self.ffn[0]:
            raise BadLimits(
                f"the total is bounded by {low}..{high} and the roles by "
                f"{self.attention[0]}..{self.attention[1]} attention and "
                f"{self.ffn[0]}..{self.ffn[1]} FFN; no numbers meet both"
            )
        if low > self.attention[1] + self.ffn[1]:
            raise BadLimits(
                f"a total of at least {low} is more than {self.attention[1]} attention and "
                f"{self.ffn[1]} FFN actors"
            )
        if self.max_step < 1:
            raise BadLimits(f"max_step is {self.max_step}; expected at least 1")
        if min(self.weight_attention, self.weight_ffn) <= 0:
            raise BadLimits("weights have to be above 0")

    @property
    def total(self) -> tuple[int, int]:
        """Least and most workers of both roles together."""
        low = self.attention[0] + self.ffn[0] if self.min_total is None else self.min_total
        high = self.attention[1] + self.ffn[1] if self.max_total is None else self.max_total
        return low, high

    @property
    def fixed(self) -> int | None:
        """The budget, where it is fixed."""
        low, high = self.total
        return low if low == high else None

    def allow(self, counts: Counts) -> bool:
        """Whether numbers are within bounds and budget."""
        low, high = self.total
        return (
            self.attention[0] <= counts.attention <= self.attention[1]
            and self.ffn[0] <= counts.ffn <= self.ffn[1]
            and low <= counts.total <= high
        )


def nearest(wanted: Counts, limits: Limits) -> Counts:
    """The counts within the limits that are least workers away; of equals, the most attention."""
    low, high = limits.total
    best: tuple[int, Counts] | None = None
    for attention in range(limits.attention[1], limits.attention[0] - 1, -1):
        least = max(limits.ffn[0], low - attention)
        most = min(limits.ffn[1], high - attention)
        if least > most:
            continue
        ffn = min(max(wanted.ffn, least), most)
        off = abs(attention - wanted.attention) + abs(ffn - wanted.ffn)
        if best is None or off < best[0]:
            best = off, Counts(attention, ffn)
    assert best is not None  # Limits refuses those that no counts meet
    return best[1]


def constrain(
    there: Counts,
    wanted: Counts,
    limits: Limits,
    held: frozenset[str] = frozenset(),
    least_attention: int = 1,
) -> tuple[Counts, tuple[Reason, ...]]:
    """The nearest that may be done in one decision towards ``wanted``.

    Args:
        there: what serves or is being started. It may break the limits (a lost actor, a changed
            spec); then the result moves towards them as far as a step allows.
        wanted: by the policy.
        limits: to be respected.
        held: roles ("attention", "ffn") whose number must not grow now.
        least_attention: attention never shrinks below so many, not even to meet the limits.

    Returns:
        the counts, and why they are not what was wanted. Whenever ``there`` respects the limits,
        so do they.
    """
    options = _options(there, limits, held, least_attention)
    best = min(options, key=lambda option: _distance(option, there, wanted, limits))
    return best, _reasons(best, there, wanted, limits, held)


def _options(
    there: Counts, limits: Limits, held: frozenset[str], least_attention: int
) -> list[Counts]:
    """All that one decision can reach."""
    reach = []
    for role, now in zip(("attention", "ffn"), there, strict=True):
        floor = min(now, least_attention) if role == "attention" else 1
        most = now if role in held else now + limits.max_step
        # All of a role may be lost and no place be found: then it stays at 0.
        reach.append(range(max(1, floor, now - limits.max_step), most + 1) or range(now, now + 1))
    return [Counts(a, f) for a in reach[0] for f in reach[1]]


def _distance(
    option: Counts, there: Counts, wanted: Counts, limits: Limits
) -> tuple[int, int, int, float, int]:
    """Least is best: break limits least, move no role but where it was wanted, then come near, at
    the wanted ratio, with few moves.
    """
    outside = sum(
        max(low - value, 0, value - high)
        for value, (low, high) in (
            (option.attention, limits.attention),
            (option.ffn, limits.ffn),
            (option.total, limits.total),
        )
    )
    # A budget that has no room for more of one role is no wish for less of the other.
    against = sum(
        max(min(now, want) - value, 0, value - max(now, want))
        for value, now, want in zip(option, there, wanted, strict=True)
    )
    off = abs(option.attention - wanted.attention) + abs(option.ffn - wanted.ffn)
    # Where the budget cuts, cut so that the ratio suffers least.
    ratio = abs(option.attention * wanted.ffn - option.ffn * wanted.attention) / max(
        1, wanted.total
    )
    moves = abs(option.attention - there.attention) + abs(option.ffn - there.ffn)
    return outside, against, off, ratio, moves


def _reasons(
    got: Counts, there: Counts, wanted: Counts, limits: Limits, held: frozenset[str]
) -> tuple[Reason, ...]:
    if got == wanted:
        return ()
    reasons: list[Reason] = []
    for role in ("attention", "ffn"):
        now, want = getattr(there, role), getattr(wanted, role)
        low, high = getattr(limits, role)
        if not low <= want <= high:
            reasons.append(Reason.AT_BOUND)
        if abs(want - now) > limits.max_step:
            reasons.append(Reason.STEP_CAPPED)
        if role in held and want > now:
            reasons.append(Reason.CANNOT_PLACE)
    low, high = limits.total
    if not low <= wanted.total <= high:
        reasons.append(Reason.AT_BUDGET)
    if limits.fixed is not None and got == there and wanted != there:
        reasons.append(Reason.ONE_LEG)
    return tuple(dict.fromkeys(reasons)) or (Reason.AT_BUDGET,)
