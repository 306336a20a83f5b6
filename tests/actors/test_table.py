"""The expert table as a value."""

import pytest

from actors.table import ExpertTable


def test_shard_lists_what_an_actor_holds():
    table = ExpertTable(3, {1: (("a",), ("b", "a"), ("b",)), 4: (("b",), ("b",), ("b",))})
    assert table.shard("a") == {1: [0, 1]}
    assert table.shard("b") == {1: [1, 2], 4: [0, 1, 2]}
    assert table.actors == ("a", "b")
    assert table.layers == (1, 4)


@pytest.mark.parametrize(
    ("holders", "text"),
    [
        ({}, "at least one MoE layer"),
        ({0: ()}, "layer 0 of the expert table has no experts"),
        ({0: (("a",), ())}, "expert 1 of layer 0 has no holder"),
        ({0: (("a", "a"),)}, "repeats a holder"),
    ],
)
def test_holes_are_refused(holders, text):
    with pytest.raises(ValueError, match=text):
        ExpertTable(1, holders)
