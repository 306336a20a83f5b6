"""Reports to whoever listens: nothing lost, and nobody waits for the others."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest
from ray.exceptions import RayActorError

os.environ.setdefault("RAY_AUTH_MODE", "disabled")

from cluster.reporting import Reports
from cluster.request_metrics import RequestMetrics
from cluster.spec import SLOSpec


class Listener:
    """A handle; may be away."""

    def __init__(self) -> None:
        self.away = False
        self.numbers: list[int] = []
        self.heard = asyncio.Event()
        outer = self

        class Method:
            @staticmethod
            def remote(frontend: str, batch: dict[str, Any]) -> Any:
                return outer._take(frontend, batch)

        self.take_requests = Method

    async def _take(self, frontend: str, batch: dict[str, Any]) -> None:
        assert frontend == "frontend-0"
        self.heard.set()
        if self.away:
            raise RayActorError()
        self.numbers += [record.number for record in batch["events"]]

    async def again(self) -> None:
        """Wait until it was told something that was sent after this."""
        for _ in range(2):
            self.heard.clear()
            await self.heard.wait()


@pytest.fixture
def metrics() -> RequestMetrics:
    return RequestMetrics("m", "frontend-0", SLOSpec())


def serve(metrics: RequestMetrics, count: int) -> None:
    for _ in range(count):
        metrics.finished(metrics.arrived(1), "error")


async def test_every_listener_hears_everything_once(metrics: RequestMetrics) -> None:
    reports = Reports("frontend-0", metrics, every_s=0.001)
    controller, recording = Listener(), Listener()
    serve(metrics, 3)
    reports.listen({"controller": controller, "listeners": {}})
    await controller.again()
    controller.away = True
    serve(metrics, 2)
    reports.listen({"controller": controller, "listeners": {"r": recording}})
    await controller.again()
    await recording.again()
    assert recording.numbers == [1, 2, 3, 4, 5] and controller.numbers == [1, 2, 3]
    controller.away = False
    await controller.again()
    assert controller.numbers == [1, 2, 3, 4, 5]
    reports.close()


async def test_who_is_not_named_any_more_hears_nothing(metrics: RequestMetrics) -> None:
    reports = Reports("frontend-0", metrics, every_s=0.001)
    one, other = Listener(), Listener()
    reports.listen({"controller": one})
    await one.again()
    reports.listen({"controller": None, "listeners": {"other": other}})
    await asyncio.sleep(0)
    one.heard.clear()
    await other.again()
    assert not one.heard.is_set()
    reports.close()


async def test_more_records_than_a_report_takes(
    metrics: RequestMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.reporting.LIMIT", 4)
    reports, listener = Reports("frontend-0", metrics, every_s=60.0), Listener()
    serve(metrics, 10)
    reports.listen({"controller": listener})
    while len(listener.numbers) < 10:
        await asyncio.sleep(0)
    assert listener.numbers == list(range(1, 11))
    reports.close()
