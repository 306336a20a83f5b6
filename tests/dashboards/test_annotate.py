"""Annotations: which marks changes and losses become, and that each is written once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.status import ActorEvent, ChangeReport
from dashboards.annotate import Annotation, Annotator, follow, of_change, of_decision, of_loss
from dashboards.grafana import GrafanaError
from tests.dashboards.stub_grafana import TOKEN, StubGrafana


@pytest.fixture
def grafana() -> Iterator[StubGrafana]:
    with StubGrafana() as stub:
        yield stub


def report(**changed: Any) -> dict[str, Any]:
    return ChangeReport(
        **{
            "number": 3,
            "verb": "scale",
            "text": "attention 1 -> 2",
            "phase": "done",
            "started_at": 1000.5,
            "seconds": {"prepare": 2.0, "commit": 0.012, "release": 0.3, "total": 2.312},
            "epoch": 4,
            "started": ("attention-1",),
            **changed,
        }
    ).model_dump()


def event(**changed: Any) -> dict[str, Any]:
    facts = {"actor": "ffn-1", "role": "ffn", "state": "failed", "detail": "it crashed", **changed}
    return ActorEvent(**facts).model_dump()


def test_a_change_is_a_span_with_its_story() -> None:
    mark = of_change("d", report())
    assert mark == Annotation(
        key="d:change:3:1000500",
        begin_ms=1000500,
        end_ms=1002812,
        tags=("afflux", "change", "d", "scale", "d:change:3:1000500"),
        text="scale attention 1 -> 2: done (prepare 2.0 s, commit 12 ms, release 300 ms); "
        "started attention-1; epoch 4",
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"phase": "rolled_back", "error": "no room"},
        {"verb": "repair", "text": "without ffn-1"},
        {"verb": "replace", "text": "ffn 1"},
    ],
)
def test_what_failed_and_what_follows_losses_is_a_failure(changed: dict[str, Any]) -> None:
    mark = of_change("d", report(**changed))
    assert mark is not None and "failure" in mark.tags and "change" not in mark.tags
    assert mark.text.endswith("no room" if "error" in changed else "epoch 4")


@pytest.mark.parametrize("phase", ["noop", "queued"])
def test_what_changed_nothing_is_no_mark(phase: str) -> None:
    assert of_change("d", report(phase=phase)) is None


@given(
    st.floats(0, 2e9),
    st.dictionaries(st.sampled_from(["prepare", "commit", "release"]), st.floats(0, 1e4)),
    st.sampled_from(["prepare", "commit", "release", "done", "rolled_back"]),
)
def test_spans_never_end_before_they_begin(
    begin: float, seconds: dict[str, float], phase: str
) -> None:
    mark = of_change("d", report(started_at=begin, seconds=seconds, phase=phase))
    assert mark is not None and mark.end_ms >= mark.begin_ms
    assert mark.key in mark.tags and "afflux" in mark.tags


def test_a_loss_is_a_moment() -> None:
    mark = of_loss("d", event(), 50.0)
    assert mark is not None and mark.begin_ms == mark.end_ms == 50_000
    assert mark.text == "ffn-1 was lost: it crashed" and "failure" in mark.tags
    assert of_loss("d", event(state="ready"), 50.0) is None
    assert of_loss("d", event(actor="", role=None), 50.0) is None


def test_a_decision_says_why() -> None:
    decision = {
        "time": 70.0,
        "policy": "slo_feedback",
        "there": "2A2F",
        "target": "3A2F",
        "rebalance": False,
        "reasons": ["slo_missed", "step_capped"],
        "detail": "TPOT 0.3 s",
        "outcome": "",
    }
    mark = of_decision("d", decision)
    assert mark is not None and mark.begin_ms == mark.end_ms == 70_000
    assert mark.text == "slo_feedback: 2A2F -> 3A2F (slo_missed, step_capped); TPOT 0.3 s"
    assert "change" in mark.tags and "decision" in mark.tags
    assert of_decision("d", {**decision, "target": None}) is None
    moved = of_decision("d", {**decision, "target": None, "rebalance": True})
    assert moved is not None and "rebalance" in moved.text


def test_written_once_even_by_another_process(grafana: StubGrafana) -> None:
    mark = of_change("d", report())
    assert mark is not None
    first = Annotator(grafana.url, TOKEN)
    assert [first.write(mark), first.write(mark)] == ["created", "unchanged"]
    assert len(grafana.requests) == 2  # what is known needs no request
    assert Annotator(grafana.url, TOKEN).write(mark) == "unchanged"
    assert grafana.annotations == [
        {
            "id": 1,
            "panelId": None,
            "time": 1000500,
            "timeEnd": 1002812,
            "tags": list(mark.tags),
            "text": mark.text,
        }
    ]


def test_a_change_under_way_gets_its_end(grafana: StubGrafana) -> None:
    told: list[tuple[str, str]] = []
    looks = [
        ([report(phase="prepare", seconds={}, epoch=None, started=())], [], []),
        ([report(phase="commit", seconds={"prepare": 2.0}, epoch=None)], [event()], []),
        ([report()], [], []),
    ]
    follow(
        "d",
        looks,
        Annotator(grafana.url, TOKEN),
        clock=lambda: 7.0,
        on_written=lambda mark, written: told.append((mark.key, written)),
    )
    change = "d:change:3:1000500"
    assert told == [
        (change, "created"),
        (change, "updated"),
        ("d:loss:ffn-1:7000", "created"),
        (change, "updated"),
    ]
    assert [one["timeEnd"] for one in grafana.annotations] == [1002812, 7000]


def test_bad_token(grafana: StubGrafana) -> None:
    mark = of_change("d", report())
    assert mark is not None
    with pytest.raises(GrafanaError) as caught:
        Annotator(grafana.url, "wrong").write(mark)
    assert caught.value.code == "bad_token"
