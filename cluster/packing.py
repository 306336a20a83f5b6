"""Packing the experts of one layer onto actors: counts first, then load.

Works on a matrix ``held[actor, expert]`` that starts as what the actors hold now, so that every
step can prefer what costs no move. Afterwards no actor has more than one copy more than another
(step time and memory both follow the number of experts), and the most loaded actor carries at most
the least loaded one's load plus one expert's share, or ``1 + tolerance`` times the mean (or times
the largest share, where that is more).
``even_totals`` does the same for memory over all layers. Knows no names, tables or epochs.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

DIGITS = 9  # loads are scaled to a mean of 1 per actor; smaller differences are rounding
EPS = 1e-8
MOVE_PRICE = 1e-3  # imbalance that one more move has to save


def replica_counts(
    load: np.ndarray, copies: int, actors: int, min_replicas: int, held: np.ndarray, margin: float
) -> np.ndarray:
    """Copies of each expert ``[E]``, ``copies`` in all and at most ``actors`` of each.

    First everything gets its first copy, then its second and so on up to ``min_replicas``, heaviest
    first when they don't suffice; what is left goes one by one to the expert with the highest load
    per copy (EPLB's greedy). A copy that is held now (``held``: number per expert) counts as
    ``margin`` heavier, so that noise in the loads moves nothing.
    """
    counts = np.ones(len(load), dtype=np.int64)
    spare = copies - len(load)
    for level in range(2, min(min_replicas, actors) + 1):
        has = held >= level
        order = np.lexsort((~has, -np.where(has, load * (1 + margin), load)))
        chosen = order[: max(spare, 0)]
        counts[chosen] += 1
        spare -= len(chosen)

    def entry(expert: int) -> tuple[float, bool, int]:
        count = int(counts[expert])
        has = bool(held[expert] > count)
        return (-load[expert] / count * (1 + margin if has else 1), not has, expert)

    heap = [entry(expert) for expert in range(len(load)) if counts[expert] < actors]
    heapq.heapify(heap)
    for _ in range(spare):
        expert = heapq.heappop(heap)[-1]
        counts[expert] += 1
        if counts[expert] < actors:
            heapq.heappush(heap, entry(expert))
    return counts


class Layer:
    """One layer's experts on their way to a new place.

    Args:
        old: ``[actors, experts]`` bool, what the actors hold now. load: ``[experts]`` float, not
            all zero. copies: of all experts together, ``experts .. experts * actors``.
        min_replicas: see ``Rules``. tolerance: excess over the mean load that is not worth a move
            (ignored when nothing is held yet: a fresh packing costs the same however good it is).
    """

    def __init__(
        self, old: np.ndarray, load: np.ndarray, copies: int, min_replicas: int, tolerance: float
    ):
        actors = len(old)
        self.old = old
        self.held = old.copy()
        self.want = replica_counts(load, copies, actors, min_replicas, old.sum(0), tolerance)
        self.share = (
            load / load.sum() * actors / self.want
        )  # load of one copy; an actor's mean is 1
        self.tolerance = tolerance if old.any() else 0.0
        self.counts = self.held.sum(1)
        self.weight = self.held @ self.share

    def fill(self, totals: np.ndarray) -> None:
        """Bring every expert to its number of copies and every actor to its number of experts.

        ``totals`` ``[actors]``: copies held in other layers, which decide between equals.
        """
        have = self.held.sum(0)
        for expert in np.flatnonzero(have > self.want):
            for _ in range(have[expert] - self.want[expert]):
                holders = np.flatnonzero(self.held[:, expert])
                keys = (-totals[holders], -self.weight[holders], -self.counts[holders])
                self._set(holders[np.lexsort(keys)[0]], expert, False)
        missing = np.flatnonzero(have < self.want)
        for expert in missing[np.argsort(-self.share[missing], kind="stable")]:
            for _ in range(self.want[expert] - have[expert]):
                self._set(self._roomiest(expert, totals), expert, True)
        while self.counts.max() - self.counts.min() > 1:
            self._level(totals)

    def _set(self, actor: int, expert: int, holds: bool) -> None:
        sign = 1 if holds else -1
        self.held[actor, expert] = holds
        self.counts[actor] += sign
        self.weight[actor] += sign * self.share[expert]

    def _roomiest(self, expert: int, totals: np.ndarray) -> int:
        """The least loaded actor among those that come out even with one more expert."""
        share, extra = divmod(int(self.want.sum()), len(self.counts))
        free = np.count_nonzero(self.counts > share) < extra
        full = np.where(self.counts < share + free, 0, np.where(self.counts <= share, 1, 2))
        actors = np.flatnonzero(~self.held[:, expert])
        keys = (totals[actors], np.round(self.weight[actors], DIGITS), full[actors])
        return int(actors[np.lexsort(keys)[0]])

    def _level(self, totals: np.ndarray) -> None:
        """One expert from an actor that has most of them to one that has fewest."""
        weight = np.round(self.weight, DIGITS)
        giver = int(np.lexsort((-totals, -weight, -self.counts))[0])
        taker = int(np.lexsort((totals, weight, self.counts))[0])
        share = max(int(self.want.sum()) // len(self.counts) - int(self.counts[taker]), 1)
        fitting = (1 - self.weight[taker]) / share  # what each expert still to come should weigh
        experts = np.flatnonzero(self.held[giver] & ~self.held[taker])
        distance = np.abs(self.share[experts] - fitting)
        best = np.lexsort((distance, self.cost(giver, taker, experts)))[0]
        self.move(giver, taker, int(experts[best]))

    def cost(self, giver: int, taker: int, experts: np.ndarray) -> np.ndarray:
        """Loads of weights that moving each of ``experts`` adds: -1, 0 or 1."""
        loads = (~self.old[taker, experts]).astype(np.int64)
        return loads - ~self.old[giver, experts]

    def move(self, giver: int, taker: int, expert: int) -> None:
        """One copy from an actor that has it to one that does not."""
        self._set(giver, expert, False)
        self._set(taker, expert, True)

    def refine(self) -> None:
        """Swap experts of the most loaded actor until the load is even enough or no swap helps.

        Even enough is the mean, or the largest share of an expert, which no swap can get below,
        plus the tolerance. Otherwise ends with ``max <= min + largest share``: with counts that
        differ by one at most, a larger gap always leaves a swap that narrows it.
        """
        enough = max(1.0, float(self.share.max())) * (1 + self.tolerance) + EPS
        for _ in range(10 * int(self.want.sum())):
            heaviest = int(np.argmax(np.round(self.weight, DIGITS)))
            if self.weight[heaviest] <= enough or not self._swap(heaviest, enough):
                return

    def _swap(self, heaviest: int, enough: float) -> bool:
        """The swap that does most for ``heaviest`` and its partner; False when none does."""
        mine = np.flatnonzero(self.held[heaviest])
        others = self.held & ~self.held[heaviest]
        others[heaviest] = False
        partner, theirs = np.nonzero(others)
        less = self.share[mine][:, None] - self.share[theirs][None, :]
        peak = np.maximum(self.weight[heaviest] - less, self.weight[partner][None, :] + less)
        peak, top = np.round(peak, DIGITS), round(float(self.weight[heaviest]), DIGITS)
        gap = top - self.weight.min()
        gain = EPS if gap > self.share.max() + EPS else max(EPS, self.tolerance / 2)
        peak[self.held[partner][:, mine].T] = np.inf  # the partner has that expert already
        score = np.maximum(peak, enough) + EPS * peak
        if self.tolerance:
            out = (~self.old[partner][:, mine]).T.astype(np.int64) - ~self.old[heaviest, mine][
                :, None
            ]
            back = (~self.old[heaviest, theirs]).astype(np.int64) - ~self.old[partner, theirs]
            score = score + MOVE_PRICE * (out + back[None, :])
        score[peak >= top - gain] = np.inf
        if not score.size:
            return False
        best = int(np.argmin(score))
        if not np.isfinite(score.flat[best]):
            return False
        row, column = divmod(best, len(theirs))
        actor = int(partner[column])
        self.move(heaviest, actor, int(mine[row]))
        self.move(actor, heaviest, int(theirs[column]))
        return True


def even_totals(layers: Sequence[Layer], slots: int | None) -> None:
    """Shift experts between actors until their totals over all layers are close and within slots.

    A shift goes from an actor with one expert more in a layer to one with one less, so the layers
    stay even; totals end within two plus 5 % of their mean of each other.
    """
    totals = np.sum([layer.counts for layer in layers], axis=0)
    before = np.sum([layer.old.sum(1) for layer in layers], axis=0)
    near = 2 + int(totals.mean() / 20)
    while True:
        giver = int(np.argmax(totals))
        taker = int(np.lexsort((before, totals))[0])  # of equals, the one that is new
        over = slots is not None and totals[giver] > slots
        if totals[giver] - totals[taker] <= (1 if over else near):
            return
        best: tuple[float, float, int, int] | None = None
        for index, layer in enumerate(layers):
            if layer.counts[giver] <= layer.counts[taker]:
                continue
            experts = np.flatnonzero(layer.held[giver] & ~layer.held[taker])
            cost = layer.cost(giver, taker, experts)
            share = layer.share[experts]
            peak = np.maximum(layer.weight[giver] - share, layer.weight[taker] + share)
            first = int(np.lexsort((peak, cost))[0])
            found = (float(cost[first]), float(peak[first]), index, int(experts[first]))
            best = found if best is None or found < best else best
        assert best is not None  # a larger total comes from a larger count in some layer
        layers[best[2]].move(giver, taker, best[3])
        totals[giver] -= 1
        totals[taker] += 1
