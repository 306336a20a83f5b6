"""What lies between two expert tables."""

from __future__ import annotations

import pytest

from actors.table import ExpertTable
from cluster.table_changes import additions, imbalance, moves, removals, union

OLD = ExpertTable(1, {0: (("a",), ("a", "b"), ("b",)), 2: (("a",), ("b",), ("b",))})
NEW = ExpertTable(2, {0: (("c",), ("a", "b"), ("c", "b")), 2: (("a",), ("b",), ("a",))})


def test_changes_per_actor_and_layer():
    assert moves(OLD, NEW) == 3
    assert additions(OLD, NEW) == {"a": {2: [2]}, "c": {0: [0, 2]}}
    assert removals(OLD, NEW) == {"a": {0: [0]}, "b": {2: [2]}}
    assert union(OLD, NEW) == {
        "a": {0: [0, 1], 2: [0, 2]},
        "b": {0: [1, 2], 2: [1, 2]},
        "c": {0: [0, 2]},
    }


def test_the_first_table_is_all_additions():
    assert moves(None, OLD) == 7
    assert additions(None, OLD) == union(None, OLD) == {a: OLD.shard(a) for a in OLD.actors}
    assert removals(None, OLD) == {}
    assert moves(OLD, OLD) == 0


def test_imbalance_is_that_of_the_worst_layer():
    assert imbalance(OLD) == pytest.approx(2 / 1.5)
    assert imbalance(OLD, layers=[0]) == pytest.approx(1.0)
    assert imbalance(OLD, {0: [3, 2, 0], 2: [1, 1, 0]}) == pytest.approx(4 / 2.5)
    assert imbalance(OLD, actors=["a", "b", "idle"]) == pytest.approx(2.0)
    assert imbalance(OLD, {0: [0, 0, 0], 2: [2, 1, 1]}) == pytest.approx(1.0)
