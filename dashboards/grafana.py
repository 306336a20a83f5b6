"""A connection to a Grafana, with errors that say what to do.

grafana-client does the talking. Not for what is said: ``push`` and ``annotate``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import niquests
from grafana_client import GrafanaApi
from grafana_client.client import GrafanaClientError, GrafanaException, GrafanaTimeoutError

from actors.errors import AffluxError

TOKEN_VARIABLE = "GRAFANA_TOKEN"
"""Environment variable that holds a service account's token."""

_TIMEOUT_S = 10.0


class GrafanaError(AffluxError):
    """Grafana can't be reached or refuses; ``code`` says which."""

    code = "grafana"


def connect(url: str, token: str) -> GrafanaApi:
    """A client; nothing is sent yet.

    Args:
        url: of Grafana, as in ``http://127.0.0.1:3000``; a path is kept.
        token: of a service account with the role Editor.

    Raises:
        GrafanaError: codes ``bad_url``, ``no_token``.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        text = f"{url!r} is no address of a Grafana; expected http://host:3000 or https://..."
        raise GrafanaError(text, "bad_url")
    if not token.strip():
        text = (
            f"there is no token: make a service account with the role Editor in Grafana "
            f"(Administration, Users and access) and set {TOKEN_VARIABLE} to its token"
        )
        raise GrafanaError(text, "no_token")
    if parts.path and not parts.path.endswith("/"):
        url = parts._replace(path=parts.path + "/").geturl()  # it is put before "api"
    return GrafanaApi.from_url(url, credential=token.strip(), timeout=_TIMEOUT_S)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Inside, what Grafana refuses is raised as a ``GrafanaError``.

    Raises:
        GrafanaError: codes ``bad_token`` (401), ``forbidden`` (403), ``conflict`` (409, 412),
            ``unreachable``, or ``grafana`` with Grafana's own words.
    """
    try:
        yield
    except GrafanaTimeoutError:
        text = f"Grafana at {url} did not answer within {_TIMEOUT_S:g} s"
        raise GrafanaError(text, "unreachable") from None
    except niquests.RequestException as error:
        text = f"no Grafana at {url}: {_first_line(error)}; check --url and that it runs"
        raise GrafanaError(text, "unreachable") from None
    except GrafanaClientError as error:
        raise _refused(url, error) from None
    except GrafanaException as error:
        raise GrafanaError(f"Grafana at {url}: {error.message}") from None


def status_of(error: GrafanaException) -> str:
    """Grafana's word for why it refused, as in ``version-mismatch``; empty without one."""
    response = error.response
    return str(response.get("status", "")) if isinstance(response, dict) else ""


def _refused(url: str, error: GrafanaClientError) -> GrafanaError:
    said = _words(error)
    if error.status_code == 401:
        text = (
            f"Grafana at {url} does not accept the token in {TOKEN_VARIABLE} ({said}): it is "
            "expired, deleted, or of another Grafana. Make a new one"
        )
        return GrafanaError(text, "bad_token")
    if error.status_code == 403:
        text = (
            f"the token in {TOKEN_VARIABLE} may not do this at {url} ({said}): its service account "
            "needs the role Editor"
        )
        return GrafanaError(text, "forbidden")
    if error.status_code in (409, 412):
        return GrafanaError(f"Grafana at {url} sees a conflict: {said}", "conflict")
    return GrafanaError(f"Grafana at {url} refuses (HTTP {error.status_code}): {said}")


def _words(error: GrafanaException) -> str:
    response = error.response
    if isinstance(response, dict) and response.get("message"):
        return str(response["message"])
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
