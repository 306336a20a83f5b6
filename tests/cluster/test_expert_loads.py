"""Counts of FFN actors become recent loads per expert."""

from cluster.expert_loads import ExpertLoads


def test_counts_are_differences_added_over_actors() -> None:
    loads = ExpertLoads(half_life_s=1e9)
    assert loads.current([0], 2) is None
    loads.take("ffn-0", {0: [10, 0]}, 1.0)
    loads.take("ffn-1", {0: [5, 1]}, 1.0)
    loads.take("ffn-0", {0: [14, 0]}, 2.0)
    current = loads.current([0, 3], 2)
    assert current is not None
    assert [round(value, 3) for value in current[0]] == [19, 1]
    assert current[3] == [0.0, 0.0]


def test_old_load_fades() -> None:
    loads = ExpertLoads(half_life_s=10.0)
    loads.take("ffn-0", {0: [80, 0]}, 0.0)
    loads.take("ffn-0", {0: [80, 40]}, 10.0)
    assert loads.current([0], 2) == {0: [40.0, 40.0]}


def test_a_count_that_went_back_is_nothing() -> None:
    loads = ExpertLoads()
    loads.take("ffn-0", {0: [80]}, 0.0)
    loads.take("ffn-0", {0: [20]}, 0.0)
    assert loads.current([0], 1) == {0: [80.0]}
