"""API keys: what is let in, what is refused, and that no key can be read back."""

from __future__ import annotations

import pickle

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from cluster.api_keys import KeyGuard, KeyRing


def ring(text: str) -> KeyRing:
    return KeyRing.from_env("KEYS", {"KEYS": text})


def client(keys: KeyRing) -> TestClient:
    app = Starlette(routes=[Route("/{path:path}", lambda _: PlainTextResponse("in"))])
    return TestClient(KeyGuard(app, keys))


@pytest.mark.parametrize("text", ["", "  ", ",", " , "])
def test_no_keys_lets_everybody_in(text: str) -> None:
    assert not ring(text)
    assert client(ring(text)).get("/v1/models").text == "in"


def test_an_unset_variable_or_none_means_no_keys() -> None:
    assert not KeyRing.from_env("KEYS", {})
    assert not KeyRing.from_env(None)


@pytest.mark.parametrize("key", ["one", "two"])
def test_every_key_opens(key: str) -> None:
    answer = client(ring(" one ,two")).get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert answer.text == "in"


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer three", "Basic one", "one", "Bearer one,two"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/tokenize", "/invocations", "/healthy", "/"])
def test_refused_in_openai_form(header: str, path: str) -> None:
    answer = client(ring("one,two")).get(path, headers={"Authorization": header})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "one" not in answer.text.replace("None", "")


@pytest.mark.parametrize("path", ["/health", "/ping", "/metrics", "/metrics/", "/version"])
def test_probes_need_no_key(path: str) -> None:
    assert client(ring("one")).get(path).text == "in"


def test_keys_cannot_be_read_back() -> None:
    keys = ring("a-secret-key")
    assert b"a-secret-key" not in pickle.dumps(keys)
    assert "a-secret-key" not in repr(keys)
