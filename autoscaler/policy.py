"""What a scaling policy is given and what it answers: the protocol that users implement too.

A policy is a function of a view, with parameters that were checked beforehand; it may keep state
between calls. It neither knows bounds' enforcement nor Ray: whatever it proposes goes through
``limits`` before anything is done. Not for the policies themselves: see ``policies/``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from autoscaler.limits import Counts, Limits
from autoscaler.model import Model
from autoscaler.reasons import Reason
from planner.control import Snapshot


class Parameters(BaseModel):
    """Base of a policy's parameters: frozen, closed, and strict about numbers being finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class SLO:
    """What is to be held: ``percentile`` of the requests within both, in the snapshot's unit."""

    ttft: float
    tpot: float
    percentile: float = 0.9


@dataclass(frozen=True)
class System:
    """What of the deployment does not change while it serves.

    Args:
        slots: most requests that one attention worker runs at a time (vLLM's max_num_seqs).
        kv_tokens: context tokens that fit on one attention worker; None: no limit.
        lanes: most lanes of a step.
        top_k, experts: of a MoE layer; None where unknown.
    """

    slots: int
    kv_tokens: int | None = None
    lanes: int = 1
    top_k: int | None = None
    experts: int | None = None


@dataclass(frozen=True)
class View:
    """Everything that a policy may look at.

    Args:
        snapshot: the system and what happened in the window.
        slo: the targets.
        limits: what will be enforced on the answer, so that a policy can plan within it.
        system: what does not change.
        model: calibrated stage times and moments of the load; None while there are none.
        wall: Unix time of the snapshot, for policies that know the time of day.
    """

    snapshot: Snapshot
    slo: SLO
    limits: Limits
    system: System
    model: Model | None = None
    wall: float = 0.0

    @property
    def there(self) -> Counts:
        """Workers that serve or are being started: what a proposal is compared with."""
        s = self.snapshot
        return Counts(s.attention + s.attention_preparing, s.ffn + s.ffn_preparing)


@dataclass(frozen=True)
class Proposal:
    """What a policy wants.

    Args:
        attention, ffn: workers of each role; None leaves a role as it is.
        reason: why; the first of the policy's half of ``Reason``.
        detail: the same for people, with the numbers that decided.
    """

    attention: int | None = None
    ffn: int | None = None
    reason: Reason = Reason.AS_IT_IS
    detail: str = ""


@runtime_checkable
class Policy(Protocol):
    """Proposes how many workers there shall be; called once per interval.

    A class with this method, a ``name`` and a ``Parameters`` model, whose instances are made with
    one positional argument, the parameters, and keep it as ``parameters``. Register it under the
    entry point group ``afflux.policies``, or name it in the spec as ``module:Class``.
    """

    name: ClassVar[str]
    Parameters: ClassVar[type[Parameters]]
    parameters: BaseModel

    def propose(self, view: View) -> Proposal | None:
        """The proposal for this view; None, or one that equals what there is, changes nothing."""
        ...


@dataclass(frozen=True)
class Decision:
    """One tick of the controller, explained.

    Args:
        at: time of the snapshot.
        there: workers that served or were being started.
        proposed: what the policy wanted, before limits; None when it was not asked or said nothing.
        advised: what the limits make of it; equals ``there`` where nothing is to be done.
        target: what is to be done now; None: nothing.
        reasons: causes, the decisive one first.
        detail: the same for people.
        rebalance: the experts shall be placed anew.
    """

    at: float
    there: Counts
    proposed: Proposal | None
    advised: Counts
    target: Counts | None
    reasons: tuple[Reason, ...]
    detail: str = ""
    rebalance: bool = False
    extra: dict[str, float] = field(default_factory=dict)
