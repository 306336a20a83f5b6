"""Writes changes and failures of a deployment into Grafana's annotation store.

Every dashboard of ours shows them (tags ``afflux`` and ``change`` or ``failure``), as a span from a
change's begin to its end. Each has a tag of its own, so that writing twice is writing once, and one
that was written while it was under way gets its end later. Plain data in: what the manager calls a
``ChangeReport`` and an ``ActorEvent``, as dictionaries. Not for asking the manager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grafana_client import GrafanaApi

from dashboards.frame import CHANGE_TAG, FAILURE_TAG, TAG
from dashboards.grafana import connect, explained

Written = Literal["created", "updated", "unchanged"]
Reports = Iterable[Mapping[str, Any]]

_PHASES = ("prepare", "commit", "release")
_AFTER_LOSSES = ("repair", "replace")


@dataclass(frozen=True)
class Annotation:
    """One mark on every graph.

    Args:
        key: tag that no other has.
        begin_ms, end_ms: Unix time in milliseconds; equal for a moment.
    """

    key: str
    begin_ms: int
    end_ms: int
    tags: tuple[str, ...]
    text: str


def of_change(deployment: str, report: Mapping[str, Any]) -> Annotation | None:
    """A change as an annotation; None for one that changed nothing.

    A change that was rolled back, and those that the manager begins after a loss, are failures.

    Args:
        report: a ``ChangeReport`` as a dictionary.
    """
    phase = report["phase"]
    if phase in ("noop", "queued"):
        return None
    seconds: Mapping[str, float] = report.get("seconds") or {}
    begin = round(report["started_at"] * 1000)
    failed = phase == "rolled_back" or report["verb"] in _AFTER_LOSSES
    key = f"{deployment}:change:{report['number']}:{begin}"
    return Annotation(
        key=key,
        begin_ms=begin,
        end_ms=begin + round(1000 * _lasted(seconds)),
        tags=(TAG, FAILURE_TAG if failed else CHANGE_TAG, deployment, report["verb"], key),
        text=_text(report, seconds),
    )


def of_loss(deployment: str, event: Mapping[str, Any], at_s: float) -> Annotation | None:
    """A lost actor as an annotation; None for an event that is no loss.

    Args:
        event: an ``ActorEvent`` as a dictionary.
        at_s: Unix time of it; events carry the manager's own clock only.
    """
    if event["state"] != "failed" or not event["actor"]:
        return None
    at = round(at_s * 1000)
    key = f"{deployment}:loss:{event['actor']}:{at}"
    why = f": {event['detail']}" if event.get("detail") else ""
    tags = (TAG, FAILURE_TAG, deployment, "loss", key)
    return Annotation(key, at, at, tags, f"{event['actor']} was lost{why}")


def of_decision(deployment: str, report: Mapping[str, Any]) -> Annotation | None:
    """What the controller ordered, and why, as an annotation; None where it ordered nothing.

    Args:
        report: a ``DecisionReport`` of ``autoscaler.journal`` as a dictionary.
    """
    if report["target"] is None and not report["rebalance"]:
        return None
    at = round(report["time"] * 1000)
    key = f"{deployment}:decision:{at}"
    wanted = f"{report['there']} -> {report['target']}" if report["target"] else "rebalance"
    reasons = ", ".join(str(reason) for reason in report["reasons"])
    parts = [f"{report['policy']}: {wanted} ({reasons})", report["detail"], report["outcome"]]
    tags = (TAG, CHANGE_TAG, deployment, "decision", key)
    return Annotation(key, at, at, tags, "; ".join(filter(None, parts)))


class Annotator:
    """Writes annotations to one Grafana.

    Args:
        url: of Grafana.
        token: of a service account with the role Editor.

    Raises:
        GrafanaError: from every call too.
    """

    def __init__(self, url: str, token: str):
        self._url = url
        self._api: GrafanaApi = connect(url, token)
        self._written: dict[str, Annotation] = {}

    def write(self, annotation: Annotation) -> Written:
        """Make it so that Grafana has it, with its newest end and text."""
        if self._written.get(annotation.key) == annotation:
            return "unchanged"
        with explained(self._url):
            outcome = self._write(annotation)
        self._written[annotation.key] = annotation
        return outcome

    def _write(self, wanted: Annotation) -> Written:
        found = self._api.annotations.find_annotations(tags=[wanted.key], limit=1)
        content: dict[str, Any] = {
            "time_from": wanted.begin_ms,
            "time_to": wanted.end_ms,
            "tags": list(wanted.tags),
            "text": wanted.text,
        }
        if not found:
            self._api.annotations.add_annotation(**content)
            return "created"
        there = found[0]
        if (there.get("timeEnd"), there.get("text")) == (wanted.end_ms, wanted.text):
            return "unchanged"
        self._api.annotations.update_annotation(there["id"], **content)
        return "updated"


def follow(
    deployment: str,
    looks: Iterable[tuple[Reports, Reports, Reports]],
    annotator: Annotator,
    clock: Callable[[], float],
    on_written: Callable[[Annotation, Written], None] = lambda annotation, written: None,
) -> None:
    """Write what is seen, look after look, until there are no more looks.

    Args:
        looks: each the change reports of now, the events since the look before, and the
            controller's decisions that ordered something.
        clock: Unix time, for events.
        on_written: told of what was created or updated.
    """
    for changes, events, decisions in looks:
        marks = [of_change(deployment, report) for report in changes]
        marks += [of_decision(deployment, report) for report in decisions]
        marks += [of_loss(deployment, event, clock()) for event in events]
        for mark in marks:
            if mark is not None:
                written = annotator.write(mark)
                if written != "unchanged":
                    on_written(mark, written)


def _lasted(seconds: Mapping[str, float]) -> float:
    return seconds.get("total") or sum(seconds.get(phase, 0.0) for phase in _PHASES)


def _text(report: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    phase = report["phase"]
    times = ", ".join(f"{one} {_time(seconds[one])}" for one in _PHASES if one in seconds)
    state = {"done": "done", "rolled_back": "rolled back"}.get(phase, f"in phase {phase}")
    parts = [f"{report['verb']} {report['text']}: {state}{f' ({times})' if times else ''}"]
    for word in ("started", "retired"):
        if report.get(word):
            parts.append(f"{word} {', '.join(report[word])}")
    if report.get("moved_experts"):
        parts.append(f"moved {report['moved_experts']} experts")
    if report.get("epoch") is not None:
        parts.append(f"epoch {report['epoch']}")
    if report.get("error"):
        parts.append(str(report["error"]))
    return "; ".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
