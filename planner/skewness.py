"""How lopsided the context of a slot is: what the barrier needs beyond the mean and the variance.

The third standardised moment of the stationary load, by the same renewal-reward as ``moments``. Not
in the papers, which take the sum over a batch as normal.
"""

from __future__ import annotations

import numpy as np

from planner.workload import Workload


def load_skewness(workload: Workload, samples: int = 1 << 17, seed: int = 0) -> float:
    """E[(L - theta)^3] / nu^3 of a slot's context L at a random step, from drawn requests.

    A request is seen in D steps, with P, P+1, ... tokens. 0 where the context doesn't vary.

    Args:
        samples: requests to draw; long tails need many.
    """
    prompt, output = workload.sample(np.random.default_rng(seed), samples)
    p, d = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64)
    total = d.sum()
    theta = float(np.sum(d * p + d * (d - 1) / 2) / total)
    p -= theta  # moments about the mean: nothing cancels later
    one, two = d * (d - 1) / 2, d * (d - 1) * (2 * d - 1) / 6
    second = float(np.sum(d * p**2 + 2 * p * one + two) / total)
    third = float(np.sum(d * p**3 + 3 * p**2 * one + 3 * p * two + one**2) / total)
    return third / second**1.5 if second > 0 else 0.0
