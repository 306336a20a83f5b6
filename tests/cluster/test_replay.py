"""Attention actors are killed in the middle of streams, and no client sees a difference.

Real engines in Ray actors under vLLM's ``AsyncLLM`` with its statistics on, the embedded model in
float32. Every request runs once undisturbed and once with its actor lost; tokens must be equal.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
ray = pytest.importorskip("ray")
pytest.importorskip("vllm")

from prometheus_client import REGISTRY  # noqa: E402
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams  # noqa: E402

from actors.attention import AttentionActor  # noqa: E402
from actors.checkpoint import Checkpoint  # noqa: E402
from actors.engine import AttentionConfig  # noqa: E402
from actors.ffn import FFNActor, FFNConfig  # noqa: E402
from benchmarks.split import split_table  # noqa: E402
from cluster.frontend import adopt_members, make_llm  # noqa: E402
from cluster.names import WORKER_ENV  # noqa: E402
from cluster.pool import AttentionPool  # noqa: E402
from cluster.request_metrics import RequestMetrics  # noqa: E402
from cluster.spec import ClusterSpec, load_spec  # noqa: E402

WAIT_S = 120.0
TOKENS = 40
NAMES = ("attention-0", "attention-1", "attention-2")
SCHEMA = {
    "type": "object",
    "properties": {
        "lines": {
            "type": "array",
            "items": {"enum": ["sea", "storm"]},
            "minItems": 6,
            "maxItems": 6,
        },
        "old": {"type": "boolean"},
    },
    "required": ["lines", "old"],
    "additionalProperties": False,
}
SEEDED = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "seed": 1234}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "seeded": SEEDED,
    "penalties": {
        "temperature": 0.0,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
    "json": {
        **SEEDED,
        "max_tokens": 90,
        "ignore_eos": False,
        "structured_outputs": StructuredOutputsParams(json=SCHEMA),
    },
    "min_tokens": {"temperature": 0.0, "ignore_eos": False, "min_tokens": TOKENS - 5},
    "logprobs": {"temperature": 0.0, "logprobs": 2, "prompt_logprobs": 1},
    "two choices": {**SEEDED, "n": 2},
}


@dataclass
class Choice:
    """What a reader got of one choice."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: int = 0
    end: str | None = None


@dataclass
class Answer:
    """What a reader got of one request."""

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt_logprobs: int = 0

    @property
    def tokens(self) -> dict[int, list[int]]:
        return {index: choice.tokens for index, choice in sorted(self.choices.items())}


class Reader:
    """Asks everything in ``REQUESTS`` at the same time and reads the streams."""

    def __init__(self, llm: Any, prefix: str):
        self.llm = llm
        self.prefix = prefix
        self.answers = {name: Answer() for name in REQUESTS}

    async def run(self) -> dict[str, Answer]:
        await asyncio.wait_for(asyncio.gather(*map(self._ask, REQUESTS)), WAIT_S)
        return self.answers

    async def all_have(self, tokens: int) -> None:
        """Wait until every choice has emitted some tokens."""

        def lacking() -> bool:
            counts = [
                [len(choice.tokens) for choice in answer.choices.values()]
                for name, answer in self.answers.items()
            ]
            return any(min(count, default=0) < tokens for count in counts)

        while lacking():
            await asyncio.sleep(0.002)

    async def _ask(self, name: str) -> None:
        options = {"max_tokens": TOKENS, "ignore_eos": True} | REQUESTS[name]
        params = SamplingParams(output_kind=RequestOutputKind.DELTA, **options)
        answer = self.answers[name]
        prompt = "The sea was calm that morning, and the ship"
        async for output in self.llm.generate(prompt, params, f"{self.prefix}-{name}"):
            answer.prompt_logprobs += output.prompt_logprobs is not None
            for part in output.outputs:
                choice = answer.choices.setdefault(part.index, Choice())
                choice.tokens += part.token_ids
                choice.text += part.text
                choice.logprobs += len(part.logprobs or ())
                choice.end = part.finish_reason or choice.end


@pytest.fixture(scope="module")
def spec() -> ClusterSpec:
    return load_spec(
        None,
        [
            "model.dtype=float32",
            "attention.engine.enforce_eager=true",
            "attention.engine.kv_cache_memory_bytes=67108864",
            "attention.engine.structured_outputs_config={backend: xgrammar, "
            "disable_any_whitespace: true}",
            "membership.wait_s=60",
        ],
    )


@pytest.fixture(scope="module")
def actors(spec: ClusterSpec) -> Iterator[dict[str, Any]]:
    """Three attention actors over one FFN actor."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80_000_000,
        ignore_reinit_error=True,
        runtime_env={
            "env_vars": {**WORKER_ENV, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        },
    )
    try:
        yield _deploy(spec)
    finally:
        ray.shutdown()


def _deploy(spec: ClusterSpec) -> dict[str, Any]:
    def get(calls: Any) -> Any:
        return ray.get(calls, timeout=240)

    model = spec.model.path
    table = split_table(Checkpoint.open(model), ["ffn-0"], 1)
    ffn = ray.remote(FFNActor).options(num_cpus=0, max_concurrency=8).remote()
    engine = dict(spec.attention.engine)
    configs = {
        name: AttentionConfig(name, model, "float32", engine, lanes=1, timeout_s=20.0)
        for name in NAMES
    }
    made = {name: ray.remote(AttentionActor).options(num_cpus=0).remote() for name in NAMES}
    made["ffn-0"] = ffn  # kept alive with the others
    shard = FFNConfig("ffn-0", model, table.shard("ffn-0"), dtype="float32", threads=1)
    get([ffn.start.remote(shard), *(made[name].start.remote(configs[name]) for name in NAMES)])
    for name in NAMES:
        theirs, ours = get([ffn.offer.remote(name), made[name].offer.remote("ffn-0")])
        get(ffn.connect.remote(ours))
        get(made[name].connect.remote(theirs))
    get([made[name].adopt.remote(table) for name in NAMES])
    return made


def members(actors: dict[str, Any], *names: str) -> dict[str, Any]:
    handles = {name: actors[name] for name in names}
    return {"attention": handles, "draining": [], "not_ready": None}


async def kill(actor: Any) -> None:
    os.kill((await actor.info.remote())["pid"], signal.SIGKILL)


def finished() -> float:
    """Requests that vLLM's statistics count as finished."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:request_success_total"
    )


