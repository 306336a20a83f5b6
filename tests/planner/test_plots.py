"""The pictures: that they are drawn, what is in them, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from planner import plots
from planner.errors import PlannerError
from planner.plots import Best, RatioLine, Series, draw_run, draw_sizing
from planner.spans import Span

PNG = b"\x89PNG\r\n\x1a\n"
LINE = RatioLine("theory", [1, 2, 4], [0.3, 0.5, 0.4], [0.0, 0.1, 0.5], [0.6, 0.3, 0.0])
DOTS = RatioLine("simulation", [1, 2], [0.3, 0.48], [0.0, 0.1], [0.6, 0.3], simulated=True)


def steps(workers: int, *, together: bool = True) -> list[Span]:
    """One step of two lanes of so many attention workers."""
    spans = []
    for lane in (0, 1):
        for worker in range(workers):
            spans.append(Span(f"A{worker}", lane, "attention", 10.0 * lane, 9.0))
            spans.append(Span(f"A{worker}", lane, "wait", 10.0 * lane + 9, 1.0))
        who = ["A"] if together else [f"A{worker}" for worker in range(workers)]
        for one in who:
            spans.append(Span(one, lane, "a2f", 10.0 * lane + 10, 1.0))
            spans.append(Span(one, lane, "f2a", 10.0 * lane + 16, 1.0))
        spans.append(Span("F", lane, "ffn", 10.0 * lane + 11, 5.0))
    return spans


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the axes of each saved figure held; the figure itself is closed by then."""
    found: list[dict[str, Any]] = []
    save = Figure.savefig

    def look(figure: Figure, *words: Any, **options: Any) -> None:
        for axis in figure.get_axes():
            found.append(
                {
                    "title": axis.get_title(loc="left"),
                    "x": axis.get_xlabel(),
                    "y": axis.get_ylabel(),
                    "rows": [tick.get_text() for tick in axis.get_yticklabels()],
                    "texts": [text.get_text() for text in axis.texts],
                    "labels": axis.get_legend_handles_labels()[1],
                }
            )
        save(figure, *words, **options)

    monkeypatch.setattr(Figure, "savefig", look)
    return found


def test_a_sizing_has_throughput_idle_shares_and_steps(
    tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    file = tmp_path / "new" / "size.png"
    marks = [Best("r* =", 2.25, 0.51, "theory")]
    draw_sizing(file, "title", [LINE, DOTS], marks, steps(2), unit="cycles", steps_title="Steps")
    assert file.read_bytes().startswith(PNG)
    assert pyplot.get_fignums() == []
    panels = {panel["title"]: panel for panel in drawn}
    throughput = panels["Throughput per instance"]
    assert throughput["y"] == "tokens per cycle and instance"
    assert throughput["labels"] == ["theory", "simulation"]
    assert throughput["texts"] == ["r* = 2.25"]
    assert panels["Idle share of each side"]["y"] == "idle, % of time"
    assert panels["Steps"]["x"] == "time, cycles"
    rows = panels["Steps"]["rows"]
    assert rows == ["attention 0", "attention 1", "lane 0 under way", "lane 1 under way", "FFN"]


def test_lanes_that_go_alone_have_rows_of_their_own() -> None:
    rows = plots._rows(steps(2, together=False))
    assert [plots._row_name(row) for row in rows] == [
        "attention 0", "attention 0 lane 0 under way", "attention 0 lane 1 under way",
        "attention 1", "attention 1 lane 0 under way", "attention 1 lane 1 under way",
        "FFN",
    ]  # fmt: skip
    middles = [middle for middle, _ in rows.values()]
    assert middles == sorted(middles)


def test_many_workers_are_cut_short_and_the_title_says_so(
    tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    draw_sizing(tmp_path / "size.png", "title", [LINE], bars=steps(12))
    panel = next(panel for panel in drawn if panel["x"].startswith("time"))
    assert "4 more attention workers not drawn" in panel["title"]
    assert sum(row.startswith("attention") for row in panel["rows"]) == 8


def test_a_run_has_a_panel_per_series_and_its_events(
    tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    times = [0.0, 1.0, 2.0]
    series = [
        Series("tokens/s", times, {"tokens": [1.0, 5.0, float("nan")]}),
        Series("workers", times, {"attention": [1, 1, 2], "FFN": [1, 1, 1]}, steps=True),
    ]
    events = [(1.0, "attention +1"), (1.1, "lost ffn"), (99.0, "never seen")]
    draw_run(tmp_path / "run.svg", "title", series, steps(1), events)
    assert (tmp_path / "run.svg").read_text().startswith("<?xml")
    panels = {panel["y"]: panel for panel in drawn}
    assert panels["tokens/s"]["texts"] == ["attention +1", "lost ffn"]
    assert panels["workers"]["labels"] == ["attention", "FFN"]
    assert panels["workers"]["x"] == "time, s"


@pytest.mark.parametrize("bars", [[], steps(1)])
def test_a_run_may_have_one_of_the_two_parts(tmp_path: Path, bars: Sequence[Span]) -> None:
    series = [Series("x", [0.0], {"x": [0.0]})] if not bars else []
    draw_run(tmp_path / "run.png", "title", series, bars)
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)


def test_nothing_to_draw_and_nowhere_to_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="at least one line"):
        draw_sizing(tmp_path / "size.png", "title", [])
    with pytest.raises(PlannerError, match="nothing to draw"):
        draw_run(tmp_path / "run.png", "title")
    (tmp_path / "file").touch()
    with pytest.raises(PlannerError, match="cannot write the picture"):
        draw_sizing(tmp_path / "file" / "size.png", "title", [LINE])
    with pytest.raises(PlannerError, match="cannot write the picture"):
        draw_sizing(tmp_path / "size.nonsense", "title", [LINE])
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.0, "8"), (9.336, "9.34"), (0.25, "0.25"), (10.0001, "10"), (32.5, "32.5")],
)
def test_ratios_are_written_short(value: float, text: str) -> None:
    assert plots._number(value) == text


def test_tints_go_to_white() -> None:
    assert plots._tint("#2f6db5", 0.0) == "#2f6db5"
    assert plots._tint("#2f6db5", 1.0) == "#ffffff"
