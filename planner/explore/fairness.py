"""Max-min fair sharing of ports by flows that all start at once: how long until the last is done?

Pure arrays: a flow is a number of bytes and the ports it passes, a port has bytes per second. Which
ports there are in a system is ``transfers``' business. Fluid: no packets, no latency, no losses.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fair_rates(passes: Array, capacities: Array, weights: Array | None = None) -> Array:
    """Max-min fair rates by progressive filling (Bertsekas and Gallager, Data Networks, 6.5.2).

    All rates grow together; when a port is full, those of the flows through it stop.

    Args:
        passes: [ports, flows] how often each flow counts at a port: 1 where it passes, 0 elsewhere;
            of classes of equal flows the number of flows of the class at one port of the kind.
        capacities: [ports] bytes per second, above 0.
        weights: [flows] rate relative to the others; none: all alike.

    Returns:
        [flows] bytes per second; inf for a flow that passes no port.
    """
    grow = np.ones(passes.shape[1]) if weights is None else np.asarray(weights, float)
    rates = np.zeros(passes.shape[1])
    going = np.ones(passes.shape[1], bool)
    left = np.asarray(capacities, float).copy()
    while going.any():
        pressure = passes[:, going] @ grow[going]
        busy = pressure > 0
        if not busy.any():
            rates[going] = np.inf
            break
        steps = np.full(left.shape, np.inf)
        steps[busy] = np.maximum(left[busy], 0.0) / pressure[busy]
        step = steps.min()
        rates[going] += step * grow[going]
        left -= step * pressure
        # ports that fill at this step within rounding fill together
        full = busy & (steps <= step * (1 + 1e-12))
        going &= ~(passes[full] > 0).any(axis=0)
    return rates


def drain_time(sizes: Array, passes: Array, capacities: Array) -> float:
    """Seconds until the last of the flows is done, rates shared anew whenever one is.

    Args:
        sizes: [flows] bytes.
        passes: [ports, flows] as in ``fair_rates``.
        capacities: [ports] bytes per second.

    Returns:
        Seconds; 0 without bytes. Twice the bytes in every flow take twice as long.
    """
    left = np.asarray(sizes, float).copy()
    seconds = 0.0
    going = left > 0
    while going.any():
        rates = fair_rates(passes[:, going], capacities)
        lasts = left[going] / rates
        step = float(lasts.min())
        seconds += step
        goes_on = lasts > step * (1 + 1e-12)
        rest = np.zeros(len(rates))
        rest[goes_on] = left[going][goes_on] - step * rates[goes_on]
        left[going] = rest
        going = left > 0
    return seconds
