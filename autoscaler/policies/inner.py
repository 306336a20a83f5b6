"""A policy inside another, as ``predictive`` and ``schedule`` have one."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from autoscaler import registry
from autoscaler.limits import Counts
from autoscaler.policy import Parameters, Policy, Proposal


class Inner(Parameters):
    """Which policy, with what parameters."""

    policy: str = Field(default="slo_feedback", min_length=1)
    """Its name (afflux policy list), or module:Class of your own."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    """Its parameters; what is left out has its default."""

    def make(self) -> Policy:
        """The policy.

        Raises:
            BadPolicy: there is none of that name, or its parameters don't fit.
        """
        return registry.make(self.policy, self.parameters)


def counts_of(proposal: object, there: Counts) -> Counts | None:
    """The numbers that an inner policy wants.

    None for what is no proposal: the outer policy hands it on as it is, and the core refuses it.
    """
    if proposal is None:
        return there
    if not isinstance(proposal, Proposal):
        return None
    attention = there.attention if proposal.attention is None else proposal.attention
    ffn = there.ffn if proposal.ffn is None else proposal.ffn
    if type(attention) is not int or type(ffn) is not int:
        return None
    return Counts(attention, ffn)
