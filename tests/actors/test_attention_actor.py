"""The attention actor without an engine: what the manager can ask of it at any time."""

import asyncio

import pytest

from actors.attention import AttentionActor
from actors.errors import AffluxError


async def test_watch_before_the_start():
    seen = await AttentionActor().watch(timeout_s=0.01)
    assert seen == {
        "state": "created",
        "error": None,
        "epoch": 0,
        "faults": [],
        "number": 0,
        "running": 0,
        "waiting": 0,
        "stalled_s": 0.0,
        "wire_s": {},
    }


async def test_watch_tells_of_a_failure_at_once():
    actor = AttentionActor()
    actor._loop = asyncio.get_running_loop()
    watching = asyncio.create_task(actor.watch(timeout_s=60.0))
    await asyncio.sleep(0)
    actor._fail(ValueError("no such model"))
    async with asyncio.timeout(10):
        seen = await watching
        assert (await actor.watch(timeout_s=60.0))["state"] == "failed"
    assert (seen["state"], seen["error"]) == ("failed", "ValueError: no such model")


async def test_the_newest_note_is_kept():
    actor = AttentionActor()
    assert (await actor.info())["note"] is None
    for number in (3, 5, 4):
        await actor.remember({"number": number})
    assert (await actor.info())["note"] == {"number": 5}


async def test_peers_and_tables_need_an_engine():
    actor = AttentionActor()
    for call in (actor.offer("ffn-0"), actor.disconnect("ffn-0"), actor.adopt(None)):
        with pytest.raises(AffluxError, match="attention actor is created"):
            await call
