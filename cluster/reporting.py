"""Tells whoever listens, once a second, what a frontend's requests came to.

The controller listens, and recordings do. A listener has an asynchronous method
``take_requests(frontend, batch)``; what it does not confirm is sent again. One that is slow, away
or dead costs its own reports only. Not for what is in a report: see ``request_log``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

from ray.exceptions import RayError

from cluster.request_metrics import RequestMetrics

logger = logging.getLogger(__name__)

EVERY_S = 1.0
ANSWER_S = 5.0
"""How long a listener may take before it is told again."""

LIMIT = 2048
"""Most records of one report."""


class Reports:
    """Belongs to one event loop.

    Args:
        frontend: this process, as in ``frontend-0``.
        metrics: of its requests.
        every_s: pause between two reports to one listener.
    """

    def __init__(self, frontend: str, metrics: RequestMetrics, every_s: float = EVERY_S):
        self.frontend = frontend
        self._metrics = metrics
        self._every_s = every_s
        self._tasks: dict[Any, asyncio.Task[None]] = {}

    def listen(self, members: Mapping[str, Any]) -> None:
        """Report to those whom the manager names, and to nobody else from now on.

        Args:
            members: its answer: a Ray handle or None under ``controller``, more of them by name
                under ``listeners``.
        """
        found = [members.get("controller"), *(members.get("listeners") or {}).values()]
        wanted = {_identity(handle): handle for handle in found if handle is not None}
        for key in [key for key in self._tasks if key not in wanted]:
            self._tasks.pop(key).cancel()
        for key, handle in wanted.items():
            if key not in self._tasks:
                self._tasks[key] = asyncio.create_task(self._report(handle))

    def close(self) -> None:
        """Report to nobody any more."""
        self.listen({})

    async def _report(self, listener: Any) -> None:
        seen, silent = 0, False
        while True:
            batch = self._metrics.batch(seen, LIMIT)
            try:
                async with asyncio.timeout(ANSWER_S):
                    await listener.take_requests.remote(self.frontend, batch)
                seen, silent = batch["number"], False
            except (RayError, TimeoutError) as error:
                if not silent:  # it may be restarting; one line is enough
                    logger.info("a listener does not answer: %s", type(error).__name__)
                silent = True
            if len(batch["events"]) < LIMIT or silent:
                await asyncio.sleep(self._every_s)


def _identity(handle: Any) -> Any:
    """The same for two handles of one actor."""
    found = getattr(handle, "_actor_id", None)
    return id(handle) if found is None else found.hex()
