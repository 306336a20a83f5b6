"""Kernel times that were measured on the machine at hand: the JSON of ``afflux bench kernels``.

A "GPU" here is what one thread of a process runs on: a core, or the one GPU there is. Only decode
steps were measured, of the models in the file, and only what a process does alone: nothing that
travels within a replica is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from planner.errors import PlannerError
from planner.explore.kernels.base import Array, Load, NotCovered, Provenance, Side, Sides, Time
from planner.explore.kernels.measured_file import Entry, Table, read_entries, same
from planner.explore.model import Model


@dataclass(frozen=True)
class Hop:
    """What handing a micro-batch over and getting it back costs, all MoE layers, seconds.

    Args:
        attention, ffn: that the two sides work on it.
        wire: that passes besides.
    """

    attention: Time
    wire: Time
    ffn: Time


class MeasuredDB:
    """A ``KernelDB`` from a file.

    Args:
        path: written by ``afflux bench kernels --json``.
        allow_extrapolation: continue the outermost lines where nothing was measured.

    Raises:
        PlannerError: not such a file.
    """

    def __init__(self, path: str | Path, *, allow_extrapolation: bool = False):
        self.path = Path(path)
        self.allow_extrapolation = allow_extrapolation
        self.machine, self.entries = read_entries(path)
        self.name = f"measured on {self.machine} ({self.path.name})"

    @property
    def models(self) -> Mapping[str, Model]:
        """Those in the file, by their names there."""
        return {name: entry.model for name, entry in self.entries.items()}

    def attention(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        """One decode step of an attention process of ``tp`` threads; see ``KernelDB``."""
        return self.layers(model, tp, sides, load) + self.outside(model, tp, load)

    def layers(self, model: Model, tp: int, sides: Sides, load: Load) -> Time:
        """The part of ``attention`` that every micro-batch goes through by itself."""
        self._check_sides(model, sides)
        return self._decode(model, tp, load, lambda entry: entry.layers)

    def outside(self, model: Model, tp: int, load: Load) -> Time:
        """The part of ``attention`` that comes once per step, micro-batches or not: the scheduler,
        what is prepared for the step, output head and sampling."""
        return self._decode(model, tp, load, lambda entry: entry.outside)

    def experts(self, model: Model, tp: int, ep: int, sides: Sides, tokens: Array) -> Time:
        """One step of the FFN side, ``ep`` processes of ``tp`` threads; see ``KernelDB``.

        Expert parallelism is the time of one that holds 1/ep of the experts and is sent all
        tokens, of which it computes those pairs that fall to it.
        """
        self._check_sides(model, sides)
        if ep < 1 or ep > model.experts:
            raise PlannerError(
                f"{model.experts} experts over {ep} groups: expected 1 to {model.experts} groups"
            )
        entry = self._entry(model)
        table = self._threads(entry.experts, tp, "experts")
        tokens = np.asarray(tokens, float)
        held = np.full_like(tokens, -(-model.experts // ep))
        return self._look_up(table, held, tokens, "experts held, tokens", tokens > 0)

    def exchange(self, model: Model, tp: int, dp: int, moe_tp: int, ep: int, tokens: Array) -> Time:
        """Nothing, where one process has both sides; see ``KernelDB``.

        Raises:
            NotCovered: several processes: what they exchange wasn't measured.
            PlannerError: the two sides don't share the same threads.
        """
        if tp * dp != moe_tp * ep:
            raise PlannerError(
                f"attention over {tp} x {dp} GPUs and experts over {moe_tp} x {ep}: expected as "
                "many"
            )
        self._entry(model)
        if dp > 1 or ep > 1:
            raise NotCovered(
                f"{self.path.name} has no exchange between {dp} attention ranks and {ep} groups of "
                "experts in one replica: expected 1 of each, a process that has both"
            )
        return Time({Provenance.MEASURED: np.zeros_like(np.asarray(tokens, float))})

    def hop(self, model: Model, tokens: Array) -> Hop:
        """Both ways between an attention and an FFN process.

        Args:
            tokens: of the micro-batch.

        Raises:
            NotCovered: see ``KernelDB``.
        """
        entry = self._entry(model)
        tokens = np.asarray(tokens, float)
        parts = {
            part: _times(
                self._look_up(table, np.ones_like(tokens), tokens, "messages, tokens", tokens > 0),
                model.moe_layers,
            )
            for part, table in entry.hop.items()
        }
        return Hop(**parts)

    # -- looking up ----------------------------------------------------------------------------

    def _decode(
        self,
        model: Model,
        tp: int,
        load: Load,
        tables: Callable[[Entry], Mapping[int, Table]],
    ) -> Time:
        if np.any(np.asarray(load.prefill) > 0):
            raise NotCovered(
                f"{self.path.name} has decode steps only, and this one computes prompts; use other "
                "kernels (roofline, aic) for prefill"
            )
        table = self._threads(tables(self._entry(model)), tp, "attention")
        batch, context = np.broadcast_arrays(
            np.asarray(load.decode, float), np.asarray(load.context, float)
        )
        return self._look_up(table, batch, context, "requests, context", batch > 0)

    def _entry(self, model: Model) -> Entry:
        for entry in self.entries.values():
            if same(entry.model, model):
                return entry
        raise NotCovered(
            f"{model.name} is not in {self.path.name}, which has {', '.join(self.entries)}: "
            "expected a model with the same sizes; measure it with `afflux bench kernels`"
        )

    def _threads(self, tables: Mapping[int, Table], threads: int, what: str) -> Table:
        if threads not in tables:
            raise NotCovered(
                f"{what} over {threads} GPUs (threads): {self.path.name} has "
                f"{', '.join(map(str, sorted(tables)))}"
            )
        return tables[threads]

    def _check_sides(self, model: Model, sides: Sides) -> None:
        shared = model.shared_inter > 0 and sides.shared is not Side.ATTENTION
        if sides.router is not Side.ATTENTION or shared:
            raise NotCovered(
                f"router on the {sides.router} side, shared experts on the {sides.shared} side: "
                f"{self.path.name} was measured with both on the attention side"
            )

    def _look_up(
        self, table: Table, first: Array, second: Array, what: str, wanted: np.ndarray
    ) -> Time:
        """Values at places; 0 where none is wanted."""
        parts = {how: np.zeros(first.shape) for how in Provenance}
        for index in np.ndindex(first.shape):
            if not wanted[index]:
                continue
            place = float(first[index]), float(second[index])
            value, how = table.at(*place)
            if how is Provenance.EXTRAPOLATED and not self.allow_extrapolation:
                raise NotCovered(
                    f"{what} of {place[0]:g}, {place[1]:g} are outside of {self.path.name}, which "
                    f"has {table.reach}; allow it with --allow-extrapolation"
                )
            parts[how][index] = value
        used = {how: part for how, part in parts.items() if np.any(part)}
        return Time(used or {Provenance.MEASURED: np.zeros(first.shape)})


def _times(time: Time, factor: float) -> Time:
    return Time({how: factor * part for how, part in time.parts.items()})
