"""Questions to a Prometheus: refusals in its own words, durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards import ask
from tests.dashboards.fake_prometheus import FakePrometheus


def test_over_time():
    with FakePrometheus(lambda expression, at: {"a": at}) as fake:
        (line,) = ask.over_time(fake.url, "x", 10.0, 12.0, 1.0)
    assert line.labels == {"series": "a"}
    assert line.times == (10.0, 11.0, 12.0) == line.values


def test_a_refusal_has_its_words_and_the_expression():
    def refuse(expression: str, at: float) -> dict[str, float]:
        raise ValueError("parse error: unexpected end of input")

    with (
        FakePrometheus(refuse) as fake,
        pytest.raises(ask.NoAnswer, match=r"(?s)unexpected end of input.*sum\("),
    ):
        ask.over_time(fake.url, "sum(", 0.0, 1.0, 1.0)


def test_nobody_there():
    with FakePrometheus(lambda expression, at: {}) as fake:
        url = fake.url
    with pytest.raises(ask.NoAnswer, match="no Prometheus answers"):
        ask.get(url, "/api/v1/targets")


def test_scrape_interval_is_the_longest_of_all_jobs():
    config = "global: {scrape_interval: 5s}\nscrape_configs: [{}, {scrape_interval: 1m30s}]"
    with FakePrometheus(lambda expression, at: {}, config) as fake:
        assert ask.scrape_interval_s(fake.url) == 90.0


@given(st.integers(0, 23), st.integers(0, 59), st.integers(0, 59), st.integers(0, 999))
def test_durations(hours, minutes, seconds, millis):
    text = f"{hours}h{minutes}m{seconds}s{millis}ms"
    assert ask.duration_s(text) == pytest.approx(
        3600 * hours + 60 * minutes + seconds + millis / 1000
    )


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "5x", "1h-3m"])
def test_no_durations(text):
    with pytest.raises(ValueError, match="15s"):
        ask.duration_s(text)
