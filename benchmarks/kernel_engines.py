"""The two sides of a model taken apart, each in a process of its own, to be timed alone.

``AttentionKernels`` steps an engine whose experts answer zeros: at once, or from an FFN actor that
computes nothing, which leaves what the hop costs. ``ExpertKernels`` runs experts on random tokens.
What is timed, and what is made of it, is ``kernels``' business.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from actors.engine import AttentionConfig
from actors.ffn import FFNConfig
from benchmarks.offline import PlainEngine, SplitEngine, greedy_request
from benchmarks.samples import prompts
from benchmarks.split import FFNHost

STEPS = 4
"""Steps of a visit to a setting that count; two before them don't."""
_WARM_STEPS = 2
_ROUTINGS = 4
_KV_FILL = 0.02


class Decoding:
    """Decode steps of any batch at any context, without computing the prompts first.

    Mixed into an engine of ``offline``. The scheduler is told that all of a prompt but its last
    token is in the KV cache, so a request decodes from its first step on. What the cache holds is
    made up; how long attention to it takes does not depend on that.
    """

    core: Any
    step: Callable[[], dict[int, Any]]
    _started = 0

    def fill_cache(self) -> None:
        """Write all of the KV cache: pages that were never written are all the same one, and
        reading them is no work."""
        for tensor in self._runner.kv_caches:
            tensor.fill_(_KV_FILL)

    @property
    def _runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    def decode(self, batch: int, context: int, steps: int, seed: int = 0) -> list[float]:
        """Seconds of each of ``steps`` engine steps in which ``batch`` requests get one token.

        Args:
            context: tokens of each request at the first step.
        """
        names = []
        for prompt in prompts(batch, context, seed):
            type(self)._started += 1
            names.append(f"decode-{self._started}")
            request = greedy_request(names[-1], prompt, steps + 1)
            prepared, wave = self.core.preprocess_add_request(request)
            prepared.num_computed_tokens = context - 1
            self.core.add_request(prepared, wave)
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            outputs = self.step()
            seconds.append(time.perf_counter() - began)
            made = sum(
                len(o.new_token_ids) for message in outputs.values() for o in message.outputs
            )
            if made != batch:
                raise RuntimeError(
                    f"{made} of {batch} requests got a token in a step at context {context}: the "
                    "KV cache is too small for them"
                )
        self.core.abort_requests(names)
        self.step()  # lets the runner forget them
        return seconds


class PlainDecoding(Decoding, PlainEngine):
    """vLLM as it is."""

    def __init__(self, model: str, dtype: str, engine: dict[str, Any]):
        super().__init__(model, dtype, engine)
        self.fill_cache()


class SplitDecoding(Decoding, SplitEngine):
    """The attention side with its experts elsewhere."""

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self.fill_cache()

    def forget_times(self) -> None:
        """The lane chooser begins anew, as that of an engine that never saw another load."""
        from actors.lanes import StageTimes

        self.engine.chooser.times = StageTimes()


class AttentionKernels(SplitDecoding):
    """The attention side alone, timed within and outside of its layers."""

    def __init__(self, config: AttentionConfig):
        super().__init__(config)
        self._forward_seconds = 0.0
        forward = self._runner._model_forward
        synchronise = _synchroniser(self.engine.vllm_config.device_config.device.type)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise()
            began = time.perf_counter()
            result = forward(*args, **kwargs)
            synchronise()
            self._forward_seconds += time.perf_counter() - began
            return result

        self._runner._model_forward = timed

    def time_steps(
        self, settings: Sequence[tuple[int, int, int]], seconds: float
    ) -> list[dict[str, Any]]:
        """Steps of each (batch, context, lanes), visited in turns until the time is up.

        Args:
            settings: lanes 0 asks no FFN actor: experts answer zeros on the spot.

        Returns:
            A row each: batch, context, lanes, ``layers_s`` and ``outside_s`` per step, medians.
        """
        found: dict[tuple[int, int, int], list[tuple[float, float]]] = defaultdict(list)
        for batch, context, lanes in _turns(settings, seconds):
            found[batch, context, lanes] += self._visit(batch, context, lanes)
        return [
            {
                "batch": batch,
                "context": context + _WARM_STEPS + STEPS // 2,
                "lanes": lanes,
                "layers_s": statistics.median(layers for layers, _ in steps),
                "outside_s": statistics.median(outside for _, outside in steps),
                "count": len(steps),
            }
            for (batch, context, lanes), steps in found.items()
        ]

    def _visit(self, batch: int, context: int, lanes: int) -> list[tuple[float, float]]:
        """(in layers, outside of them) of each step that counts."""
        from actors.seam import Seam

        inside: list[float] = []
        step = self.step

        def noted() -> dict[int, Any]:
            self._forward_seconds = 0.0
            outputs = step()
            inside.append(self._forward_seconds)
            return outputs

        client, Seam.client = Seam.client, self.engine.client if lanes else None
        self.set_lanes(lanes or 1)
        self.step = noted  # type: ignore[method-assign]
        try:
            whole = self.decode(batch, context, _WARM_STEPS + STEPS)
        finally:
            del self.step
            Seam.client = client
        both = list(zip(inside[_WARM_STEPS:], whole[_WARM_STEPS:], strict=False))[:STEPS]
        return [(layers, total - layers) for layers, total in both]


