"""The admin interface over HTTP: who gets in, what reaches the manager, which answers come back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorUnavailableError
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from actors.errors import AffluxError
from cluster import admin
from cluster.admin import AdminMount, make_admin
from cluster.api_keys import KeyGuard, KeyRing
from cluster.status import ChangeReport, ClusterStatus

KEYS = KeyRing.from_env("K", {"K": "admin-key"})
API_KEYS = KeyRing.from_env("K", {"K": "api-key"})
STATUS = ClusterStatus(name="x", url=None, health="ready", epoch=1, lanes=1, model="m")


def report(phase: str, **more: Any) -> ChangeReport:
    data = {"number": 3, "verb": "scale", "text": "attention 1 -> 2", "phase": phase}
    return ChangeReport.model_validate({**data, "started_at": 1.0, **more})


class FakeManager:
    """Methods answer like a Ray actor's: ``manager.scale.remote(...)`` is awaited."""

    def __init__(self, **answers: Any):
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.answers = answers

    def __getattr__(self, name: str) -> Any:
        class Method:
            def remote(_, *words: Any, **options: Any) -> Any:  # noqa: N805
                self.calls.append((name, words, options))
                return self._answer(name)

        return Method()

    async def _answer(self, name: str) -> Any:
        answer = self.answers[name]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, BaseException):
            raise answer
        return await answer() if isinstance(answer, Callable) else answer


def client(
    manager: FakeManager,
    keys: KeyRing = KEYS,
    variable: str | None = "ADMIN",
    key: str = "admin-key",
) -> httpx.AsyncClient:
    models = Starlette(routes=[Route("/{path:path}", lambda _: PlainTextResponse("vllm"))])
    app = AdminMount(KeyGuard(models, API_KEYS), make_admin(manager, keys, variable))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://x", headers=headers
    )


