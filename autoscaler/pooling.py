"""Runs a function over many questions in processes that share something large.

What is shared is handed over once per process, not once per question. Not for long-lived services.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from planner.errors import PlannerError

Ask = Callable[[Callable[[Any, Any], Any], Iterable[Any]], Iterator[Any]]
"""Of a function ``(shared, question) -> answer`` at the top of a module, and questions: the answers
in order."""

_shared: Any = None  # of a process of the pool


@contextmanager
def sharing(shared: Any, jobs: int | None = None) -> Iterator[Ask]:
    """A way to ask about what is shared.

    Args:
        shared: anything that can be pickled.
        jobs: processes; None: one per core; 1: this one.

    Raises:
        PlannerError: jobs below 1.
    """
    if jobs is not None and jobs < 1:
        raise PlannerError(f"jobs is {jobs}, expected at least 1")
    if jobs == 1:
        yield lambda function, questions: (function(shared, one) for one in questions)
        return
    with ProcessPoolExecutor(jobs, initializer=_share, initargs=(shared,)) as pool:
        yield lambda function, questions: pool.map(_call, ((function, one) for one in questions))


def _share(shared: Any) -> None:
    global _shared
    _shared = shared


def _call(given: tuple[Callable[[Any, Any], Any], Any]) -> Any:
    function, question = given
    return function(_shared, question)
