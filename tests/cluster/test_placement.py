"""Expert tables for a start, a change and a loss: by example and by property."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.table import ExpertTable
from cluster.placement import (
    TOLERANCE,
    Loads,
    PlacementError,
    Rules,
    additions,
    imbalance,
    initial_table,
    moves,
    place,
    repair,
    spread_evenly,
)
from cluster.placement_rules import layer_loads
from cluster.table_changes import actor_loads, copies_of

EPS = 1e-6
quick = settings(deadline=None, max_examples=50)  # the machine may be busy
POOL = [f"ffn-{index}" for index in range(20)]


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[int], int, list[str]]:
    """Layers, experts per layer, actors: as many actors as experts at most."""
    layers = draw(st.lists(st.integers(0, 100), min_size=1, max_size=12, unique=True))
    experts = draw(st.integers(1, 64))
    actors = [f"ffn-{i}" for i in range(draw(st.integers(1, experts)))]
    return layers, experts, actors


@st.composite
def measured(draw: st.DrawFn, layers: Sequence[int], num_experts: int) -> Loads | None:
    """Loads of all, some or no layers: zeros, ties and very hot experts included."""
    if draw(st.booleans()):
        return None
    load = st.one_of(st.integers(0, 5), st.integers(0, 10_000), st.floats(0, 1e6))
    return {
        layer: draw(st.lists(load, min_size=num_experts, max_size=num_experts))
        for layer in layers
        if draw(st.integers(0, 3))
    }


@st.composite
def tables(draw: st.DrawFn, layers: Sequence[int], num_experts: int) -> ExpertTable:
    """Any valid table, however uneven."""
    names = st.lists(st.sampled_from(POOL[:6]), min_size=1, max_size=3, unique=True).map(tuple)
    rows = st.lists(names, min_size=num_experts, max_size=num_experts).map(tuple)
    return ExpertTable(draw(st.integers(0, 9)), {layer: draw(rows) for layer in layers})


class Case:
    """What to place where: valid, so that ``place`` has no reason to refuse."""

    def __init__(self, draw: st.DrawFn):
        self.layers = sorted(draw(st.sets(st.integers(0, 60), min_size=1, max_size=5)))
        self.num_experts = draw(st.integers(1, 24))
        replicas, redundant = draw(st.integers(1, 4)), draw(st.integers(0, 6))
        most = min(8, self.num_experts * replicas + redundant)
        self.actors = draw(st.permutations(POOL[:10]))[: draw(st.integers(1, most))]
        number = len(self.actors)
        if self.num_experts * min(replicas, number) + redundant < number:
            redundant = number
        least = -(-len(self.layers) * self.num_experts // number)
        slots = draw(st.one_of(st.none(), st.just(least), st.integers(least, 3 * least)))
        self.rules = Rules(replicas, redundant, slots)
        self.loads = draw(measured(self.layers, self.num_experts))

    def __repr__(self) -> str:
        return f"Case({vars(self)})"

    def place(self, current: ExpertTable | None, max_moves: int | None = None) -> ExpertTable:
        return place(
            current,
            self.layers,
            self.num_experts,
            self.actors,
            self.rules,
            self.loads,
            max_moves,
        )

    def check(self, table: ExpertTable, actors: Sequence[str] | None = None) -> None:
        """Everything has a holder (a table refuses less), nobody unknown, nobody over its slots."""
        assert list(table.layers) == self.layers
        assert all(len(rows) == self.num_experts for rows in table.holders.values())
        assert set(table.actors) <= set(self.actors if actors is None else actors)
        if self.rules.slots is not None:
            assert max(totals(table).values()) <= self.rules.slots


cases = st.composite(lambda draw: Case(draw))()


def totals(table: ExpertTable) -> Counter[str]:
    return Counter(actor for actor, _, _ in copies_of(table))


def counts(table: ExpertTable, layer: int, actors: Sequence[str]) -> list[int]:
    held = Counter(actor for row in table.holders[layer] for actor in row)
    return [held[actor] for actor in actors]


# -- the first table ------------------------------------------------------------------------------


@quick
@given(clusters())
def test_even_in_every_layer_and_in_total(cluster: tuple[list[int], int, list[str]]) -> None:
    layers, experts, actors = cluster
    holders = spread_evenly(layers, experts, actors)
    assert sorted(holders) == sorted(layers)
    for row in holders.values():
        assert len(row) == experts
        assert all(len(names) == 1 for names in row)
    table = ExpertTable(1, holders)
    for layer in layers:
        held = counts(table, layer, actors)
        assert max(held) - min(held) <= 1
        assert min(held) >= 1, "an actor without experts in a layer"
    assert max(totals(table).values()) - min(totals(table).values()) <= 1


@quick
@given(clusters())
def test_shards_partition_the_experts(cluster: tuple[list[int], int, list[str]]) -> None:
    layers, experts, actors = cluster
    table = initial_table(layers, experts, actors, epoch=3)
    assert table == ExpertTable(3, spread_evenly(layers, experts, actors))
    for layer in layers:
        held = [expert for actor in actors for expert in table.shard(actor)[layer]]
        assert sorted(held) == list(range(experts))


def test_first_table_with_replicas_keeps_the_runs_and_adds_to_them() -> None:
    table = initial_table([0, 1], 4, ["a", "b"], Rules(min_replicas=2))
    assert table.holders[0] == (("a", "b"), ("a", "b"), ("b", "a"), ("b", "a"))


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
    with pytest.raises(PlacementError, match=words) as raised:
        spread_evenly(layers, experts, actors)
    assert raised.value.code == "bad_placement"
    with pytest.raises(PlacementError, match=words):
        initial_table(layers, experts, actors)


# -- place: what every table must be --------------------------------------------------------------


@quick
@given(cases, st.data())
def test_placed_tables_obey_the_rules(case: Case, data: st.DataObject) -> None:
    current = data.draw(st.one_of(st.none(), tables(case.layers, case.num_experts)))
    table = case.place(current)
    case.check(table)
    assert table.epoch == (current.epoch + 1 if current else 1)
    actors, slots = case.actors, case.rules.slots
    asked = min(
        case.num_experts * min(case.rules.min_replicas, len(actors)) + case.rules.redundant,
        case.num_experts * len(actors),
    )
    room = asked * len(case.layers)
    if slots is not None:
        room = min(room, slots * len(actors))
    held = totals(table)
    assert sum(held.values()) == room, "copies left out though there was room"
    spread = [held[actor] for actor in actors]
    assert max(spread) - min(spread) <= 2 + room / len(actors) / 20
    for layer in case.layers:
        row = counts(table, layer, actors)
        assert max(row) - min(row) <= 1
        assert min(row) >= 1 or sum(row) < len(actors)
        replicas = sorted(len(holders) for holders in table.holders[layer])
        least = min(case.rules.min_replicas, len(actors))
        if sum(row) >= least * case.num_experts:
            assert replicas[0] >= least
        else:
            assert replicas[-1] - replicas[0] <= 1, "replicas are given level by level"


@quick
@given(cases, st.data())
def test_load_is_even_up_to_the_share_of_one_expert(case: Case, data: st.DataObject) -> None:
    current = data.draw(st.one_of(st.none(), tables(case.layers, case.num_experts)))
    table = case.place(current)
    for layer in case.layers:
        load = actor_loads(table, layer, case.loads, case.actors)
        rows = zip(
            layer_loads(case.loads, layer, case.num_experts), table.holders[layer], strict=True
        )
        largest = max(expert / len(holders) for expert, holders in rows)
        mean = load.mean()
        enough = (1 + TOLERANCE) * max(mean, largest)
        assert load.max() <= max(load.min() + largest, enough) + EPS * mean


@quick
@given(cases, st.data())
def test_same_input_same_table_and_then_nothing_moves(case: Case, data: st.DataObject) -> None:
    current = data.draw(st.one_of(st.none(), tables(case.layers, case.num_experts)))
    table = case.place(current)
    assert case.place(current) == table
    fresh = case.place(None)
    assert case.place(fresh).holders == fresh.holders


def test_heavy_experts_are_apart_and_hot_ones_replicated() -> None:
    loads = {0: [90, 10, 80, 10, 70, 10, 60, 10]}
    table = place(None, [0], 8, ["a", "b", "c", "d"], loads=loads)
    assert imbalance(table, loads) == pytest.approx(100 / 85)
    assert len({table.holders[0][expert] for expert in (0, 2, 4, 6)}) == 4
    hot = place(None, [0], 8, ["a", "b", "c", "d"], Rules(redundant=2), {0: [200] + [10] * 7})
    assert [len(holders) for holders in hot.holders[0]] == [3] + [1] * 7


def test_more_actors_than_experts_when_there_are_copies_for_all() -> None:
    table = place(None, [0, 1], 2, ["a", "b", "c"], Rules(redundant=1))
    assert all(counts(table, layer, ["a", "b", "c"]) == [1, 1, 1] for layer in (0, 1))
    with pytest.raises(
        PlacementError, match=r"ffn.min_replicas to 2 or ffn.redundant_experts to 1"
    ):
        place(None, [0, 1], 2, ["a", "b", "c"])


def test_replicas_give_way_to_memory_before_holders_do() -> None:
    names, loads = ["a", "b"], {0: [1, 9, 1, 1], 1: [1, 1, 1, 9]}
    table = place(None, [0, 1], 4, names, Rules(min_replicas=2, slots=5), loads)
    assert [len(holders) for holders in table.holders[0]] == [1, 2, 1, 1]
    assert [len(holders) for holders in table.holders[1]] == [1, 1, 1, 2]
    with pytest.raises(
        PlacementError, match=r"room for 3 experts each, 6 in all.*need 8.*ffn.count"
    ):
        place(None, [0, 1], 4, names, Rules(slots=3))


@pytest.mark.parametrize(
    ("loads", "words"),
    [
        ({0: [1, 2]}, "layer 0 have shape"),
        ({0: [1, 2, -1]}, "not negative"),
        ({0: [1, 2, float("nan")]}, "finite"),
    ],
)
def test_refuses_loads(loads: Loads, words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        place(None, [0], 3, ["a"], loads=loads)


def test_refuses_a_table_of_another_model() -> None:
    with pytest.raises(PlacementError, match="two models"):
        place(initial_table([0], 4, ["a"]), [0, 1], 4, ["a"])
    with pytest.raises(PlacementError, match="min_replicas is 0"):
        Rules(min_replicas=0)


# -- place: how little moves ----------------------------------------------------------------------


@st.composite
def even_cases(draw: st.DrawFn) -> Case:
    """Equal loads, no redundant copies, an actor for every expert at most: counts are all."""
    case = Case(draw)
    case.loads = None
    case.actors = case.actors[: case.num_experts]
    case.rules = Rules(case.rules.min_replicas)
    return case


@quick
@given(even_cases(), st.integers(1, 3))
def test_a_newcomer_gets_its_share_and_nobody_else_anything(case: Case, joining: int) -> None:
    replicas = min(case.rules.min_replicas, len(case.actors))
    case.rules = Rules(replicas)
    old = case.place(None)
    new_names = [name for name in POOL if name not in case.actors][:joining]
    case.actors = [*case.actors, *new_names][: case.num_experts * replicas]
    new = case.place(old)
    gained = additions(old, new)
    assert set(gained) <= set(new_names)
    share = -(-case.num_experts * replicas // len(case.actors))
    for shard in gained.values():
        assert all(len(experts) <= share for experts in shard.values())


@quick
@given(even_cases(), st.data())
def test_of_a_leaver_only_its_experts_move_and_each_once(case: Case, data: st.DataObject) -> None:
    case.rules = Rules()
    if len(case.actors) < 2:
        case.num_experts, case.actors = max(case.num_experts, 2), POOL[:2]
    old = case.place(None)
    leaver = data.draw(st.sampled_from(list(case.actors)))
    case.actors = [actor for actor in case.actors if actor != leaver]
    new = case.place(old)
    assert moves(old, new) == totals(old)[leaver]
    for layer, rows in old.holders.items():
        for before, after in zip(rows, new.holders[layer], strict=True):
            assert before == after or before == (leaver,)


@quick
@given(cases, st.data(), st.integers(0, 40))
def test_max_moves_is_obeyed_but_for_orphans(case: Case, data: st.DataObject, most: int) -> None:
    current = data.draw(tables(case.layers, case.num_experts))
    table = case.place(current, max_moves=most)
    case.check(table)
    forced = moves(current, repair(current, (), case.actors, case.rules, case.loads))
    assert moves(current, table) <= max(most, forced)


@quick
@given(cases, st.data(), st.integers(4, 8))
def test_limited_changes_arrive_in_the_end(case: Case, data: st.DataObject, most: int) -> None:
    """However small the steps, the end is a table that an unlimited call leaves alone."""
    case.rules = Rules(case.rules.min_replicas, case.rules.redundant)
    table = data.draw(tables(case.layers, case.num_experts))
    for _ in range(200):
        following = case.place(table, max_moves=most)
        if following.holders == table.holders:
            break
        table = following
    assert case.place(table).holders == table.holders


def test_full_actors_swap_within_the_limit_or_not_at_all() -> None:
    rows: dict[int, tuple[tuple[str, ...], ...]] = {0: (("a",), ("a",), ("b",), ("b",))}
    old, rules, loads = ExpertTable(1, rows), Rules(slots=2), {0: [9, 9, 1, 1]}
    assert place(old, [0], 4, ["a", "b"], rules, loads, max_moves=1).holders == rows
    new = place(old, [0], 4, ["a", "b"], rules, loads, max_moves=2)
    assert moves(old, new) == 2
    assert imbalance(new, loads) == pytest.approx(1.0)


def test_of_limited_moves_replicas_come_first() -> None:
    rows = (("a", "b"), ("a", "b"), ("a",), ("a", "b"))
    old = ExpertTable(1, {0: rows, 1: (("a", "b"),) * 4})
    new = place(old, [0, 1], 4, ["a", "b", "c"], Rules(min_replicas=2), max_moves=1)
    assert [len(holders) for holders in new.holders[0]] == [2, 2, 2, 2]
    assert moves(old, new) == 1


def test_what_is_even_enough_stays() -> None:
    old = place(None, [0], 8, ["a", "b"])
    loads = {0: [1.02] * 4 + [1.0] * 4}
    assert moves(old, place(old, [0], 8, ["a", "b"], loads=loads)) == 0
    loads = {0: [2.0] * 4 + [1.0] * 4}
    better = place(old, [0], 8, ["a", "b"], loads=loads)
    assert 0 < moves(old, better) <= 4
    assert imbalance(better, loads) <= 1 + TOLERANCE


# -- repair ---------------------------------------------------------------------------------------


@quick
@given(cases, st.data())
def test_repair_moves_orphans_only(case: Case, data: st.DataObject) -> None:
    current = data.draw(tables(case.layers, case.num_experts))
    table = repair(current, (), case.actors, case.rules, case.loads)
    case.check(table)
    assert table.epoch == current.epoch + 1
    live = set(case.actors)
    if case.rules.slots is None:
        for layer, rows in current.holders.items():
            for before, after in zip(rows, table.holders[layer], strict=True):
                left = tuple(actor for actor in before if actor in live)
                assert after == left or (not left and len(after) == 1)


def test_repair_gives_orphans_to_the_least_loaded() -> None:
    rows = {0: (("a",), ("b",), ("c", "a"), ("c",))}
    table = repair(ExpertTable(4, rows), ["c"], ["a", "b", "c"], Rules(min_replicas=2))
    assert table == ExpertTable(5, {0: (("a",), ("b",), ("a",), ("b",))})


def test_repair_drops_replicas_for_room_and_refuses_without() -> None:
    rows = {0: (("a", "b"), ("a", "b"), ("c",))}
    table = repair(ExpertTable(1, rows), ["c"], ["a", "b"], Rules(slots=2), {0: [5, 1, 1]})
    assert moves(ExpertTable(1, rows), table) == 1
    assert max(totals(table).values()) == 2
    assert len(table.holders[0][0]) == 2, "the lighter replica gives way"
    with pytest.raises(PlacementError, match="1 FFN actors have room for 2"):
        repair(table, ["b"], ["a"], Rules(slots=2))
    with pytest.raises(PlacementError, match="no FFN actors"):
        repair(table, ["a", "b"], ["a", "b"])


@quick
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=12))
def test_no_expert_is_ever_without_a_holder(events: list[tuple[int, bool]]) -> None:
    """Joins, leaves, losses and repairs in any order."""
    rules, layers = Rules(min_replicas=2, redundant=1, slots=30), [0, 3, 7]
    live = list(POOL[:3])
    table = initial_table(layers, 10, live, rules)
    for index, killed in events:
        name = POOL[index]
        if name not in live:
            live.append(name)
        elif len(live) > 1:
            live.remove(name)
            if killed:
                table = repair(table, [name], live, rules)
        table = place(table, layers, 10, live, rules)
        assert set(table.actors) == set(live)
        assert max(totals(table).values()) <= 30
