"""The first expert table: every expert once, even inside a layer and over all layers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement import PlacementError, experts_of, initial_table, spread_evenly


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[int], int, list[str]]:
    """Layers, experts per layer, actors: as many actors as experts at most."""
    layers = draw(st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True))
    experts = draw(st.integers(1, 64))
    actors = [f"ffn-{i}" for i in range(draw(st.integers(1, experts)))]
    return layers, experts, actors


@given(clusters())
def test_even_in_every_layer_and_in_total(cluster: tuple[list[int], int, list[str]]) -> None:
    layers, experts, actors = cluster
    holders = spread_evenly(layers, experts, actors)
    assert sorted(holders) == sorted(layers)
    totals = Counter(dict.fromkeys(actors, 0))
    for row in holders.values():
        assert len(row) == experts
        counts = Counter(dict.fromkeys(actors, 0))
        for names in row:
            assert len(names) == 1
            counts[names[0]] += 1
        assert max(counts.values()) - min(counts.values()) <= 1
        assert min(counts.values()) >= 1, "an actor without experts in a layer"
        totals += counts
    assert max(totals.values()) - min(totals.values()) <= 1


@given(clusters())
def test_shards_partition_the_experts(cluster: tuple[list[int], int, list[str]]) -> None:
    layers, experts, actors = cluster
    table = initial_table(layers, experts, actors, epoch=3)
    assert table.epoch == 3
    for layer in layers:
        held = [expert for actor in actors for expert in experts_of(table, actor)[layer]]
        assert sorted(held) == list(range(experts))


@pytest.mark.parametrize(
    ("layers", "experts", "actors", "words"),
    [
        ([1], 4, [], "no FFN actors"),
        ([], 4, ["a"], "no MoE layers"),
        ([1], 2, ["a", "b", "c"], "3 FFN actors for 2 experts"),
        ([1, 1], 4, ["a"], "must not repeat"),
        ([1], 4, ["a", "a"], "must not repeat"),
    ],
)
def test_refuses(layers: list[int], experts: int, actors: list[str], words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        spread_evenly(layers, experts, actors)
