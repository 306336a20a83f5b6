"""Pictures and pages of fronts: they are written, whole, and show what they are given."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from planner.errors import PlannerError
from planner.explore.plots import describe, draw_fronts, write_page
from planner.explore.points import Mode
from tests.planner.explore.explorations import AFD_WINS, NOTHING, exploration, point


def test_a_picture_of_two_questions(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "fronts.png"
    draw_fronts(
        file, "chat and coding", {"chat": exploration(AFD_WINS), "none": exploration(NOTHING)}
    )
    from matplotlib import image

    pixels = image.imread(file)
    assert pixels.shape[1] > 1000
    # the winner's star: crimson is in the picture
    near = abs(pixels[..., :3] - [0xB3 / 255, 0x20 / 255, 0x2C / 255]).max(axis=-1) < 0.02
    assert near.any()


def test_a_page_that_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the page is drawn by plotly, of the extra plan")
    file = tmp_path / "deep" / "fronts.html"
    write_page(file, "AFD <pays>", {"chat": exploration(AFD_WINS)})
    text = file.read_text()

    class Loads(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [str(v) for k, v in attrs if k in ("src", "href") and v]

    parser = Loads()
    parser.feed(text)
    assert parser.found == []
    assert "16A+112F" in text
    assert "misses TPOT" in text
    assert "AFD <pays>" not in text.split("</head>")[-1].split("Plotly.newPlot")[-1]


def test_a_configuration_in_lines() -> None:
    lines = describe(point(Mode.AFD, 3970.0, tpot_safe=0.012, chunk=256))
    assert lines[0] == "AFD: 16A+112F, 128 GPUs"
    assert "1 x ffn: 112 GPUs, EP 112" in lines
    assert "3 lanes, chunks of 256 tokens" in lines[3]
    assert "TPOT 10 ms (safe bound 12 ms)" in lines[4]
    lines = describe(point(Mode.AFD, 3970.0, tpot_paper=0.008))
    assert "TPOT 10 ms (the paper's formula 8 ms)" in lines[4]


@pytest.mark.parametrize("draw", [draw_fronts, write_page])
def test_nothing_to_draw_is_refused(draw: object, tmp_path: Path) -> None:
    with pytest.raises(PlannerError, match="nothing to draw"):
        draw(tmp_path / "x.png", "none", {"": exploration(NOTHING)})  # type: ignore[operator]


def test_without_plotly_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(PlannerError, match=r"pip install 'afflux\[plan\]'"):
        write_page(tmp_path / "x.html", "t", {"": exploration(AFD_WINS)})


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the page is drawn by plotly, of the extra plan")
    (tmp_path / "file").write_text("")
    with pytest.raises(PlannerError, match="cannot write the page"):
        write_page(tmp_path / "file" / "x.html", "t", {"": exploration(AFD_WINS)})
