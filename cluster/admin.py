"""The verbs over HTTP: ``/admin`` beside the OpenAI interface, for holders of an admin key.

    POST /admin/scale      {"attention": 2, "ffn": 3}
    POST /admin/retire     {"actor": "ffn-1", "replace": false}
    POST /admin/flip       {"actor": "ffn-1", "to": "attention"}
    POST /admin/rebalance  {}
    GET  /admin/status, /admin/changes, /admin/changes/{number}

A POST also takes ``wait`` (true) and ``timeout_s`` (60). It answers 200 with the change's report
once it has ended, 202 with the report so far, 409 when it was refused or rolled back. Errors have
OpenAI's form. Requests under /admin never reach vLLM's app. Deciding and doing is the manager's.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from ray.exceptions import RayError, RayTaskError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.errors import AffluxError
from cluster.api_keys import KeyRing
from cluster.connection import ASK_S, ManagerAway
from cluster.status import ChangeReport, Role
from cluster.verbs import newer_of

PREFIX = "/admin"
RETRY_S = 2.0
"""What a client is told to wait when the manager is away."""

LONGEST_S = 600.0
"""The longest that a request may wait for its change."""

_NOT_FOUND = ("unknown_actor", "unknown_change")
_TRY_AGAIN = ("manager_away", "change_forgotten", "not_ready")


class _Order(BaseModel):
    """What every verb's body may hold."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    wait: bool = True
    timeout_s: float = Field(default=60.0, ge=0, le=LONGEST_S)


class ScaleOrder(_Order):
    """Numbers of actors; at least one of the two."""

    attention: int | None = Field(default=None, ge=0)
    ffn: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _something(self) -> ScaleOrder:
        if self.attention is None and self.ffn is None:
            raise ValueError("give attention, ffn or both")
        return self


class RetireOrder(_Order):
    """Which actor goes, and whether another takes its place."""

    actor: str = Field(min_length=1)
    replace: bool = False


class FlipOrder(_Order):
    """Which actor gets which role."""

    actor: str = Field(min_length=1)
    to: Role


class RebalanceOrder(_Order):
    """Nothing more to say."""


class AdminMount:
    """ASGI middleware: what is under /admin goes to ``admin``, everything else to ``app``."""

    def __init__(self, app: ASGIApp, admin: ASGIApp):
        self.app = app
        self.admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        below = path == PREFIX or path.startswith(f"{PREFIX}/")
        await (self.admin if below else self.app)(scope, receive, send)


