"""The runs of ``bench slo``: which there are, what each left behind, and the figures of all.

Plain data and pure functions. Not for performing them: see ``slo``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks import attainment as judging
from benchmarks.attainment import Change, Outcome, Targets
from benchmarks.scenarios import Scenario
from benchmarks.timeline import Count

BUDGET = 8
MIDDLE = (4, 4)
SPLITS = tuple((attention, BUDGET - attention) for attention in range(1, BUDGET))

POLICIES: Mapping[str, Mapping[str, Any]] = {
    "optimal_ratio": {"gain": 0.2, "ticks": 4},
    "slo_feedback": {"shift": 3},
}
"""Policies that take part, with their parameters."""

DRAIN_S = 90.0
STATIC_DRAIN_S = 15.0
"""How long a policy's and a static run wait for their last requests; a static split's backlog that
takes longer has missed."""


@dataclass
class Run:
    """One run of the scenario. Times are seconds from its start unless they are Unix times.

    Args:
        name: a split such as "3A5F", or a policy.
        policy: whether a policy was in charge.
        begin: attention and FFN actors at the start.
        began: Unix time.
        outcomes: one per request.
        simulated: the outcomes in the planner's simulator, the same changes at the same times, by
            the fitted model; empty: not asked.
        model: the controller's latency model at the end, as plain data; None: there was none.
        changes: those that were carried out, in order.
        refused: changes that were rolled back, as text.
        counts: actors that served, by Unix time.
        decisions: what the controller decided at each tick, and why.
        rate: output tokens by second.
    """

    name: str
    policy: bool
    begin: tuple[int, int]
    began: float = 0.0
    outcomes: list[Outcome] = field(default_factory=list)
    simulated: list[Outcome] = field(default_factory=list)
    model: dict[str, Any] | None = None
    changes: list[Change] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    decisions: list[dict[str, Any]] = field(default_factory=list)
    rate: list[int] = field(default_factory=list)

    @property
    def attainment(self) -> float:
        """Share of all requests that were answered within both targets."""
        return judging.attainment(self.outcomes)

    @property
    def drain_s(self) -> float:
        """How long it waits for its last requests once no more come."""
        return DRAIN_S if self.policy else STATIC_DRAIN_S

    @property
    def lost(self) -> int:
        """Requests that the deployment failed."""
        return sum(outcome.lost for outcome in self.outcomes)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The policy's, as far as they are not its defaults."""
        return POLICIES.get(self.name, {})


def plan(only: Sequence[str] = ()) -> list[Run]:
    """What is to be run, in order: policies first.

    Args:
        only: names of policies, splits such as 3A5F, or "static" for all of these; empty: all.

    Raises:
        ValueError: none of these has that name.
    """
    policies = [Run(name, True, MIDDLE) for name in POLICIES]
    statics = [Run(split_name(split), False, split) for split in SPLITS]
    known = {run.name for run in (*policies, *statics)}
    for name in only:
        if name not in known and name != "static":
            raise ValueError(f"{name} is neither static nor one of {', '.join(sorted(known))}")
    runs = [*policies, *statics]
    if not only:
        return runs
    return [run for run in runs if run.name in only or ("static" in only and not run.policy)]


def split_name(split: tuple[int, int]) -> str:
    """As in ``3A5F``."""
    return f"{split[0]}A{split[1]}F"


def summary(scenario: Scenario, runs: Sequence[Run], targets: Targets) -> dict[str, Any]:
    """The flat figures; those of what was not run are None."""
    policies = [one for one in runs if one.policy]
    statics = [one.attainment for one in runs if not one.policy]
    whole = len(statics) == len(SPLITS)
    worse = min((one.attainment for one in policies), default=None)
    best, middle = (max(statics), median(statics)) if whole else (None, None)
    changes = max((max(by_phase(scenario, one)) for one in policies), default=None)
    found: dict[str, Any] = {
        "scenario": scenario.name,
        "attainment": worse,
        "attainment_best_static": best,
        "attainment_median_static": middle,
        "changes": changes,
        "oscillations": sum(reversals(scenario, one) for one in policies),
        "lost": sum(one.lost for one in policies),
        "requests": len(scenario.asked),
        "seconds": scenario.seconds,
        "shifts": scenario.shifts,
        "budget": BUDGET,
        "ttft_target_s": targets.ttft_s,
        "tpot_target_s": targets.tpot_s,
        "begins_at": split_name(MIDDLE),
        "emulation": True,
    }
    for one in runs:
        found[f"attainment_{one.name}"] = one.attainment
    if policies and worse is not None and changes is not None:
        held = not found["lost"] and not found["oscillations"] and changes <= 2
        if best is not None and middle is not None:
            held = held and worse >= best and worse > middle
        found["holds"] = held
    return found


def by_phase(scenario: Scenario, one: Run) -> list[int]:
    """Changes in each phase."""
    return judging.changes_by_phase(scenario, one.changes)


def reversals(scenario: Scenario, one: Run) -> int:
    """Changes back within a phase."""
    return judging.reversals(scenario, one.begin[0], one.changes)
