"""vLLM's engine core driven in a loop, with the routed experts in place or taken out.

The same loop steps both, so that what is compared is the engine and not its client: no HTTP, no
detokenising, no Ray. Used by ``benchmarks.decode`` and by the tests that compare tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from actors.engine import AttentionConfig, AttentionEngine


@dataclass
class Run:
    """Result of ``generate``: tokens per prompt, and the time of each engine step in seconds.

    ``first`` and ``last``: when each prompt got its first and its last token, in seconds from the
    begin.
    """

    tokens: list[list[int]]
    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


def greedy_request(name: str, prompt: list[int], tokens: int) -> Any:
    """A request for vLLM's engine core: exactly ``tokens`` tokens, whatever they are."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False
        ),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )


class _Engine:
    core: Any
    _count = 0

    def step(self) -> dict[int, Any]:
        outputs, executed = self.core.step_fn()
        self.core.post_step(model_executed=executed)
        return outputs or {}

    def generate(self, prompts: list[list[int]], max_tokens: int | Sequence[int]) -> Run:
        """Greedy decode of all prompts together, exactly ``max_tokens`` tokens each.

        Args:
            max_tokens: one number for all, or one per prompt.
        """
        lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        run = Run(tokens=[[] for _ in prompts], first=[0.0] * len(prompts))
        run.last = [0.0] * len(prompts)
        index: dict[str, int] = {}
        for number, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            type(self)._count += 1
            request_id = f"offline-{self._count}"
            index[request_id] = number
            request = greedy_request(request_id, prompt, length)
            prepared, wave = self.core.preprocess_add_request(request)
            self.core.add_request(prepared, wave)
        began = time.perf_counter()
        while self.core.scheduler.has_unfinished_requests():
            start = time.perf_counter()
            outputs = self.step()
            end = time.perf_counter()
            run.step_seconds.append(end - start)
            made = 0
            for message in outputs.values():
                for output in message.outputs:
                    number = index[output.request_id]
                    if output.new_token_ids:
                        if not run.tokens[number]:
                            run.first[number] = end - began
                        run.last[number] = end - began
                    run.tokens[number] += output.new_token_ids
                    made += len(output.new_token_ids)
                    if output.finish_reason is not None and str(output.finish_reason) == "error":
                        run.errors.append(str(output.stop_reason))
            run.step_tokens.append(made)
        run.seconds = time.perf_counter() - began
        return run


class PlainEngine(_Engine):
    """vLLM as it is."""

    def __init__(self, model: str, dtype: str, engine: dict[str, Any]):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor.abstract import Executor

        config = EngineArgs(
            model=model, dtype=dtype, distributed_executor_backend="uni", **engine
        ).create_engine_config()
        self.core = EngineCore(config, Executor.get_class(config), log_stats=True)

    @property
    def weight_bytes(self) -> int:
        model = self.core.model_executor.driver_worker.worker.model_runner.model
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta)


class _Kept:
    """Stands in for a running mean of the lane chooser and keeps every measurement."""

    def __init__(self) -> None:
        self.points: list[tuple[float, float]] = []

    def add(self, n: float, t: float) -> None:
        self.points.append((n, t))


class SplitEngine(_Engine):
    """The attention side of afflux; its experts are FFN actors in other processes."""

    def __init__(self, config: AttentionConfig):
        self.engine = AttentionEngine(config)
        self.core = self.engine.core

    def step(self) -> dict[int, Any]:
        return self.engine.step()

    def offer(self, peer: str) -> Any:
        return self.engine.offer(peer)

    def connect(self, offer: Any) -> None:
        self.engine.connect(offer)

    def adopt(self, table: Any) -> None:
        self.engine.adopt(table)

    def set_lanes(self, lanes: int | None) -> None:
        """Lanes of the following steps, at most those the engine was built for; None: automatic."""
        self.engine.chooser.fixed = lanes

    def record(self) -> None:
        """Keep every stage time from now on; needs a fixed number of lanes."""
        stages = ("attention", "ffn", "transfer")
        kept: Any = SimpleNamespace(**{stage: _Kept() for stage in stages})
        self.engine.chooser.times = kept

    def recorded(self) -> dict[str, list[tuple[float, float]]]:
        """Stage -> (tokens, seconds of one layer) since ``record``, which ends here."""
        from actors.lanes import StageTimes

        kept = vars(self.engine.chooser.times)
        self.engine.chooser.times = StageTimes()
        return {stage: times.points for stage, times in kept.items()}

    def facts(self) -> dict[str, Any]:
        """Totals of the experts' client and what the chooser has measured."""
        from actors.loader import AttentionLoader
        from actors.seam import Seam

        engine = self.engine
        times = engine.chooser.times
        return {
            **vars(engine.client.stats),
            "lanes": list(engine.chooser.recent),
            "stage_seconds": {stage: sizes.points for stage, sizes in vars(times).items()},
            "hops": engine.endpoint.hops(),
            "weight_bytes": engine.weight_bytes,
            "expert_parameters": sorted(
                {name for layer in Seam.layers.values() for name, _ in layer.named_parameters()}
            ),
            "tensors_read": list(AttentionLoader.tensors_read),
            "last_error": str(engine.last_error) if engine.last_error else None,
        }
