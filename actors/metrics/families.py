"""The catalogue's metrics as prometheus_client objects, for one process.

Two ways to fill a metric: count or observe as things happen (``families[name]``), or have a
function read values at scrape time that somebody keeps anyway (``collect_from``). The first costs
the hot path, so what exists already takes the second. A name that this side does not export is an
error when the process starts. Not for serving them (``exporter``).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from actors.metrics import catalogue

logger = logging.getLogger(__name__)

# A second series per counter and histogram that nobody reads.
prometheus_client.disable_created_metrics()


class Value(NamedTuple):
    """A counter's or a gauge's value at scrape time.

    Args:
        name: as in the catalogue.
        labels: values of the metric's own labels, in order; no base labels.
        value: counters must never fall while the process lives.
    """

    name: str
    labels: tuple[str, ...]
    value: float


class Distribution(NamedTuple):
    """A histogram at scrape time that is kept elsewhere.

    Args:
        name: as in the catalogue.
        labels: values of the metric's own labels, in order.
        counts: per bucket, not cumulative; one more than the catalogue has edges, for what lies
            above the last.
        sum: of all observed values, in the metric's unit.
    """

    name: str
    labels: tuple[str, ...]
    counts: Sequence[int]
    sum: float


Reading: TypeAlias = Value | Distribution


class Families:
    """The metrics of one process.

    Args:
        side: which part of the catalogue.
        values: base label -> value, for all of ``catalogue.base_labels(side)``.

    Attributes:
        registry: holds all of them; nothing else of the process.

    Raises:
        ValueError: ``values`` does not name the side's base labels.
    """

    def __init__(self, side: catalogue.Side, values: Mapping[str, str]):
        wanted = catalogue.base_labels(side)
        if set(values) != set(wanted):
            raise ValueError(
                f"metrics of side {side!r} have the base labels {wanted}, got {tuple(values)}"
            )
        self.side = side
        self.registry = CollectorRegistry()
        self._metrics = catalogue.of(side)
        self._base = tuple(values[name] for name in wanted)
        self._base_names = wanted
        self._made: dict[str, Any] = {}
        self._taken: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        """The prometheus_client object of a metric, base labels bound.

        A metric with labels of its own gives an object whose ``labels(...)`` takes these only; call
        it once for every value that is known, so that the series begin at zero.

        Raises:
            ValueError: this side does not export it, or ``collect_from`` fills it.
        """
        if name not in self._made:
            (metric,) = self._take([name])
            names = (*self._base_names, *metric.labels)
            options: dict[str, Any] = {"registry": self.registry}
            if metric.kind == "histogram":
                options["buckets"] = metric.buckets
            parent = _CLASSES[metric.kind](metric.name, metric.help, names, **options)
            bound = _Bound(parent, self._base) if metric.labels else parent.labels(*self._base)
            self._made[name] = bound
        return self._made[name]

    def collect_from(
        self, function: Callable[[], Iterable[Reading]], names: Collection[str]
    ) -> None:
        """Read metrics at scrape time.

        Args:
            function: yields readings, in any order; called on any thread, by several at once. What
                it yielded before it raised is kept, the rest is missing from this scrape; the
                first error is logged.
            names: all that it may yield.

        Raises:
            ValueError: this side does not export one of ``names``, or another source fills it.
        """
        metrics = {metric.name: metric for metric in self._take(names)}
        self.registry.register(_Source(function, metrics, self._base_names, self._base))

    @property
    def missing(self) -> set[str]:
        """What the catalogue promises for this side and nobody fills; opt-in metrics aside."""
        return {
            name
            for name, metric in self._metrics.items()
            if name not in self._taken and not metric.opt_in
        }

    def _take(self, names: Iterable[str]) -> list[catalogue.Metric]:
        taken = []
        for name in names:
            if name not in self._metrics:
                raise ValueError(
                    f"a process of side {self.side!r} does not export {name}; what it exports is "
                    "in actors/metrics/catalogue.py"
                )
            if name in self._taken:
                raise ValueError(f"{name} is filled already; a metric has one source")
            self._taken.add(name)
            taken.append(self._metrics[name])
        return taken


class Rising:
    """Keeps totals that are estimates, or end up smaller than they seemed, from ever falling:
    Prometheus would take that for a restart and count everything again."""

    def __init__(self) -> None:
        self._highest: dict[Hashable, float] = {}

    def __call__(self, key: Hashable, value: float) -> float:
        """The greatest value so far of what ``key`` names, 0.0 at least."""
        highest = self._highest[key] = max(value, self._highest.get(key, 0.0))
        return highest


class _Bound:
    """A metric with own labels whose base labels are given already."""

    def __init__(self, parent: Any, base: tuple[str, ...]):
        self._parent = parent
        self._base = base

    def labels(self, *own: str) -> Any:
        return self._parent.labels(*self._base, *own)


class _Source:
    """A collector over a function, as the registry wants it."""

    def __init__(
        self,
        function: Callable[[], Iterable[Reading]],
        metrics: Mapping[str, catalogue.Metric],
        base_names: tuple[str, ...],
        base: tuple[str, ...],
    ):
        self._function = function
        self._metrics = metrics
        self._base_names = base_names
        self._base = base
        self._failed = False

    def describe(self) -> Iterator[Metric]:
        """Names for the registry, without reading anything."""
        yield from self._empty().values()

    def collect(self) -> Iterator[Metric]:
        families = self._empty()
        try:
            for reading in self._function():
                self._add(families[reading.name], reading)
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception(
                    "some of %s are missing from this scrape; later failures are not logged",
                    sorted(families),
                )
        yield from families.values()

    def _empty(self) -> dict[str, Any]:
        return {
            name: _FAMILIES[metric.kind](
                name, metric.help, labels=(*self._base_names, *metric.labels)
            )
            for name, metric in self._metrics.items()
        }

    def _add(self, family: Any, reading: Reading) -> None:
        metric = self._metrics[reading.name]
        if len(reading.labels) != len(metric.labels):
            raise ValueError(f"{metric.name} has the labels {metric.labels}, got {reading.labels}")
        labels = (*self._base, *reading.labels)
        if isinstance(reading, Value):
            family.add_metric(labels, reading.value)
            return
        edges = (*metric.buckets, math.inf)
        if len(reading.counts) != len(edges):
            raise ValueError(
                f"{metric.name} has {len(edges)} buckets, got {len(reading.counts)} counts"
            )
        buckets, total = [], 0
        for edge, count in zip(edges, reading.counts, strict=True):
            total += int(count)
            buckets.append((floatToGoString(edge), total))
        family.add_metric(labels, buckets, float(reading.sum))


_CLASSES: dict[str, Any] = {
    "counter": prometheus_client.Counter,
    "gauge": prometheus_client.Gauge,
    "histogram": prometheus_client.Histogram,
}
_FAMILIES: dict[str, Any] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
