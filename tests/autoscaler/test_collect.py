"""Asking everybody at once, whoever is dead or silent."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayActorError

from actors.errors import AffluxError
from autoscaler.collect import Cursors, collect


class Handle:
    """Answers, raises, or never does."""

    def __init__(self, answer: Any):
        self.answer = answer
        self.asked: list[Any] = []

    def __getattr__(self, method: str) -> Any:
        outer = self

        class Method:
            @staticmethod
            def remote(*args: Any) -> Any:
                outer.asked.append(args)
                return outer._call()

        return Method

    async def _call(self) -> Any:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def manager(**workers: Handle) -> Handle:
    return Handle({name: ("attention", handle, "ready") for name, handle in workers.items()})


async def test_a_round_and_the_next() -> None:
    worker = Handle({"number": 5})
    cursors = Cursors()
    there = manager(a=worker)
    assert await collect(there, cursors) == {"a": {"number": 5}}
    worker.answer = {"number": 9}
    await collect(there, cursors)
    assert worker.asked == [(0,), (5,)] and cursors.numbers == {"a": 9}


async def test_the_dead_and_the_silent_are_left_out() -> None:
    cursors = Cursors()
    workers = {
        "a": Handle({"number": 1}),
        "b": Handle(RayActorError()),
        "c": Handle(None),
        "d": Handle(AffluxError("has none", code="no_telemetry")),
    }
    found = await collect(manager(**workers), cursors, deadline_s=0.02)
    assert list(found) == ["a"]
    assert set(cursors.silent) == {"b", "c", "d"} and cursors.silent["d"] == "has none"
    assert not cursors.away


async def test_while_the_manager_is_away_its_last_word_counts() -> None:
    cursors, worker = Cursors(), Handle({"number": 1})
    for answer in (None, RayActorError(), AffluxError("starting", code="not_ready")):
        assert await collect(Handle(answer), cursors, deadline_s=0.02) == {}
        assert cursors.away
    await collect(manager(a=worker), cursors)
    for gone in (Handle(RayActorError()), None):
        assert set(await collect(gone, cursors)) == {"a"}
        assert cursors.away
    await collect(manager(b=worker), cursors)
    assert cursors.numbers == {"b": 1}, "the cursors of those that left go too"
