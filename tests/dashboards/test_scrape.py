"""Reading a deployment's pages: discovery, what is missing, and other people's answers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from dashboards.scrape import Scraper, Target, Unreachable, parse, targets_of
from tests.dashboards.deployment import Deployment, busy, served


@pytest.fixture
def deployment() -> Deployment:
    made = Deployment(attention=1, ffn=2)
    busy(made)
    return made


@pytest.fixture
def url(deployment: Deployment) -> Iterator[str]:
    with served(deployment) as found:
        yield found


def test_reads_every_page_of_ours(deployment, url):
    scrape = Scraper(url).scrape()
    assert len(scrape.targets) == 6 and not scrape.missing  # vLLM's page is another job's
    assert scrape.series["afd_epoch"] == {(("model_name", "verse"),): 4.0}
    who = {dict(labels)["actor_id"] for labels in scrape.series["afd_table_epoch"]}
    assert who == {"attention-0", "ffn-0", "ffn-1"}


def test_all_jobs(deployment, url):
    scrape = Scraper(url, jobs=None).scrape()
    assert len(scrape.targets) == 7
    assert list(scrape.missing.values()) == ["HTTP 500"]  # nobody serves vLLM's page here


def test_a_page_that_fails_is_named_and_the_others_are_there(deployment, url):
    deployment.broken.add("/ffn-1")
    scrape = Scraper(url).scrape()
    assert scrape.missing == {f"{url}/ffn-1": "HTTP 500"}
    who = {dict(labels)["actor_id"] for labels in scrape.series["afd_table_epoch"]}
    assert who == {"attention-0", "ffn-0"}


def test_a_process_that_hangs_costs_the_deadline_and_no_more(deployment, url):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, never answers
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        groups = deployment.discovery()
        deployment.discovery = lambda: [
            *groups,
            {"targets": [address], "labels": {"job": "afflux"}},
        ]
        scrape = Scraper(url, timeout_s=4.0).scrape()  # room for a busy machine
    assert scrape.missing == {f"http://{address}/metrics": "no answer in time"}
    assert "afd_epoch" in scrape.series


def test_remembers_who_there_was_while_the_manager_is_away(deployment, url):
    scraper = Scraper(url)
    scraper.scrape()
    deployment.broken |= {"/sd", "/metrics"}
    scrape = scraper.scrape()
    assert scrape.missing == {f"{url}/sd": "HTTP 500", f"{url}/metrics": "HTTP 500"}
    assert "afd_table_epoch" in scrape.series


def test_nobody_there():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(Unreachable, match=f"127.0.0.1:{port}/sd: nobody listens there"):
        Scraper(f"http://127.0.0.1:{port}").scrape()


def test_discovery_labels():
    text = """[{"targets": ["a:1", "b:2"], "labels": {"job": "afflux"}},
               {"targets": ["c:3"], "labels": {"__metrics_path__": "/x", "__scheme__": "https"}}]"""
    assert targets_of(text) == (
        Target("a:1", job="afflux"),
        Target("b:2", job="afflux"),
        Target("c:3", "/x", "https"),
    )
    assert targets_of(text)[2].url == "https://c:3/x"


@pytest.mark.parametrize("text", ["", "<html>", "[1]", '{"targets": []}', '[{"labels": {}}]'])
def test_an_answer_that_is_no_discovery(text):
    with pytest.raises(Unreachable, match="not with service discovery's JSON"):
        targets_of(text, "http://a:1/sd")


def test_values_that_are_none_are_left_out():
    assert parse('a 1\nb NaN\n# TYPE c gauge\nc{x="y"} +Inf\n') == {"a": {(): 1.0}}


def test_a_page_that_is_none():
    with pytest.raises(ValueError, match="html"):
        parse("<html>\n")
