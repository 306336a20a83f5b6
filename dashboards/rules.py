"""The recording rules and alerts in deploy/prometheus, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from actors.errors import AffluxError
from cluster.paths import project_root

RULE_FILES = ("recording.rules.yml", "alerts.rules.yml")


class RulesError(AffluxError):
    """A rule file that is missing or is none."""

    code = "bad_rules"


@dataclass(frozen=True)
class Rule:
    """A recording rule or an alert.

    Args:
        name: of the recorded series or of the alert.
        alert: it is an alert.
        annotations: of an alert.
    """

    name: str
    expr: str
    alert: bool
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


def folder() -> Path:
    """Where prometheus.yml, the rules and their tests are."""
    return project_root() / "deploy" / "prometheus"


def load() -> list[Rule]:
    """All rules, those that record first.

    Raises:
        RulesError: a file is missing or holds something else.
    """
    return [rule for name in RULE_FILES for rule in _read(folder() / name)]


def _read(file: Path) -> list[Rule]:
    try:
        data: Any = yaml.safe_load(file.read_text())
        return [_rule(one) for group in data["groups"] for one in group["rules"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise RulesError(f"{file} holds no rules: {type(error).__name__}: {error}") from None


def _rule(data: dict[str, Any]) -> Rule:
    alert = "alert" in data
    return Rule(
        name=data["alert" if alert else "record"],
        expr=data["expr"],
        alert=alert,
        labels=data.get("labels", {}),
        annotations=data.get("annotations", {}),
    )
