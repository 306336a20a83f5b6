"""Measured step times as a file holds them: what ``afflux bench kernels`` writes, read and checked.

A table has a value at some pairs of loads, and lines in between. What the values mean is
``measured``'s business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from planner.errors import PlannerError
from planner.explore.kernels.base import Array, Provenance
from planner.explore.model import Model, model_from_config

_WRITTEN_BY = "`afflux bench kernels`"


@dataclass(frozen=True)
class Table:
    """A value over two loads, for instance requests and context.

    Args:
        columns: by rising first load: that, the second loads (rising) and the values there.
    """

    columns: tuple[tuple[float, Array, Array], ...]

    @classmethod
    def of(cls, points: Sequence[tuple[float, float, float]]) -> Table:
        """From (first load, second load, value); repeated places have their mean."""
        places: dict[float, dict[float, list[float]]] = {}
        for first, second, value in points:
            places.setdefault(first, {}).setdefault(second, []).append(value)
        columns = []
        for first in sorted(places):
            seconds = sorted(places[first])
            values = [float(np.mean(places[first][second])) for second in seconds]
            columns.append((first, np.array(seconds), np.array(values)))
        return cls(tuple(columns))

    def at(self, first: float, second: float) -> tuple[float, Provenance]:
        """The value at a place: measured there, on lines between places, or on the outermost of
        these lines continued, never below 0."""
        firsts = np.array([column[0] for column in self.columns])
        place, how = _between(firsts, first)
        low, high = self.columns[place[0]], self.columns[place[1]]
        at_low, how_low = _on_lines(low[1], low[2], second)
        at_high, how_high = _on_lines(high[1], high[2], second)
        value = at_low
        if place[0] != place[1]:
            value += (at_high - at_low) * (first - low[0]) / (high[0] - low[0])
        return max(value, 0.0), max(how, how_low, how_high, key=list(Provenance).index)

    @property
    def reach(self) -> str:
        """What was measured, in words, for refusals."""
        parts = [f"{x:g} with {seconds.min():g} to {seconds.max():g}"
                 for x, seconds, _ in self.columns]  # fmt: skip
        return ", ".join(parts)


@dataclass(frozen=True)
class Entry:
    """All that was measured of one model.

    Args:
        model: made of the config in the file.
        layers, outside: by threads, seconds of a decode step of the attention side in and outside
            of its layers over (requests, context).
        experts: by threads, seconds of all MoE layers over (experts held, tokens).
        hop: seconds that one message between the sides takes, over (1, its tokens): "attention"
            and "ffn", which these processes work on it, and "wire".
    """

    model: Model
    layers: Mapping[int, Table]
    outside: Mapping[int, Table]
    experts: Mapping[int, Table]
    hop: Mapping[str, Table]


def read_entries(path: str | Path) -> tuple[str, Mapping[str, Entry]]:
    """(machine, entries by the models' names) of a file.

    Raises:
        PlannerError: not such a file; says what is wrong.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        models = report["details"]["models"]
        entries = {name: _entry(name, kept) for name, kept in models.items()}
        return str(report["summary"]["machine"]), entries
    except (OSError, UnicodeDecodeError) as error:
        raise PlannerError(f"{path}: can't be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlannerError(
            f"{path}: expected the JSON that {_WRITTEN_BY} writes ({error!r})"
        ) from error


def same(one: Model, other: Model) -> bool:
    """Whether two models are alike but for their names."""
    return replace(one, name="") == replace(other, name="")


def _entry(name: str, kept: Mapping[str, Any]) -> Entry:
    attention, experts, hop = kept["attention"], kept["experts"], kept["hop"]
    if not (attention and experts and hop):
        raise ValueError(f"{name} has no rows of attention, experts or the hop")
    return Entry(
        model=model_from_config(name, kept["config"]),
        layers=_by_threads(attention, "batch", "context", "layers_s"),
        outside=_by_threads(attention, "batch", "context", "outside_s"),
        experts=_by_threads(experts, "held", "tokens", "seconds"),
        hop={
            part: Table.of([(1.0, _number(row, "tokens"), _number(row, f"{part}_s"))
                            for row in hop])
            for part in ("attention", "wire", "ffn")
        },
    )  # fmt: skip


def _by_threads(
    rows: Sequence[Mapping[str, Any]], first: str, second: str, value: str
) -> dict[int, Table]:
    points: dict[int, list[tuple[float, float, float]]] = {}
    for row in rows:
        point = (_number(row, first), _number(row, second), _number(row, value))
        points.setdefault(int(_number(row, "threads")), []).append(point)
    return {threads: Table.of(found) for threads, found in points.items()}


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < np.inf:
        raise ValueError(f"{key} is {value!r}, expected a number of at least 0")
    return float(value)


def _between(places: Array, wanted: float) -> tuple[tuple[int, int], Provenance]:
    """Which two places a wanted one lies between, or the outermost two beside it."""
    exact = np.flatnonzero(places == wanted)
    if len(exact):
        return (int(exact[0]), int(exact[0])), Provenance.MEASURED
    outside = wanted < places[0] or wanted > places[-1]
    how = Provenance.EXTRAPOLATED if outside else Provenance.INTERPOLATED
    if len(places) == 1:
        return (0, 0), how
    high = int(np.clip(np.searchsorted(places, wanted), 1, len(places) - 1))
    return (high - 1, high), how


def _on_lines(places: Array, values: Array, wanted: float) -> tuple[float, Provenance]:
    (low, high), how = _between(places, wanted)
    if low == high:
        return float(values[low]), how
    share = (wanted - places[low]) / (places[high] - places[low])
    return float(values[low] + (values[high] - values[low]) * share), how
