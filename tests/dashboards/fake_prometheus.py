"""A stand-in for Prometheus' HTTP API: a function answers range queries; a configuration."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

CONFIG = "global: {scrape_interval: 5s}\nscrape_configs: [{job_name: afflux}]"

Values = Callable[[str, float], "dict[str, float]"]
"""From an expression and a Unix time to values by labels, as in ``role=ffn,state=ready``; a name
without ``=`` is the label ``series``. A ValueError refuses the expression."""


class FakePrometheus:
    """Use it as a context manager; ``asked`` holds the expressions of all range queries."""

    def __init__(self, values: Values, config: str = CONFIG):
        self.asked: list[str] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name is http.server's
                code, body = fake._answer(self.path, values, config)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, path: str, values: Values, config: str) -> tuple[int, dict[str, Any]]:
        url = urlsplit(path)
        words = {name: found[0] for name, found in parse_qs(url.query).items()}
        if url.path == "/api/v1/status/config":
            return 200, {"status": "success", "data": {"yaml": config}}
        if url.path != "/api/v1/query_range":
            return 404, {"status": "error", "error": f"no {url.path} here"}
        self.asked.append(words["query"])
        start, end, step = (float(words[name]) for name in ("start", "end", "step"))
        times = [start + n * step for n in range(int((end - start) / step + 1e-6) + 1)]
        series: dict[str, list[list[Any]]] = {}
        try:
            for at in times:
                for name, value in values(words["query"], at).items():
                    series.setdefault(name, []).append([at, repr(value)])
        except ValueError as error:
            return 400, {"status": "error", "error": str(error)}
        result = [{"metric": _labels(name), "values": found} for name, found in series.items()]
        return 200, {"status": "success", "data": {"resultType": "matrix", "result": result}}

    def __enter__(self) -> FakePrometheus:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _labels(name: str) -> dict[str, str]:
    if "=" not in name:
        return {"series": name}
    return dict(part.split("=", 1) for part in name.split(","))
