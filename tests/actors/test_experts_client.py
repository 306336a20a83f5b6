"""Grouping pairs by the actor that owns their expert (the rest is tested over real NIXL)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from actors.experts_client import _by_owner


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 6), st.randoms())
def test_every_pair_goes_to_its_owner_once(tokens, top_k, actors, random):
    owner = np.array([[random.randrange(actors) for _ in range(top_k)] for _ in range(tokens)])
    seen = np.zeros(tokens * top_k, dtype=int)
    for index, pairs, rows, local in _by_owner(owner):
        seen[pairs] += 1
        assert (owner.reshape(-1)[pairs] == index).all()
        assert (np.diff(rows) > 0).all()  # each row is sent once
        assert (rows[local] == pairs // top_k).all()
        assert local.dtype == np.int32
    assert (seen == 1).all()
