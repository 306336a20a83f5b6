"""A worker without a role; with one it is covered by ``tests/e2e``."""

from __future__ import annotations

import threading

import pytest

from actors import worker as module
from actors.errors import AffluxError
from actors.worker import Worker


async def test_preload_imports_on_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(module, "_import_all", lambda: threads.append(threading.current_thread()))
    worker = Worker()
    assert (await worker.info())["role"] is None and await worker.ping() == "created"
    assert await worker.preload() == "warm" and await worker.preload() == "warm"
    assert len(threads) == 1 and threads[0] is not threading.main_thread()


async def test_an_import_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ImportError("no vllm")

    monkeypatch.setattr(module, "_import_all", broken)
    with pytest.raises(ImportError, match="no vllm"):
        await Worker().preload()


async def test_without_a_role_there_is_nothing_to_ask() -> None:
    worker = Worker()
    with pytest.raises(AffluxError, match="without a role can't adopt") as error:
        await worker.adopt(None)
    assert error.value.code == "not_running"
    with pytest.raises(AffluxError, match="AttentionConfig or an FFNConfig, got str"):
        await worker.start("attention")


async def test_the_newest_note_is_kept() -> None:
    worker = Worker()
    for number in (1, 3, 2):
        await worker.remember({"number": number})
    assert (await worker.info())["note"] == {"number": 3}


async def test_watch_waits() -> None:
    assert (await Worker().watch(0, 0.01))["faults"] == []
