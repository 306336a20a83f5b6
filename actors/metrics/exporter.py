"""A small HTTP server for metrics: each process has one, on a thread and a port of its own.

Serves pages that are made when they are asked for. Not for what stands on a page (``families``),
nor for who reads it (Prometheus, through the manager's service discovery).
"""

from __future__ import annotations

import errno
import json
import logging
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest

from actors.errors import AffluxError

logger = logging.getLogger(__name__)

Page = Callable[[str], tuple[bytes, str]]
"""Given a request's Accept header, the body and its content type. Runs on any thread."""

_CLIENT_TIMEOUT_S = 10.0


def registry_page(registry: CollectorRegistry) -> Page:
    """A registry in the format that the reader asks for: OpenMetrics or text."""

    def page(accept: str) -> tuple[bytes, str]:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type

    return page


def plain_page(registry: CollectorRegistry) -> Page:
    """A registry as text format 0.0.4, whatever the reader asks for.

    For vLLM's metrics: OpenMetrics would turn ``vllm:x`` into ``vllm_x``, and vLLM's public
    dashboards ask for the former.
    """

    def page(accept: str) -> tuple[bytes, str]:
        return generate_latest(registry, escaping="allow-utf-8"), CONTENT_TYPE_PLAIN_0_0_4

    return page


def json_page(function: Callable[[], Any]) -> Page:
    """What ``function`` returns, as JSON."""

    def page(accept: str) -> tuple[bytes, str]:
        return json.dumps(function()).encode(), "application/json"

    return page


class Exporter:
    """Serves pages from the moment it is made until ``close``.

    Args:
        host: address to bind to; "0.0.0.0" or "::" for every interface.
        port: 0 for any free one. One that is taken is replaced by any free one, with a warning.
        pages: path -> page. A page that raises answers 500 and leaves the others alone.

    Raises:
        AffluxError: the host is not an address of this machine, or the port is not allowed (code
            ``bad_metrics_address``).
    """

    def __init__(self, host: str, port: int, pages: Mapping[str, Page]):
        self.pages = dict(pages)
        self._server = _bind(host, port, self.pages)
        bound = self._server.server_address
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{bound[1]}"
        """"host:port" as bound; a host of every interface is not an address to call."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics-http", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop listening; idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingMixIn, TCPServer):
    # Not HTTPServer, which asks DNS for this machine's name when it binds.
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 16

    def __init__(self, host: str, port: int, pages: dict[str, Page]):
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.pages = pages
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("metrics reader %s went away", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0, the default: one scrape per connection, so that ``close`` leaves no reader behind.
    server: _Server
    timeout = _CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        page = self.server.pages.get(path)
        if page is None:
            paths = ", ".join(sorted(self.server.pages))
            self._answer(404, f"no page {path}; there are: {paths}\n".encode(), "text/plain")
            return
        try:
            body, content_type = page(self.headers.get("Accept") or "")
        except Exception:
            logger.exception("page %s failed", path)
            self._answer(500, f"page {path} failed; see the log\n".encode(), "text/plain")
            return
        self._answer(200, body, content_type)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line per scrape would fill the log."""


def _bind(host: str, port: int, pages: dict[str, Page]) -> _Server:
    try:
        return _Server(host, port, pages)
    except OSError as error:
        if not port or error.errno != errno.EADDRINUSE:
            raise AffluxError(
                f"metrics can't be served on {host}, port {port}: {error}; see metrics.host and "
                "metrics.port of the spec",
                code="bad_metrics_address",
            ) from error
    server = _Server(host, 0, pages)
    logger.warning("port %d is taken; metrics are on port %d", port, server.server_address[1])
    return server
