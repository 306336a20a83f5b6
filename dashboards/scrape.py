"""Reads the metrics of a whole deployment once, without Prometheus: for ``afflux top``.

The manager's service discovery says which processes there are; each is asked for its page, all at
the same time. A process that does not answer is named in the result and holds nobody up for longer
than the deadline. Keeps no history and computes nothing: rates are ``top.py``'s.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from actors.errors import AffluxError

Labels = tuple[tuple[str, str], ...]
"""Label names and values, sorted by name."""

Series = Mapping[str, Mapping[Labels, float]]
"""Values by sample name (``afd_x_bucket`` too) and labels."""

_TEXT = {"Accept": "text/plain;version=0.0.4"}


class Unreachable(AffluxError):
    """The manager's service discovery does not answer, or not as it should."""

    code = "metrics_unreachable"


@dataclass(frozen=True)
class Target:
    """One page to read. ``address`` is host:port; ``job`` says whose page it is."""

    address: str
    path: str = "/metrics"
    scheme: str = "http"
    job: str = ""

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"{self.scheme}://{self.address}{self.path}"


@dataclass(frozen=True)
class Scrape:
    """What every process said at about the same time.

    Attributes:
        at: Unix time at which the pages were asked for.
        series: of all processes together; their labels keep them apart.
        targets: who was asked.
        missing: why there is no page, by URL.
    """

    at: float
    series: Series
    targets: tuple[Target, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)


class Scraper:
    """Reads a deployment again and again; remembers who there was while the manager is away.

    Args:
        url: of the manager's exporter, ``http://host:port``.
        jobs: which pages, as service discovery names them; None for all.
        timeout_s: how long discovery, and then all pages together, may take.
    """

    def __init__(
        self, url: str, *, jobs: Sequence[str] | None = ("afflux",), timeout_s: float = 2.0
    ):
        self.url = url.rstrip("/")
        self._jobs = jobs
        self._timeout_s = timeout_s
        self._known: tuple[Target, ...] = ()

    def scrape(self) -> Scrape:
        """Ask everybody.

        Raises:
            Unreachable: service discovery does not answer and never did.
        """
        return asyncio.run(self._scrape())

    async def _scrape(self) -> Scrape:
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        missing: dict[str, str] = {}
        async with aiohttp.ClientSession(timeout=timeout, headers=_TEXT) as session:
            try:
                found = targets_of(await _read(session, f"{self.url}/sd"), self.url)
                self._known = tuple(
                    target for target in found if self._jobs is None or target.job in self._jobs
                )
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                if not self._known:
                    raise Unreachable(
                        f"no service discovery at {self.url}/sd: {_reason(error)}; expected the "
                        "address of a manager's exporter, as 'afflux status' shows it"
                    ) from None
                missing[f"{self.url}/sd"] = _reason(error)
            at = time.time()
            pages = await asyncio.gather(
                *(_page(session, target) for target in self._known), return_exceptions=True
            )
        series: dict[str, dict[Labels, float]] = {}
        for target, page in zip(self._known, pages, strict=True):
            if isinstance(page, Exception):
                missing[target.url] = _reason(page)
            elif isinstance(page, BaseException):
                raise page
            else:
                for name, values in page.items():
                    series.setdefault(name, {}).update(values)
        return Scrape(at, series, self._known, missing)


def targets_of(text: str, url: str = "") -> tuple[Target, ...]:
    """Prometheus HTTP service discovery's JSON as targets.

    Args:
        url: where it came from, for the error.

    Raises:
        Unreachable: it is something else.
    """
    try:
        return tuple(
            Target(
                address=address,
                path=group.get("labels", {}).get("__metrics_path__", "/metrics"),
                scheme=group.get("labels", {}).get("__scheme__", "http"),
                job=group.get("labels", {}).get("job", ""),
            )
            for group in json.loads(text)
            for address in group["targets"]
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Unreachable(
            f"{url or 'the manager'} answers, but not with service discovery's JSON: "
            f"{text[:80]!r}; expected the address of a manager's exporter"
        ) from None


def parse(text: str) -> dict[str, dict[Labels, float]]:
    """A page in Prometheus' text format 0.0.4 as series.

    Raises:
        ValueError: it is no such page.
    """
    series: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if math.isfinite(sample.value):  # NaN is how a process says that there is no value
                labels = tuple(sorted(sample.labels.items()))
                series.setdefault(sample.name, {})[labels] = sample.value
    return series


async def _page(session: aiohttp.ClientSession, target: Target) -> dict[str, dict[Labels, float]]:
    return parse(await _read(session, target.url))


async def _read(session: aiohttp.ClientSession, url: str) -> str:
    """A page's text. Raises ValueError when the answer is an error or no text."""
    async with session.get(url) as answer:
        if answer.status != 200:
            raise ValueError(f"HTTP {answer.status}")
        return (await answer.read()).decode()


def _reason(error: Any) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "nobody listens there"
    return str(error) or type(error).__name__
