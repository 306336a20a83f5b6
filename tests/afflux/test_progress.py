"""Progress of a start: lines where nobody watches, a table where somebody does."""

import io

import pytest
from rich.console import Console

from afflux.progress import STEPS, StartProgress, WorkProgress, _ticks
from cluster.status import ActorEvent


def event(actor: str, state: str, **more: object) -> ActorEvent:
    role = actor.split("-")[0] if actor else None
    return ActorEvent.model_validate({"actor": actor, "role": role, "state": state, **more})


def test_lines_when_there_is_no_terminal():
    out = io.StringIO()
    with StartProgress(Console(file=out, width=40)) as progress:
        progress(event("", "pending", detail="starting Ray"))
        progress(event("ffn-0", "placed", seconds=1.25, detail="node [10.0.0.1]"))
    lines = out.getvalue().splitlines()
    assert [line.split() for line in lines] == [
        ["0.0s", "cluster", "starting", "Ray"],
        ["1.2s", "ffn-0", "placed", "node", "[10.0.0.1]"],
    ]


def test_a_table_on_a_terminal():
    out = io.StringIO()
    with StartProgress(Console(file=out, force_terminal=True, width=100)) as progress:
        progress(event("attention-0", "loading", seconds=3.0))
        progress(event("ffn-0", "ready", seconds=4.0))
    text = out.getvalue()
    assert "attention-0" in text
    assert "ffn-0" in text
    assert all(step in text for step in STEPS)


@pytest.mark.parametrize(
    ("state", "done"),
    [
        ("pending", 0),
        ("placed", 1),
        ("importing", 1),
        ("starting", 1),
        ("loading", 2),
        ("ready", 5),
    ],
)
def test_ticks(state: str, done: int):
    cells = _ticks(state)
    assert len(cells) == len(STEPS)
    assert sum("✓" in cell for cell in cells) == done
    assert "failed" in _ticks("failed")[0]
    assert "warm" in _ticks("warm")[0]


def test_work_is_a_bar_on_a_terminal():
    out = io.StringIO()
    with WorkProgress(Console(file=out, force_terminal=True, width=80)) as progress:
        progress("simulating [8A1F]", 0.25)
    assert "simulating [8A1F]" in out.getvalue()
    assert "25 %" in out.getvalue()


def test_work_is_a_line_now_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    with WorkProgress(Console(file=out, width=80)) as progress:
        progress("quick", 0.5)
        monkeypatch.setattr(WorkProgress, "EVERY_S", 0.0)
        progress("slow", 0.75)
    assert out.getvalue().splitlines() == [" 75 %  slow"]
