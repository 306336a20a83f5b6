"""What is believed of stage times before anything was measured: emulated devices, or a file.

Measurements override it (``calibrate``). Reads a deployment's spec; not for fitting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from planner.curves import Linear
from planner.latency import Latencies, load_latencies

if TYPE_CHECKING:
    from actors.checkpoint import Checkpoint
    from cluster.spec import ClusterSpec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DENSE_PAIR_BYTES = 8
"""Expert id and weight of a pair on the wire (``actors.transport.geometry``)."""


class Line(Protocol):
    """Seconds as a line over a load, as ``cluster.spec.LineSpec``."""

    @property
    def a_s(self) -> float: ...
    @property
    def b_s(self) -> float: ...


class Emulated(Protocol):
    """Modelled times of one layer, as ``cluster.spec.EmulateSpec``."""

    @property
    def attention(self) -> Line: ...
    @property
    def ffn(self) -> Line: ...
    @property
    def transfer(self) -> Line: ...


@dataclass(frozen=True)
class Prior:
    """Latencies that are believed until something was measured.

    Args:
        latencies: per step of one lane, seconds.
        emulated: devices are emulated, so that no stage is quicker than this; what is measured of
            the real wire alone says nothing.
    """

    latencies: Latencies
    emulated: bool = False


def prior_of(spec: ClusterSpec, checkpoint: Checkpoint) -> Prior | None:
    """What a spec says of stage times; None where it says nothing.

    Raises:
        PlannerError: ``autoscaler.latencies`` names nothing that can be read.
    """
    if spec.emulate is not None:
        named: str = spec.model.dtype
        if named == "auto":
            config = checkpoint.config
            named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        latencies = latencies_from_emulation(
            spec.emulate,
            layers=len(checkpoint.moe_layers),
            top_k=checkpoint.top_k,
            hidden=int(checkpoint.config.get("hidden_size", 0)),
            item_bytes=_ITEM_BYTES.get(named, 2),
        )
        return Prior(latencies, emulated=True)
    if spec.autoscaler.latencies is not None:
        return Prior(load_latencies(spec.autoscaler.latencies))
    return None


def latencies_from_emulation(
    emulate: Emulated, *, layers: int, top_k: int, hidden: int, item_bytes: int
) -> Latencies:
    """Stage times of emulated devices, which are per layer, as those of a step.

    Attention's load is context tokens in both. An FFN call's is (token, expert) pairs, of which a
    request has ``top_k`` in a layer. A frame's is bytes one way: hidden states there and back, and
    an id and a weight for each pair on the way there. The machine's own work comes on top.

    Args:
        emulate: ``ClusterSpec.emulate``.
        layers: MoE layers of the model.
        top_k: experts per token.
        hidden: hidden size.
        item_bytes: of one number of a hidden state.
    """
    both_ways = 2 * hidden * item_bytes + _DENSE_PAIR_BYTES * top_k
    wire = emulate.transfer
    return Latencies(
        attention=Linear(layers * emulate.attention.a_s, layers * emulate.attention.b_s),
        ffn=Linear(layers * top_k * emulate.ffn.a_s, layers * emulate.ffn.b_s),
        transfer=Linear(layers * both_ways * wire.a_s, 2 * layers * wire.b_s),
        prefill=Linear(layers * emulate.attention.a_s, 0.0),
        source="emulated devices",
    )
