"""A recording in numbers: load, latencies, how busy everybody was. For people; policies look at
windows (``telemetry``) instead."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from pydantic import BaseModel, ConfigDict

from actors.telemetry import STEP_COLUMNS
from autoscaler.recording import entries, read_header
from cluster.request_log import Done, First
from planner.digest import Digest, Percentiles

_COLUMN = {name: place for place, name in enumerate(STEP_COLUMNS)}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Times(_Model):
    """Percentiles in seconds; None where there was nothing."""

    count: int
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


class Actor(_Model):
    """What one actor did.

    ``busy`` share of the time that is known; ``count`` steps or kernel calls and their ``mean``
    seconds; ``requests`` and ``context`` tokens of a step; ``missed`` records.
    """

    name: str
    role: str
    busy: float | None = None
    count: int = 0
    mean: float | None = None
    requests: float | None = None
    context: float | None = None
    missed: int = 0


class Summary(_Model):
    """A recording; ``failed`` requests ended with an error, the others well or called off."""

    file: str
    model: str
    emulated: bool
    seconds: float
    requests: int
    failed: int
    rate: float
    ttft: Times
    tpot: Times
    ttft_target: float | None
    tpot_target: float | None
    prompt_mean: float | None
    output_mean: float | None
    prefix_hit: float | None
    actors: tuple[Actor, ...]
    changes: int
    decisions: int


@dataclass
class _Told:
    """Sums over what one actor told."""

    role: str
    first: float = 0.0
    last: float = 0.0
    busy: float = 0.0
    count: int = 0
    seconds: float = 0.0
    requests: float = 0.0
    context: float = 0.0
    missed: int = 0
    totals: dict[str, Any] = field(default_factory=dict)

    def actor(self, name: str) -> Actor:
        known, count = self.last - self.first, self.count
        step = self.role == "attention" and count > 0
        return Actor(
            name=name,
            role=self.role,
            busy=min(1.0, self.busy / known) if known > 0 else None,
            count=count,
            mean=self.seconds / count if count else None,
            requests=self.requests / count if step else None,
            context=self.context / count if step else None,
            missed=self.missed,
        )


def summarise(path: str | PathLike[str]) -> Summary:
    """The numbers of a recording.

    Raises:
        BadRecording: see ``recording.entries``.
    """
    header = read_header(path)
    told: dict[str, _Told] = {}
    requests: dict[tuple[str, str, int], Done | First] = {}
    kinds: defaultdict[str, int] = defaultdict(int)
    began = ended = header.began
    for entry in entries(path):
        kinds[entry.kind] += 1
        ended = max(ended, entry.at)
        if entry.kind == "requests":
            for record in entry.data["events"]:
                requests[entry.name, entry.data["incarnation"], record.number] = record
        elif entry.kind in ("steps", "rides"):
            one = told.setdefault(entry.name, _Told(entry.data["role"], entry.at))
            one.last = entry.at
            one.missed += entry.data.get("missed", 0)
            (_add_steps if entry.kind == "steps" else _add_rides)(one, entry.data)
    done = [record for record in requests.values() if isinstance(record, Done)]
    firsts = [record for record in requests.values() if isinstance(record, First)]
    good = [record for record in done if record.outcome in ("stop", "length")]
    prompt = sum(record.prompt for record in firsts)
    seconds = ended - began
    return Summary(
        file=str(path),
        model=header.model,
        emulated=header.emulated,
        seconds=seconds,
        requests=len(done),
        failed=sum(record.outcome == "error" for record in done),
        rate=len(done) / seconds if seconds > 0 else 0.0,
        ttft=_times([record.ttft for record in firsts]),
        tpot=_times([record.tpot for record in good]),
        ttft_target=header.ttft_s,
        tpot_target=header.tpot_s,
        prompt_mean=sum(record.prompt for record in good) / len(good) if good else None,
        output_mean=sum(record.output for record in good) / len(good) if good else None,
        prefix_hit=sum(record.cached for record in firsts) / prompt if prompt else None,
        actors=tuple(one.actor(name) for name, one in sorted(told.items())),
        changes=kinds["change"],
        decisions=kinds["decision"],
    )


def _add_steps(told: _Told, data: dict[str, Any]) -> None:
    rows = data["steps"]
    told.count += len(rows)
    told.busy += float(rows[:, _COLUMN["compute"]].sum())
    told.seconds += float(rows[:, _COLUMN["step"]].sum())
    told.requests += float(rows[:, _COLUMN["requests"]].sum())
    told.context += float(rows[:, _COLUMN["context"]].sum())


def _add_rides(told: _Told, data: dict[str, Any]) -> None:
    before, told.totals = told.totals, data
    if before.get("incarnation") != data["incarnation"] or "rides" not in before:
        return  # totals of before the recording, or of nothing yet
    told.count += data["rides"] - before["rides"]
    told.busy += data["busy_s"] - before["busy_s"]
    told.seconds += data["busy_s"] - before["busy_s"]


def _times(values: list[float | None]) -> Times:
    digest = Digest()
    for value in values:
        if value is not None:
            digest.add(max(0.0, value))
    found: Percentiles = digest.percentiles()
    if not found.count:
        return Times(count=0)
    return Times(count=found.count, mean=found.mean, p50=found.p50, p90=found.p90, p99=found.p99)
