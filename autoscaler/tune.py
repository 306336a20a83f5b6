"""Searches a policy's parameters, and the controller's timing, for the best trade in a replay.

Two goals at once: attainment, and actor-seconds. The search is Optuna's (tree-structured Parzen
estimators, Bergstra et al., NeurIPS 2011); what can be turned is in ``knobs``. Not for running one
replay: see ``replay``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoscaler import registry
from autoscaler.knobs import Knob, nested, with_settings
from autoscaler.pooling import sharing
from autoscaler.registry import BadPolicy
from autoscaler.replay import Scenario, run

if TYPE_CHECKING:
    import optuna

Progress = Callable[[str, float], None]

_PATIENCE = 20  # sets of values that a policy may refuse for each one that is tried


@dataclass(frozen=True)
class Trial:
    """One set of values and what it came to.

    Args:
        values: by the knobs' names; empty for the values that the search began from.
        attainment, actor_seconds, changes, reversals, ttft_p90, tpot_p90: see ``Outcome``.
    """

    values: Mapping[str, Any]
    attainment: float
    actor_seconds: float
    changes: int
    reversals: int
    ttft_p90: float
    tpot_p90: float


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Args:
        policy: its name.
        base: parameters that were not turned.
        knobs: what was.
        trials: all of them; the first is the policy as it was given.
        refused: sets of values that the policy refused.
    """

    policy: str
    base: Mapping[str, Any]
    knobs: Sequence[Knob]
    trials: Sequence[Trial]
    refused: int

    @property
    def front(self) -> list[Trial]:
        """Trials that no other beats in both goals, the cheapest first."""
        return front(self.trials)

    def chosen(self, attainment: float) -> Trial:
        """The cheapest that reaches an attainment, or the one with the most where none does."""
        enough = [trial for trial in self.trials if trial.attainment >= attainment]
        if enough:
            return min(enough, key=lambda trial: (trial.actor_seconds, -trial.attainment))
        return max(self.trials, key=lambda trial: (trial.attainment, -trial.actor_seconds))

    def section(self, trial: Trial) -> dict[str, Any]:
        """A trial as the autoscaler section of a spec."""
        settings = {knob.name for knob in self.knobs if knob.is_setting}
        parameters = {name: v for name, v in trial.values.items() if name not in settings}
        return {
            "policy": self.policy,
            "parameters": nested(self.base, parameters),
            **{name: v for name, v in trial.values.items() if name in settings},
        }


def tune(
    scenario: Scenario,
    policy: str,
    knobs: Sequence[Knob],
    *,
    base: Mapping[str, Any] | None = None,
    trials: int = 40,
    seed: int = 0,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Search; the same arguments and jobs give the same trials.

    Args:
        scenario: what every set of values has to cope with.
        policy: a name, as ``registry.make`` takes it.
        knobs: what is turned.
        base: parameters that are not.
        trials: replays in all; the first is the policy with its base parameters. Values that the
            policy refuses are not among them.
        seed: of the search and of the simulations.
        jobs: replays at a time; None: two.
        progress: is told how far it is.

    Raises:
        BadPolicy: the base parameters don't fit.
        PlannerError: as ``replay.run``; or jobs below 1.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tell = progress or (lambda text, share: None)
    given = dict(base or {})
    registry.make(policy, given)
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(5, trials // 4))
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    done: list[Trial] = []
    refused = 0
    width = 2 if jobs is None else jobs
    with sharing((scenario, policy, given, seed), width) as ask:
        tell(f"{policy} as it is", 0.0)
        done += [trial for trial in ask(_try, [{}]) if trial is not None]
        while len(done) < trials and refused < _PATIENCE * trials:
            # Whole rounds, so that what is asked does not depend on who is done first.
            drawn = [study.ask() for _ in range(min(width, trials - len(done)))]
            questions = [{knob.name: _draw(trial, knob) for knob in knobs} for trial in drawn]
            for trial, found in zip(drawn, ask(_try, questions), strict=True):
                if found is None:
                    refused += 1
                    # Worse than all that was seen, so that the search keeps away from there.
                    dearest = max(one.actor_seconds for one in done)
                    study.tell(trial, [0.0, 2 * dearest])
                    continue
                done.append(found)
                study.tell(trial, [found.attainment, found.actor_seconds])
            best = front(done)
            tell(
                f"{len(done)} of {trials}: {len(best)} on the front, attainment "
                f"{best[0].attainment:.3f} to {best[-1].attainment:.3f}",
                len(done) / trials,
            )
    return Tuning(policy, given, knobs, done, refused)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other beats in attainment and actor-seconds, the cheapest first."""
    kept: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.actor_seconds, -trial.attainment)):
        if not kept or trial.attainment > kept[-1].attainment:
            kept.append(trial)
    return kept


def _draw(trial: optuna.trial.Trial, knob: Knob) -> Any:
    if knob.kind == "choice":
        return trial.suggest_categorical(knob.name, knob.choices)
    if knob.kind == "int":
        return trial.suggest_int(knob.name, int(knob.low), int(knob.high), log=knob.log)
    # Three figures are what people can read and what a replay can tell apart.
    return float(f"{trial.suggest_float(knob.name, knob.low, knob.high, log=knob.log):.3g}")


def _try(
    shared: tuple[Scenario, str, dict[str, Any], int], values: Mapping[str, Any]
) -> Trial | None:
    """What a set of values comes to; None where the policy refuses it."""
    scenario, policy, base, seed = shared
    settings = {name: v for name, v in values.items() if Knob(name, "float").is_setting}
    parameters = {name: v for name, v in values.items() if name not in settings}
    try:
        made = registry.make(policy, nested(base, parameters))
    except BadPolicy:
        return None
    outcome = run(with_settings(scenario, settings), made, seed=seed)
    return Trial(
        values,
        outcome.attainment,
        outcome.actor_seconds,
        outcome.changes,
        outcome.reversals,
        outcome.ttft_p90,
        outcome.tpot_p90,
    )
