"""A stand-in for Grafana's HTTP API: folders, dashboards with versions, annotations, tokens.

It refuses what Grafana refuses, as its documentation says (401, 403, 404, 412), and remembers every
request.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "glsa_good"

Answer = tuple[int, Any]


class StubGrafana:
    """A server on a free port of the loopback interface; a context manager.

    Attributes:
        requests: (method, path) of all, in order.
        before_save: called with a dashboard's uid before it is saved: for somebody else's edits.
        refuse: an answer to every request, in place of the right one.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.requests: list[tuple[str, str]] = []
        self.folders: list[dict[str, Any]] = []
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.annotations: list[dict[str, Any]] = []
        self.before_save: Callable[[str], None] = lambda uid: None
        self.refuse: Answer | None = None
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                status, answer = stub.answer(self.command, self.path, body, token)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

            def log_message(self, *words: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}{prefix}"

    def __enter__(self) -> StubGrafana:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def writes(self) -> list[tuple[str, str]]:
        """The requests that could change something."""
        return [one for one in self.requests if one[0] != "GET"]

    def save(self, page: dict[str, Any], folder_uid: str) -> dict[str, Any]:
        """As if somebody saved it in the browser: one version more."""
        uid = page["uid"]
        old = self.dashboards.get(uid)
        version = old["dashboard"]["version"] + 1 if old else 1
        stored = {**page, "id": 7, "version": version}
        meta = {"folderUid": folder_uid, "url": f"{self.prefix}/d/{uid}/x", "slug": "x"}
        self.dashboards[uid] = {"dashboard": stored, "meta": meta}
        return self.dashboards[uid]

    def answer(self, method: str, target: str, body: Any, token: str) -> Answer:
        parts = urlsplit(target)
        path = parts.path.removeprefix(f"{self.prefix}/api")
        self.requests.append((method, path))
        if token != TOKEN:
            return 401, {"message": "Invalid API key"}
        if self.refuse is not None:
            return self.refuse
        match method, path.strip("/").split("/"):
            case "GET", ["folders"]:
                return 200, self.folders
            case "POST", ["folders"]:
                self.folders.append({"id": 1, **body})
                return 200, self.folders[-1]
            case "GET", ["dashboards", "uid", uid]:
                found = self.dashboards.get(uid)
                return (200, found) if found else (404, {"message": "Dashboard not found"})
            case "POST", ["dashboards", "db"]:
                return self._save(body)
            case "GET", ["annotations"]:
                wanted = set(parse_qs(parts.query).get("tags", ()))
                return 200, [one for one in self.annotations if wanted <= set(one["tags"])]
            case "POST", ["annotations"]:
                self.annotations.append({"id": len(self.annotations) + 1, **body})
                return 200, {"id": len(self.annotations), "message": "Annotation added"}
            case "PUT", ["annotations", number]:
                self.annotations[int(number) - 1] |= body
                return 200, {"message": "Annotation updated"}
        return 404, {"message": f"no {method} {path}"}

    def _save(self, body: dict[str, Any]) -> Answer:
        page, folder = body["dashboard"], body["folderUid"]
        self.before_save(page["uid"])
        there = self.dashboards.get(page["uid"])
        if there and not body["overwrite"] and page["version"] != there["dashboard"]["version"]:
            text = "The dashboard has been changed by someone else"
            return 412, {"message": text, "status": "version-mismatch"}
        for other in self.dashboards.values():
            named = other["dashboard"]["title"] == page["title"]
            if named and other["dashboard"]["uid"] != page["uid"]:
                text = "A dashboard with the same name in the folder already exists"
                return 412, {"message": text, "status": "name-exists"}
        stored = self.save({key: value for key, value in page.items() if key != "id"}, folder)
        return 200, {
            "id": 7,
            "uid": page["uid"],
            "url": stored["meta"]["url"],
            "status": "success",
            "version": stored["dashboard"]["version"],
        }
