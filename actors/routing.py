"""Which FFN actor each (token, expert) pair goes to: the expert table as arrays, and the split.

Pure numpy. Replicas of an expert share its pairs by token row; actors that are masked get none, far
ones only what nobody else holds. Not here: sending, when an actor is masked (``experts_client``),
and who is far (``nearness``).
"""

from collections.abc import Collection, Iterator, Mapping
from math import lcm
from typing import NamedTuple

import numpy as np

from actors.table import ExpertTable, Holders

_MAX_WIDTH = 64  # columns; replica counts whose common multiple is larger share nearly evenly


class Route(NamedTuple):
    """One layer.

    Attributes:
        sole: index of the actor that every pair goes to; None when there are several.
        columns: [W, E] index of the actor of an expert, -1 where no live actor holds it. A token
            row takes one column, so neighbouring rows use different replicas.
        complete: every expert has a live holder.
    """

    sole: int | None
    columns: np.ndarray
    complete: bool

    def owners(self, ids: np.ndarray, offset: int, pairs: np.ndarray | None = None) -> np.ndarray:
        """Index of the actor that each pair goes to, [P]; -1 without a live holder.

        Args:
            ids: [T, K] expert ids of a chunk.
            offset: rotates the replicas, so that small batches use all of them over time.
            pairs: [P] flat indices of the pairs that are asked about; None for all T * K.
        """
        flat = ids.reshape(-1)
        if pairs is not None:
            flat = flat[pairs]
        width = len(self.columns)
        if width == 1:
            return self.columns[0][flat]
        tokens, top_k = ids.shape
        rows = np.repeat(np.arange(tokens), top_k) if pairs is None else pairs // top_k
        return self.columns[(rows + offset) % width, flat]


def make_route(
    experts: Holders,
    index: Mapping[str, int],
    masked: Collection[str] = (),
    far: Collection[str] = (),
) -> Route:
    """The route of one layer.

    Args:
        experts: actors that hold each expert.
        index: number of each actor that occurs.
        masked: actors to leave out.
        far: actors to leave out where another one holds the expert.
    """
    live = [[index[a] for a in _asked(holders, masked, far)] for holders in experts]
    width = min(lcm(*{len(holders) for holders in live} - {0}), _MAX_WIDTH)
    columns = np.empty((width, len(live)), dtype=np.int64)
    for expert, holders in enumerate(live):
        columns[:, expert] = np.resize(holders, width) if len(holders) > 1 else (holders or [-1])[0]
    first = int(columns[0, 0])
    sole = first if first >= 0 and bool((columns == first).all()) else None
    return Route(sole, columns, all(live))


def _asked(
    holders: Collection[str], masked: Collection[str], far: Collection[str]
) -> Collection[str]:
    live = [actor for actor in holders if actor not in masked] if masked else holders
    if not far:
        return live
    return [actor for actor in live if actor not in far] or live


class Routes:
    """Routes of all layers of a table, without some actors.

    Args:
        table: see ``ExpertTable``.
        masked: actors that get nothing.
        far: actors that get only what nobody else holds.
    """

    def __init__(self, table: ExpertTable, masked: Collection[str] = (), far: Collection[str] = ()):
        self.table = table
        self.masked = frozenset(masked)
        self.far = frozenset(far)
        self.actors = table.actors
        index = {actor: i for i, actor in enumerate(self.actors)}
        self.layers = {
            layer: make_route(experts, index, self.masked, self.far)
            for layer, experts in table.holders.items()
        }


class Share(NamedTuple):
    """The pairs of a chunk that one actor gets.

    Attributes:
        owner: index of the actor.
        pairs: [P] flat indices (row * top_k + place) into the chunk's ids and weights, ascending.
        rows: [R] int64 rows of the chunk that they belong to, ascending, without repeats.
        local: [P] int32 place of each pair's row in ``rows``.
    """

    owner: int
    pairs: np.ndarray
    rows: np.ndarray
    local: np.ndarray


def shares(owners: np.ndarray, top_k: int, pairs: np.ndarray | None = None) -> Iterator[Share]:
    """Split pairs by actor, in the order of the actors' indices.

    Args:
        owners: [P] actor of each pair.
        top_k: pairs per row of the chunk.
        pairs: [P] flat indices of the pairs, ascending; None when they are all of the chunk's.
    """
    for owner in np.unique(owners):
        mine = np.nonzero(owners == owner)[0]
        if pairs is not None:
            mine = pairs[mine]
        of_row = mine // top_k  # ascending, so repeats are neighbours
        first = np.empty(len(of_row), dtype=bool)
        first[:1] = True
        np.not_equal(of_row[1:], of_row[:-1], out=first[1:])
        yield Share(int(owner), mine, of_row[first], (np.cumsum(first) - 1).astype(np.int32))
