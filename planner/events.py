"""What may happen to a simulated cluster from outside: scaling, and losing a worker.

Only the descriptions, checked; the simulator carries them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from planner.errors import PlannerError


@dataclass(frozen=True)
class ChangeTimes:
    """How long a change of the number of workers takes, in the unit of the latencies.

    Args:
        prepare_attention: from the decision until a new attention worker can take requests (start,
            load weights, connect). Serving goes on meanwhile.
        prepare_ffn: the same for FFN workers, either direction, for experts move both ways.
        commit_pause: how long no step begins (attention) or no call begins (FFN) at the change.
        drain_deadline: how long a retiring attention worker may finish its requests; what is left
            then is replayed on others.
    """

    prepare_attention: float = 0.0
    prepare_ffn: float = 0.0
    commit_pause: float = 0.0
    drain_deadline: float = math.inf

    def __post_init__(self) -> None:
        for name in ("prepare_attention", "prepare_ffn", "commit_pause", "drain_deadline"):
            if not getattr(self, name) >= 0:
                raise PlannerError(f"{name} is {getattr(self, name)}; give a time >= 0")


@dataclass(frozen=True)
class Scale:
    """New numbers of workers decided at time ``at``; None leaves a role as it is.

    Either absolute (``attention=4``) or, with ``relative``, a difference (``attention=-1``).
    """

    at: float
    attention: int | None = None
    ffn: int | None = None
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.at >= 0:
            raise PlannerError(f"a change at time {self.at}; give a time >= 0")
        if not self.relative:
            for role in ("attention", "ffn"):
                count = getattr(self, role)
                if count is not None and count < 1:
                    raise PlannerError(f"a change to {count} {role} workers; give at least 1")


@dataclass(frozen=True)
class Failure:
    """A worker that stops at time ``at`` without a word.

    An attention worker takes its requests with it; after ``detect`` they are replayed on others
    (prompt and emitted tokens are prefilled again), and barrier groups that waited for it go on.
    When FFN workers shard the experts, the loss of one stalls every call for ``detect + recover``;
    then the others hold its experts. The last FFN worker's loss stalls until a `Scale` or a policy
    brings new ones.

    Args:
        at: time of the loss.
        role: whose.
        detect: time until it is noticed.
        recover: FFN: time after that until the survivors hold the lost experts. Attention: ignored.
        worker: number of the attention worker; None for the one with the most requests.
    """

    at: float
    role: Literal["attention", "ffn"]
    detect: float = 0.0
    recover: float = 0.0
    worker: int | None = None

    def __post_init__(self) -> None:
        if self.role not in ("attention", "ffn"):
            raise PlannerError(f"failure of role {self.role!r}; roles are 'attention' and 'ffn'")
        for name in ("at", "detect", "recover"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise PlannerError(f"failure with {name}={value}; give a finite time >= 0")
