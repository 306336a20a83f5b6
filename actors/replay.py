"""Starting a request again from where it was: emitted tokens come back as *output* tokens.

An attention actor that takes over a request gets its prompt, its parameters and the tokens that the
client has already. They must count as output, not as a longer prompt: limits, penalties, logits
processors, grammar and a seeded generator then go on as if nothing had happened. Two halves: the
engine's (``restore``, on vLLM's ``Request``) and the model runner's (``ReplayRunner``). Not for
deciding what is replayed, or where.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from actors.errors import AffluxError

COMPILE_S = 60.0
"""The longest that a replay waits for its grammar."""


class ReplayError(AffluxError):
    """A request that can't be started again from its emitted tokens."""

    code = "replay_refused"


async def grammar_ready(request: Any) -> None:
    """Return once the grammar of vLLM's ``Request`` is compiled, or has failed to compile.

    ``restore`` waits for it as well, but on the thread that calls it.
    """
    structured = request.structured_output_request
    if structured is not None and isinstance(structured._grammar, Future):
        await asyncio.wait([asyncio.wrap_future(structured._grammar)], timeout=COMPILE_S)


def restore(core: Any, request: Any, emitted: Sequence[int]) -> None:
    """Give a fresh ``Request`` its emitted tokens back, before the scheduler sees it.

    Args:
        core: vLLM's ``EngineCore``.
        request: made by ``core.preprocess_add_request``; changed in place.
        emitted: token ids that the client has already.

    Raises:
        ReplayError: a pooling request or a streaming session, or the grammar does not accept what
            was emitted.
    """
    if not emitted:
        return
    params = request.sampling_params
    if params is None or request.resumable:
        what = "a pooling request" if params is None else "a streaming session"
        raise ReplayError(f"{request.request_id} is {what}; it can't go on after {len(emitted)}")
    if request.use_structured_output:
        _restore_with_grammar(core.structured_output_manager, request, emitted)
    else:
        request.append_output_token_ids(list(emitted))
    # Told with the first token, which the client has. (vLLM also takes it for a fact that no
    # cached prefix is longer than the prompt; this one's may be.)
    request.prefill_stats = None
    if params.prompt_logprobs is not None:
        request.sampling_params = params.clone()
        request.sampling_params.prompt_logprobs = None


def _restore_with_grammar(manager: Any, request: Any, emitted: Sequence[int]) -> None:
    """Token by token, as the scheduler does: reasoning may end at any of them."""
    structured = request.structured_output_request
    if isinstance(structured._grammar, Future):
        structured._grammar.exception(COMPILE_S)
    if isinstance(structured.grammar, Exception):
        request.append_output_token_ids(list(emitted))
        return  # the scheduler ends the request with it
    for count, token in enumerate(emitted):
        request.append_output_token_ids(token)
        if not manager.accept_tokens(request, [token]):
            raise ReplayError(
                f"{request.request_id}: its grammar refuses token {token}, which was emitted after "
                f"{count} others"
            )


def advance(generator: torch.Generator, draws: int, sampler: Any, vocab_size: int) -> None:
    """Advance a request's generator as if ``draws`` tokens had been sampled with it.

    Args:
        generator: freshly seeded.
        draws: tokens sampled so far; each takes one draw, whatever top-k and top-p are.
        sampler: vLLM's ``TopKTopPSampler``, which draws in different ways on different platforms.
        vocab_size: columns of the logits.
    """
    own_noise = getattr(sampler.forward, "__name__", "") == "forward_cpu"
    if own_noise and not sampler.use_fp64_gumbel:
        for _ in range(draws):  # a seed for the noise of one row
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        return
    dtype = torch.float64 if sampler.use_fp64_gumbel else torch.float32
    row = torch.empty(vocab_size, dtype=dtype, device=generator.device)
    for _ in range(draws):
        row.exponential_(generator=generator)


class ReplayRunner:
    """Mixed into vLLM's model runner: new requests may have output tokens already.

    ``emitted_of`` is set by the engine: a request's id to its output tokens at the scheduler.
    """

    emitted_of: Callable[[str], Sequence[int]] = staticmethod(lambda request_id: ())
    _kept_out: dict[int, torch.Generator] | None = None

    def _update_states(self, scheduler_output: Any) -> Any:
        returning: dict[str, list[int]] = {}
        for new in scheduler_output.scheduled_new_reqs:
            emitted = self.emitted_of(new.req_id)
            if len(emitted) > 0:
                returning[new.req_id] = list(emitted)
        if not returning:
            return super()._update_states(scheduler_output)  # type: ignore[misc]
        batch = self.input_batch  # type: ignore[attr-defined]
        add_request = batch.add_request

        def add_with_emitted(state: Any) -> int:
            emitted = returning.get(state.req_id)
            if emitted is not None and not state.output_token_ids:
                state.output_token_ids.extend(emitted)
                if state.generator is not None:
                    sampler = self.sampler.topk_topp_sampler  # type: ignore[attr-defined]
                    advance(state.generator, len(emitted), sampler, batch.vocab_size)
            return add_request(state)

        batch.add_request = add_with_emitted
        try:
            return super()._update_states(scheduler_output)  # type: ignore[misc]
        finally:
            del batch.add_request

    # A request whose prefill is cut into chunks is sampled at every chunk, and the token discarded.
    # vLLM takes its generator back by one draw then, which generators of the CPU can't do: the
    # whole step would fail. Kept out of the batch, the generator isn't drawn from at all.

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        generators = self.input_batch.generators  # type: ignore[attr-defined]
        if generators:
            count = self.input_batch.num_reqs  # type: ignore[attr-defined]
            discarded = self.discard_request_mask.np[:count].nonzero()[0]  # type: ignore[attr-defined]
            self._kept_out = {
                row: generators.pop(row) for row in discarded.tolist() if row in generators
            }
        try:
            return super()._sample(*args, **kwargs)  # type: ignore[misc]
        except BaseException:
            self._put_back()
            raise

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._bookkeeping_sync(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._put_back()

    def _put_back(self) -> None:
        if self._kept_out:
            self.input_batch.generators.update(self._kept_out)  # type: ignore[attr-defined]
        self._kept_out = None
