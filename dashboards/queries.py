"""Words for writing PromQL: a series of a dashboard's targets, rates, sums, quantiles.

Pure text in, text out. Every selector made here carries the dashboard's ``job`` and ``instance``
variables, and every rate goes over ``$__rate_interval``, so that the choice at the top of a
dashboard reaches every panel. Not for recording rules and alerts, which know no variables
(deploy/prometheus).
"""

from __future__ import annotations

TARGETS = 'job=~"$job", instance=~"$instance"'
"""Matchers that every selector of a dashboard has."""

OURS = f'{TARGETS}, deployment=~"$deployment"'
"""The same for afflux's own series."""


def series(name: str, *matchers: str, base: str = OURS) -> str:
    """A selector.

    Args:
        name: of the metric, with its suffix.
        matchers: further ones, as in ``slo="ttft"``.
        base: ``TARGETS`` for series that are not ours (Ray's).
    """
    return f"{name}{{{', '.join((base, *matchers))}}}"


def rate(name: str, *matchers: str, base: str = OURS) -> str:
    """Increase of a counter per second."""
    return f"rate({series(name, *matchers, base=base)}[$__rate_interval])"


def increase(name: str, *matchers: str, window: str = "$__rate_interval") -> str:
    """Increase of a counter over a window, as in ``1h``; "$__range" is the dashboard's."""
    return f"increase({series(name, *matchers)}[{window}])"


def total(expression: str, *by: str) -> str:
    """Sum over everything but the labels ``by``."""
    return f"sum{_by(by)} ({expression})"


def most(expression: str, *by: str) -> str:
    """Greatest value by the labels ``by``."""
    return f"max{_by(by)} ({expression})"


def quantile(
    q: float, name: str, *by: str, matchers: tuple[str, ...] = (), base: str = OURS
) -> str:
    """A quantile of a histogram over all its processes.

    Args:
        q: 0 to 1.
        name: of the histogram, without ``_bucket``.
        by: labels to keep apart.
    """
    buckets = total(rate(f"{name}_bucket", *matchers, base=base), "le", *by)
    return f"histogram_quantile({q:g}, {buckets})"


def mean(name: str, *by: str, matchers: tuple[str, ...] = ()) -> str:
    """Mean of what a histogram observed."""
    return (
        f"{total(rate(f'{name}_sum', *matchers), *by)} / "
        f"{total(rate(f'{name}_count', *matchers), *by)}"
    )


def buckets(name: str, *matchers: str) -> str:
    """What a heatmap draws: observations per second by upper edge."""
    return total(rate(f"{name}_bucket", *matchers), "le")


def share(part: str, whole: str) -> str:
    """A ratio of two sums."""
    return f"{part} / {whole}"


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""
