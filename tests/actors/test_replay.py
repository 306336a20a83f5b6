"""A request that starts again from its emitted tokens goes on exactly as it would have.

Each case runs once undisturbed; then, for several cuts, a fresh request gets the prompt and the
tokens before the cut as emitted, and has to answer with the rest. Float32, greedy and seeded.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from actors import replay
from actors.engine import AttentionConfig
from actors.replay import ReplayError, advance, restore
from benchmarks.offline import SplitEngine
from benchmarks.processes import Remote
from benchmarks.split import FFNHost, FFNPool
from benchmarks.tokens import engine_args, prompts
from tests.models import VOCAB

TOKENS = 24
SEEDED = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 4321}
PENALTIES = {"frequency_penalty": 0.4, "presence_penalty": 0.5, "repetition_penalty": 1.3}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": SEEDED,
    "seeded without filters": {"temperature": 1.0, "seed": 7},
    "penalties": {"temperature": 0.0, **PENALTIES},
    "seeded penalties": {**SEEDED, **PENALTIES},
    "logprobs": {"temperature": 0.0, "logprobs": 2},
}


class Engine(SplitEngine):
    """An attention engine that takes requests with emitted tokens and returns whole outputs."""

    def run(
        self, requests: Sequence[tuple[list[int], SamplingParams, list[int]]]
    ) -> list[list[EngineCoreOutput]]:
        """Outputs of each (prompt, parameters, emitted), all in the engine at the same time."""
        outputs: dict[str, list[EngineCoreOutput]] = {}
        for prompt, params, emitted in requests:
            type(self)._count += 1
            request = EngineCoreRequest(
                request_id=f"replay-{self._count}",
                prompt_token_ids=prompt,
                mm_features=None,
                sampling_params=params,
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
            outputs[request.request_id] = []
            self.engine.add(request, emitted)
        while self.core.scheduler.has_unfinished_requests():
            for message in self.step().values():
                for output in message.outputs:
                    assert str(output.finish_reason) != "error", output.stop_reason
                    outputs[output.request_id].append(output)
        return list(outputs.values())

    def abort_and_add_again(self, prompt: list[int], cut: int) -> tuple[list[int], list[int]]:
        """Run to ``cut`` tokens, start again under the same id; all tokens in both ways."""
        (whole,) = self.run([(prompt, params(temperature=0.0), [])])
        request = EngineCoreRequest(
            request_id="twice",
            prompt_token_ids=prompt,
            mm_features=None,
            sampling_params=params(temperature=0.0),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        got: list[int] = []
        self.engine.add(request)
        added = False
        while self.core.scheduler.has_unfinished_requests():
            for message in self.step().values():
                for output in message.outputs:
                    got += output.new_token_ids
            if len(got) >= cut and not added:
                self.engine.add(request, list(got))
                added = True
        return [token for output in whole for token in output.new_token_ids], got

    def left(self, client: int) -> tuple[int, int]:
        """Requests before and after a client's abort; two clients have two each."""
        for number in range(4):
            request = EngineCoreRequest(
                request_id=f"left-{number}",
                prompt_token_ids=[5, 6, 7],
                mm_features=None,
                sampling_params=params(temperature=0.0),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
                client_index=number % 2,
            )
            self.engine.add(request)
        self.step()
        before = len(self.core.scheduler.requests)
        self.engine.abort_client(client)
        left = len(self.core.scheduler.requests)
        self.engine.abort_client(1 - client)
        while self.core.scheduler.has_requests():
            self.step()
        return before, left


def params(**options: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_tokens": TOKENS, "ignore_eos": True, "detokenize": False} | options
    )


