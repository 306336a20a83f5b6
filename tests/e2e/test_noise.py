"""The front door takes whatever is sent to its port."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from tests.http_noise import noise, send

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/admin/v1/scale", "/")
GROWTH_MIB = 40.0
"""Of proxy and replica together: requests that are refused touch code for the first time."""


def test_noise_on_the_socket(url: str, http: httpx.Client, model: str) -> None:
    bombard_socket(url, 1_500)
    assert_serves(http, model)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand(url: str, http: httpx.Client, model: str) -> None:
    bombard_socket(url, 5_000)
    before = memory_mib()
    bombard_socket(url, 95_000)
    assert_serves(http, model)
    assert memory_mib() - before < GROWTH_MIB


def test_json_that_means_nothing(http: httpx.Client, model: str) -> None:
    """Refused with a 4xx, whatever is in it; nothing hangs and nothing fails inside."""
    for body in bodies(7, 300, model):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (200, *range(400, 430)), (answer.status_code, body[:300])
    assert_serves(http, model)


def bombard_socket(url: str, count: int) -> None:
    place = urlsplit(url)
    assert place.hostname and place.port
    for number, data in enumerate(noise(3, count, PATHS)):
        said = send(place.hostname, place.port, data, wait=number % 10 == 0)
        assert not said.startswith(b"HTTP/1.1 50"), (data[:300], said[:300])


def bodies(seed: int, count: int, model: str) -> Iterator[bytes]:
    """Requests of which most have something wrong: a type, a range, a field, the JSON itself."""
    dice = random.Random(f"bodies {seed}")
    odd = (None, -1, 2**70, 1e308, "", "x" * 500, [], {}, True, [[[]]], {"a": {"b": 1}}, "\u0000")
    fields = ("prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed")
    more = ("logprobs", "stream", "response_format", "tools", "logit_bias", "best_of", "user")
    for _ in range(count):
        data = {"model": model, "prompt": "The sea", "max_tokens": 1}
        data["messages"] = [{"role": "user", "content": "hi"}]
        for field in dice.sample((*fields, *more), dice.randint(1, 3)):
            data[field] = dice.choice(odd)
        made = json.dumps(data).encode()
        yield made[: dice.randrange(len(made))] if dice.randrange(8) == 0 else made


def assert_serves(http: httpx.Client, model: str) -> None:
    body = {"model": model, "prompt": "The sea", "max_tokens": 2}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2


def memory_mib() -> float:
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if "ray::ServeReplica" in line or "ProxyActor" in line:
            total += process.memory_info().rss
    return total / 2**20
