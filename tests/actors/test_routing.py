"""Pairs to holders: everything covered, nothing masked, replicas loaded alike."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.routing import Routes, make_route, shares
from actors.table import ExpertTable


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 6), st.randoms(), st.booleans())
def test_every_pair_goes_to_its_owner_once(tokens, top_k, actors, random, some):
    asked = np.array(
        [pair for pair in range(tokens * top_k) if not some or random.random() < 0.5], dtype=int
    )
    owners = np.array([random.randrange(actors) for _ in asked], dtype=int)
    seen = np.zeros(tokens * top_k, dtype=int)
    order = []
    for share in shares(owners, top_k, asked if some else None):
        seen[share.pairs] += 1
        order.append(share.owner)
        place = np.searchsorted(asked, share.pairs)
        assert (owners[place] == share.owner).all()
        assert (np.diff(share.rows) > 0).all()  # each row is sent once
        assert (share.rows[share.local] == share.pairs // top_k).all()
        assert share.local.dtype == np.int32
    assert seen[asked].all()
    assert seen.sum() == len(asked)
    assert order == sorted(set(owners.tolist()))


names = [f"ffn-{i}" for i in range(6)]
layers = st.lists(
    st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True).map(tuple),
    min_size=1,
    max_size=12,
).map(tuple)


@given(layers, st.sets(st.sampled_from(names)), st.integers(0, 10**6), st.randoms())
def test_pairs_go_to_live_holders_only(experts, masked, offset, random):
    routes = Routes(ExpertTable(1, {3: experts}), masked)
    route = routes.layers[3]
    ids = np.array([[random.randrange(len(experts)) for _ in range(3)] for _ in range(9)])
    owners = route.owners(ids, offset)
    some = np.array(sorted(random.sample(range(27), 11)))
    assert (route.owners(ids, offset, some) == owners[some]).all()
    for expert, owner in zip(ids.reshape(-1), owners, strict=True):
        live = [actor for actor in experts[expert] if actor not in masked]
        assert (routes.actors[owner] in live) if live else (owner == -1)
    everything = [[a for a in holders if a not in masked] for holders in experts]
    assert route.complete == all(everything)
    if route.sole is not None:
        assert all(routes.actors[route.sole] in holders for holders in everything)
    elif len(route.columns) == 1:
        assert len(set(route.columns[0].tolist())) > 1 or not route.complete


@given(layers)
def test_replicas_get_equal_numbers_of_rows(experts):
    index = {name: i for i, name in enumerate(names)}
    route = make_route(experts, index)
    width = len(route.columns)
    rows = width * 5
    for expert, holders in enumerate(experts):
        owners = route.owners(np.full((rows, 1), expert), offset=7)
        counts = np.bincount(owners, minlength=len(names))
        assert {counts[index[holder]] for holder in holders} == {rows // len(holders)}


def test_unreplicated_layers_have_one_column_and_a_sole_holder_is_known():
    index = {"a": 0, "b": 1}
    assert make_route((("a",), ("b",)), index).columns.shape == (1, 2)
    assert make_route((("a",), ("b",)), index).sole is None
    assert make_route((("b",), ("b",)), index).sole == 1
    both = (("a", "b"), ("a", "b"))
    assert make_route(both, index).sole is None
    assert make_route(both, index, {"a"}).sole == 1
    assert make_route(both, index, {"a", "b"}).sole is None


def test_many_different_replica_counts_keep_the_matrix_small():
    actors = [f"ffn-{i}" for i in range(13)]
    index = {name: i for i, name in enumerate(actors)}
    experts = tuple(tuple(actors[:count]) for count in (2, 3, 5, 7, 11, 13))
    route = make_route(experts, index)
    assert len(route.columns) <= 64
    for expert, holders in enumerate(experts):
        counts = np.bincount(route.columns[:, expert], minlength=len(holders))
        assert counts.max() - counts.min() <= 1


@given(layers, st.sets(st.sampled_from(names)), st.sets(st.sampled_from(names)), st.integers(0, 99))
def test_far_holders_get_only_what_no_near_one_holds(experts, masked, far, offset):
    routes = Routes(ExpertTable(1, {3: experts}), masked, far)
    route = routes.layers[3]
    owners = route.owners(np.arange(len(experts))[:, None], offset)
    for holders, owner in zip(experts, owners, strict=True):
        live = set(holders) - masked
        if not live:
            assert owner == -1
        else:
            assert routes.actors[owner] in (live - far or live)
