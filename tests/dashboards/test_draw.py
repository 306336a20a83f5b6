"""Pictures: our dashboards over a made-up Prometheus, and each thing that a panel can show."""

from __future__ import annotations

import math

import pytest

from dashboards import draw as drawing
from dashboards.ask import Line
from dashboards.build import build_all
from dashboards.draw import draw, increments
from dashboards.plots import ATTENTION, COLOURS, FFN, NothingToDraw, colour_of, colours_of, gaps
from dashboards.units import formatter
from tests.dashboards.fake_prometheus import FakePrometheus

START = 1_700_000_000.0


def wave(expression: str, at: float) -> dict[str, float]:
    """Buckets where a heatmap asks for them, else two series; one has a gap."""
    value = 2 + math.sin(at / 60)
    if "afd_scale_events_total" in expression or "afd_actors_lost_total" in expression:
        return {"role=ffn,verb=flip,outcome=done": float((at - START) // 700)}
    if "_bucket" in expression and "histogram_quantile" not in expression:
        return {"le=0.1": value, "le=1": 2 * value, "le=+Inf": 3 * value}
    both = {"actor_id=attention-0": value, "actor_id=ffn-0": 1.0}
    return {"actor_id=attention-0": value} if 300 < at - START < 600 else both


def size(path) -> tuple[int, int]:
    from matplotlib.image import imread

    height, width, _ = imread(path).shape
    return width, height


def test_every_dashboard_of_ours(tmp_path):
    boards = list(build_all().values())
    with FakePrometheus(wave) as fake:
        paths = draw(fake.url, boards, START, START + 1800, tmp_path / "new")
    assert [path.name for path in paths] == [f"{board['uid']}.png" for board in boards]
    assert all(min(size(path)) > 500 for path in paths)
    assert not any("$" in asked for asked in fake.asked)  # every variable has a value


def test_chosen_panels_make_one_picture(tmp_path):
    boards = list(build_all().values())
    from dashboards.picture import Panel, panels_of

    titles = [part.title for part in panels_of(boards[0]) if isinstance(part, Panel)][:3]
    with FakePrometheus(wave) as fake:
        (path,) = draw(fake.url, boards, START, START + 60, tmp_path, titles=titles)
        assert path.name == "panels.png"
        with pytest.raises(ValueError, match="there is no panel 'nope'"):
            draw(fake.url, boards, START, START + 60, tmp_path, titles=["nope"])


def test_a_panel_without_data_is_drawn_and_a_picture_without_any_is_refused(tmp_path):
    boards = list(build_all().values())[:1]
    with FakePrometheus(lambda _, at: {}) as fake, pytest.raises(NothingToDraw, match="no value"):
        draw(fake.url, boards, START, START + 60, tmp_path)
    only = "afd_time_to_first_token_seconds"
    with FakePrometheus(lambda asked, at: {"a": math.nan} if only in asked else {}) as fake:
        assert draw(fake.url, boards, START, START + 60, tmp_path)[0].is_file()


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("")
    boards = list(build_all().values())[:1]
    with FakePrometheus(wave) as fake, pytest.raises(NothingToDraw, match="cannot write"):
        draw(fake.url, boards, START, START + 60, tmp_path / "out")


def test_events_are_increments():
    def counters(expression: str, at: float) -> dict[str, float]:
        if "afd_actors_lost_total" in expression:
            return {"role=ffn": float(at - START >= 30)}
        count = 5.0 if at - START < 20 else 0.0 if at - START < 40 else 2.0
        return {"outcome=done,verb=scale": count}

    with FakePrometheus(counters) as fake:
        marks = drawing.events(fake.url, drawing.Span(START, START + 60, 10.0))
    assert [(mark.at - START, mark.text, mark.loss) for mark in marks] == [
        (30.0, "ffn lost", True),
        (40.0, "scale done", False),
    ]


def test_a_first_value_is_no_event():
    assert increments(Line({}, (1.0, 2.0, 3.0), (7.0, 7.0, 9.0))) == [3.0]
    assert increments(Line({}, (), ())) == []


def test_a_gap_is_not_joined():
    times, values = gaps(Line({}, (0.0, 1.0, 5.0), (1.0, 2.0, 3.0)), 1.0)
    assert times == [0.0, 1.0, 2.0, 5.0]
    assert [math.isnan(value) for value in values] == [False, False, True, False]


def test_roles_have_their_colours():
    found = colours_of(["attention-0", "ffn-0", "attention-1", "FFN busy", "other"])
    assert found["attention-0"] == ATTENTION[0] and found["attention-1"] == ATTENTION[1]
    assert found["ffn-0"] == FFN[0] and found["FFN busy"] == FFN[1]
    assert found["other"] not in {*ATTENTION, *FFN}


def test_grafanas_words_for_colours():
    assert colour_of("#EAB839") == "#EAB839"
    assert colour_of("red") == colour_of("semi-dark-red") == COLOURS["red"]
    assert colour_of("unheard of") == COLOURS["text"]


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("s", 0.0, "0 s"),
        ("s", 0.00012, "120 us"),
        ("s", 0.25, "250 ms"),
        ("s", 90.0, "90 s"),
        ("s", 150.0, "2.5 min"),
        ("ms", 250.0, "250 ms"),
        ("percentunit", 0.125, "12.5 %"),
        ("percent", 12.5, "12.5 %"),
        ("Bps", 2.5e7, "25 MB/s"),
        ("bytes", 512.0, "512 B"),
        ("mbytes", 1.0, "1.05 MB"),
        ("reqps", 3.0, "3/s"),
        ("short", 12345.0, "12.3 k"),
        ("bool_yes_no", 1.0, "yes"),
        ("s", math.nan, "-"),
        ("short", math.inf, "-"),
    ],
)
def test_units(unit, value, text):
    assert formatter(unit)(value) == text
