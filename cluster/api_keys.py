"""Who may use the HTTP server: API keys from the environment, kept as salted digests.

Keys are read where the application is built; only digests travel to the replicas, so a key appears
in no spec, log, state file or process argument. Not for users, quotas or rate limits.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = frozenset({"/health", "/ping", "/metrics", "/version"})
"""Paths that probes and scrapers read without a key; they tell nothing about requests."""


@dataclass(frozen=True)
class KeyRing:
    """Digests of the accepted keys; without any, everybody is let in."""

    salt: bytes
    digests: tuple[bytes, ...]

    @classmethod
    def from_env(cls, variable: str | None, env: Mapping[str, str] | None = None) -> KeyRing:
        """Read comma separated keys from an environment variable; unset or empty means no keys."""
        text = (os.environ if env is None else env).get(variable, "") if variable else ""
        salt = secrets.token_bytes(16)
        keys = [key.strip() for key in text.split(",")]
        return cls(salt, tuple(_digest(salt, key) for key in keys if key))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def accepts(self, authorization: str | None) -> bool:
        """Whether an ``Authorization`` header carries one of the keys as its bearer token."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        given = _digest(self.salt, key.strip())
        return any(hmac.compare_digest(given, digest) for digest in self.digests)


class KeyGuard:
    """ASGI middleware: 401 in OpenAI's form for requests without a valid key.

    It guards every path but ``OPEN_PATHS``. vLLM's own check leaves out several that run the model.
    """

    def __init__(self, app: ASGIApp, keys: KeyRing):
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._open(scope) or self.keys.accepts(Headers(scope=scope).get("authorization")):
            await self.app(scope, receive, send)
            return
        error = {
            "message": "Incorrect or missing API key: send 'Authorization: Bearer <key>'",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        response = JSONResponse(
            {"error": error}, status_code=401, headers={"WWW-Authenticate": "Bearer"}
        )
        await response(scope, receive, send)

    def _open(self, scope: Scope) -> bool:
        if not self.keys or scope["type"] not in ("http", "websocket"):
            return True
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope.get("method") == "OPTIONS" or path.rstrip("/") in OPEN_PATHS


def _digest(salt: bytes, key: str) -> bytes:
    return hmac.new(salt, key.encode(), hashlib.sha256).digest()