# -- who gets in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["", "api-key", "other"])
@pytest.mark.parametrize("path", ["/admin", "/admin/", "/admin/status", "/admin/nonsense"])
async def test_only_an_admin_key_opens(key: str, path: str) -> None:
    manager = FakeManager(status=STATUS)
    async with client(manager, key=key) as http:
        answer = await http.get(path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_admin_key"
    assert manager.calls == []


@pytest.mark.parametrize(
    ("variable", "words"),
    [("MY_KEYS", "environment variable MY_KEYS"), (None, "frontend.admin_keys_env")],
)
@pytest.mark.parametrize("key", ["", "api-key", "admin-key"])
async def test_without_admin_keys_nobody_gets_in(
    variable: str | None, words: str, key: str
) -> None:
    manager = FakeManager(scale=report("done"))
    async with client(manager, KeyRing.from_env(None), variable, key) as http:
        answer = await http.post("/admin/scale", json={"ffn": 1})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "admin_closed"
    assert words in answer.json()["error"]["message"]
    assert manager.calls == []


@pytest.mark.parametrize("path", ["/v1/models", "/administration", "/x/admin/status", "/"])
async def test_other_paths_go_to_the_app_with_api_keys(path: str) -> None:
    async with client(FakeManager(), key="api-key") as http:
        assert (await http.get(path)).text == "vllm"
    async with client(FakeManager(), key="admin-key") as http:
        assert (await http.get(path)).json()["error"]["code"] == "invalid_api_key"


# -- orders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "call"),
    [
        ("scale", {"attention": 2, "ffn": 3}, ("scale", (), {"attention": 2, "ffn": 3})),
        ("scale", {"ffn": 3}, ("scale", (), {"attention": None, "ffn": 3})),
        ("retire", {"actor": "ffn-1"}, ("retire", ("ffn-1",), {"replace": False})),
        (
            "retire",
            {"actor": "ffn-1", "replace": True},
            ("retire", ("ffn-1",), {"replace": True}),
        ),
        ("flip", {"actor": "ffn-1", "to": "attention"}, ("flip", ("ffn-1",), {"to": "attention"})),
        ("rebalance", {}, ("rebalance", (), {})),
        ("rebalance", None, ("rebalance", (), {})),
    ],
)
async def test_orders_reach_the_manager(path: str, body: Any, call: Any) -> None:
    manager = FakeManager(**{path: report("done", epoch=4)})
    async with client(manager) as http:
        answer = await http.post(f"/admin/{path}", json=body)
    assert answer.status_code == 200, answer.text
    assert ChangeReport.model_validate(answer.json()) == report("done", epoch=4)
    assert manager.calls == [call]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("scale", {}, None),
        ("scale", {"attention": -1}, "attention"),
        ("scale", {"attention": "2"}, "attention"),
        ("scale", {"attention": True}, "attention"),
        ("scale", {"attention": 1.5}, "attention"),
        ("scale", {"atention": 2, "ffn": 1}, "atention"),
        ("scale", {"ffn": 1, "timeout_s": 601}, "timeout_s"),
        ("scale", [1], None),
        ("retire", {}, "actor"),
        ("retire", {"actor": ""}, "actor"),
        ("flip", {"actor": "ffn-1", "to": "prefill"}, "to"),
        ("flip", {"actor": "ffn-1"}, "to"),
    ],
)
async def test_bad_bodies_are_400(path: str, body: Any, param: str | None) -> None:
    manager = FakeManager()
    async with client(manager) as http:
        answer = await http.post(f"/admin/{path}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("bad_request", param)
    assert error["type"] == "invalid_request_error"
    assert manager.calls == []


async def test_a_body_that_is_no_json_is_400() -> None:
    async with client(FakeManager()) as http:
        broken = await http.post(
            "/admin/scale", content="{", headers={"Content-Type": "application/json"}
        )
        form = await http.post("/admin/scale", data={"ffn": "2"})
    assert (broken.status_code, form.status_code) == (400, 400)
    assert "Content-Type: application/json" in form.json()["error"]["message"]
    assert "Content-Type" not in broken.json()["error"]["message"]


async def test_unknown_paths_and_methods() -> None:
    async with client(FakeManager()) as http:
        assert (await http.get("/admin/nonsense")).json()["error"]["code"] == "not_found"
        wrong = await http.get("/admin/scale")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


async def test_it_waits_until_the_change_has_ended() -> None:
    manager = FakeManager(scale=report("queued"), change=[report("prepare"), report("done")])
    async with client(manager) as http:
        answer = await http.post("/admin/scale", json={"ffn": 2, "timeout_s": 9})
    assert (answer.status_code, answer.json()["phase"]) == (200, "done")
    assert [call[0] for call in manager.calls] == ["scale", "change", "change"]
    number, left = manager.calls[1][1]
    assert number == 3 and 0 < left <= 9


@pytest.mark.parametrize("body", [{"wait": False}, {"timeout_s": 0}])
async def test_under_way_is_202(body: dict[str, Any]) -> None:
    manager = FakeManager(scale=report("queued"))
    async with client(manager) as http:
        answer = await http.post("/admin/scale", json={"ffn": 2, **body})
    assert (answer.status_code, answer.json()["phase"]) == (202, "queued")


async def test_nothing_to_do_is_200() -> None:
    async with client(FakeManager(scale=report("noop"))) as http:
        answer = await http.post("/admin/scale", json={"ffn": 2})
    assert (answer.status_code, answer.json()["phase"]) == (200, "noop")


async def test_rolled_back_is_409_with_the_report() -> None:
    manager = FakeManager(scale=report("prepare"), change=report("rolled_back", error="no room"))
    async with client(manager) as http:
        answer = await http.post("/admin/scale", json={"ffn": 2})
    assert answer.status_code == 409
    data = answer.json()
    assert data["error"]["code"] == "rolled_back" and "no room" in data["error"]["message"]
    assert ChangeReport.model_validate(data["change"]).error == "no room"


@pytest.mark.parametrize(
    ("code", "status"), [("refused", 409), ("unknown_actor", 404), ("bad_placement", 409)]
)
async def test_refusals(code: str, status: int) -> None:
    async with client(FakeManager(retire=AffluxError("min is 1", code))) as http:
        answer = await http.post("/admin/retire", json={"actor": "ffn-9"})
    assert answer.status_code == status
    assert answer.json()["error"] == {
        "message": "min is 1",
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }


# -- questions -------------------------------------------------------------------------------------


async def test_status_and_changes() -> None:
    manager = FakeManager(status=STATUS, history=[[report("done")]], change=report("done"))
    async with client(manager) as http:
        status = await http.get("/admin/status")
        history = await http.get("/admin/changes", params={"limit": 7})
        one = await http.get("/admin/changes/3", params={"timeout_s": 2})
    assert ClusterStatus.model_validate(status.json()) == STATUS
    assert [ChangeReport.model_validate(c).number for c in history.json()["changes"]] == [3]
    assert ChangeReport.model_validate(one.json()) == report("done")
    assert manager.calls[1:] == [("history", (7,), {}), ("change", (3, 2.0), {})]


async def test_an_unknown_change_is_404() -> None:
    async with client(FakeManager(change=AffluxError("no change 9", "unknown_change"))) as http:
        answer = await http.get("/admin/changes/9")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_change")
        assert (await http.get("/admin/changes/nine")).status_code == 400
        assert (await http.get("/admin/changes", params={"limit": 0})).status_code == 400


# -- the manager is away ---------------------------------------------------------------------------

AWAY = ActorUnavailableError("restarting", None)


@pytest.mark.parametrize("path", ["/admin/status", "/admin/changes", "/admin/changes/1"])
async def test_a_manager_that_is_away_is_503(path: str) -> None:
    async with client(FakeManager(status=AWAY, history=AWAY, change=AWAY)) as http:
        answer = await http.get(path)
    assert answer.status_code == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert answer.json()["error"]["code"] == "manager_away"
    assert answer.json()["error"]["type"] == "server_error"


async def test_a_silent_manager_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "ASK_S", 0.01)
    async with client(FakeManager(status=asyncio.Event().wait)) as http:
        assert (await http.get("/admin/status")).status_code == 503


async def test_a_manager_that_restarts_during_a_change_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin, "RETRY_S", 0.01)
    manager = FakeManager(scale=report("queued"), change=[AWAY, AWAY, report("done")])
    async with client(manager) as http:
        answer = await http.post("/admin/scale", json={"ffn": 2})
    assert (answer.status_code, answer.json()["phase"]) == (200, "done")


async def test_a_manager_that_forgot_the_change_is_503() -> None:
    unknown = AffluxError("there is no change 3", "unknown_change")
    async with client(FakeManager(scale=report("queued"), change=unknown)) as http:
        answer = await http.post("/admin/scale", json={"ffn": 2})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "change_forgotten")
    assert int(answer.headers["Retry-After"]) >= 1
