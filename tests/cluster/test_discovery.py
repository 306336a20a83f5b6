"""Service discovery: what Prometheus is told, and which addresses it can reach."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from cluster.discovery import FRONTEND_SILENCE_S, Frontends, Targets, announced, groups

ADDRESSES = st.lists(st.from_regex(r"10\.0\.0\.[1-9]:9[0-9]{3}", fullmatch=True)).map(tuple)


def test_groups() -> None:
    targets = Targets(("b:2", "a:1", "b:2"), ("f:3",), ("r:4",))
    assert groups("mine", targets) == [
        {"targets": ["a:1", "b:2", "f:3"], "labels": {"job": "afflux", "deployment": "mine"}},
        {
            "targets": ["f:3"],
            "labels": {
                "job": "vllm",
                "deployment": "mine",
                "__metrics_path__": "/vllm/metrics",
            },
        },
        {"targets": ["r:4"], "labels": {"job": "ray"}},
    ]


def test_a_group_without_targets_is_left_out() -> None:
    assert groups("mine", Targets()) == []
    assert [g["labels"]["job"] for g in groups("mine", Targets(processes=("a:1",)))] == ["afflux"]


@given(ADDRESSES, ADDRESSES, ADDRESSES)
def test_every_address_is_listed_once_per_job(
    processes: tuple[str, ...], frontends: tuple[str, ...], ray: tuple[str, ...]
) -> None:
    answer = json.loads(json.dumps(groups("x", Targets(processes, frontends, ray))))
    listed = {group["labels"]["job"]: group["targets"] for group in answer}
    assert set(listed.get("afflux", [])) == {*processes, *frontends}
    assert set(listed.get("vllm", [])) == set(frontends)
    assert set(listed.get("ray", [])) == set(ray)
    for group in answer:
        assert len(group["targets"]) == len(set(group["targets"])) > 0
        assert all(isinstance(value, str) for value in group["labels"].values())


def test_announced() -> None:
    assert announced("127.0.0.1:9464", None) == "127.0.0.1:9464"
    assert announced("10.1.1.1:80", "10.0.0.1", "10.0.0.2") == "10.1.1.1:80", "an address is one"
    assert announced("0.0.0.0:80", "10.0.0.1", "10.0.0.2") == "10.0.0.1:80"
    assert announced("[::]:80", "fd00::1") == "[fd00::1]:80"
    assert announced("0.0.0.0:80", None) == "0.0.0.0:80", "nothing better is known"


def test_loopback_is_reached_on_its_own_node_only() -> None:
    for address in ("127.0.0.1:80", "[::1]:80", "localhost:80"):
        assert announced(address, "10.0.0.1", "10.0.0.1") == address
        assert announced(address, "10.0.0.2", "10.0.0.1") is None
        assert announced(address, None, "10.0.0.1") == address


def test_a_silent_frontend_is_forgotten() -> None:
    frontends = Frontends()
    frontends.hear("frontend-0", "a:1", 0.0)
    frontends.hear("frontend-1", "b:1", 10.0)
    assert frontends.live(FRONTEND_SILENCE_S) == ("a:1", "b:1")
    assert frontends.live(FRONTEND_SILENCE_S + 1) == ("b:1",)
    frontends.hear("frontend-0", "a:2", 20.0)
    assert frontends.live(20.0) == ("b:1", "a:2"), "it is back, elsewhere"
    frontends.hear("frontend-1", None, 21.0)
    assert frontends.live(21.0) == ("a:2",), "it can't be scraped any more"
