"""The Serve-native start: a Serve configuration file, ``serve run``, and no afflux command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml

from cluster import launcher, ray_head
from cluster.app import build
from cluster.records import RayRecord, Record
from cluster.spec import SpecError
from tests.e2e.conftest import KEY, free_port

NAME = "served"
START_S = 600.0
PATIENT = ("transport.timeout_s=30", "membership.silence_s=30", "membership.wait_s=240")
"""Nothing is lost in this test; cores that others use may keep a process waiting."""


@pytest.fixture(scope="module")
def ray_cluster(state_home: Path) -> Iterator[tuple[RayRecord, str]]:
    """A bare Ray cluster, as an administrator would hand it out."""
    record, address = ray_head.start(ray_head.HeadOptions())
    yield record, address
    _, left = ray_head.stop(record)
    assert left == ()


def serve_config(folder: Path, port: int) -> Path:
    file = folder / "serve.yaml"
    application = {
        "name": NAME,
        "route_prefix": "/",
        "import_path": "cluster.app:build",
        "args": {"set": [f"name={NAME}", f"frontend.port={port}", *PATIENT]},
    }
    config = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    file.write_text(yaml.safe_dump(config))
    return file


def test_serve_run_and_delete(ray_cluster: tuple[RayRecord, str], tmp_path: Path) -> None:
    ray_record, address = ray_cluster
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address]
    with ray_head.credentials(ray_record), (tmp_path / "log").open("w") as log:
        serve_run = subprocess.Popen(
            [*command, str(serve_config(tmp_path, port))], stdout=log, stderr=log, env=os.environ
        )
    try:
        _wait_until_healthy(url, serve_run, tmp_path / "log")
        with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
            model = client.models.list().data[0].id
            answer = client.completions.create(model=model, prompt="The sea", max_tokens=8)
            assert answer.usage is not None and answer.usage.completion_tokens > 0
        assert httpx.get(f"{url}/v1/models").status_code == 401, "keys come from the environment"
        with launcher.connected(Record(name=NAME, address=address, url=url, ray=ray_record)):
            _delete_and_wait()
    finally:
        serve_run.terminate()  # SIGINT may be ignored: a shell starts background jobs so
        serve_run.wait(timeout=120)


def _wait_until_healthy(url: str, serve_run: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert serve_run.poll() is None, log.read_text()
        try:
            if httpx.get(f"{url}/health", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    pytest.fail(f"not healthy within {START_S:g} s\n{log.read_text()}")


def _delete_and_wait() -> None:
    """Deleting the application must end everything that it started."""
    import ray
    from ray import serve

    from cluster.manager import find_actor, find_manager

    assert find_manager(NAME) is not None and find_actor(NAME, "ffn-0") is not None
    serve.delete(NAME)
    deadline = time.monotonic() + 120
    while find_manager(NAME) is not None and time.monotonic() < deadline:
        time.sleep(0.25)
    assert find_manager(NAME) is None
    assert find_actor(NAME, "ffn-0") is None and find_actor(NAME, "attention-0") is None
    groups = ray.util.placement_group_table().values()
    assert [group["name"] for group in groups if group["state"] != "REMOVED"] == []


def test_the_builder_takes_a_file_a_mapping_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("model: {path: deploy/models/verse}\n")
    for args in ({}, {"spec": str(file)}, {"spec": {"model": {"path": "deploy/models/verse"}}}):
        assert build(args) is not None
    assert build({"spec": str(file), "set": "name=other,ffn.count=1"}) is not None


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"file": "x"}, "unknown arguments"),
        ({"spec": "/no/such/file.yaml"}, "/no/such/file.yaml"),
        ({"set": "no.such.key=1"}, "no"),
        ({"spec": {"model": {"path": "x"}, "colour": "red"}}, "colour"),
    ],
)
def test_the_builder_refuses(args: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        build(args)
