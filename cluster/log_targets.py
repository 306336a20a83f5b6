"""Keeps log handlers that wait for a buffer to fill alive while others configure logging.

``logging.config.dictConfig``, which vLLM calls, closes every handler of the process. A closed
``MemoryHandler`` has no target any more but stays where it was: it writes nothing, and keeps every
record for ever. Ray Serve's access log is such a handler. Configures no logging itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


@contextmanager
def kept_log_targets() -> Iterator[None]:
    """Whoever is inside may configure logging; buffering handlers have their targets afterwards,
    and write what came meanwhile."""
    before = {handler: handler.target for handler in _buffering() if handler.target is not None}
    try:
        yield
    finally:
        for handler, target in before.items():
            if handler.target is None:
                handler.setTarget(target)
                handler.flush()


def _buffering() -> set[MemoryHandler]:
    """Those that some logger of this process writes to."""
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return {
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, MemoryHandler)
    }
