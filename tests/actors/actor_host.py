"""An ``AttentionActor`` in a process of its own, driven over ``benchmarks.processes.Remote``."""

import asyncio
import itertools
import threading
import time
from concurrent.futures import Future
from typing import Any

from actors.attention import AttentionActor
from actors.emulate import Emulation
from actors.engine import AttentionConfig
from benchmarks.offline import Run


class ActorHost:
    """Runs the actor's event loop on a thread, as Ray would. Methods return plain data."""

    _requests = itertools.count()

    def __init__(self) -> None:
        self.actor = AttentionActor()
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.begun: dict[str, Future[Any]] = {}
        self.tokens_seen = 0

    def start(self, config: AttentionConfig) -> dict[str, Any]:
        # compiling takes minutes where several tests share two cores
        info = self._submit(self.actor.start(config)).result(280)
        return {"state": info["state"], "digest": info["digest"]}

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the actor and wait for its result."""
        return self._submit(getattr(self.actor, method)(*args, **kwargs)).result(60)

    # what ``benchmarks.split.FFNPool.connect`` asks of an attention side
    def offer(self, peer: str) -> Any:
        return self.call("offer", peer)

    def connect(self, offer: Any) -> None:
        self.call("connect", offer)

    def emulate(self, emulation: Emulation | None) -> None:
        """Emulate devices from now on."""
        engine = self.actor._engine
        assert engine is not None
        engine.client.emulate = emulation

    def begin(self, name: str, prompts: list[list[int]], max_tokens: int) -> None:
        """Start ``generate`` in the background."""
        self.tokens_seen = 0
        self.begun[name] = self._submit(self._generate(prompts, max_tokens))

    def wait_for_tokens(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait until what runs in the background has made some tokens."""
        deadline = time.monotonic() + timeout_s
        while self.tokens_seen < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.tokens_seen} of {count} tokens in {timeout_s:g} s")
            time.sleep(0.001)

    def end(self, name: str) -> Run:
        """Result of what ``begin`` started."""
        return self.begun.pop(name).result(90)

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        trace_headers: dict[str, str] | None = None,
    ) -> Run:
        return self._submit(self._generate(prompts, max_tokens, trace_headers)).result(90)

    def _submit(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def _generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        trace_headers: dict[str, str] | None = None,
    ) -> Run:
        from vllm import SamplingParams
        from vllm.v1.engine import EngineCoreRequest

        run = Run(tokens=[[] for _ in prompts])
        client = next(self._requests)
        index = {f"{client}-{number}": number for number in range(len(prompts))}
        for request_id, number in index.items():
            params = SamplingParams(
                max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False
            )
            await self.actor.add_request(
                EngineCoreRequest(
                    request_id=request_id,
                    prompt_token_ids=prompts[number],
                    mm_features=None,
                    sampling_params=params,
                    pooling_params=None,
                    arrival_time=time.time(),
                    lora_request=None,
                    cache_salt=None,
                    data_parallel_rank=None,
                    client_index=client,
                    trace_headers=trace_headers,
                )
            )
        left = len(prompts)
        async for message in self.actor.outputs(client):
            for output in message.outputs if message is not None else ():
                run.tokens[index[output.request_id]] += output.new_token_ids
                self.tokens_seen += len(output.new_token_ids)
                if output.finish_reason is not None:
                    left -= 1
                    if str(output.finish_reason) == "error":
                        run.errors.append(str(output.stop_reason))
            if not left:
                break
        return run
