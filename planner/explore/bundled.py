"""Published configs that come with the planner (``models``), by their names.

Reduced to the keys that are used; each says which Hugging Face repository it is from.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from planner.errors import PlannerError


def bundled_models() -> tuple[str, ...]:
    """Hugging Face names of the bundled configs."""
    return tuple(_configs())


def find_config(name: str) -> tuple[str, Mapping[str, Any]]:
    """Hugging Face name and config of a bundled model, by any of its names in any case.

    Raises:
        PlannerError: unknown; the nearest names are offered.
    """
    names, wanted = _names(), name.strip().lower()
    if wanted not in names:
        near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
        known = " or ".join(near) if near else ", ".join(bundled_models())
        raise PlannerError(
            f"unknown model {name!r}, and no such file: "
            f"{'did you mean' if near else 'expected one of'} {known}{'?' if near else '.'} Of "
            "another model, give the path of its config.json"
        )
    return names[wanted], _configs()[names[wanted]]


@cache
def _configs() -> dict[str, dict[str, Any]]:
    """Configs by Hugging Face name."""
    found: dict[str, dict[str, Any]] = {}
    folder = resources.files("planner.explore") / "models"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".json"):
            config = json.loads(file.read_text(encoding="utf-8"))
            found[config["_name"]] = config
    return found


@cache
def _names() -> dict[str, str]:
    """Hugging Face names by everything that a model may be called, in lower case."""
    return {
        called.lower(): name
        for name, config in _configs().items()
        for called in (name, *config["_aliases"])
    }
