"""The placement that afflux chooses, beside all others, over links of two speeds."""

from __future__ import annotations

import pytest

from benchmarks.hosts import why_not
from benchmarks.placement import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


def test_it_is_the_best_one() -> None:
    summary = run()["summary"]
    assert summary["chosen_over_worst"] >= 2
    assert summary["chosen_over_best"] >= 0.95
