"""What is said of actors that are slow to reach, and where others go then."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from cluster.siting import Siting
from cluster.slowness import REPORTS
from cluster.spec import Role, make_spec
from cluster.topology import Site

PLACES: dict[str, tuple[Role, str]] = {
    "attention-0": ("attention", "a"),
    "ffn-0": ("ffn", "b"),
    "ffn-1": ("ffn", "c"),
}


def siting(rooms: dict[str, float], ffn_min: int = 1) -> Siting:
    """Nodes with so many CPUs left, and the actors of ``PLACES``."""
    spec = make_spec(
        {"name": "d", "model": {"path": "m"}, "ffn": {"count": 2, "min": ffn_min}},
    )
    sites = [Site(node, {}, {"CPU": cpus}) for node, cpus in rooms.items()]

    def present(role: Role, sites: Sequence[Site]) -> list[Site]:
        by_node = {site.node: site for site in sites}
        return [by_node[node] for of, node in PLACES.values() if of == role]

    return Siting(spec, lambda: sites, present, lambda name: PLACES[name][1], lambda: "head")


def hear(found: Siting, slow_s: float) -> None:
    for _ in range(REPORTS):
        found.heard("attention-0", {"ffn-0": 0.0004, "ffn-1": slow_s})


def test_nothing_is_slow() -> None:
    found = siting({"a": 4, "b": 4, "c": 4})
    hear(found, 0.0005)
    report = found.report(PLACES)
    assert report.slow == () and [link.wire_s for link in report.links] == [0.0004, 0.0005]


def test_another_node_has_room() -> None:
    found = siting({"a": 0, "b": 4, "c": 4})
    hear(found, 0.005)
    (one,) = found.report(PLACES).slow
    assert (one.actor, one.role) == ("ffn-1", "ffn")
    assert one.command == "afflux retire ffn-1 --replace" and " b" in one.advice


def test_no_other_node_has_room() -> None:
    found = siting({"a": 0, "b": 0, "c": 4})
    hear(found, 0.005)
    assert found.report(PLACES).slow[0].command == "afflux retire ffn-1"
    found = siting({"a": 0, "b": 0, "c": 4}, ffn_min=2)
    hear(found, 0.005)
    (one,) = found.report(PLACES).slow
    assert one.command is None and "add a node" in one.advice


async def test_a_new_actor_goes_elsewhere() -> None:
    """Where frames take long, even if there is less room at the others."""
    found = siting({"a": 0, "b": 1, "c": 64})
    assert await found.node_for("ffn") == "b"  # spread evenly: b comes first
    hear(found, 0.005)
    assert await found.node_for("ffn") == "b"
    found = siting({"a": 0, "b": 0, "c": 64})
    hear(found, 0.005)
    assert await found.node_for("ffn") == "c", "better there than nowhere"
    PLACES["ffn-2"] = ("ffn", "b")
    try:
        found = siting({"a": 0, "b": 1, "c": 64})
        assert await found.node_for("ffn") == "c"
        hear(found, 0.005)
        assert await found.node_for("ffn") == "b"
    finally:
        del PLACES["ffn-2"]


def test_on_one_node_nobody_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it is the cores that are short."""
    monkeypatch.setitem(PLACES, "ffn-1", ("ffn", "b"))
    found = siting({"a": 0, "b": 4, "c": 4})
    hear(found, 0.005)
    assert found.report(PLACES).slow == ()
