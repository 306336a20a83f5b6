"""What was measured lately, as the snapshot that policies decide on.

Fed with whatever actors and frontends told (``collect``, ``take_requests``), in any order; pure,
all time comes with the calls, on one monotonic clock. A window never reaches back before the last
change of members, nor into a new actor's first steps. Not for fitting a model to the same data: see
``calibrate``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import numpy as np

from actors.telemetry import STEP_COLUMNS
from autoscaler.door import Door
from autoscaler.histories import (
    History,
    RequestHistory,
    StepHistory,
    bins_between,
    wire_between,
)
from autoscaler.policy import SLO
from planner.control import Snapshot

Role = Literal["attention", "ffn", "frontend"]
Batch = Mapping[str, Any]
H = TypeVar("H", bound=History)

KEEP_S = 10.0
"""Seconds beyond the window that are kept, for answers that come late."""

_COLUMN = {name: place for place, name in enumerate(STEP_COLUMNS)}


class Telemetry:
    """Windows over everything that was told.

    Args:
        window_s: length of a window, seconds.
        slo: targets in seconds; requests in flight that miss one count as soon as they do.
        warmup_steps: first steps of an attention actor that count for nothing.
        warmup_s: seconds after an actor's first step, and after a change, that count for nothing.
    """

    def __init__(
        self,
        window_s: float = 20.0,
        slo: SLO | None = None,
        *,
        warmup_steps: int = 3,
        warmup_s: float = 2.0,
    ):
        self.window_s = window_s
        self._slo = slo or SLO(math.inf, math.inf)
        self._warmup_steps = warmup_steps
        self._warmup_s = warmup_s
        self._attention: dict[tuple[str, str], StepHistory] = {}
        self._ffn: dict[tuple[str, str], History] = {}
        self._frontends: dict[tuple[str, str], RequestHistory] = {}
        self._members: dict[str, tuple[str, str]] | None = None
        self._floor = -math.inf
        self._first = math.inf

    # -- what is told ----------------------------------------------------------------------------

    def take(self, name: str, batch: Batch, now: float) -> None:
        """Take in what an actor or a frontend told; the same batch again changes nothing.

        Args:
            name: of the actor or frontend.
            batch: as ``Worker.telemetry`` or ``RequestMetrics.batch`` made it.
            now: when it came.

        Raises:
            ValueError: it has a role that is unknown.
        """
        keep = self.window_s + KEEP_S
        key = name, batch["incarnation"]
        match batch["role"]:
            case "attention":
                self._attention.setdefault(key, StepHistory(keep)).take(batch, now)
            case "ffn":
                slim = {k: v for k, v in batch.items() if k != "experts"}
                self._ffn.setdefault(key, History(keep)).take(slim, now)
            case "frontend":
                self._frontends.setdefault(key, RequestHistory(keep)).take(batch, now)
                self._first = min(self._first, now)
            case role:
                raise ValueError(
                    f"{name} told of the role {role!r}; expected attention, ffn or frontend"
                )

    def members(self, members: Iterable[tuple[str, str, str]], now: float) -> None:
        """Who is there now: (name, role, state) of actors; what others told is forgotten."""
        self._members = {name: (role, state) for name, role, state in members}
        for histories in (self._attention, self._ffn):
            for key in [key for key in histories if key[0] not in self._members]:
                del histories[key]  # type: ignore[attr-defined]
        silent = now - self.window_s - KEEP_S
        for key in [key for key, told in self._frontends.items() if told.heard < silent]:
            del self._frontends[key]

    def changed(self, now: float) -> None:
        """Members or experts have changed; windows begin after this, and after the warm-up."""
        self._floor = max(self._floor, now + self._warmup_s)

    # -- what it comes to ------------------------------------------------------------------------

    def snapshot(self, now: float) -> Snapshot:
        """What a policy is shown.

        Shares and rates of a system that reports and is idle are 0. Before anybody has told
        anything, ``window`` is 0 and ``age`` infinite.
        """
        start = self._start(now)
        door = Door(self._slo, self._floor)
        for told in _sorted(self._frontends):
            door.add(told, start, now)
        gauges = [told.latest for told in self._newest(self._attention)]
        running = sum(gauge["running"] for gauge in gauges) if gauges else door.running
        waiting = sum(gauge["waiting"] for gauge in gauges) + door.waiting
        batch, context = self._loads(start)
        sums = door.sums
        return Snapshot(
            now=now,
            window=max(0.0, now - start),
            **self._counts(),
            running=running,
            waiting=waiting,
            arrival_rate=door.arrival_rate,
            rejected=door.rejected,
            tokens_rate=door.tokens_rate,
            completed=sums.count,
            ttft=door.late(door.ttft, door.waits, self._slo.ttft),
            tpot=door.late(door.tpot, door.paces, self._slo.tpot),
            itl=door.itl.percentiles(),
            attention_busy=_mean(self._attention_busy(start)),
            ffn_busy=_mean([ride["busy_s"] / ride["seconds"] for ride in self._rides(start)]),
            batch=batch,
            kv_tokens=context,
            theta=sums.theta,
            nu2=sums.nu2,
            prompt_mean=sums.prompt / sums.count if sums.count else math.nan,
            output_mean=sums.output / sums.count if sums.count else math.nan,
            prefix_hit=door.cached / door.prompt if door.prompt else math.nan,
            kv_usage=_mean([gauge["kv_usage"] for gauge in gauges]),
            imbalance=_imbalance([ride["pairs"] / ride["seconds"] for ride in self._rides(start)]),
            age=self._age(now),
        )

    def steps(self, now: float) -> dict[str, np.ndarray]:
        """Warm steps of the window by attention actor: float64[n, STEP_COLUMNS]."""
        start = self._start(now)
        return {
            key[0]: told.steps(self._warm(told, start), self._warmup_steps)
            for key, told in self._present(self._attention)
        }

    def rides(self, now: float) -> dict[str, dict[str, Any]]:
        """What each FFN actor did in the window: ``seconds`` of it, and differences of ``rides``,
        ``frames``, ``tokens``, ``pairs``, ``busy_s``, ``boarding_s`` and ``bins``."""
        start = self._start(now)
        found = {key[0]: self._ride(told, start) for key, told in self._present(self._ffn)}
        return {name: ride for name, ride in found.items() if ride is not None}

    def wire(self, now: float) -> dict[str, dict[str, Any]]:
        """What each attention actor's frames took in the window: ``seconds`` by stage, ``frames``,
        ``tokens``, ``hops``, ``bytes_out``, ``bytes_back``; differences."""
        start = self._start(now)
        found = {}
        for key, told in self._present(self._attention):
            ends = told.between(start, self._warm(told, self._floor))
            if ends is not None and ends[0].get("wire") and ends[1].get("wire"):
                found[key[0]] = wire_between(ends[0]["wire"], ends[1]["wire"])
        return found

    def facts(self) -> dict[str, int | None]:
        """``slots`` and ``kv_tokens`` of an attention actor, the least of all, and MoE ``layers``;
        None while unknown."""
        gauges = [told.latest for told in self._newest(self._attention)]
        found: dict[str, int | None] = {}
        for name, key in (
            ("slots", "slots"),
            ("kv_tokens", "kv_tokens"),
            ("layers", "layer_count"),
        ):
            found[name] = min((gauge[key] for gauge in gauges if gauge[key]), default=None)
        return found

    # -- parts -----------------------------------------------------------------------------------

    def _start(self, now: float) -> float:
        return min(now, max(now - self.window_s, self._floor, self._first))

    def _warm(self, told: History, start: float) -> float:
        """When an actor's times begin to count, on our clock."""
        if told.began is None:
            return start
        return max(start, told.began + told.offset + self._warmup_s)

    def _present(
        self, histories: Mapping[tuple[str, str], H]
    ) -> Iterator[tuple[tuple[str, str], H]]:
        """Those of members, newest life of each, in order of names."""
        newest: dict[str, tuple[str, str]] = {}
        for key in sorted(histories, key=lambda key: (key[0], histories[key].heard, key[1])):
            if self._members is None or key[0] in self._members:
                newest[key[0]] = key
        for key in newest.values():
            yield key, histories[key]

    def _newest(self, histories: Mapping[tuple[str, str], H]) -> list[H]:
        return [told for _, told in self._present(histories)]

    def _attention_busy(self, start: float) -> list[float]:
        """Computing share of each attention actor that is known for some of the window."""
        shares = []
        for told in self._newest(self._attention):
            since = self._warm(told, start)
            known = told.reach - since
            if known <= 0:
                continue
            rows = told.steps(since, self._warmup_steps)
            seconds = rows[:, _COLUMN["step"]]
            # A step that was under way when the window began counts by its part inside.
            inside = np.minimum(rows[:, _COLUMN["at"]] - (since - told.offset), seconds)
            part = np.divide(inside, seconds, out=np.ones_like(seconds), where=seconds > 0)
            shares.append(min(1.0, float(np.sum(rows[:, _COLUMN["compute"]] * part)) / known))
        return shares

    def _loads(self, start: float) -> tuple[float, float]:
        """Mean requests and context tokens of a lane's step; 0 when idle, nan when unknown."""
        told = self._newest(self._attention)
        if not told:
            return math.nan, math.nan
        rows = np.concatenate(
            [one.steps(self._warm(one, start), self._warmup_steps) for one in told]
        )
        if not len(rows):
            return 0.0, 0.0
        lanes = np.maximum(rows[:, _COLUMN["lanes"]], 1.0)
        requests, context = (rows[:, _COLUMN[name]] / lanes for name in ("requests", "context"))
        return float(requests.mean()), float(context.mean())

    def _rides(self, start: float) -> list[dict[str, Any]]:
        rides = [self._ride(told, start) for told in self._newest(self._ffn)]
        return [ride for ride in rides if ride is not None]

    def _ride(self, told: History, start: float) -> dict[str, Any] | None:
        floor = self._warm(told, self._floor)
        ends = told.between(max(start, floor), floor)
        if ends is None or "rides" not in ends[0]:
            return None
        old, new, seconds = ends
        totals = ("rides", "frames", "tokens", "pairs", "busy_s", "boarding_s")
        found: dict[str, Any] = {key: max(0, new[key] - old[key]) for key in totals}
        found["busy_s"] = min(found["busy_s"], seconds)
        return {**found, "seconds": seconds, "bins": bins_between(old["bins"], new["bins"])}

    def _counts(self) -> dict[str, int]:
        """Workers by role and state, as the snapshot names them."""
        if self._members is None:
            return {
                "attention": len(self._newest(self._attention)),
                "ffn": len(self._newest(self._ffn)),
            }
        count = {
            (role, state): sum(1 for member in self._members.values() if member == (role, state))
            for role in ("attention", "ffn")
            for state in ("starting", "ready", "draining")
        }
        return {
            "attention": count["attention", "ready"],
            "attention_preparing": count["attention", "starting"],
            "attention_draining": count["attention", "draining"],
            "ffn": count["ffn", "ready"] + count["ffn", "draining"],
            "ffn_preparing": count["ffn", "starting"] - count["ffn", "draining"],
        }

    def _age(self, now: float) -> float:
        """Time since the newest word of the role that has been silent longest."""
        ages = []
        roles: tuple[tuple[str, Mapping[Any, History]], ...] = (
            ("attention", self._attention),
            ("ffn", self._ffn),
            ("frontend", self._frontends),
        )
        for role, histories in roles:
            actors = None if role == "frontend" else self._members
            if actors is not None and (role, "ready") not in actors.values():
                continue  # nobody is there to say anything
            heard = max((told.heard for told in histories.values()), default=-math.inf)
            ages.append(max(0.0, now - heard))
        return max(ages)


def _sorted(histories: Mapping[tuple[str, str], H]) -> list[H]:
    return [histories[key] for key in sorted(histories)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _imbalance(loads: list[float]) -> float:
    total = sum(loads)
    return max(loads) * len(loads) / total if total > 0 else math.nan