@pytest.mark.timeout(600)
async def test_streams_outlive_their_actors(spec: ClusterSpec, actors: dict[str, Any]) -> None:
    """One actor is killed while another lives; then the last one, before a third joins."""
    metrics = RequestMetrics("verse", "frontend-0", spec.slo)
    one = members(actors, "attention-0")
    llm, _ = await make_llm(spec, one, client_index=0, metrics=metrics)
    try:
        expected = await Reader(llm, "undisturbed").run()
        for name, answer in expected.items():
            for choice in answer.choices.values():
                assert choice.end in ("length", "stop"), name
                assert len(choice.tokens) == TOKENS or name in ("json", "min_tokens")
        thing = json.loads(expected["json"].choices[0].text)
        assert len(thing["lines"]) == 6

        reader = Reader(llm, "killed")
        answers = asyncio.ensure_future(reader.run())
        await asyncio.wait_for(reader.all_have(4), WAIT_S)
        adopt_members(llm, members(actors, "attention-0", "attention-1"))
        await kill(actors["attention-0"])
        check(await answers, expected)
        assert llm.pool.members == ("attention-1",)
        assert llm.pool.replays >= len(REQUESTS)

        reader = Reader(llm, "alone")
        answers = asyncio.ensure_future(reader.run())
        await asyncio.wait_for(reader.all_have(6), WAIT_S)
        await kill(actors["attention-1"])
        while llm.pool.members:
            await asyncio.sleep(0.01)
        assert llm.pool.flights, "they wait"
        assert not answers.done()
        late = asyncio.ensure_future(Reader(llm, "late").run())
        await asyncio.sleep(0)
        adopt_members(llm, members(actors, "attention-0", "attention-2"))
        check(await answers, expected)
        check(await late, expected)
        assert llm.pool.members == ("attention-2",), "the dead one is not asked again"
        assert not llm.errored and not llm.output_processor.request_states
        choices = sum(options.get("n", 1) for options in REQUESTS.values())
        assert finished() >= 4 * (choices - 1)
        await check_metrics(llm, metrics, 4 * choices, expected["greedy"].choices[0].text)
        await check_take_over(llm, actors["attention-2"])
    finally:
        llm.shutdown()


async def check_metrics(llm: Any, metrics: RequestMetrics, answers: int, text: str) -> None:
    """Our own metrics count each of the ``answers`` once, whatever actors it met."""

    def value(name: str, **labels: str) -> float:
        base = {"model_name": "verse", "role": "frontend", "actor_id": "frontend-0"}
        found = metrics.families.registry.get_sample_value(name, {**base, **labels})
        assert found is not None, name
        return found

    assert value("afd_requests_replayed_total") == llm.pool.replays
    for part in ("time_to_first_token", "e2e_request_latency", "request_queue_time"):
        assert value(f"afd_{part}_seconds_count") == answers, part
    times = [
        value(f"afd_request_{part}_time_seconds_sum") for part in ("queue", "prefill", "decode")
    ]
    assert min(times) > 0
    assert sum(times) == pytest.approx(value("afd_e2e_request_latency_seconds_sum"))
    assert value("afd_generation_tokens_total") == value("afd_request_generation_tokens_sum")
    stops = value("afd_requests_total", outcome="stop")
    word = text.split()[3]
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, stop=[word])
    prompt = "The sea was calm that morning, and the ship"
    async for output in llm.generate(prompt, params, "stopped"):
        reason = output.outputs[0].finish_reason
    assert reason == "stop"
    while llm.pool.flights:  # the engine hears of it after its reader has
        await asyncio.sleep(0.01)
    assert value("afd_requests_total", outcome="stop") == stops + 1
    assert value("afd_requests_total", outcome="abort") == 0


async def check_take_over(llm: Any, actor: Any) -> None:
    """A frontend replica that comes after a dead one gets its index, not its requests."""
    reader = Reader(llm, "old")
    reading = asyncio.ensure_future(reader.run())
    await asyncio.wait_for(reader.all_have(1), WAIT_S)
    pool = AttentionPool(llm.pool.client_index)
    pool.set_actors({"attention-2": actor})

    async def held() -> int:
        facts = await actor.info.remote()
        return facts["running"] + facts["waiting"]

    async def aborted() -> None:
        while llm.pool.members or await held():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(aborted(), WAIT_S)
    assert llm.pool.flights, "the old pool would start them again elsewhere"
    assert pool.members == ("attention-2",)
    reading.cancel()
    await asyncio.wait([reading])
    pool.shutdown()


def check(answers: dict[str, Answer], expected: dict[str, Answer]) -> None:
    for name, answer in answers.items():
        want = expected[name]
        assert answer.tokens == want.tokens, name
        for index, choice in answer.choices.items():
            assert choice.text == want.choices[index].text, name
            assert choice.end == want.choices[index].end, name
        assert answer.prompt_logprobs == want.prompt_logprobs, "told once"
    logprobs = answers["logprobs"].choices[0]
    assert logprobs.logprobs == len(logprobs.tokens) == TOKENS
