"""The verbs: ask a running deployment's manager, and have it change who serves what.

``afflux scale``, ``retire``, ``flip``, ``rebalance``, ``changes`` and ``status`` as functions; the
HTTP form is ``admin.py``. A verb says what should be so; asking twice is asking once. Deciding and
doing is the manager's. Every call uses the connection to Ray that is there, or makes one for
itself: who calls often stays connected (``launcher.connected``).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from actors.errors import AffluxError
from cluster.connection import ASK_S, ManagerAway, get, manager_of
from cluster.status import ChangeReport, ClusterStatus, Role, TopologyStatus

OnChange = Callable[[ChangeReport], None]

POLL_S = 0.2
"""How often a change that is waited for is looked at."""

PROBE_S = 300.0
"""How long measuring the links of a cluster may take."""

AWAY_S = 60.0
"""How long a manager may be away, restarting, before waiting for its change is given up."""


class ChangeForgotten(AffluxError):
    """The manager restarted and knows nothing of a change that was under way."""

    code = "change_forgotten"


def scale(
    name: str,
    *,
    attention: int | None = None,
    ffn: int | None = None,
    wait: bool = True,
    timeout_s: float | None = None,
    address: str | None = None,
    on_change: OnChange | None = None,
) -> ChangeReport:
    """Set the number of attention actors, of FFN actors, or both in one change.

    Args:
        name: the deployment.
        attention: actors wanted; None leaves the number as it is.
        ffn: likewise.
        wait: return when the change has ended, else as soon as it is accepted.
        timeout_s: return after so many seconds even if it has not ended; it goes on. None waits
            until it ends; the manager gives each of its phases a deadline.
        address: the Ray cluster to look in when this machine has no record of the deployment.
        on_change: told of the report now and then while it is under way, and at the end.

    Returns:
        the report. Look at its ``phase``: a change that was rolled back is returned, not raised.

    Raises:
        ValueError: neither number was given.
        AffluxError: code ``refused``: the manager refuses, and nothing was changed; codes
            ``not_running``, ``no_ray``, ``manager_away``: it could not be asked;
            ``change_forgotten``: it restarted meanwhile, so ask again.
    """
    if attention is None and ffn is None:
        raise ValueError("scale needs attention=N, ffn=N or both")

    def ask(manager: Any) -> Any:
        return manager.scale.remote(attention=attention, ffn=ffn)

    return _change(name, ask, wait, timeout_s, address, on_change)


def retire(
    name: str,
    actor: str,
    *,
    replace: bool = False,
    wait: bool = True,
    timeout_s: float | None = None,
    address: str | None = None,
    on_change: OnChange | None = None,
) -> ChangeReport:
    """Take any one actor out of service, without its requests or experts being lost.

    Args:
        actor: as in ``ffn-1``.
        replace: start another in its place first; otherwise there is one fewer.

    Other arguments, result and errors as for ``scale``.
    """

    def ask(manager: Any) -> Any:
        return manager.retire.remote(actor, replace=replace)

    return _change(name, ask, wait, timeout_s, address, on_change)


def flip(
    name: str,
    actor: str,
    *,
    to: Role,
    wait: bool = True,
    timeout_s: float | None = None,
    address: str | None = None,
    on_change: OnChange | None = None,
) -> ChangeReport:
    """Turn an actor into one of the other role: one fewer here, one more there, in one change.

    Arguments, result and errors as for ``scale``. An actor that has the role already is no change.
    """

    def ask(manager: Any) -> Any:
        return manager.flip.remote(actor, to=to)

    return _change(name, ask, wait, timeout_s, address, on_change)


def rebalance(
    name: str,
    *,
    wait: bool = True,
    timeout_s: float | None = None,
    address: str | None = None,
    on_change: OnChange | None = None,
) -> ChangeReport:
    """Place the experts anew, from their measured load. As ``scale`` otherwise."""

    def ask(manager: Any) -> Any:
        return manager.rebalance.remote()

    return _change(name, ask, wait, timeout_s, address, on_change)


def change(
    name: str, number: int, timeout_s: float = 0.0, *, address: str | None = None
) -> ChangeReport:
    """The report of one change, once it has ended or ``timeout_s`` have passed.

    Raises:
        AffluxError: code ``unknown_change``: there is none of this number.
    """
    with manager_of(name, address) as manager:
        return get(manager.change.remote(number, timeout_s), timeout_s + ASK_S)


def changes(name: str, *, limit: int = 50, address: str | None = None) -> list[ChangeReport]:
    """The newest ``limit`` changes, newest last, those under way included."""
    with manager_of(name, address) as manager:
        return get(manager.history.remote(limit), ASK_S)


def status(name: str, *, address: str | None = None) -> ClusterStatus:
    """Ask a deployment's manager for everything about it.

    Raises:
        NotRunning: there is no such deployment.
        NoRay: its Ray cluster does not answer.
        ManagerAway: its manager does not answer.
    """
    with manager_of(name, address) as manager:
        return get(manager.status.remote(), ASK_S)


def topology(name: str, *, probe: bool = False, address: str | None = None) -> TopologyStatus:
    """How far apart a deployment's actors are, and what that costs; errors as of ``status``.

    Args:
        probe: measure the links between nodes first.
    """
    with manager_of(name, address) as manager:
        return get(manager.topology.remote(probe), PROBE_S if probe else ASK_S)


def watch(
    name: str, *, interval_s: float = 1.0, address: str | None = None
) -> Iterator[ClusterStatus]:
    """The status again and again over one connection, until the caller has seen enough.

    While the manager is away, the last status comes again with that in its ``detail``.
    """
    with manager_of(name, address) as manager:
        last: ClusterStatus | None = None
        while True:
            try:
                last = get(manager.status.remote(), ASK_S)
                yield last
            except ManagerAway as error:
                if last is None:
                    raise
                yield last.model_copy(update={"detail": f"{error}; this is the last known state"})
            time.sleep(interval_s)


def _change(
    name: str,
    ask: Callable[[Any], Any],
    wait: bool,
    timeout_s: float | None,
    address: str | None,
    on_change: OnChange | None,
) -> ChangeReport:
    with manager_of(name, address) as manager:
        report: ChangeReport = get(ask(manager), ASK_S)
        return follow(manager, report, timeout_s, on_change) if wait else report


def follow(
    manager: Any, report: ChangeReport, timeout_s: float | None, on_change: OnChange | None
) -> ChangeReport:
    """Look at a change until it has ended or ``timeout_s`` have passed; its newest report.

    A manager that restarts meanwhile is waited for.

    Raises:
        ManagerAway: it was away for ``AWAY_S``, or until ``timeout_s``; the change may go on.
        ChangeForgotten: it is back and knows nothing of the change.
    """
    heard = time.monotonic()
    deadline = math.inf if timeout_s is None else heard + timeout_s
    while True:
        if on_change is not None:
            on_change(report)
        left = deadline - time.monotonic()
        if report.ended or left <= 0:
            return report
        pause = min(POLL_S, left)
        newer: ChangeReport | AffluxError
        try:
            newer = get(manager.change.remote(report.number, pause), pause + ASK_S)
            heard = time.monotonic()
        except ManagerAway:
            if time.monotonic() + pause > min(deadline, heard + AWAY_S):
                raise
            time.sleep(pause)
            continue
        except AffluxError as error:
            newer = error
        report = newer_of(report, newer)


def newer_of(report: ChangeReport, answer: ChangeReport | AffluxError) -> ChangeReport:
    """What the manager answers about a change that it had accepted with ``report``.

    Raises:
        ChangeForgotten: it knows none of this number, or another one.
        AffluxError: ``answer``, when that is about something else.
    """
    if isinstance(answer, AffluxError):
        if answer.code != "unknown_change":
            raise answer
    elif (answer.verb, answer.text) == (report.verb, report.text):
        return answer
    raise ChangeForgotten(
        f"the manager restarted while change {report.number} ({report.verb} {report.text}) was "
        "under way and knows nothing of it; look at the status and ask again"
    )
