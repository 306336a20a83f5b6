"""Finds policies by name, and makes them from parameters that were checked.

Names are ours, those under the entry point group ``afflux.policies``, or ``module:Class`` of the
user's own. Policies that hold others (``predictive``, ``schedule``) come here too.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from actors.errors import AffluxError
from autoscaler.policy import Parameters, Policy

GROUP = "afflux.policies"

BUILT_IN: Mapping[str, str] = {
    "static": "autoscaler.policies.static:Static",
    "slo_feedback": "autoscaler.policies.slo_feedback:SLOFeedback",
    "optimal_ratio": "autoscaler.policies.optimal_ratio:OptimalRatio",
    "planned": "autoscaler.policies.planned:Planned",
    "predictive": "autoscaler.policies.predictive:Predictive",
    "schedule": "autoscaler.policies.schedule:Schedule",
}


class BadPolicy(AffluxError):
    """A policy that is not there, is none, or whose parameters don't fit; says what would."""

    code = "bad_policy"


def names() -> dict[str, str]:
    """Name -> ``module:Class`` of every policy that is installed; ours win."""
    theirs = {point.name: point.value for point in entry_points(group=GROUP)}
    return {**theirs, **BUILT_IN}


def find(name: str) -> type[Policy]:
    """The class of a policy.

    Args:
        name: one of ``names()``, or ``module:Class``.

    Raises:
        BadPolicy: there is no such policy, it can't be imported, or it is no policy.
    """
    # Reading the entry points of all packages takes a tenth of a second: only when it is needed.
    path = BUILT_IN.get(name) or (name if ":" in name else names().get(name, name))
    module_name, _, attribute = path.partition(":")
    if not attribute:
        known = names()
        raise BadPolicy(
            f"there is no policy {name!r}; known are {', '.join(sorted(known))}, or name your own "
            "as module:Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # a user's module may raise anything
        raise BadPolicy(f"policy {name!r} can't be imported: {error}") from error
    parameters = getattr(found, "Parameters", None)
    is_class = isinstance(parameters, type) and issubclass(parameters, Parameters)
    if not (isinstance(found, type) and callable(getattr(found, "propose", None)) and is_class):
        raise BadPolicy(
            f"{path} is no policy: expected a class with propose(view) and a class attribute "
            "Parameters, a subclass of autoscaler.policy.Parameters"
        )
    return found


def make(name: str, parameters: Mapping[str, Any] | None = None) -> Policy:
    """A policy with these parameters, its own defaults for the rest.

    Raises:
        BadPolicy: see ``find``; or parameters are unknown or out of range, all of them in one text.
    """
    kind = find(name)
    given = dict(parameters or {})
    try:
        checked = kind.Parameters.model_validate(given)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            shown = (
                ""
                if problem["type"] in ("extra_forbidden", "missing")
                else (f" (given {problem['input']!r})")
            )
            lines.append(f"  {key or 'parameters'}: {problem['msg']}{shown}")
        known = ", ".join(kind.Parameters.model_fields) or "none"
        raise BadPolicy(
            f"policy {name} can't be made from these parameters; it knows {known}\n"
            + "\n".join(lines)
        ) from None
    try:
        return kind(checked)  # type: ignore[call-arg]
    except AffluxError as error:
        raise BadPolicy(f"policy {name}: {error}") from error
