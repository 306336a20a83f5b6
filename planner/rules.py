"""Sizing rules of related systems, as small functions to compare with.

Each is what its paper states and no more; ours, with workload and barrier, is in ``sizing``. All
times are in one unit, whichever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from planner.errors import PlannerError
from planner.setting import check_least


def megascale_lanes(attention_time: float, ffn_time: float, transfer_time: float) -> int:
    """Micro-batches that hide the transfer: m >= 2*(1 + T_c/T_f), T_f = max(T_a, T_e).

    MegaScale-Infer, arXiv 2504.02263. Its other condition, T_c < T_f, is the caller's to meet.

    Args:
        attention_time, ffn_time, transfer_time: per micro-batch and layer, the last one way.

    Raises:
        PlannerError: a negative time, or no compute at all.
    """
    slowest = _slowest(attention_time, ffn_time, transfer_time)
    return math.ceil(2.0 * (1.0 + transfer_time / slowest) - 1e-9)


def megascale_time(
    attention_time: float, ffn_time: float, transfer_time: float, lanes: int, layers: int
) -> float:
    """Time of one step: (T_a + T_e + 2*T_c) + T_f*(m*L - 1). MegaScale-Infer, arXiv 2504.02263.

    Holds with at least ``megascale_lanes`` lanes; with fewer it is too low.

    Raises:
        PlannerError: a negative time, no compute at all, or fewer than one lane or layer.
    """
    slowest = _slowest(attention_time, ffn_time, transfer_time)
    check_least("lanes", lanes, 1.0)
    check_least("layers", layers, 1.0)
    first = attention_time + ffn_time + 2.0 * transfer_time
    return first + slowest * (lanes * layers - 1)


def megascale_transfer_time(
    attention_bytes: float,
    attention_bandwidth: float,
    ffn_bytes: float,
    ffn_bandwidth: float,
    utilisation: float = 1.0,
) -> float:
    """T_c, the slower of sender and receiver. MegaScale-Infer, arXiv 2504.02263.

    max(b_a*h*K/tp_a / (W_a*util), b_e*h/tp_e / (W_e*util)), with the numerators given as bytes per
    GPU of a micro-batch and layer.

    Args:
        attention_bytes, ffn_bytes: that one GPU sends or receives.
        attention_bandwidth, ffn_bandwidth: of one GPU, bytes per unit of time.
        utilisation: share of the bandwidth that is reached, in (0, 1].

    Raises:
        PlannerError: a number out of range.
    """
    check_least("attention_bytes", attention_bytes, 0.0)
    check_least("ffn_bytes", ffn_bytes, 0.0)
    if attention_bandwidth <= 0 or ffn_bandwidth <= 0 or not 0.0 < utilisation <= 1.0:
        raise PlannerError("bandwidths have to be above 0, utilisation above 0 and up to 1")
    return max(attention_bytes / attention_bandwidth, ffn_bytes / ffn_bandwidth) / utilisation


def janus_tpot(
    attention_times: Sequence[float], ffn_times: Sequence[float], transfer_times: Sequence[float]
) -> float:
    """TPOT = sum over layers of (T_attn + T_moe + T_comm). Janus, arXiv 2512.13525.

    Nothing overlaps in it: one lane.

    Raises:
        PlannerError: different numbers of layers.
    """
    if not len(attention_times) == len(ffn_times) == len(transfer_times):
        raise PlannerError("attention, FFN and transfer times are needed for the same layers")
    return math.fsum(attention_times) + math.fsum(ffn_times) + math.fsum(transfer_times)


def janus_batch(
    token_rate: float, tpot: Callable[[float], float], most: float = 1e7, tolerance: float = 1e-6
) -> float:
    """Requests in flight at a token rate: the least fixed point of B = rate * TPOT(B).

    Janus, arXiv 2512.13525; Little's law. Iterated from an empty system, which climbs to the least
    one.

    Args:
        token_rate: tokens per unit of time that are asked for.
        tpot: time per token with so many requests in flight, not falling.
        most: requests in flight beyond which there is taken to be no fixed point.

    Returns:
        B, or ``inf`` where the system can't follow the rate.
    """
    check_least("token_rate", token_rate, 0.0)
    low, high = 0.0, token_rate * tpot(0.0)
    # TPOT never falls, so each step lands above the last and not beyond the least fixed point
    while high > low * (1.0 + tolerance) + tolerance:
        low, high = high, token_rate * tpot(high)
        if high > most:
            return math.inf
    return high


def janus_fewest(
    token_rate: float,
    tpot: Callable[[int, int, float], float],
    max_tpot: float,
    most_attention: int = 64,
    most_ffn: int = 64,
) -> tuple[int, int]:
    """Fewest instances that keep TPOT at a token rate. Janus, arXiv 2512.13525.

    Args:
        token_rate: tokens per unit of time.
        tpot: time per token of (attention instances, FFN instances, requests in flight).
        max_tpot: the limit.
        most_attention, most_ffn: how far to search.

    Returns:
        (attention, FFN) with the smallest sum, of equals the one with the lower TPOT.

    Raises:
        PlannerError: none within the bounds keeps the limit.
    """
    for total in range(2, most_attention + most_ffn + 1):
        found = []
        for a in range(max(1, total - most_ffn), min(most_attention, total - 1) + 1):
            f = total - a
            batch = janus_batch(token_rate, lambda b, a=a, f=f: tpot(a, f, b))  # type: ignore[misc]
            if math.isfinite(batch) and (time := tpot(a, f, batch)) <= max_tpot:
                found.append((time, a, f))
        if found:
            return min(found)[1:]
    raise PlannerError(
        f"no {most_attention} attention and {most_ffn} FFN instances or fewer keep a TPOT of "
        f"{max_tpot:g} at {token_rate:g} tokens per unit of time"
    )


def fastafd_attention(
    ffn_time: Callable[[int], float], attention_time: float, most: int = 1024
) -> int:
    """The most attention nodes with T_e <= T_a: FFN side hidden behind attention (FastAFD).

    "Balance is the wrong target": a node more than that makes every node wait.

    Args:
        ffn_time: T_e with so many attention nodes, not falling.
        attention_time: T_a.
        most: how far to search.

    Returns:
        at least 1, even where one node already makes the FFN side the slower one.
    """
    low, high = 1, most + 1  # T_e(low) <= T_a, or low is 1; T_e(high) > T_a
    while high - low > 1:
        middle = (low + high) // 2
        if ffn_time(middle) <= attention_time:
            low = middle
        else:
            high = middle
    return low


def _slowest(attention_time: float, ffn_time: float, transfer_time: float) -> float:
    check_least("attention_time", attention_time, 0.0)
    check_least("ffn_time", ffn_time, 0.0)
    check_least("transfer_time", transfer_time, 0.0)
    slowest = max(attention_time, ffn_time)
    if slowest <= 0:
        raise PlannerError("attention and FFN time are both 0, expected one above 0")
    return slowest
