"""Outboxes: order, one listener, and what happens to clients that are gone."""

from __future__ import annotations

import asyncio
from typing import Any

from actors.outboxes import Outboxes


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


async def read(outboxes: Outboxes, client: int, got: list[Any]) -> None:
    async for message in outboxes.listen(client):
        got.append(message)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_keeps_what_came_before_the_listener() -> None:
    outboxes = Outboxes()
    assert outboxes.put(1, "a") and outboxes.put(2, "other") and not outboxes.listened(1)
    got: list[Any] = []
    reader = asyncio.create_task(read(outboxes, 1, got))
    await settle()
    assert got == ["a"] and outboxes.listened(1)
    outboxes.put(1, "b")
    outboxes.close()
    await asyncio.wait_for(reader, 1)
    assert got == ["a", "b"]


async def test_a_new_listener_gets_nothing_of_the_old_one_s() -> None:
    outboxes = Outboxes()
    old: list[Any] = []
    new: list[Any] = []
    reader = asyncio.create_task(read(outboxes, 1, old))
    await settle()
    outboxes.put(1, "unread")
    outboxes.renew(1)
    await asyncio.wait_for(reader, 1)
    assert old == []
    outboxes.put(1, "fresh")
    reader = asyncio.create_task(read(outboxes, 1, new))
    await settle()
    assert new == ["fresh"]
    reader.cancel()


async def test_a_silent_client_is_gone() -> None:
    clock = Clock()
    outboxes = Outboxes(60.0, clock=clock)
    got: list[Any] = []
    reader = asyncio.create_task(read(outboxes, 1, got))
    await settle()
    for _ in range(5):  # signs of life keep it
        clock.now += 50
        outboxes.heard(1)
        assert outboxes.put(1, "alive")
    await settle()
    clock.now += 61
    assert not outboxes.put(1, "too late")
    await asyncio.wait_for(reader, 1)
    assert got == ["alive"] * 5
    assert outboxes.put(1, "a new client") and not outboxes.listened(1)
