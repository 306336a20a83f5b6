"""The end of the shared deployment: an actor is killed, then everything is taken down.

These tests break what the others use, so this file must run after them (files run in the order of
their names).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from cluster import launcher, ray_head, records
from cluster.spec import ClusterSpec
from cluster.status import ClusterHandle


def test_a_frozen_ffn_actor_fails_the_step_and_nothing_more(
    cluster: ClusterHandle, spec: ClusterSpec, client: openai.OpenAI, model: str
) -> None:
    """Silence ends in an error that names peer and layer, after the deadline; then it serves on."""
    frozen = psutil.Process(launcher.status(spec.name).actors[1].pid)
    began = time.monotonic()
    frozen.suspend()
    try:
        with pytest.raises(openai.InternalServerError, match=r"(?s)layer.*ffn-0") as error:
            client.completions.create(model=model, prompt="The sea", max_tokens=8)
    finally:
        frozen.resume()
    assert error.value.status_code == 503
    assert time.monotonic() - began < spec.transport.timeout_s + 5
    answer = client.completions.create(model=model, prompt="The sea", max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert httpx.get(f"{cluster.url}/health").status_code == 200


def test_a_lost_attention_actor_ends_requests_with_an_error(
    cluster: ClusterHandle,
    spec: ClusterSpec,
    client: openai.OpenAI,
    model: str,
    in_ray: None,
    running: Callable[[], int],
) -> None:
    """Its only attention actor is killed in the middle of a stream."""
    pid = launcher.status(spec.name).actors[0].pid
    assert pid is not None
    stream = client.completions.create(
        model=model,
        prompt="The sea",
        max_tokens=900,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    chunks = iter(stream)
    next(chunks)
    psutil.Process(pid).kill()
    began = time.monotonic()
    with pytest.raises(openai.APIError, match="attention-0 is gone"):
        for _ in chunks:
            pass
    assert time.monotonic() - began < 10
    with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(model=model, prompt="The sea", max_tokens=4)
    assert error.value.status_code == 503
    deadline = time.monotonic() + 10
    while httpx.get(f"{cluster.url}/health").status_code == 200 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert httpx.get(f"{cluster.url}/health").status_code == 503
    while (report := launcher.status(spec.name)).health != "failed":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert report.health == "failed" and report.actors[0].state == "failed"


def test_down_leaves_nothing(cluster: ClusterHandle, spec: ClusterSpec) -> None:
    """Ends the shared deployment, so it comes last; the fixture's ``down`` then finds nothing."""
    import ray

    record = records.load(spec.name)
    assert record is not None and record.ray is not None
    pids = [process.pid for process in ray_head.processes(record.ray)]
    assert len(pids) > 5
    if ray.is_initialized():  # the session's own connection
        ray.shutdown()
    report = launcher.down(spec.name)
    assert report.found and report.stopped_ray and report.left == ()
    assert {"ffn-0", "ffn-1"} <= set(report.actors)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert not Path(record.ray.folder).exists()
    assert records.load(spec.name) is None
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((spec.frontend.host, spec.frontend.port))
    if Path("/dev/shm").is_dir():
        mine = [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in pids)]
        assert mine == []
    assert not launcher.down(spec.name, address="local").found, "down is idempotent"
