"""From the spec to what an actor is told when it starts. Pure; nothing is started here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from actors.emulate import Emulation, Line
from actors.metrics.config import MetricsConfig
from actors.tracing import TracingConfig
from cluster.ray_actors import cpu_threads
from cluster.spec import ClusterSpec, LineSpec

if TYPE_CHECKING:
    from actors.engine import AttentionConfig
    from actors.ffn import FFNConfig


def attention_config(
    spec: ClusterSpec, name: str, *, secret: bytes, address: str | None
) -> AttentionConfig:
    """What the attention actor ``name`` is told.

    Args:
        secret: see ``peer_secret``. address: of its node.
    """
    from actors.engine import AttentionConfig

    return AttentionConfig(
        name=name,
        model=spec.model.path,
        dtype=spec.model.dtype,
        engine=dict(spec.attention.engine),
        lanes=None if spec.lanes == "auto" else spec.lanes,
        max_frame_tokens=spec.transport.max_frame_tokens,
        timeout_s=spec.transport.timeout_s,
        ucx_tls=spec.transport.ucx_tls,
        wait_s=spec.membership.wait_s,
        threads=cpu_threads(spec.attention),
        emulate=emulation(spec),
        metrics=metrics(spec),
        tracing=tracing(spec),
        secret=secret,
        address=address,
    )


def ffn_config(
    spec: ClusterSpec,
    name: str,
    experts: Mapping[int, Sequence[int]],
    epoch: int,
    offers: Sequence[Any] = (),
    *,
    secret: bytes,
    address: str | None,
) -> FFNConfig:
    """What the FFN actor ``name`` is told.

    Args:
        experts: layer -> experts to hold. epoch: frames of earlier ones are refused.
        offers: of peers whose memory has some of the weights.
        secret: see ``peer_secret``. address: of its node.
    """
    from actors.ffn import FFNConfig

    return FFNConfig(
        name=name,
        model=spec.model.path,
        experts=experts,
        dtype=spec.model.dtype,
        max_frame_tokens=spec.transport.max_frame_tokens,
        threads=cpu_threads(spec.ffn),
        engine_args=dict(spec.ffn.engine),
        device="cuda" if spec.ffn.resources.gpus else "cpu",
        ucx_tls=spec.transport.ucx_tls,
        offers=tuple(offers),
        emulate=emulation(spec),
        epoch=epoch,
        metrics=metrics(spec),
        secret=secret,
        address=address,
    )


def emulation(spec: ClusterSpec) -> Emulation | None:
    """The emulated devices of a spec, None for real ones."""
    if spec.emulate is None:
        return None
    stages = spec.emulate
    return Emulation(_line(stages.attention), _line(stages.ffn), _line(stages.transfer))


def metrics(spec: ClusterSpec) -> MetricsConfig | None:
    """What an actor is told about its metrics; None for none."""
    if not spec.metrics.enabled:
        return None
    return MetricsConfig(
        model_name=spec.served_name,
        host=spec.metrics.host,
        expert_tokens=spec.metrics.expert_tokens,
    )


def tracing(spec: ClusterSpec) -> TracingConfig | None:
    """What frontends and attention actors are told about traces; None for none."""
    if spec.tracing.otlp_endpoint is None:
        return None
    return TracingConfig(
        endpoint=spec.tracing.otlp_endpoint,
        protocol=spec.tracing.protocol,
        sample_ratio=spec.tracing.sample_ratio,
        deployment=spec.name,
    )


def _line(line: LineSpec) -> Line:
    return Line(line.a_s, line.b_s)
