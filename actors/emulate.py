"""Emulated devices: a stage lasts at least its modelled time, by sleeping for the rest.

Control plane, data plane and tokens stay real, so tens of actors with a GPU's proportions run on
a few cores. Results made this way must be labelled as emulation. Not a simulator: the planner has
one that needs no actors.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """Seconds as a line over a load: ``a_s * load + b_s`` (t_A, t_F, t_C of arXiv 2601.21351)."""

    a_s: float = 0.0
    b_s: float = 0.0

    def __call__(self, load: float) -> float:
        """Modelled seconds of a load (context tokens, pairs or bytes)."""
        return self.a_s * load + self.b_s


@dataclass(frozen=True)
class Emulation:
    """The stages of one layer: attention of one lane by context tokens, a kernel call of an FFN
    actor by (token, expert) pairs, a frame one way by bytes; frames do not wait for one another's
    wire."""

    attention: Line = Line()
    ffn: Line = Line()
    transfer: Line = Line()


def sleep_rest(began: float, seconds: float) -> None:
    """Sleep until ``seconds`` after ``began`` (``time.perf_counter()``); no time left: return."""
    left = began + seconds - time.perf_counter()
    if left > 0:
        time.sleep(left)
