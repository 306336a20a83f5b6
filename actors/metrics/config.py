"""What a process is told about its metrics. Data only; the deployment's spec is in ``cluster``."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MetricsConfig:
    """Crosses Ray.

    Args:
        model_name: label of every series.
        host: address that the exporter binds to; "0.0.0.0" for every interface.
        expert_tokens: export tokens by layer and expert, which are many series.
    """

    model_name: str
    host: str = "127.0.0.1"
    expert_tokens: bool = False
