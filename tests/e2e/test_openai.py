"""The HTTP surface with the ``openai`` SDK as the client, over attention and FFN actors."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest

from cluster.spec import ClusterSpec

LONG = 900
"""Tokens of a request that nobody will wait for."""

Left = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]

MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]


def test_models(client: openai.OpenAI, model: str) -> None:
    assert [entry.id for entry in client.models.list()] == [model]


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=12, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens <= 12


def test_greedy_answers_repeat(client: openai.OpenAI, model: str) -> None:
    texts = {
        client.completions.create(model=model, prompt="The sea", max_tokens=16, temperature=0)
        .choices[0]
        .text
        for _ in range(3)
    }
    assert len(texts) == 1


def test_stream_equals_whole_and_reports_usage(client: openai.OpenAI, model: str) -> None:
    whole = client.completions.create(
        model=model, prompt="Once upon a time", max_tokens=16, temperature=0
    )
    chunks = list(
        client.completions.create(
            model=model,
            prompt="Once upon a time",
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(texts) == whole.choices[0].text
    assert len(texts) > 4, "tokens must arrive one by one"
    assert chunks[-1].usage == whole.usage


def test_chat_stream(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=8, temperature=0, stream=True
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content
    for token in logprobs.content:
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob), "greedy is the top"


def test_stop_string(client: openai.OpenAI, model: str) -> None:
    free = client.completions.create(model=model, prompt="The sea", max_tokens=16, temperature=0)
    text = free.choices[0].text
    stop = text[len(text) // 2 :][:3]
    cut = client.completions.create(
        model=model, prompt="The sea", max_tokens=16, temperature=0, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == text[: text.index(stop)]


def test_several_choices(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(
        model=model, prompt="The sea", max_tokens=6, n=3, temperature=1.0, seed=7
    )
    assert sorted(choice.index for choice in answer.choices) == [0, 1, 2]
    assert answer.usage is not None and answer.usage.completion_tokens <= 18


def test_seed_repeats(client: openai.OpenAI, model: str) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=model, prompt="The sea", max_tokens=16, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert ask(11) == ask(11)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_structured_output(client: openai.OpenAI, model: str) -> None:
    schema = {
        "type": "object",
        "properties": {"kind": {"enum": ["ship", "storm"]}, "old": {"type": "boolean"}},
        "required": ["kind", "old"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=64,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
    )
    thing = json.loads(answer.choices[0].message.content or "")
    assert thing["kind"] in ("ship", "storm") and isinstance(thing["old"], bool)


def test_structured_choice(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        max_tokens=16,
        extra_body={"structured_outputs": {"choice": ["north", "south"]}},
    )
    assert answer.choices[0].message.content in ("north", "south")


def test_tokenize_round_trip(http: httpx.Client, model: str) -> None:
    tokens = http.post("/tokenize", json={"model": model, "prompt": "The sea is wide."}).json()
    assert tokens["count"] == len(tokens["tokens"]) > 0
    text = http.post("/detokenize", json={"model": model, "tokens": tokens["tokens"]}).json()
    assert text["prompt"].endswith("The sea is wide.")


def test_health_and_metrics_need_no_key(url: str) -> None:
    assert httpx.get(f"{url}/health").status_code == 200
    metrics = httpx.get(f"{url}/metrics").text
    assert "vllm:num_requests_running" in metrics


# -- what must be refused --------------------------------------------------------------------------


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic a2V5"])
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/chat/completions", "/tokenize", "/invocations"]
)
def test_wrong_key(url: str, path: str, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    answer = httpx.post(url + path, json={}, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_wrong_key_in_the_sdk(url: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()


def test_prompt_too_long(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"(?i)maximum (context|model) length|longer"):
        client.completions.create(model=model, prompt="sea " * 4000, max_tokens=4)


@pytest.mark.parametrize("body", [b"{", b'{"model": }', b"[1, 2", b'"text"'])
def test_malformed_json(http: httpx.Client, body: bytes) -> None:
    answer = http.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)


def test_bad_parameters(client: openai.OpenAI, model: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)):
        client.chat.completions.create(model=model, messages=MESSAGES, temperature=-3)


def test_unknown_path(http: httpx.Client) -> None:
    assert http.get("/v1/no-such-path").status_code == 404


# -- many at once, and clients that go away --------------------------------------------------------


async def _stream(client: openai.AsyncOpenAI, model: str, prompt: str, tokens: int) -> int:
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )
    count = 0
    async for chunk in stream:
        if chunk.usage is not None:
            count = chunk.usage.completion_tokens
    return count


def test_many_streams(async_client: openai.AsyncOpenAI, model: str) -> None:
    async def run() -> list[int]:
        return await asyncio.gather(
            *(_stream(async_client, model, f"Chapter {i}:", 8 + i) for i in range(24))
        )

    assert asyncio.run(run()) == [8 + i for i in range(24)]


def test_one_request_too_many(
    async_client: openai.AsyncOpenAI, model: str, spec: ClusterSpec, running: Callable[[], int]
) -> None:
    """Beyond frontend.max_requests: 429 and when to come back; the others go on."""

    def ask() -> Any:
        return async_client.completions.create(
            model=model,
            prompt="The sea",
            max_tokens=LONG,
            stream=True,
            extra_body={"ignore_eos": True},
        )

    async def run() -> None:
        streams = await asyncio.gather(*(ask() for _ in range(spec.frontend.max_requests)))
        with pytest.raises(openai.RateLimitError, match="requests are in hand") as error:
            await ask()
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        assert error.value.body["code"] == 429  # type: ignore[index]
        assert [entry.id async for entry in async_client.models.list()] == [model]
        assert await anext(aiter(streams[0]))
        for stream in streams:
            await stream.close()

    asyncio.run(run())
    deadline = time.monotonic() + 60
    while running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running() == 0


@pytest.mark.parametrize("left_after", [1, 2, 3, 5, 8, 13, 21, 34])
def test_a_stream_that_is_left_leaves_the_engine(
    async_client: openai.AsyncOpenAI, model: str, left_at_once: Left, left_after: int
) -> None:
    """At whatever moment: while a chunk is sent, while the engine computes, right at the start."""

    async def leave() -> None:
        stream = await async_client.completions.create(
            model=model,
            prompt="The sea",
            max_tokens=LONG,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = 0
        async for _ in stream:
            chunks += 1
            if chunks == left_after:
                break
        await stream.close()

    left_at_once(leave)


def test_a_plain_request_that_is_left_leaves_the_engine(
    async_client: openai.AsyncOpenAI, model: str, left_at_once: Left, running: Callable[[], int]
) -> None:
    async def leave() -> None:
        request = async_client.completions.create(
            model=model, prompt="The sea", max_tokens=LONG, extra_body={"ignore_eos": True}
        )
        task = asyncio.create_task(request)
        deadline = time.monotonic() + 30
        while running() == 0 and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        assert running() == 1
        task.cancel()
        await asyncio.wait([task])

    left_at_once(leave)


@pytest.fixture
def left_at_once(engines: Callable[[], list[dict[str, Any]]], running: Callable[[], int]) -> Left:
    """Runs a client that goes away, and checks that its request did not run to its end.

    Steps are counted, not seconds: an orphan takes all of them, on machines of any speed.
    """

    def steps() -> int:
        return sum(fact["stats"]["steps"] for fact in engines())

    def check(leave: Callable[[], Coroutine[Any, Any, None]]) -> None:
        assert running() == 0
        before = steps()
        asyncio.run(leave())
        deadline = time.monotonic() + 60
        while running() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert running() == 0
        assert steps() - before < LONG, "the engine ran an abandoned request to its end"

    return check