class IdleFFNHost(FFNHost):
    """FFN actors that answer zeros at once: a hop and nothing else."""

    def start(self, config: FFNConfig) -> dict[str, Any]:
        info = super().start(config)
        worker = self.actors[config.name]._worker
        assert worker is not None  # ``start`` made it

        def nothing(layer: int, x: Any, ids: Any, weights: Any, rows: Any, out: Any) -> Any:
            return out.zero_()

        worker.shard.compute = nothing  # type: ignore[method-assign, assignment]
        return info


class ExpertKernels:
    """The first ``held`` experts of every MoE layer, in a process of ``threads`` threads."""

    def __init__(self, model: str, dtype: str, threads: int, held: Sequence[int], device: str):
        import torch

        from actors.checkpoint import Checkpoint
        from actors.shard import ExpertShard

        self._torch = torch
        self._device = device
        self._synchronise = _synchroniser(device)
        self._shards: dict[int, Any] = {}
        layers = Checkpoint.open(model).moe_layers
        for count in held:
            experts = {layer: tuple(range(count)) for layer in layers}
            self._shards[count] = ExpertShard(
                model, experts, dtype=dtype, threads=threads, device=device
            )

    def time_layers(
        self, settings: Sequence[tuple[int, int]], seconds: float
    ) -> list[dict[str, Any]]:
        """All MoE layers for each (tokens, held), visited in turns until the time is up.

        A layer's pairs are drawn evenly over all experts of the model; only those of held experts
        are computed, and only rows with such a pair are there, as when an actor gets its part.

        Returns:
            A row each: tokens, held, ``seconds`` of all layers, the median.
        """
        torch = self._torch
        torch.manual_seed(0)
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        work: dict[tuple[int, int], list[Any]] = {}
        with torch.inference_mode():
            for tokens, held in _turns(settings, seconds):
                shard = self._shards[held]
                if (tokens, held) not in work:
                    work[tokens, held] = [self._draw(shard, tokens, held) for _ in range(_ROUTINGS)]
                    self._pass(shard, work[tokens, held])
                for _ in range(STEPS):
                    found[tokens, held].append(self._pass(shard, work[tokens, held]))
        return [
            {
                "tokens": tokens,
                "held": held,
                "seconds": statistics.median(times),
                "count": len(times),
            }
            for (tokens, held), times in found.items()
        ]

    def _pass(self, shard: Any, routings: Sequence[Any]) -> float:
        self._synchronise()
        began = time.perf_counter()
        for layer in shard.layers:
            question = routings[layer % len(routings)]
            if question is not None:
                shard.compute(layer, *question)
        self._synchronise()
        return time.perf_counter() - began

    def _draw(self, shard: Any, tokens: int, held: int) -> Any:
        """x, ids, weights, rows and room for the result; None where no pair falls here."""
        torch, device = self._torch, self._device
        ids = torch.rand(tokens, shard.num_experts).argsort(dim=1)[:, : shard.top_k]
        x = 0.1 * torch.randn(tokens, shard.hidden)
        weights = torch.full((tokens, shard.top_k), 1.0 / shard.top_k)
        rows = None
        if held < shard.num_experts:
            mine = ids < held
            kept = mine.any(dim=1)
            if not bool(kept.any()):
                return None
            place = kept.cumsum(0) - 1
            rows = place.repeat_interleave(mine.sum(dim=1)).to(torch.int32).to(device)
            ids, weights, x = ids[mine], weights[mine], x[kept]
        x = x.to(shard.dtype).to(device)
        ids, weights = ids.to(torch.int32).to(device), weights.to(device)
        return x, ids, weights, rows, torch.empty_like(x)


def _turns(settings: Sequence[Any], seconds: float) -> Iterator[Any]:
    """Settings over and over until the time is up, each once at least; the machine's speed drifts,
    and so it drifts for all of them."""
    end = time.monotonic() + seconds
    visited: set[Hashable] = set()
    while True:
        for setting in settings:
            if time.monotonic() > end and setting in visited:
                return
            visited.add(setting)
            yield setting


def _synchroniser(device: str) -> Callable[[], None]:
    """Waits for what a device still computes."""
    if device == "cpu":
        return lambda: None
    import torch

    return torch.cuda.synchronize
