"""How the cost of metrics is worked out from runs. The runs need two cores and take minutes."""

import pytest

from benchmarks.metrics_cost import decode_rate, pairs
from benchmarks.offline import Run


def test_a_rate_is_of_the_steps_in_which_all_decode():
    run = Run([], step_seconds=[9.0, 5.0, 0.1, 0.3, 2.0], step_tokens=[1, 4, 4, 4, 3])
    assert decode_rate(run, 4) == pytest.approx(4 * 2 / 0.4)  # the first full one is left out


def test_who_goes_first_alternates():
    order: list[bool] = []

    def measure(on: bool) -> float:
        order.append(on)
        return 99.0 if on else 100.0

    rows = pairs(measure, 3)
    assert order == [True, False, False, True, True, False]
    assert rows == [{"on": 99.0, "off": 100.0, "ratio": 0.99}] * 3