def tokens_of(outputs: Sequence[EngineCoreOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


@pytest.fixture(scope="module")
def engine(moe_checkpoint: Any) -> Iterator[Remote]:
    """Chunked prefill and prefix cache on, a budget of 48 tokens per step, one FFN actor."""
    model = str(moe_checkpoint("qwen3_moe"))
    args = engine_args(prefix_cache=True, chunked_prefill=True)
    config = AttentionConfig("attention-0", model, "float32", args, lanes=2, timeout_s=30.0)
    host, attention = Remote(FFNHost), Remote(functools.partial(Engine, config))
    pool = FFNPool([host], model, 1, 1, dtype="float32")
    pool.connect(attention, "attention-0")
    attention.adopt(pool.table)
    yield attention
    for process in (host, attention):
        process.kill()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("case", CASES)
def test_goes_on_as_if_nothing_had_happened(engine: Remote, case: str) -> None:
    """The prompt's blocks are cached at some cuts; the longest replay needs two prefill chunks."""
    prompt = prompts(VOCAB)[8]
    options = CASES[case]
    ((*whole,),) = engine.run([(prompt, params(**options), [])])
    tokens = tokens_of(whole)
    assert len(tokens) == TOKENS
    cuts = [1, 2, 11, TOKENS - 1]
    rest = engine.run([(prompt, params(**options), tokens[:cut]) for cut in cuts])
    for cut, outputs in zip(cuts, rest, strict=True):
        assert tokens[:cut] + tokens_of(outputs) == tokens, f"{case} cut at {cut}"
        assert str(outputs[-1].finish_reason) == "length"
        assert all(output.prefill_stats is None for output in outputs), "told once"
        if "logprobs" in options:
            got = [output.new_logprobs for output in outputs]
            assert [len(one.logprobs) for one in got if one is not None] == [1] * len(outputs)
            expected = [output.new_logprobs for output in whole[cut:]]
            for one, other in zip(got, expected, strict=True):
                assert one is not None and other is not None
                assert one.logprobs[0] == pytest.approx(other.logprobs[0], abs=1e-3)


@pytest.mark.timeout(300)
def test_a_prefill_in_chunks_does_not_touch_the_generator(engine: Remote) -> None:
    """vLLM alone fails the step here: generators of the CPU can't be taken back."""
    prompt = [(13 * j) % (VOCAB - 10) + 5 for j in range(150)]
    (whole,) = engine.run([(prompt, params(**SEEDED), [])])
    tokens = tokens_of(whole)
    assert len(tokens) == TOKENS
    other = [(17 * j) % (VOCAB - 10) + 5 for j in range(140)]
    rest, _ = engine.run(
        [(prompt, params(**SEEDED), tokens[:9]), (other, params(temperature=0.9, seed=1), [])]
    )
    assert tokens[:9] + tokens_of(rest) == tokens


@pytest.mark.timeout(300)
def test_limits_count_what_was_emitted(engine: Remote) -> None:
    prompt = prompts(VOCAB)[3]
    (whole,) = engine.run([(prompt, params(temperature=0.0), [])])
    tokens = tokens_of(whole)
    stop = next(token for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i])
    at = tokens.index(stop)
    early = params(temperature=0.0, stop_token_ids=[stop], min_tokens=at + 2)
    (free,) = engine.run([(prompt, early, [])])
    assert len(tokens_of(free)) > at + 1, "min_tokens forbids the stop token"
    cut = at - 1
    kept, stopped = engine.run(
        [
            (prompt, early, tokens[:cut]),
            (prompt, params(temperature=0.0, stop_token_ids=[stop]), tokens[:cut]),
        ]
    )
    assert tokens[:cut] + tokens_of(kept) == tokens_of(free)
    assert tokens[:cut] + tokens_of(stopped) == tokens[: at + 1]
    assert str(stopped[-1].finish_reason) == "stop" and stopped[-1].stop_reason == stop


@pytest.mark.timeout(300)
def test_prompt_logprobs_come_once(engine: Remote) -> None:
    prompt = prompts(VOCAB)[4]
    asked = params(temperature=0.0, prompt_logprobs=1)
    (whole,) = engine.run([(prompt, asked, [])])
    assert whole[0].new_prompt_logprobs_tensors is not None
    fresh, replayed = engine.run([(prompt, asked, []), (prompt, asked, tokens_of(whole)[:5])])
    assert fresh[0].new_prompt_logprobs_tensors is not None
    assert all(output.new_prompt_logprobs_tensors is None for output in replayed)
    assert tokens_of(replayed) == tokens_of(whole)[5:]


@pytest.mark.timeout(300)
def test_the_same_id_again_replaces_the_request(engine: Remote) -> None:
    whole, got = engine.abort_and_add_again(prompts(VOCAB)[5], 7)
    assert got == whole


@pytest.mark.timeout(300)
def test_a_client_s_requests_can_be_ended(engine: Remote) -> None:
    assert engine.left(1) == (4, 2)


def advanced_as_sampled(forward: str, filters: bool, fp64: bool) -> bool:
    """Whether ``advance`` leaves a generator where sampling three tokens leaves it."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    current_platform.import_kernels()
    sampler = TopKTopPSampler(use_fp64_gumbel=fp64)
    sampler.forward = getattr(sampler, forward)
    k = torch.tensor([5, 5]) if filters else None
    p = torch.tensor([0.9, 0.9]) if filters else None
    used, advanced = (torch.Generator().manual_seed(5) for _ in range(2))
    for _ in range(3):
        sampler.forward(torch.randn(2, 97), {1: used}, k, p)
    advance(advanced, 3, sampler, 97)
    return torch.equal(used.get_state(), advanced.get_state())


@pytest.mark.parametrize("fp64", [False, True])
@pytest.mark.parametrize("forward", ["forward_cpu", "forward_native"])
@pytest.mark.parametrize("filters", [False, True])
def test_advance_draws_what_the_sampler_draws(
    vllm_process: Any, forward: str, filters: bool, fp64: bool
) -> None:
    assert vllm_process(advanced_as_sampled, forward, filters, fp64)


def test_what_can_t_be_replayed_is_refused() -> None:
    core: Any = SimpleNamespace()
    pooling: Any = SimpleNamespace(request_id="p", sampling_params=None, resumable=False)
    restore(core, pooling, ())  # nothing was emitted: it is just sent again
    with pytest.raises(ReplayError, match="p is a pooling request"):
        restore(core, pooling, [1])
    session: Any = SimpleNamespace(request_id="s", sampling_params=params(), resumable=True)
    with pytest.raises(ReplayError, match="s is a streaming session"):
        restore(core, session, [1])
    assert replay.ReplayError.code == "replay_refused"
