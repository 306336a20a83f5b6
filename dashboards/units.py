"""Values in Grafana's units as short texts, for pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

_AFTER = {"bytes": "B", "decbytes": "B", "Bps": "B/s", "binBps": "B/s", "reqps": "/s", "cps": "/s"}


def formatter(unit: str) -> Callable[[float], str]:
    """A function that writes a value.

    Args:
        unit: Grafana's, as in ``s``, ``percentunit``, ``Bps``; unknown ones give a bare number.
    """
    if unit == "s":
        return seconds
    if unit == "ms":
        return lambda value: seconds(value / 1e3)
    if unit == "percentunit":
        return lambda value: f"{100 * value:.3g} %" if math.isfinite(value) else "-"
    if unit == "percent":
        return lambda value: f"{value:.3g} %" if math.isfinite(value) else "-"
    if unit == "mbytes":
        return lambda value: formatter("bytes")(value * 2**20)
    if unit == "bool_yes_no":
        return lambda value: "yes" if value else "no"
    after = _AFTER.get(unit, "")

    def write(value: float) -> str:
        if not math.isfinite(value):
            return "-"
        text = number(value)
        return f"{text} {after}" if after[:1].isalpha() and text[-1].isdecimal() else text + after

    return write


def number(value: float) -> str:
    """Three digits, with k, M or G from ten thousand on."""
    for size, word in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.3g}{word}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def seconds(value: float) -> str:
    """A duration in the unit that suits it."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0 s"
    for size, word, least in ((60.0, "min", 120.0), (1.0, "s", 1.0), (1e-3, "ms", 1e-3)):
        if abs(value) >= least:
            return f"{value / size:.3g} {word}"
    return f"{value / 1e-6:.3g} us"
