"""The verbs on the command line: words, outcomes, exit codes; what they do is faked."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from actors.errors import AffluxError
from afflux.change import parse_counts
from afflux.main import app
from afflux.progress import ChangeProgress
from cluster.status import ChangeReport

run = CliRunner().invoke


def report(phase: str = "done", **more: Any) -> ChangeReport:
    data = {"number": 3, "verb": "scale", "text": "attention 1 -> 2", "phase": phase}
    return ChangeReport.model_validate({**data, "started_at": 1.0, **more})


DONE = report(
    seconds={"prepare": 1.8, "commit": 0.01, "total": 1.92},
    epoch=4,
    started=("attention-1",),
    moved_experts=12,
)


class FakeVerbs:
    """Stands in for ``cluster.verbs``: remembers calls, answers ``reports`` one after another."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.reports = [report("prepare"), report("commit"), DONE]
        self.error: BaseException | None = None

    def __getattr__(self, verb: str) -> Any:
        def call(*words: Any, on_change: Any = None, **options: Any) -> Any:
            self.calls.append((verb, words, options))
            for one in self.reports if on_change else ():
                on_change(one)
            if self.error is not None:
                raise self.error
            return self.reports if verb == "changes" else self.reports[-1]

        return call


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> FakeVerbs:
    import cluster

    fake = FakeVerbs()
    names = ("scale", "retire", "flip", "rebalance", "changes")
    stand_in = SimpleNamespace(**{name: getattr(fake, name) for name in names})
    monkeypatch.setitem(sys.modules, "cluster.verbs", stand_in)
    monkeypatch.setattr(cluster, "verbs", stand_in, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return fake


WAITING = {"wait": True, "timeout_s": None, "address": None}


@pytest.mark.parametrize(
    ("line", "verb", "words", "options"),
    [
        ("scale attention=2 ffn=3", "scale", (), {"attention": 2, "ffn": 3}),
        ("scale ffn=03 attention=2", "scale", (), {"attention": 2, "ffn": 3}),
        ("scale FFN=1", "scale", (), {"ffn": 1}),
        (
            "scale ffn=1 --no-wait --timeout 9",
            "scale",
            (),
            {"ffn": 1, "wait": False} | {"timeout_s": 9.0},
        ),
        ("retire ffn-1", "retire", ("ffn-1",), {"replace": False}),
        ("retire ffn-1 --replace", "retire", ("ffn-1",), {"replace": True}),
        ("flip ffn-1 --to attention", "flip", ("ffn-1",), {"to": "attention"}),
        (
            "flip attention-0 --to ffn --address h:1",
            "flip",
            ("attention-0",),
            {"to": "ffn", "address": "h:1"},
        ),
        ("rebalance", "rebalance", (), {}),
    ],
)
def test_words_reach_the_verb(
    verbs: FakeVerbs, line: str, verb: str, words: tuple[str, ...], options: dict[str, Any]
) -> None:
    result = run(app, [*line.split(), "--name", "mine"])
    assert result.exit_code == 0, result.output
    assert verbs.calls == [(verb, ("mine", *words), WAITING | options)]


def test_a_change_is_followed_by_lines_and_its_outcome(verbs: FakeVerbs) -> None:
    lines = run(app, ["scale", "attention=2"]).stdout.splitlines()
    assert [line.rpartition("change 3  ")[2] for line in lines[:2]] == [
        "scale attention 1 -> 2: prepare",
        "scale attention 1 -> 2: commit",
    ]
    assert lines[2:] == [
        "done: change 3 (scale attention 1 -> 2) in 1.92 s (prepare 1.80, commit 0.01); "
        "started attention-1; moved 12 experts; epoch 4"
    ]


def test_nothing_to_do_is_fine(verbs: FakeVerbs) -> None:
    verbs.reports = [report("noop", text="2 attention already")]
    result = run(app, ["scale", "attention=2"])
    assert (result.exit_code, result.stdout.strip()) == (0, "nothing to do: 2 attention already")
    verbs.reports = [report("noop", verb="rebalance", text="by measured load")]
    assert "nothing to do: no move of experts" in run(app, ["rebalance"]).stdout


def test_without_waiting_it_says_how_to_follow(verbs: FakeVerbs) -> None:
    verbs.reports = [report("queued")]
    result = run(app, ["scale", "attention=2", "--no-wait"])
    assert result.exit_code == 0
    assert "under way: change 3 (scale attention 1 -> 2); see afflux changes" in result.stdout


@pytest.mark.parametrize(
    ("last", "error", "text"),
    [
        (
            report("rolled_back", error="ffn-2: no memory"),
            None,
            "was rolled back: ffn-2: no memory",
        ),
        (report("prepare"), None, "is in phase prepare still"),
        (DONE, AffluxError("ffn.max is 4", "refused"), "error: ffn.max is 4"),
    ],
)
def test_what_did_not_happen_is_one_error_line_and_exit_code_1(
    verbs: FakeVerbs, last: ChangeReport, error: Exception | None, text: str
) -> None:
    verbs.reports, verbs.error = [last], error
    result = run(app, ["scale", "attention=2"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert text in result.stderr


def test_ctrl_c_stops_waiting_only(verbs: FakeVerbs) -> None:
    verbs.error = KeyboardInterrupt()
    result = run(app, ["rebalance"])
    assert result.exit_code == 130
    assert result.stderr.strip() == "no longer waiting; the change goes on (afflux changes)"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], ""),
        (["2"], "cannot read '2'"),
        (["atention=2"], "cannot read 'atention=2'"),
        (["attention"], "cannot read 'attention'"),
        (["attention="], "no number of actors"),
        (["attention=two"], "no number of actors"),
        (["attention=-1"], "no number of actors"),
        (["attention=1.5"], "no number of actors"),
        (["attention=²"], "no number of actors"),
        (["ffn=1", "ffn=1"], "ffn is given twice"),
    ],
)
def test_wrong_words_are_refused_with_the_form(
    verbs: FakeVerbs, words: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="afflux scale attention=N ffn=M") as raised:
        parse_counts(words)
    assert text in str(raised.value)
    assert run(app, ["scale", *words]).exit_code == 2
    assert verbs.calls == []


