"""In which order links are measured."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
pytest.importorskip("ray")

from cluster.probing import rounds


@given(st.integers(0, 17))
def test_every_pair_once_and_nobody_twice_in_a_round(count: int) -> None:
    names = [f"node{n}" for n in range(count)]
    found = rounds(names)
    pairs = [frozenset(pair) for each in found for pair in each]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for each in found:
        busy = [name for pair in each for name in pair]
        assert len(busy) == len(set(busy))
    assert len(found) <= max(0, count)
