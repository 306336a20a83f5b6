"""What every stage did and when, for the first steps of a simulation, and as a Chrome trace.

The trace opens in chrome://tracing and https://ui.perfetto.dev. Not for a whole run: a span is
kept per stage and step, so the recorder stops after the steps that were asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Phase = Literal["attention", "a2f", "wait", "ffn", "f2a"]


@dataclass(frozen=True, slots=True)
class Span:
    """One stage at work, or one lane on its way or waiting.

    Args:
        worker: "A3" for attention worker 3, "F" for the FFN workers together; of the phases on
            the way and in a queue of a barrier group, "A" for all attention workers.
        lane: number of the lane within its worker, from 0.
        phase: attention, a2f, wait (for the FFN), ffn, f2a.
        start: when it began, in the unit of the latencies.
        duration: how long it took, in the same unit.
    """

    worker: str
    lane: int
    phase: Phase
    start: float
    duration: float


@dataclass(slots=True)
class SpanLog:
    """Spans of the first ``steps`` steps begun at or after ``since``; full after that."""

    steps: int
    since: float = 0.0
    spans: list[Span] = field(default_factory=list)

    def begins(self, now: float) -> bool:
        """Whether the step that begins now is to be recorded; counts it."""
        if self.steps <= 0 or now < self.since:
            return False
        self.steps -= 1
        return True

    def add(self, worker: str, lane: int, phase: Phase, start: float, end: float) -> None:
        """Records what took time; what took none is left out."""
        if end > start:
            self.spans.append(Span(worker, lane, phase, start, end - start))


def to_chrome_trace(spans: Iterable[Span], unit: str = "s") -> dict[str, Any]:
    """The spans in the Trace Event Format: a process per worker, a thread per lane.

    Args:
        spans: what ``Result.spans`` holds.
        unit: of the spans' times. Seconds are written as microseconds; any other unit (cycles) one
            for one, as viewers label the axis in microseconds whatever it means.

    Returns:
        A dict for ``json.dump``.
    """
    scale = 1e6 if unit == "s" else 1.0
    kept = list(spans)
    names = sorted({s.worker for s in kept}, key=lambda name: (name[0], int(name[1:] or -1)))
    pids = {name: pid for pid, name in enumerate(names, start=1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": name}}
        for name, pid in pids.items()
    ]
    for worker, lane in sorted({(s.worker, s.lane) for s in kept}):
        label = {"name": f"lane {lane}"}
        event = {"ph": "M", "name": "thread_name", "pid": pids[worker], "tid": lane, "args": label}
        events.append(event)
    events.extend(
        {
            "ph": "X",
            "name": s.phase,
            "cat": "afd",
            "pid": pids[s.worker],
            "tid": s.lane,
            "ts": s.start * scale,
            "dur": s.duration * scale,
        }
        for s in kept
    )
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"unit": unit}}
