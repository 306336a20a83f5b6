"""A Prometheus of our own: its configuration, its life, and what is said when that fails."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cluster.paths import project_root
from dashboards import ask, local
from tests.dashboards.deployment import Deployment, busy, served

TEMPLATE = """
global: {scrape_interval: 200ms, scrape_timeout: 200ms}
rule_files: [rules.yml]
scrape_configs:
  - job_name: afflux
    http_sd_configs: [{url: "http://127.0.0.1:9464/sd", refresh_interval: 1s}]
"""
RULES = """
groups: [{name: g, interval: 200ms, rules: [{record: "afd:epoch:max", expr: max(afd_epoch)}]}]
"""


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "deploy"
    folder.mkdir()
    (folder / "rules.yml").write_text(RULES)
    (folder / "prometheus.yml").write_text(TEMPLATE)
    return folder / "prometheus.yml"


def until(done: Callable[[], object], seconds: float = 30.0) -> object:
    """The first answer that is true."""
    deadline = time.monotonic() + seconds
    while not (answer := done()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


# -- configuration ---------------------------------------------------------------------------------


def test_configuration_of_the_project():
    folder = project_root() / "deploy" / "prometheus"
    text = (folder / "prometheus.yml").read_text()
    config = yaml.safe_load(local.configuration(text, folder, "http://127.0.0.1:1234/sd"))
    urls = [s["url"] for job in config["scrape_configs"] for s in job["http_sd_configs"]]
    assert set(urls) == {"http://127.0.0.1:1234/sd"}
    assert config["rule_files"] and all(Path(name).is_file() for name in config["rule_files"])
    assert config["global"] == yaml.safe_load(text)["global"]


@pytest.mark.parametrize("text", ["", "scrape_configs: []", "scrape_configs: [{job_name: a}]"])
def test_a_template_without_discovery_is_refused(text):
    with pytest.raises(ValueError, match="http_sd_configs"):
        local.configuration(text, Path("/"), "http://a/sd")


# -- without Prometheus ----------------------------------------------------------------------------


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called prometheus on PATH."""
    program = tmp_path / "bin" / "prometheus"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")


def test_says_how_to_install(tmp_path, monkeypatch, template):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(local.NoPrometheus, match="apt-get install prometheus"):
        local.start(tmp_path / "state", template, "http://127.0.0.1:1/sd")


def test_one_that_ends_at_once_shows_its_last_words(tmp_path, monkeypatch, template):
    fake(tmp_path, monkeypatch, "echo no room on this disk; exit 3")
    with pytest.raises(local.PrometheusFailed, match=r"(?s)exit code 3.*no room on this disk"):
        local.start(tmp_path / "state", template, "http://127.0.0.1:1/sd", port=0)
    assert local.find(tmp_path / "state") is None


def test_one_that_never_answers_is_ended(tmp_path, monkeypatch, template):
    fake(tmp_path, monkeypatch, "echo $$ > pid; exec sleep 600")
    monkeypatch.setattr(local, "START_S", 0.5)
    with pytest.raises(local.PrometheusFailed, match=r"within 0\.5 s"):
        local.start(tmp_path / "state", template, "http://127.0.0.1:1/sd", port=0)
    pid = int((tmp_path / "state" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_port_that_is_taken(tmp_path, monkeypatch, template):
    fake(tmp_path, monkeypatch, "exit 0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(local.PrometheusFailed, match=f"port {port} .* in use"):
            local.start(tmp_path / "state", template, "http://127.0.0.1:1/sd", port=port)


def test_a_record_of_another_process_is_not_believed(tmp_path):
    record = {"pid": os.getpid(), "started_at": 1.0, "url": "http://a", "discovery": "http://b"}
    (tmp_path / "running.json").write_text(json.dumps(record))
    assert local.find(tmp_path) is None
    assert local.stop(tmp_path) is None  # and nobody is killed
    assert not (tmp_path / "running.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_broken_record_is_none(tmp_path, text):
    (tmp_path / "running.json").write_text(text)
    assert local.find(tmp_path) is None


# -- with Prometheus -------------------------------------------------------------------------------

real = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason=f"no prometheus here; {local.HOW_TO_INSTALL}"
)


@real
def test_life(tmp_path, template):
    folder = tmp_path / "state"
    deployment = Deployment()
    busy(deployment)
    with served(deployment) as url, served(Deployment()) as other:
        running = local.start(folder, template, f"{url}/sd", port=0)
        try:
            assert local.find(folder) == running

            def up() -> bool:
                found = [one for one in local.targets(running) if one.job == "afflux"]
                return len(found) == 6 and all(one.health == "up" for one in found)

            until(up)
            epoch = until(
                lambda: ask.get(running.url, "/api/v1/query", {"query": "afd:epoch:max"})["result"]
            )
            assert epoch[0]["value"][1] == "4"
            assert ask.scrape_interval_s(running.url) == 0.2

            again = local.start(folder, template, f"{other}/sd")
            assert (again.pid, again.url) == (running.pid, running.url)
            assert again.discovery == f"{other}/sd" and local.find(folder) == again
            with pytest.raises(local.PrometheusFailed, match="runs already"):
                local.start(folder, template, f"{url}/sd", port=1)
        finally:
            stopped = local.stop(folder)
    assert stopped is not None and stopped.pid == running.pid
    assert local.find(folder) is None and local.stop(folder) is None
    assert (folder / "data").is_dir()
    local.stop(folder, remove_data=True)
    assert not folder.exists()


@real
def test_a_bad_rule_is_shown(tmp_path, template):
    (template.parent / "rules.yml").write_text("groups: [{name: g, rules: [{record: x}]}]")
    with pytest.raises(local.PrometheusFailed, match=r"(?s)exit code 1.*rules\.yml"):
        local.start(tmp_path / "state", template, "http://127.0.0.1:1/sd", port=0)
