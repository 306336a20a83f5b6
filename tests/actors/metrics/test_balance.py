"""How evenly experts were used lately."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.metrics.balance import Balance

EXPERTS = {0: [0, 1], 3: [1, 2]}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_greatest_over_mean_of_what_is_held():
    balance = Balance()
    assert balance({}, EXPERTS) == 1.0
    loads = {0: [30, 10, 999], 3: [999, 5, 5]}  # 999: not held here
    assert balance(loads, EXPERTS) == pytest.approx((1.5 + 1.0) / 2)
    assert balance(loads, {0: [], 7: [1]}) == 1.0


def test_only_the_last_minute_counts():
    clock = Clock()
    balance = Balance(60.0, clock)
    assert balance({0: [900, 0]}, {0: [0, 1]}) == 2.0  # since the start, for want of better
    clock.now = 30.0
    assert balance({0: [910, 30]}, {0: [0, 1]}) == pytest.approx(30 / 20)
    clock.now = 95.0  # 65 s ago: the second call
    assert balance({0: [910, 30]}, {0: [0, 1]}) == 1.0
    clock.now = 100.0
    assert balance({0: [920, 40]}, {0: [0, 1]}) == 1.0


def test_however_often_somebody_reads_few_pasts_are_kept():
    clock = Clock()
    balance = Balance(60.0, clock)
    for second in range(600):
        clock.now = float(second)
        balance({0: [second, 0]}, {0: [0, 1]})
    assert len(balance._past) <= 8


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8))
def test_between_even_and_all_on_one(counts):
    ratio = Balance()({0: counts}, {0: range(len(counts))})
    assert 1.0 <= ratio <= len(counts) + 1e-9
