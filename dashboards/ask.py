"""Questions to a Prometheus over its HTTP API: current facts and values over time.

Proxies of the environment are not used: a Prometheus that a proxy has to find is none of ours. Not
for what to ask, nor for what answers mean.
"""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from actors.errors import AffluxError

TIMEOUT_S = 30.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0, "y": 31536e3}


class NoAnswer(AffluxError):
    """A Prometheus does not answer, or refuses the question."""

    code = "prometheus_no_answer"


@dataclass(frozen=True)
class Line:
    """One series over time: ``times`` are Unix seconds, ``values`` may hold NaN."""

    labels: Mapping[str, str]
    times: tuple[float, ...]
    values: tuple[float, ...]


def get(
    url: str, path: str, words: Mapping[str, str] | None = None, *, timeout_s: float = TIMEOUT_S
) -> Any:
    """The ``data`` of an answer.

    Args:
        url: of the Prometheus, ``http://host:port``.
        path: as in ``/api/v1/targets``.
        words: of the question, as in ``{"query": "up"}``.

    Raises:
        NoAnswer: the text has Prometheus' own words where it gave any.
    """
    question = f"{url.rstrip('/')}{path}?{urllib.parse.urlencode(words or {})}"
    try:
        with _DIRECT.open(question, timeout=timeout_s) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise NoAnswer(f"Prometheus at {url} refuses {path}: {_words(error)}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoAnswer(f"no Prometheus answers at {url}: {error}") from None


def over_time(url: str, expression: str, start: float, end: float, step: float) -> list[Line]:
    """A range query.

    Args:
        start, end: Unix seconds, both included.
        step: seconds between two values.

    Raises:
        NoAnswer: as ``get``; the text has the expression.
    """
    words = {
        "query": expression,
        "start": f"{start:.3f}",
        "end": f"{end:.3f}",
        "step": f"{step:.3f}",
    }
    try:
        found = get(url, "/api/v1/query_range", words)
    except NoAnswer as error:
        raise NoAnswer(f"{error}\n  {expression}") from None
    return [
        Line(
            series["metric"],
            tuple(float(moment) for moment, _ in series["values"]),
            tuple(float(value) for _, value in series["values"]),
        )
        for series in found["result"]
    ]


def scrape_interval_s(url: str) -> float:
    """The longest interval at which it scrapes, in seconds.

    Raises:
        NoAnswer: as ``get``.
    """
    config = yaml.safe_load(get(url, "/api/v1/status/config")["yaml"])
    usual = config.get("global", {}).get("scrape_interval", "1m")
    jobs = config.get("scrape_configs") or [{}]
    return max(duration_s(job.get("scrape_interval", usual)) for job in jobs)


def duration_s(text: str) -> float:
    """Prometheus' durations (``1m30s``) in seconds.

    Raises:
        ValueError: it is none.
    """
    parts = re.findall(r"([0-9]+)(ms|[smhdwy])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration; expected one like 15s or 1m30s")
    return math.fsum(int(number) * _UNITS[unit] for number, unit in parts)


def _words(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (OSError, ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
