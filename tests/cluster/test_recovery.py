"""What a new manager concludes from what the actors say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.errors import AffluxError
from actors.table import ExpertTable
from cluster import ray_actors, recovery
from cluster.recovery import look_around, newest, pairs
from cluster.spec import make_spec


def test_newest_table_wins() -> None:
    old, new = (ExpertTable(epoch, {0: (("ffn-0",),)}) for epoch in (3, 5))
    assert newest([new, old]) is new
    assert newest([]) is None


def test_a_connection_needs_both_sides() -> None:
    infos = {
        "attention-0": {"role": "attention", "peers": ["ffn-0", "ffn-1"]},
        "attention-1": {"role": "attention", "peers": ["ffn-0"]},
        "ffn-0": {"role": "ffn", "peers": ["attention-0"]},
        "ffn-1": {"role": "ffn", "peers": ["attention-0", "attention-1"]},
    }
    assert pairs(infos) == {("attention-0", "ffn-0"), ("attention-0", "ffn-1")}


class Silent:
    """A worker that answers from the ``answers``-th question on."""

    def __init__(self, answers: int):
        self.left = answers
        self.info = self
        self.killed = False

    async def remote(self) -> dict[str, Any]:
        self.left -= 1
        if self.left > 0:
            await asyncio.sleep(60)
        return {"role": None, "state": "warm", "note": {"number": 7}}


def serve(monkeypatch: pytest.MonkeyPatch, workers: dict[str, Silent]) -> None:
    monkeypatch.setattr(recovery, "ANSWER_S", 0.01)
    monkeypatch.setattr(ray_actors, "workers", lambda deployment: workers)
    monkeypatch.setattr(ray_actors, "groups", lambda deployment: {})
    monkeypatch.setattr(ray_actors, "where", lambda handle: ("node", "10.0.0.1", 1))
    monkeypatch.setattr(ray_actors, "kill", lambda handle: setattr(handle, "killed", True))


async def test_who_is_slow_is_asked_again_before_it_is_ended(monkeypatch: pytest.MonkeyPatch):
    workers = {"ffn-0": Silent(1), "ffn-1": Silent(4), "ffn-2": Silent(10**6)}
    serve(monkeypatch, workers)
    monkeypatch.setattr(recovery, "PATIENCE_S", 0.5)
    found = await look_around(make_spec({"model": {"path": "/m"}}))
    assert found.note == {"number": 7}
    assert [name for name, _, _ in found.warm] == ["ffn-0", "ffn-1"]
    assert found.names == ("ffn-0", "ffn-1", "ffn-2")
    assert [w.killed for w in workers.values()] == [False, False, True]


async def test_silence_is_not_taken_for_an_empty_deployment(monkeypatch: pytest.MonkeyPatch):
    workers = {"ffn-0": Silent(10**6)}
    serve(monkeypatch, workers)
    monkeypatch.setattr(recovery, "PATIENCE_S", 0.05)
    with pytest.raises(AffluxError, match="none of ffn-0 has said within") as error:
        await look_around(make_spec({"model": {"path": "/m"}}))
    assert error.value.code == "silent" and not workers["ffn-0"].killed
