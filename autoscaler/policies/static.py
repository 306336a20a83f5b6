"""Fixed numbers of workers: the policy to compare others with, and to pin a deployment."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from autoscaler import policy
from autoscaler.policy import Proposal, View
from autoscaler.reasons import Reason


class StaticParameters(policy.Parameters):
    """Numbers of workers."""

    attention: int | None = Field(default=None, ge=1)
    """Attention workers; null leaves as many as there are."""

    ffn: int | None = Field(default=None, ge=1)
    """FFN workers; null leaves as many as there are."""


class Static:
    """Proposes the same numbers at every tick, so a lost worker is replaced."""

    name: ClassVar[str] = "static"
    Parameters: ClassVar[type[policy.Parameters]] = StaticParameters

    def __init__(self, parameters: StaticParameters):
        self.parameters = parameters

    def propose(self, view: View) -> Proposal:
        """The numbers of the parameters, whatever the view."""
        attention, ffn = self.parameters.attention, self.parameters.ffn
        if attention is None and ffn is None:
            return Proposal(detail="no numbers are set; everything stays as it is")
        return Proposal(attention, ffn, Reason.FIXED, "set by parameters")
