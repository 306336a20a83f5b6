"""Where an FFN actor's new experts come from: the checkpoint, or the memory of an actor that has
them.

A peer's experts are packed for its kernels already. Where this actor would pack a layer in exactly
the same way (equal fingerprints), its rows are read over NIXL into new tensors and then put to use.
Anything that goes wrong on that way ends at the checkpoint, which always has the experts. Which
source is expected to be quicker is a pure function of sizes and of rates measured in this process.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from actors.errors import AffluxError

if TYPE_CHECKING:
    from actors.local_experts import LocalExperts
    from actors.shard import ExpertShard
    from actors.transport.reads import Access, Shelf

logger = logging.getLogger(__name__)

Experts = Mapping[int, Sequence[int]]

CHECKPOINT = "checkpoint"
NEAR = "near"
FAR = "far"
TTL_S = 120.0

_SMOOTHING = 0.5
_MEASURABLE = 16 << 20
_GUESSES = {CHECKPOINT: 0.2e9, NEAR: 1e9, FAR: 0.4e9}


@dataclass(frozen=True, slots=True)
class LayerRows:
    """Where the packed experts of one layer lie.

    Args:
        fingerprint: equal for layers whose rows mean the same, see ``fingerprint``.
        positions: global expert -> its row.
        tensors: (address of row 0, bytes of a row) of each packed tensor, by name, sorted.
    """

    fingerprint: str
    positions: Mapping[int, int]
    tensors: tuple[tuple[str, int, int], ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's rows."""
        return sum(size for _, _, size in self.tensors)

    def regions(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """(address, bytes) of the experts' rows, tensor by tensor."""
        return [
            (address + self.positions[expert] * size, size)
            for _, address, size in self.tensors
            for expert in experts
        ]


@dataclass(frozen=True, slots=True)
class WeightOffer:
    """Experts that an actor lets others read from its memory for a while. Crosses Ray."""

    name: str
    access: Access
    layers: Mapping[int, LayerRows]

    @property
    def token(self) -> str:
        """What ``unexport`` wants."""
        return self.access.token

    @property
    def nbytes(self) -> int:
        """Bytes of all experts offered."""
        return sum(rows.expert_bytes * len(rows.positions) for rows in self.layers.values())


class Rates:
    """Bytes of packed experts per second of each source, set-up included.

    Args:
        guesses: used until a source is measured for the first time; the defaults are on the safe
            side.
    """

    def __init__(self, guesses: Mapping[str, float] = _GUESSES):
        self._by_source = dict(guesses)
        self._measured: set[str] = set()

    def note(self, source: str, nbytes: int, seconds: float) -> None:
        """Learn from one load; later loads count for more than earlier ones.

        A small load is not counted: it takes as long as its set-up, from whatever source.
        """
        if nbytes < _MEASURABLE or seconds <= 0:
            return
        now = nbytes / seconds
        if source in self._measured:
            now = self._by_source[source] + _SMOOTHING * (now - self._by_source[source])
        self._by_source[source] = now
        self._measured.add(source)

    def seconds(self, source: str, nbytes: int) -> float:
        """How long a load is expected to take."""
        return nbytes / self._by_source[source]

    def snapshot(self) -> dict[str, float]:
        """Bytes per second of the sources that were measured."""
        return {source: self._by_source[source] for source in sorted(self._measured)}


class Part(NamedTuple):
    """Experts to take from one offer, or (``offer`` is None) from the checkpoint."""

    offer: int | None
    experts: dict[int, tuple[int, ...]]


def plan(
    wanted: Experts,
    offers: Sequence[tuple[Mapping[int, LayerRows], str]],
    fingerprints: Mapping[int, str],
    rates: Rates,
) -> list[Part]:
    """Choose a source for each expert.

    Args:
        wanted: layer -> global experts to load.
        offers: the layers of each offer, and whether it is ``NEAR`` or ``FAR``.
        fingerprints: of this actor's own layers; a layer that is not in here can't be read.
        rates: measured here.

    Returns:
        Parts with offers in their order, then what is left to the checkpoint; no part is empty,
        and every expert wanted is in exactly one. An offer that is not expected to be quicker
        than the checkpoint is not used.
    """
    left = {layer: list(ids) for layer, ids in wanted.items()}
    parts = []
    for number, (layers, source) in enumerate(offers):
        if rates.seconds(source, 1) >= rates.seconds(CHECKPOINT, 1):
            continue
        found = {
            layer: found_here
            for layer, ids in left.items()
            if (rows := layers.get(layer)) is not None
            and rows.fingerprint == fingerprints.get(layer)
            and (found_here := tuple(e for e in ids if e in rows.positions))
        }
        if found:
            parts.append(Part(number, found))
            for layer, ids in found.items():
                left[layer] = [e for e in left[layer] if e not in ids]
    rest = {layer: tuple(ids) for layer, ids in left.items() if ids}
    return [*parts, Part(None, rest)] if rest else parts


def fingerprint(digest: str, module: LocalExperts, rows: Mapping[str, torch.Tensor]) -> str:
    """Equal for two layers only if their packed rows can stand for each other.

    Args:
        digest: of the checkpoint.
        module: a packed layer, with any experts.
        rows: its packed tensors, see ``expert_rows.rows_of``.
    """
    import vllm

    kernel = module.quant_method.moe_kernel
    fused = kernel.fused_experts if kernel is not None else None
    device = next(iter(rows.values())).device
    terms = (
        digest,
        module.layer_name,
        getattr(vllm, "__version__", ""),
        torch.__version__,
        platform.machine(),
        torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else _gpu(device),
        type(module.quant_method).__name__,
        type(fused).__name__,
        getattr(fused, "isa", ""),
        str(module.activation),
        [(name, str(t.dtype), tuple(t.shape[1:])) for name, t in sorted(rows.items())],
    )
    return hashlib.sha256(repr(terms).encode()).hexdigest()


class WeightSource:
    """Grows a shard from the quicker source and lends its experts to others.

    Args:
        shard: what grows.
        name: of the actor, for agents and errors.
        ucx_tls: UCX transport list, as of ``Endpoint``.
    """

    def __init__(self, shard: ExpertShard, name: str, ucx_tls: str | None = None):
        self.shard = shard
        self.rates = Rates()
        self.last: dict[str, Any] | None = None
        """Facts about the last load, see ``grow``."""
        self._name = name
        self._tls = ucx_tls
        self._shelf: Shelf | None = None
        self._lock = threading.Lock()

    @property
    def exports(self) -> int:
        """How many offers are open."""
        return len(self._shelf) if self._shelf is not None else 0

    def grow(
        self, experts: Experts, offers: Sequence[WeightOffer] = (), *, background: bool = True
    ) -> dict[str, Any]:
        """Make the shard hold these experts too; see ``ExpertShard.grow`` for ``background``.

        Returns:
            ``source`` ("held", "checkpoint", the names of peers, or several), ``bytes`` of memory
            taken, ``seconds``, ``failures`` (why a peer was not read after all) and ``rates``
            (bytes per second measured here so far).

        Raises:
            CheckpointError, UnsupportedModel, ValueError: see ``ExpertShard.grow``.
        """
        began = time.monotonic()
        wanted = self.shard.missing(experts)
        sources: list[str] = []
        failures: list[str] = []
        nbytes = 0
        if wanted and offers:
            for offer, part in self._planned(wanted, offers):
                try:
                    nbytes += self._read(offer, part)
                    sources.append(offer.name)
                except Exception as error:
                    logger.warning("can't read experts of %s: %s", offer.name, error)
                    failures.append(f"{offer.name}: {error}")
        rest = self.shard.missing(experts)
        if rest:
            start = time.monotonic()
            loaded = self.shard.grow(rest, background=background)
            self.rates.note(CHECKPOINT, loaded, time.monotonic() - start)
            nbytes += loaded
            sources.append(CHECKPOINT)
        self.last = {
            "source": "+".join(sources) or "held",
            "bytes": nbytes,
            "seconds": time.monotonic() - began,
            "failures": failures,
            "rates": self.rates.snapshot(),
        }
        return self.last

    def export(self, experts: Experts, ttl_s: float = TTL_S) -> WeightOffer:
        """Let others read these experts for a while; those not held are left out.

        The memory offered stays as it is until ``unexport``, whatever the shard does meanwhile.
        """
        from actors.transport.reads import Shelf

        with self._lock:
            if self._shelf is None:
                device = str(self.shard.device)
                self._shelf = Shelf(f"{self._name}/weights", device=device, ucx_tls=self._tls)
            layers: dict[int, LayerRows] = {}
            lent: list[torch.Tensor] = []
            for layer, ids in experts.items():
                packed = self.shard.packed(layer)
                if packed is None:
                    continue
                held, rows, print_ = packed
                layers[layer] = LayerRows(
                    print_,
                    {expert: held.index(expert) for expert in ids if expert in held},
                    tuple((name, t.data_ptr(), _row_bytes(t)) for name, t in sorted(rows.items())),
                )
                lent += rows.values()
            if not any(rows.positions for rows in layers.values()):
                raise AffluxError(
                    f"{self._name} holds none of the experts {dict(experts)} (by layer) in a form "
                    "that others can read",
                    code="nothing_to_export",
                )
            return WeightOffer(self._name, self._shelf.lend(lent, ttl_s), layers)

    def unexport(self, token: str) -> bool:
        """Take an offer back; False when it is unknown or has ended by itself."""
        return self._shelf is not None and self._shelf.take_back(token)

    def close(self) -> None:
        """Take all offers back."""
        if self._shelf is not None:
            self._shelf.close()

    def _planned(
        self, wanted: Experts, offers: Sequence[WeightOffer]
    ) -> list[tuple[WeightOffer, dict[int, tuple[int, ...]]]]:
        offered = {layer for offer in offers for layer in offer.layers if layer in wanted}
        try:
            prints = self.shard.fingerprints(offered)
        except Exception as error:  # a layer that vLLM can't pack without weights
            logger.warning("experts are read from the checkpoint: %s", error)
            return []
        described = [(offer.layers, _distance(offer)) for offer in offers]
        return [
            (offers[part.offer], part.experts)
            for part in plan(wanted, described, prints, self.rates)
            if part.offer is not None
        ]

    def _read(self, offer: WeightOffer, experts: Experts) -> int:
        """Read and put to use, layer by layer; returns bytes read."""
        from actors.transport.reads import Reader

        start, nbytes = time.monotonic(), 0
        device = str(self.shard.device)
        with Reader(self._name, offer.access, device=device, ucx_tls=self._tls) as reader:
            for layer, ids in experts.items():
                rows = offer.layers[layer]
                into = self.shard.empty_rows(layer, len(ids))
                reader.read(rows.regions(ids), [tensor for _, tensor in sorted(into.items())])
                self.shard.adopt(layer, ids, into)
                nbytes += rows.expert_bytes * len(ids)
        self.rates.note(_distance(offer), nbytes, time.monotonic() - start)
        return nbytes


def _distance(offer: WeightOffer) -> str:
    return NEAR if offer.access.near else FAR


def _row_bytes(tensor: torch.Tensor) -> int:
    return tensor[0].numel() * tensor.element_size()


def _gpu(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
