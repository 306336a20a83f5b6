"""Buffering log handlers survive that somebody else configures logging."""

import io
import logging
from collections.abc import Iterator
from logging.config import dictConfig
from logging.handlers import MemoryHandler

import pytest

from cluster.log_targets import kept_log_targets

VLLMS_WAY = {"version": 1, "disable_existing_loggers": False}


@pytest.fixture
def access_log() -> Iterator[tuple[logging.Logger, MemoryHandler, io.StringIO]]:
    """A logger with a handler as Ray Serve's replicas have: buffers of one record."""
    written = io.StringIO()
    handler = MemoryHandler(1, target=logging.StreamHandler(written))
    logger = logging.getLogger("test.access")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    yield logger, handler, written
    logger.removeHandler(handler)


def test_without_help_records_pile_up(access_log) -> None:
    logger, handler, written = access_log
    dictConfig(VLLMS_WAY)
    for _ in range(3):
        logger.info("GET / 200")
    assert len(handler.buffer) == 3 and not written.getvalue()


def test_with_help_they_are_written(access_log) -> None:
    logger, handler, written = access_log
    with kept_log_targets():
        dictConfig(VLLMS_WAY)
        logger.info("meanwhile")
    logger.info("after")
    assert written.getvalue().split() == ["meanwhile", "after"]
    assert not handler.buffer


def test_a_target_that_somebody_else_set_stays(access_log) -> None:
    logger, handler, _ = access_log
    other = io.StringIO()
    with kept_log_targets():
        dictConfig(VLLMS_WAY)
        handler.setTarget(logging.StreamHandler(other))
    logger.info("there")
    assert other.getvalue().split() == ["there"]


def test_an_error_inside_changes_nothing(access_log) -> None:
    logger, _, written = access_log

    @kept_log_targets()
    def refuse() -> None:
        dictConfig(VLLMS_WAY)
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such"):
        refuse()
    logger.info("after")
    assert written.getvalue().split() == ["after"]
