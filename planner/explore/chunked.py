"""Chunked prefill that rides with decode: how many steps carry prompt tokens, and what that means.

The mean-field schedule of aiconfigurator 0.12 (``BaseBackend.run_agg``), in arrays: every slot's
prompt is computed once per request, in chunks that ride in some of the steps in which the other
slots decode. It knows nothing of what a step takes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from planner.explore.kernels.base import Array
from planner.explore.points import Shape


@dataclass(frozen=True)
class Chunked:
    """The steps of one request's life on one attention rank; arrays of one shape.

    Args:
        batch: slots of the rank.
        mixed: steps that carry a chunk.
        plain: steps of decode alone.
        decode: requests that decode in a mixed step.
        passes: mixed steps that one prompt takes.
        queue: factor on these for the wait behind other prompts, 1.9 to 4.
        tokens: that a request generates.
    """

    batch: Array
    mixed: Array
    plain: Array
    decode: Array
    passes: Array
    queue: Array
    tokens: int

    def where(self, mask: np.ndarray) -> Chunked:
        """Those that are chosen."""
        return replace(
            self,
            **{f.name: getattr(self, f.name)[mask] for f in fields(self) if f.name != "tokens"},
        )

    def rate(self, mixed: Array, plain: Array) -> Array:
        """Output tokens per second of the rank."""
        total = mixed * self.mixed + plain * self.plain
        return self.batch * self.tokens / total


def chunked(shape: Shape, batch: Array, chunk: Array) -> Chunked:
    """The schedule for slots and prompt tokens per step; both broadcast.

    Args:
        batch: slots of one attention rank, >= 1.
        chunk: most prompt tokens in a step of the rank, >= 1.
    """
    batch, chunk = np.broadcast_arrays(np.asarray(batch, float), np.asarray(chunk, float))
    passes = np.ceil(shape.prompt / chunk)
    steps = np.ceil(shape.prompt * batch / chunk)
    decode_steps = float(shape.output)
    crowded = steps >= decode_steps
    decode = np.where(
        crowded,
        np.floor(batch / np.maximum(steps / decode_steps, 1.0)),
        batch - np.ceil(chunk / shape.prompt),
    )
    alone = batch <= 1
    return Chunked(
        batch=batch,
        mixed=np.where(alone, passes, steps),
        plain=np.where(alone, decode_steps - 1, np.where(crowded, 0.0, decode_steps - steps)),
        decode=np.where(alone, 0.0, np.maximum(decode, 1.0)),
        passes=passes,
        queue=np.minimum(2.0 + (steps - 3.0) / 20.0, 4.0),
        tokens=max(shape.output - 1, 1),
    )
