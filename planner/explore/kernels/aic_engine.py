"""aiconfigurator's compiled engine for lists of operations: seconds for single loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.explore.kernels.base import NotCovered


class Engine:
    """Times of lists of operations, in seconds.

    Args:
        handle: of the package.
        where: for refusals.
    """

    def __init__(self, handle: Any, where: str):
        self._handle, self._where = handle, where

    def total(self, indices: Sequence[int], tokens: int) -> float:
        """Seconds of operations of the list "generation" that depend on tokens only, together.

        Raises:
            NotCovered: nothing was measured that could tell.
        """
        return self.total_generation(indices, tokens, 1)

    def total_generation(self, indices: Sequence[int], requests: int, context: int) -> float:
        """The same for one token of each of ``requests`` with ``context`` tokens in the cache."""
        call = self._handle.evaluate_generation_ops
        return sum(self._ask(call, indices, batch_size=requests, s=context))

    def context(self, indices: Sequence[int], prompts: int, tokens: int, past: int) -> list[float]:
        """Seconds of each operation of the list "context" for ``tokens`` new tokens of each of
        ``prompts`` with ``past`` tokens in the cache."""
        call = self._handle.evaluate_context_ops
        # one at a time: answers to operations of one name are merged
        return [
            sum(self._ask(call, [index], batch_size=prompts, s=tokens, prefix=past))
            for index in indices
        ]

    def _ask(self, call: Any, indices: Sequence[int], **load: int) -> list[float]:
        try:
            rows = call(list(indices), **load)
        except Exception as error:
            raise NotCovered(f"not measured on {self._where}: {error}") from error
        return [1e-3 * row[1] for row in rows]
