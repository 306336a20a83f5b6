"""Points as plain data and back, and what tells questions apart, for ``planner.kept``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from planner.explore.kernels.base import Provenance
from planner.explore.points import Group, Mode, Point
from planner.explore.question import Question

FORMAT = 2


def point_data(point: Point) -> dict[str, Any]:
    """For JSON."""
    return vars(point) | {
        "mode": point.mode.value,
        "groups": [vars(group) for group in point.groups],
        "shares": {source.value: share for source, share in point.shares.items()},
    }


def read_point(data: Mapping[str, Any]) -> Point:
    """What ``point_data`` wrote."""
    changed = {
        "mode": Mode(data["mode"]),
        "groups": tuple(Group(**group) for group in data["groups"]),
        "shares": {Provenance(key): value for key, value in data["shares"].items()},
    }
    return Point(**{**data, **changed})


def digest(question: Question, *sources: str) -> str:
    """Of all that decides the answer: the question, and the names of the kernel times."""
    text = repr((FORMAT, question, sources))
    return hashlib.sha256(text.encode()).hexdigest()[:24]
