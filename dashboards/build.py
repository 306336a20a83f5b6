"""All dashboards, and their JSON: what Grafana imports, provisions or gets pushed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import dataplane, elasticity, ray_serve, slo

Json = dict[str, Any]


def build_all() -> dict[str, Json]:
    """Every dashboard as plain JSON data, by uid, the one to look at first first."""
    built = (slo.build(), elasticity.build(), dataplane.build(), ray_serve.build())
    pages = (json.loads(json.dumps(page, cls=JSONEncoder)) for page in built)
    return {page["uid"]: page for page in pages}


def write(folder: Path) -> list[Path]:
    """Write each dashboard to ``folder/UID.json``; the folder is made if it is not there.

    Returns:
        the files, in the order of ``build_all``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for uid, page in build_all().items():
        file = folder / f"{uid}.json"
        file.write_text(text_of(page))
        files.append(file)
    return files


def text_of(page: Json) -> str:
    """JSON that is stable and easy to compare."""
    return json.dumps(page, indent=2) + "\n"
