"""The split of a budget that the explorer plans for the requests that come now.

Kernel times, memory and network of a known system (``planner.explore``) instead of the calibrated
model: for GPUs that were never measured here, and for saying whether AFD is the right level at all.
That part is advice in the words of the proposal: a proposal is about numbers of actors, and no
actor can change the level. Not for how many actors there are: the total stays.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from autoscaler import policy
from autoscaler.advice import Advice, Adviser, Load, kind
from autoscaler.limits import Counts, nearest
from autoscaler.policy import Proposal, View
from autoscaler.reasons import Reason

if TYPE_CHECKING:
    from planner.explore.question import Exploration


class PlannedParameters(policy.Parameters):
    """What is served on what, and when another split is wanted."""

    model: str = ""
    """Name of a bundled model (afflux plan --list-models), or a folder with its config.json; this
    and system are needed."""

    system: str = ""
    """Name of the GPUs and their network (afflux plan --list-systems), or a file that describes
    them."""

    gpus: int | None = Field(default=None, ge=2)
    """Actors of both roles to split, one GPU each; null: the fixed budget, or those there are."""

    kernels: str = Field(default="aic", min_length=1)
    """Times of kernels: aic, aiconfigurator's measured ones (needs the extra plan); roofline, data
    sheets alone; or a file of afflux bench kernels."""

    backend: Literal["trtllm", "vllm", "sglang"] = "vllm"
    """Whose kernels were measured."""

    allow_extrapolation: bool = False
    """Plan outside of what was measured too."""

    headroom: float = Field(default=0.85, gt=0, le=1)
    """Share of the targets that is aimed at."""

    compare: bool = True
    """Also look at the other levels of disaggregation, and say where one would serve more."""

    grain: float = Field(default=0.25, gt=0, le=2)
    """Lengths that differ by less than about this share are one kind of load, with one plan. Lower
    follows them more closely and searches more often."""

    tolerance: float = Field(default=0.05, ge=0, le=1)
    """A split that is off by no more than this share of the actors stays."""

    ticks: int = Field(default=3, ge=1)
    """Ticks in a row that must want the same split. Higher: calmer, later."""

    background: bool = True
    """Search in a thread, so that no tick waits; false waits, for replays that shall repeat."""


class Planned:
    """Proposes the planner's split; see the module. Keeps the answers, for how many ticks the same
    split was wanted, and the kind of load."""

    name: ClassVar[str] = "planned"
    Parameters: ClassVar[type[policy.Parameters]] = PlannedParameters

    def __init__(self, parameters: PlannedParameters | None = None):
        self.parameters = parameters or PlannedParameters()
        self.adviser = Adviser(self._explore, self.parameters.background)
        self._wish: tuple[Counts, int] | None = None
        self._kind = (0, 0, 0)

    def propose(self, view: View) -> Proposal:
        """See ``policy.Policy``."""
        given, before = self.parameters, self._wish
        self._wish = None
        if not given.model or not given.system:
            text = "the parameters model and system are needed: set both"
            return Proposal(reason=Reason.MODEL_UNRELIABLE, detail=text)
        load = self._load(view)
        if load is None:
            return Proposal(detail="nothing is known of the requests' lengths yet")
        advice = self.adviser.advise(load)
        if advice is None:
            return Proposal(detail=f"the planner is looking at {_words(load)}")
        if not math.isfinite(advice.attention_share):
            reason = Reason.MODEL_UNRELIABLE if advice.failed else Reason.OTHER
            return Proposal(reason=reason, detail=f"{_words(load)}: {advice.text}")
        return self._split(view, load, advice, before)

    def _split(
        self, view: View, load: Load, advice: Advice, before: tuple[Counts, int] | None
    ) -> Proposal:
        there, detail = view.there, f"{_words(load)}: {advice.text}"
        attention = min(max(round(load.gpus * advice.attention_share), 1), load.gpus - 1)
        wanted = nearest(Counts(attention, load.gpus - attention), view.limits)
        off = abs(wanted.attention - there.attention)
        near = wanted.total == there.total and off <= self.parameters.tolerance * there.total
        if wanted == there or (near and view.limits.allow(there)):
            return Proposal(detail=detail)
        ticks = before[1] + 1 if before is not None and before[0] == wanted else 1
        self._wish = (wanted, ticks)
        if ticks < self.parameters.ticks and view.limits.allow(there):
            return Proposal(detail=f"{detail}; {wanted} is not wanted for long enough yet")
        return Proposal(*wanted, Reason.RATIO, f"{there} -> {wanted}: {detail}")

    def _load(self, view: View) -> Load | None:
        """The kind of load of now; None while lengths are unknown."""
        s, model, given = view.snapshot, view.model, self.parameters
        prompt = _first(s.prompt_mean, model.prompt_mean if model else math.nan)
        output = _first(s.output_mean, model.output_mean if model else math.nan)
        gpus = given.gpus or view.limits.fixed or view.there.total
        if not (prompt >= 1 and output >= 1 and gpus >= 2):
            return None
        hit = min(max(_first(s.prefix_hit, model.prefix_hit if model else 0.0, 0.0), 0.0), 1.0)
        old = self._kind
        self._kind = (
            kind(prompt * hit, given.grain, old[0]),
            max(1, kind(prompt * (1.0 - hit), given.grain, old[1])),
            max(1, kind(output, given.grain, old[2])),
        )
        return Load(
            *self._kind,
            gpus,
            given.headroom * view.slo.ttft,
            given.headroom * view.slo.tpot,
            view.system.lanes,
        )

    def _explore(self, load: Load) -> Exploration:
        """One search; takes seconds."""
        from planner.explore.kernels.sources import find_source
        from planner.explore.model import read_model
        from planner.explore.points import Mode, Shape, Targets
        from planner.explore.question import Options, Question
        from planner.explore.search import explore
        from planner.explore.system import find_system, read_system

        given = self.parameters
        described = Path(given.system).suffix in (".yaml", ".yml")
        system = read_system(given.system) if described else find_system(given.system)
        source = find_source(
            given.kernels,
            system,
            backend=given.backend,
            allow_extrapolation=given.allow_extrapolation,
        )
        question = Question(
            read_model(given.model),
            system,
            load.gpus,
            Shape("live", load.prefix, load.prompt, load.output),
            Targets(load.ttft, load.tpot),
            modes=tuple(Mode) if given.compare else (Mode.AFD,),
            options=Options(
                lanes=tuple(range(1, max(1, load.lanes) + 1)),
                allow_extrapolation=given.allow_extrapolation,
            ),
        )
        return explore(question, source, jobs=1)


def _words(load: Load) -> str:
    cached = f"{load.prefix} + " if load.prefix else ""
    return f"prompts of about {cached}{load.prompt} tokens, answers of {load.output}"


def _first(*values: float) -> float:
    """The first that is a number; nan if none is."""
    return next((value for value in values if math.isfinite(value)), math.nan)
