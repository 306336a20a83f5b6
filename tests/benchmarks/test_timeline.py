"""The timeline is drawn, whatever happened in the run."""

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from benchmarks.load import Stream
from benchmarks.timeline import Count, Mark, draw, spread

ZERO = 1_800_000_000.0


def streams(seconds: float = 30.0) -> list[Stream]:
    """Eight streams that stall for two seconds in the middle."""
    dice = random.Random(5)
    made = []
    for number in range(8):
        at, times = ZERO + dice.random(), []
        while at < ZERO + seconds:
            times.append(at)
            at += dice.uniform(0.04, 0.08) + (2.0 if abs(at - ZERO - seconds / 2) < 0.05 else 0.0)
        made.append(Stream(number, times[0] - 0.2, times, [1] * len(times), times[-1]))
    return made


COUNTS = [Count(ZERO - 2, 1, 1), Count(ZERO + 8, 2, 1), Count(ZERO + 20, 2, 3)]
MARKS = [
    Mark("change", ZERO + 8, "2A1F", begin=ZERO + 6, end=ZERO + 8),
    Mark("kill", ZERO + 15, "ffn-0", end=ZERO + 17),
    Mark("freeze", ZERO + 15.1, "attention-0", end=ZERO + 22),
    Mark("wake", ZERO + 24, ""),
]


def test_a_picture_is_made(tmp_path: Path):
    path = tmp_path / "deep" / "run.png"
    draw(path, "chaos", streams(), COUNTS, MARKS, emulated=True)
    picture = imread(path)
    assert picture.shape[0] > 600 and picture.shape[1] > 1200
    assert picture[..., :3].std() > 0.02


@pytest.mark.parametrize(("counts", "marks"), [([], []), (COUNTS[:1], MARKS * 6)])
def test_few_and_many_marks(tmp_path: Path, counts: list[Count], marks: list[Mark]):
    path = tmp_path / "run.png"
    draw(path, "elastic", streams(5.0), counts, marks)
    assert path.stat().st_size > 10_000


def test_one_token(tmp_path: Path):
    draw(tmp_path / "run.png", "one", [Stream(0, ZERO, [ZERO + 1], [4])], COUNTS, [])
    assert (tmp_path / "run.png").exists()


def test_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="no token"):
        draw(tmp_path / "run.png", "empty", [Stream(0, ZERO, error="HTTP 503")], [], [])
    assert not (tmp_path / "run.png").exists()


@given(st.lists(st.floats(0, 100), max_size=40).map(sorted), st.floats(0.1, 2.0))
def test_labels_keep_apart_and_inside(wished: list[float], apart: float):
    places = spread(wished, apart, 100.0)
    assert len(places) == len(wished)
    assert all(0 <= place <= 100 for place in places)
    assert all(b - a >= apart * 0.999 for a, b in itertools.pairwise(places))
