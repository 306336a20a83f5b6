"""``afflux top``: what it prints, over made-up processes; the manager behind it is faked."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from actors.errors import AffluxError
from afflux import top
from afflux.main import app
from afflux.top_view import amount, bar, level, seconds, top_view
from cluster.status import ChangeReport
from dashboards.scrape import Scrape
from dashboards.top import View, view
from tests.dashboards.deployment import Deployment, busy, scraped, served

run = CliRunner().invoke

CHANGE = ChangeReport.model_validate(
    {
        "number": 3,
        "verb": "scale",
        "text": "attention 1 -> 2",
        "phase": "done",
        "started_at": 1.0,
        "seconds": {"prepare": 1.8, "commit": 0.01, "total": 1.92},
    }
)


@pytest.fixture
def deployment() -> Deployment:
    made = Deployment(attention=2, ffn=3)
    busy(made)
    return made


@pytest.fixture
def url(deployment: Deployment) -> Iterator[str]:
    with served(deployment) as found:
        yield found


def a_second(deployment: Deployment) -> View:
    old = Scrape(100.0, scraped(deployment))
    busy(deployment)
    return view(Scrape(101.0, scraped(deployment)), old, old)


def text_of(shown: Any, width: int = 80, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(shown)
    return console.file.getvalue()


def test_shows_everything_in_80_columns(deployment):
    text = text_of(top_view(a_second(deployment), [CHANGE], "changes may be old"))
    lines = text.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].endswith(" afflux healthy  verse  epoch 4  attention 2/2  ffn 3/3  A/F 0.67")
    assert "8 running, 0 waiting, 10/s   tokens/s: 400 out, 100 prompt" in lines[1]
    (attention,) = [" ".join(line.split()) for line in lines if line.startswith("attention-1 ")]
    assert attention == "attention-1 ███▒▒· 50%+30% 20 40 ms 16 2.0 600 us 8 25% 4"
    (ffn,) = [" ".join(line.split()) for line in lines if line.startswith("ffn-2 ")]
    assert ffn == "ffn-2 ██▒▒·· 40%+20% 40 15 ms 8.0 1.0 ms 0 64 1.25 4"
    assert "scale attention 1 -> 2  1.92 s" in text and "changes may be old" in text
    assert "…" not in "".join(lines[:-2])  # nothing but the change is too long


def test_columns_of_the_latencies(deployment):
    lines = text_of(top_view(a_second(deployment))).splitlines()
    (head,) = [line.split() for line in lines if line.startswith("latency over 1 s")]
    assert head[4:] == ["p50", "p90", "p99", "mean", "count", "target", "met"]
    (ttft,) = [" ".join(line.split()) for line in lines if line.startswith("TTFT ")]
    assert ttft == "TTFT 90 ms 98 ms 100 ms 90 ms 10 500 ms 90%"


def test_colours_say_what_deserves_a_look(deployment):
    healthy = text_of(top_view(a_second(deployment)), force_terminal=True, color_system="standard")
    red = "\x1b[31m"
    assert healthy.count(red) == 1  # the attainment of 90 % below the objective of 99 %
    deployment.attention[0]("afd_attention_kv_cache_usage_ratio").set(0.99)
    deployment.frontend("afd_requests_waiting").set(5)
    seen = view(Scrape(1.0, scraped(deployment)))
    bad = text_of(top_view(seen), force_terminal=True, color_system="standard")
    assert f"{red}99%" in bad and "\x1b[33m5 waiting" in bad


def test_an_actor_that_is_behind_or_missing_shows(deployment):
    deployment.manager("afd_epoch").set(9)
    deployment.manager("afd_actors", role="ffn", state="ready").set(2)
    deployment.manager("afd_actors", role="ffn", state="loading").set(1)
    seen = view(Scrape(1.0, scraped(deployment), missing={"http://a:1/metrics": "no answer"}))
    text = text_of(top_view(seen), width=120)
    assert "ffn 2/3 (1 loading)" in text and "no page from http://a:1/metrics: no answer" in text


def test_of_nothing():
    assert "latency since they began" in text_of(top_view(View(1.0, None, None)))


@given(st.one_of(st.none(), st.floats(0, 1e9)))
def test_durations_and_amounts_are_short(value):
    assert len(seconds(value if value is None or value < 1e3 else 1.0)) <= 7
    assert len(amount(value)) <= 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0, "0 s"),
        (4.2e-5, "42 us"),
        (0.0012, "1.2 ms"),
        (0.25, "250 ms"),
        (12, "12 s"),
    ],
)
def test_durations(value, text):
    assert seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0"), (0.25, "0.25"), (3.21, "3.2"), (9999, "9999"), (12345, "12k"),
     (3.2e6, "3.2M"), (1.5e10, "15G")],
)  # fmt: skip
def test_amounts(value, text):
    assert amount(value) == text


@given(st.lists(st.floats(0, 1), max_size=4), st.integers(1, 40))
def test_a_bar_is_as_wide_as_asked(shares, width):
    assert len(bar([(share, "█", "") for share in shares], width)) == width


def test_levels():
    assert [level(value, (1, 2)) for value in (None, 0.9, 1, 2)] == ["", "", "yellow", "red"]


# -- the command -----------------------------------------------------------------------------------


def test_once_prints_one_view(url):
    done = run(app, ["top", "--once", "--interval", "0.1", "--metrics-url", url])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("afflux healthy") == 1 and "latency since they began" in done.stdout


def test_once_as_json(url):
    done = run(app, ["top", "--once", "--json", "--interval", "0.1", "--metrics-url", url])
    data = json.loads(done.stdout)
    assert [row["actor"] for row in data["ffn"]] == ["ffn-0", "ffn-1", "ffn-2"]
    assert data["ttft"]["count"] == 10 and data["interval_s"] >= 0.1
    assert data["changes"] == [] and data["missing"] == {}


def test_nobody_there():
    done = run(app, ["top", "--once", "--metrics-url", "http://127.0.0.1:1"])
    assert done.exit_code == 1
    assert "no service discovery at http://127.0.0.1:1/sd" in done.stderr


class FakeManager:
    """Stands in for ``cluster.verbs`` and ``cluster.connection``."""

    def __init__(self, url: str | None):
        self.url = url
        self.error: Exception | None = None

    def status(self, name: str, *, address: str | None = None) -> Any:
        return SimpleNamespace(metrics_url=self.url)

    def changes(self, name: str, *, limit: int, address: str | None = None) -> list[ChangeReport]:
        if self.error is not None:
            raise self.error
        return [CHANGE][:limit]

    @contextmanager
    def manager_of(self, name: str, address: str | None = None) -> Iterator[None]:
        yield


@pytest.fixture
def manager(url: str, monkeypatch: pytest.MonkeyPatch) -> FakeManager:
    import cluster

    fake = FakeManager(url)
    for module in ("verbs", "connection"):
        monkeypatch.setitem(sys.modules, f"cluster.{module}", fake)
        monkeypatch.setattr(cluster, module, fake, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


def test_asks_the_manager_where_and_what_changed(manager):
    done = run(app, ["top", "--once", "--json", "--interval", "0.1"])
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [change["number"] for change in data["changes"]] == [3] and data["note"] == ""


def test_goes_on_without_the_manager(manager):
    manager.error = AffluxError("the manager is restarting")
    done = run(app, ["top", "--once", "--interval", "0.1"])
    assert done.exit_code == 0, done.output
    assert "changes may be old: the manager is restarting" in done.stdout


def test_metrics_that_are_off(manager):
    manager.url = None
    done = run(app, ["top", "--once"])
    assert done.exit_code == 1 and "metrics.enabled: true" in done.stderr


def frames(deployment: Deployment, count: int) -> Iterator[Any]:
    """So many, then Ctrl-C."""
    for _ in range(count):
        yield a_second(deployment), [CHANGE], ""
    raise KeyboardInterrupt


def test_live_redraws_on_a_terminal_and_ends_with_ctrl_c(deployment):
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40)
    top._show(frames(deployment, 3), console, as_json=False, once=False)
    assert console.file.getvalue().count("tokens/s") == 3
    assert "\x1b[?1049h" in console.file.getvalue()  # on the alternate screen, which goes again
    assert "\x1b[?1049l" in console.file.getvalue()


def test_elsewhere_one_below_the_other(deployment):
    console = Console(file=io.StringIO(), width=80)
    top._show(frames(deployment, 2), console, as_json=False, once=False)
    assert console.file.getvalue().count("tokens/s") == 2
    assert "\x1b" not in console.file.getvalue()


def test_json_lines(deployment, capsys):
    top._show(frames(deployment, 2), Console(), as_json=True, once=False)
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [4, 4]