@pytest.mark.parametrize("line", ["retire", "flip ffn-1", "flip ffn-1 --to nonsense", "scale x=1"])
def test_wrong_usage_exits_with_2(verbs: FakeVerbs, line: str) -> None:
    assert run(app, line.split()).exit_code == 2
    assert verbs.calls == []


@given(st.dictionaries(st.sampled_from(["attention", "ffn"]), st.integers(0, 10**6), min_size=1))
def test_counts_come_back(counts: dict[str, int]) -> None:
    assert parse_counts([f"{role}={number}" for role, number in counts.items()]) == counts


def test_changes_as_table_and_as_json(verbs: FakeVerbs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    verbs.reports = [DONE, report("rolled_back", number=4, verb="flip", error="no [room]")]
    text = run(app, ["changes", "--limit", "5"]).stdout
    assert verbs.calls[0] == ("changes", ("afflux",), {"limit": 5, "address": None})
    rows = [line.split() for line in text.splitlines()]
    assert [row[-6:] for row in rows[1:3]] == [
        ["1.92", "1.80", "0.01", "-", "4", "12"],
        ["-", "-", "-", "-", "-", "0"],
    ]
    assert {"4", "flip", "rolled_back"} <= set(rows[2])
    assert "change 4: no [room]" in text
    data = json.loads(run(app, ["changes", "--json"]).stdout)
    assert [ChangeReport.model_validate(one).number for one in data] == [3, 4]
    verbs.reports = []
    assert run(app, ["changes"]).stdout.strip() == "no changes yet"


def test_progress_redraws_on_a_terminal() -> None:
    out = io.StringIO()
    with ChangeProgress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress(report("prepare"))
    assert "change 3  scale attention 1 -> 2: prepare" in out.getvalue()