class AdminGuard:
    """ASGI middleware: lets admin keys in; without any configured, nobody.

    Args:
        variable: name of the environment variable that admin keys come from, or None.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing, variable: str | None):
        self.app = app
        self.keys = keys
        self.variable = variable

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return
        if not self.keys:
            refusal = _error(403, "admin_closed", self._how_to_open())
        elif not self.keys.accepts(Headers(scope=scope).get("authorization")):
            refusal = _error(
                401,
                "invalid_admin_key",
                "Incorrect or missing admin key: send 'Authorization: Bearer <key>' (API keys are "
                "not admin keys)",
                headers={"WWW-Authenticate": "Bearer"},
            )
        else:
            await self.app(scope, receive, send)
            return
        await refusal(scope, receive, send)

    def _how_to_open(self) -> str:
        if self.variable is None:
            return (
                f"{PREFIX} is closed: frontend.admin_keys_env is null in the spec; let it name the "
                "environment variable with the admin keys"
            )
        return (
            f"{PREFIX} is closed: no admin keys; set the environment variable {self.variable} to "
            "one or more keys, separated by commas, where the deployment is started"
        )


def make_admin(manager: Any, keys: KeyRing, variable: str | None) -> ASGIApp:
    """The guarded app.

    Args:
        manager: Ray handle of the deployment's manager.
        keys: admin keys.
        variable: where they came from, for the error without any.
    """
    return AdminGuard(_app(manager), keys, variable)


def _app(manager: Any) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(RequestValidationError, _bad_request)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(AffluxError, _afflux_error)

    @app.post(f"{PREFIX}/scale")
    async def scale(order: ScaleOrder) -> JSONResponse:
        call = manager.scale.remote(attention=order.attention, ffn=order.ffn)
        return await _carry_out(manager, call, order)

    @app.post(f"{PREFIX}/retire")
    async def retire(order: RetireOrder) -> JSONResponse:
        return await _carry_out(
            manager, manager.retire.remote(order.actor, replace=order.replace), order
        )

    @app.post(f"{PREFIX}/flip")
    async def flip(order: FlipOrder) -> JSONResponse:
        return await _carry_out(manager, manager.flip.remote(order.actor, to=order.to), order)

    @app.post(f"{PREFIX}/rebalance")
    async def rebalance(order: RebalanceOrder | None = None) -> JSONResponse:
        return await _carry_out(manager, manager.rebalance.remote(), order or RebalanceOrder())

    @app.get(f"{PREFIX}/status")
    async def status() -> JSONResponse:
        report = await _ask(manager.status.remote(), ASK_S)
        return JSONResponse(report.model_dump(mode="json"))

    @app.get(f"{PREFIX}/changes")
    async def changes(limit: int = Query(default=50, ge=1, le=1000)) -> JSONResponse:
        reports = await _ask(manager.history.remote(limit), ASK_S)
        return JSONResponse({"changes": [report.model_dump(mode="json") for report in reports]})

    @app.get(f"{PREFIX}/changes/{{number}}")
    async def change(
        number: int, timeout_s: float = Query(default=0.0, ge=0, le=LONGEST_S)
    ) -> JSONResponse:
        report = await _ask(manager.change.remote(number, timeout_s), timeout_s + ASK_S)
        return JSONResponse(report.model_dump(mode="json"))

    return app


async def _carry_out(manager: Any, call: Any, order: _Order) -> JSONResponse:
    """Wait for the change as long as the order says, and answer with its report."""
    deadline = time.monotonic() + order.timeout_s
    report: ChangeReport = await _ask(call, ASK_S)
    while order.wait and not report.ended and (left := deadline - time.monotonic()) > 0:
        try:
            newer = await _ask(manager.change.remote(report.number, left), left + ASK_S)
        except ManagerAway:  # it restarts
            if deadline - time.monotonic() < RETRY_S:
                raise
            await asyncio.sleep(RETRY_S / 4)
            continue
        except AffluxError as error:
            newer = error
        report = newer_of(report, newer)
    data = report.model_dump(mode="json")
    if report.phase == "rolled_back":
        message = f"{report.verb} was rolled back: {report.error}"
        return _error(409, "rolled_back", message, change=data)
    return JSONResponse(data, status_code=200 if report.ended else 202)


async def _ask(call: Any, timeout_s: float) -> Any:
    """Await a call to the manager; an error of our own code is raised as itself."""
    try:
        async with asyncio.timeout(timeout_s):
            return await call
    except RayTaskError as error:
        if isinstance(error.cause, AffluxError):
            raise error.cause from None
        raise
    except RayError as error:
        raise ManagerAway.because(error) from None
    except TimeoutError:
        raise ManagerAway.silent(timeout_s) from None


# -- errors in OpenAI's form -----------------------------------------------------------------------


def _error(
    status: int,
    code: str,
    message: str,
    *,
    param: str | None = None,
    headers: dict[str, str] | None = None,
    **more: Any,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error, **more}, status_code=status, headers=headers)


async def _bad_request(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    texts, first = [], None
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"][1:])
        first = first or where or None
        texts.append(f"{where}: {problem['msg']}" if where else problem["msg"])
    if request.method == "POST" and "json" not in request.headers.get("content-type", ""):
        texts.append("send JSON with 'Content-Type: application/json'")
    return _error(400, "bad_request", "; ".join(texts), param=first)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    return _error(error.status_code, code, str(error.detail), headers=dict(error.headers or {}))


async def _afflux_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AffluxError)
    if error.code in _TRY_AGAIN:
        headers = {"Retry-After": f"{RETRY_S:.0f}"}
        return _error(503, error.code, error.message, headers=headers)
    return _error(404 if error.code in _NOT_FOUND else 409, error.code, error.message)
