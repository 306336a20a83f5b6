"""A small deployment of plain processes: FFN hosts, and an attention engine to wire up.

Shared by the decode benchmark and the token comparison. Not for serving: see ``cluster``.
"""

import functools
from collections.abc import Sequence
from typing import Any

from actors.checkpoint import Checkpoint
from actors.engine import AttentionConfig
from actors.ffn import FFNActor, FFNConfig
from actors.metrics.config import MetricsConfig
from actors.table import ExpertTable
from benchmarks.offline import SplitEngine
from benchmarks.processes import Remote


class FFNHost:
    """Any number of FFN actors in one process."""

    def __init__(self) -> None:
        self.actors: dict[str, FFNActor] = {}

    def start(self, config: FFNConfig) -> dict[str, Any]:
        actor = self.actors[config.name] = FFNActor()
        return actor.start(config)

    def offer(self, name: str, peer: str) -> Any:
        return self.actors[name].offer(peer)

    def connect(self, name: str, offer: Any) -> None:
        self.actors[name].connect(offer)

    def disconnect(self, name: str, peer: str) -> None:
        self.actors[name].disconnect(peer)

    def stop(self, name: str) -> None:
        self.actors.pop(name).stop()

    def info(self, name: str) -> dict[str, Any]:
        return self.actors[name].info()


def split_table(checkpoint: Checkpoint, names: Sequence[str], epoch: int) -> ExpertTable:
    """Experts dealt to actors in turn, offset by layer: any count, divisible or not."""
    return ExpertTable(
        epoch,
        {
            layer: tuple(
                (names[(expert + layer) % len(names)],) for expert in range(checkpoint.num_experts)
            )
            for layer in checkpoint.moe_layers
        },
    )


class FFNPool:
    """FFN actors of one table, spread over given host processes (round robin)."""

    def __init__(
        self,
        hosts: Sequence[Remote],
        model: str,
        count: int,
        epoch: int,
        *,
        dtype: str,
        threads: int | None = 1,
        max_frame_tokens: int = 512,
        metrics: MetricsConfig | None = None,
    ):
        self.names = [f"ffn{epoch}-{i}" for i in range(count)]
        self.hosts = {name: hosts[i % len(hosts)] for i, name in enumerate(self.names)}
        self.table = split_table(Checkpoint.open(model), self.names, epoch)
        for name, host in self.hosts.items():
            host.start(
                FFNConfig(
                    name=name,
                    model=model,
                    experts=self.table.shard(name),
                    dtype=dtype,
                    threads=threads,
                    max_frame_tokens=max_frame_tokens,
                    metrics=metrics,
                )
            )

    def connect(self, attention: Remote, attention_name: str) -> None:
        """Introduce an attention engine and every actor of the pool to each other."""
        for name, host in self.hosts.items():
            theirs = host.offer(name, attention_name)
            ours = attention.offer(name)
            host.connect(name, ours)
            attention.connect(theirs)

    def stop(self) -> None:
        """End the actors; their host processes stay."""
        for name, host in self.hosts.items():
            host.stop(name)

    def info(self) -> list[dict[str, Any]]:
        """``FFNActor.info`` of each actor."""
        return [host.info(name) for name, host in self.hosts.items()]


def attention_process(config: AttentionConfig, **process: Any) -> Remote:
    """A process with a ``SplitEngine``; ``process`` goes to ``Remote``."""
    return Remote(functools.partial(SplitEngine, config), **process)
