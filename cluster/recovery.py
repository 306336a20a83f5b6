"""How a manager that Ray has started anew finds out what there is.

The actors are the truth: each says its role, peers, epoch and table. What no actor can know (the
targets, the numbers used so far, the frontend's address) is in the *note* that the manager leaves
with every worker whenever something changes. Reading only; ``Membership.restore`` decides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from actors.errors import AffluxError
from actors.table import ExpertTable
from cluster import ray_actors
from cluster.membership import Membership
from cluster.seats import ANSWER_S, Seat
from cluster.spec import ClusterSpec

logger = logging.getLogger(__name__)

_SILENT: dict[str, Any] = {"state": "silent"}

PATIENCE_S = 30.0
"""How long a worker may be silent before it is ended; serving goes on meanwhile."""

KEPT_REPORTS = 50
"""Reports of changes that outlive a manager."""


@dataclass
class Found:
    """What was there: members' seats, warm workers (name, handle, node), the newest note.

    ``names``: of all processes, of those that were ended just now too.
    """

    names: tuple[str, ...] = ()
    seats: list[Seat] = field(default_factory=list)
    warm: list[tuple[str, Any, str]] = field(default_factory=list)
    note: dict[str, Any] | None = None


def note(
    core: Membership,
    number: int,
    url: str | None,
    serve_app: str | None,
    metrics_port: int | None = None,
    kept: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a later manager must know and can't read off the actors."""
    return {
        "number": number,
        "targets": dict(core.targets),
        "serial": core.serial,
        "epoch": core.epoch,
        "past": core.reports(KEPT_REPORTS),
        "table": core.table,
        "draining": [m.name for m in core.live("attention") if m.state == "draining"],
        "url": url,
        "serve_app": serve_app,
        "metrics_port": metrics_port,
        "kept": dict(kept or {}),
    }


async def look_around(spec: ClusterSpec) -> Found:
    """Ask every worker of the deployment who it is.

    Workers that are dead, or silent for ``PATIENCE_S`` while others answer, are ended; so are
    placement groups without a worker.

    Raises:
        AffluxError: code ``silent``: there are workers, and none of them answered in
            ``PATIENCE_S``. Nothing was ended.
    """
    handles, answers = await _ask_all(spec)
    groups = await asyncio.to_thread(ray_actors.groups, spec.name)
    found = Found(names=tuple(handles))
    for (name, handle), info in zip(handles.items(), answers, strict=True):
        if info is None or info is _SILENT:
            logger.warning("%s is %s; ending it", name, "dead" if info is None else "silent")
            ray_actors.kill(handle)
            continue
        left = info.get("note") or {}
        if left.get("number", 0) > (found.note or {}).get("number", 0):
            found.note = left
        node_id, node_ip, pid = await asyncio.to_thread(ray_actors.where, handle)
        if info["role"] is None:
            found.warm.append((name, handle, node_id or ""))
            continue
        member = info.get("name") or name
        usable = info["state"] == "ready" and member in groups
        found.seats.append(
            Seat(
                member,
                info["role"],
                state="ready" if usable else "failed",
                group=groups.pop(member, None),
                handle=handle,
                info=info,
                node_id=node_id,
                node_ip=node_ip,
                pid=pid,
            )
        )
    for seat in [seat for seat in found.seats if seat.state == "failed"]:
        logger.warning("%s was left half started; ending it", seat.name)
        ray_actors.kill(seat.handle)
        if seat.group is not None:
            ray_actors.remove_group(seat.group)
        found.seats.remove(seat)
    for group in groups.values():
        ray_actors.remove_group(group)
    return found


def restore(core: Membership, found: Found, now: float) -> None:
    """Give a new membership what was found."""
    assert found.note is not None
    left = found.note
    infos = {seat.name: seat.info or {} for seat in found.seats}
    roles = {seat.name: seat.role for seat in found.seats}
    tables = [info["table"] for info in infos.values() if info.get("table") is not None]
    if left.get("table") is not None:
        tables.append(left["table"])
    core.targets = dict(left["targets"])
    core.restore(
        roles,
        newest(tables),
        draining=[name for name in left["draining"] if name in roles],
        connected=pairs(infos),
        adopted={n: i.get("epoch", 0) for n, i in infos.items() if roles[n] == "attention"},
        serial=left["serial"],
        epoch=left["epoch"],
        past=left["past"],
        now=now,
    )


def newest(tables: list[ExpertTable]) -> ExpertTable | None:
    """The table with the highest epoch."""
    return max(tables, key=lambda table: table.epoch, default=None)


def pairs(infos: Mapping[str, Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(attention, FFN) pairs of which both say that they are connected."""
    peers = {name: set(info.get("peers", ())) for name, info in infos.items()}
    return {
        (name, peer)
        for name, info in infos.items()
        if info["role"] == "attention"
        for peer in peers[name]
        if name in peers.get(peer, ())
    }


async def _ask_all(spec: ClusterSpec) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """Handles of all workers by name, and what each says: None if dead, ``_SILENT``.

    Who doesn't answer is asked again until ``PATIENCE_S`` is over: this process has just started,
    and on a busy machine it is its own slowness that looks like their silence.
    """
    deadline = time.monotonic() + PATIENCE_S
    handles = await asyncio.to_thread(ray_actors.workers, spec.name)
    answers: dict[str, dict[str, Any] | None] = dict.fromkeys(handles, _SILENT)
    while silent := [name for name, answer in answers.items() if answer is _SILENT]:
        if time.monotonic() > deadline:
            break
        if len(silent) < len(handles):
            logger.warning("no answer yet from %s; asking again", ", ".join(silent))
        found = await asyncio.gather(*(_info(handles[name]) for name in silent))
        answers.update(zip(silent, found, strict=True))
    told = any(answer.get("note") for answer in answers.values() if answer is not None)
    if silent and not told:
        raise AffluxError(
            f"none of {', '.join(handles)} has said within {PATIENCE_S:g} s what {spec.name} is; "
            "is the machine overloaded? The next command tries again",
            code="silent",
        )
    return handles, list(answers.values())


async def _info(handle: Any) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(ANSWER_S):
            return await handle.info.remote()
    except TimeoutError:
        return _SILENT
    except RayError:
        return None
