"""Puts the dashboards into a Grafana: made, updated, or left alone when they are there already.

Uids stay, so links and bookmarks do too. Asking twice is asking once. Not for files: Grafana can
read those itself (deploy/grafana).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grafana_client import GrafanaApi
from grafana_client.client import GrafanaClientError

from dashboards.build import Json
from dashboards.grafana import GrafanaError, connect, explained, status_of

_MESSAGE = "afflux dashboards push"
_FOLDER_UID = re.compile(r"[^a-z0-9]+")


@dataclass(frozen=True)
class Pushed:
    """What has become of one dashboard.

    Args:
        url: where it is.
    """

    uid: str
    title: str
    outcome: Literal["created", "updated", "unchanged"]
    url: str


def push(url: str, token: str, folder: str, pages: Mapping[str, Json]) -> list[Pushed]:
    """Make Grafana's dashboards what ``pages`` say.

    Args:
        url: of Grafana.
        token: of a service account with the role Editor.
        folder: title of a folder at the top level; made if it is not there.
        pages: by uid.

    Raises:
        GrafanaError: see ``grafana.explained``; what was pushed before stays.
    """
    api = connect(url, token)
    with explained(url):
        folder_uid = _folder(api, folder)
        return [_push(api, url, folder_uid, page) for page in pages.values()]


def _folder(api: GrafanaApi, title: str) -> str:
    for one in api.folder.get_all_folders():
        if one["title"] == title:
            return one["uid"]
    uid = _FOLDER_UID.sub("-", title.lower()).strip("-")[:40] or None
    return api.folder.create_folder(title, uid=uid)["uid"]


def _push(api: GrafanaApi, url: str, folder_uid: str, page: Json, again: bool = True) -> Pushed:
    there = _there(api, page["uid"])
    if there is not None and _same(page, there["dashboard"]) and _in(there, folder_uid):
        return _pushed(url, page, "unchanged", there["meta"].get("url"))
    version = there["dashboard"].get("version") if there is not None else None
    body = {
        "dashboard": {**page, "id": None, "version": version},
        "folderUid": folder_uid,
        # with the version that was read, Grafana refuses if somebody has saved in between
        "overwrite": False,
        "message": _MESSAGE,
    }
    try:
        answer = api.dashboard.update_dashboard(body)
    except GrafanaClientError as error:
        if error.status_code != 412:
            raise
        if status_of(error) == "version-mismatch" and again:
            return _push(api, url, folder_uid, page, again=False)
        raise _conflict(page, error) from None
    outcome: Literal["created", "updated"] = "created" if there is None else "updated"
    return _pushed(url, page, outcome, answer.get("url"))


def _there(api: GrafanaApi, uid: str) -> Json | None:
    try:
        return api.dashboard.get_dashboard(uid)
    except GrafanaClientError as error:
        if error.status_code == 404:
            return None
        raise


def _in(there: Json, folder_uid: str) -> bool:
    return there.get("meta", {}).get("folderUid") == folder_uid


def _same(wanted: Any, there: Any) -> bool:
    """Whether all that is wanted is there; Grafana adds fields of its own."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        return all(
            key in there and _same(value, there[key])
            for key, value in wanted.items()
            if value is not None
        )
    if isinstance(wanted, list) and isinstance(there, list):
        return len(wanted) == len(there) and all(map(_same, wanted, there))
    return wanted == there


def _conflict(page: Json, error: GrafanaClientError) -> GrafanaError:
    reason = {
        "version-mismatch": "somebody saves it again and again at this moment; try again",
        "name-exists": "the folder holds another dashboard of this title; rename or delete that "
        "one, or push into another folder",
        "plugin-dashboard": "it belongs to a plugin; push into another folder",
    }.get(status_of(error), "Grafana gives no reason; try again, or delete it there first")
    text = f"Grafana does not take {page['title']!r} ({page['uid']}), HTTP 412: {reason}"
    return GrafanaError(text, "conflict")


def _pushed(
    url: str, page: Json, outcome: Literal["created", "updated", "unchanged"], path: str | None
) -> Pushed:
    # Grafana answers with a path that holds its own prefix
    place = f"{url.split('://')[0]}://{url.split('://')[1].split('/')[0]}{path}" if path else url
    return Pushed(page["uid"], page["title"], outcome, place)
