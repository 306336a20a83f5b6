"""vLLM's ``AsyncLLM`` on top of an ``AttentionPool``, and the arguments that both are made from.

vLLM's own argument parser turns the spec's ``engine`` sections into its configuration, so every
option of ``vllm serve`` keeps its meaning. Not for HTTP: see ``frontend.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from cluster.log_targets import kept_log_targets
from cluster.pool import AttentionPool, engine_client
from cluster.spec import ClusterSpec, SpecError


class PooledLLM(AsyncLLM):
    """``AsyncLLM`` whose engine is a pool of attention actors.

    Args:
        config: vLLM's configuration, the same as at the actors.
        pool: the pool, made in the running loop.
    """

    def __init__(self, config: VllmConfig, pool: AttentionPool, *, log_requests: bool = False):
        self.pool = pool
        self.not_ready: str | None = None
        pool.on_failure = self._on_failure
        with engine_client(pool):
            super().__init__(
                config,
                Executor.get_class(config),
                log_stats=True,
                usage_context=UsageContext.OPENAI_API_SERVER,
                log_requests=log_requests,
            )

    async def check_health(self) -> None:
        """Raises ``EngineDeadError`` while no attention actor can take a request."""
        await super().check_health()
        if self.not_ready or not self.pool.open:
            raise EngineDeadError()

    def abandon(self, request_ids: Iterable[str]) -> None:
        """Abort engine requests that nobody reads any more; those that have ended are ignored."""
        left = [request_id for request_id in request_ids if request_id in self.pool.flights]
        if left:
            self._aborting = asyncio.ensure_future(self.abort(left, internal=True))

    def _on_failure(self, request_ids: list[str], reason: Exception) -> None:
        """Hand the reason to the callers; vLLM alone would say "internal server error"."""
        siblings: set[str] = set()
        for request_id in request_ids:
            state = self.output_processor.request_states.get(request_id)
            if state is None:
                continue
            if state.queue is not None:
                state.queue.put(reason)
            if state.parent_req is not None:
                siblings.add(state.parent_req.request_id)
        if siblings:  # the other choices of a request with n > 1 have no reader any more
            self._aborting = asyncio.ensure_future(self.abort(siblings, internal=True))


def server_args(spec: ClusterSpec) -> Namespace:
    """Arguments of vLLM's OpenAI server for a spec.

    Raises:
        SpecError: names the argument that vLLM doesn't know or doesn't accept.
    """
    parser = make_arg_parser(_Parser(add_help=False))
    given: dict[str, Any] = {
        "model": spec.model.path,
        "dtype": spec.model.dtype,
        "served_model_name": [spec.served_name],
        **spec.attention.engine,
        **spec.frontend.engine,
    }
    args = parser.parse_args(_as_command_line(parser, given))
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise SpecError(f"frontend.engine: {error}") from error
    return args


def engine_config(args: Namespace) -> VllmConfig:
    """vLLM's configuration as the frontend needs it: tokenizer, limits, no weights.

    Raises:
        SpecError: vLLM refuses the model or a combination of arguments.
    """
    try:
        with kept_log_targets():  # vLLM configures logging here, and Serve's access log would go
            engine_args = AsyncEngineArgs.from_cli_args(args)
            return engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (TypeError, ValueError) as error:
        raise SpecError(f"vLLM refuses this configuration: {error}") from error


class _Parser(FlexibleArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise SpecError(f"attention.engine / frontend.engine: {message}")


def _as_command_line(parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> list[str]:
    """``{"enable_x": False, "stop": [1, 2]}`` -> ``["--no-enable-x", "--stop", "1", "2"]``."""
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    words: list[str] = []
    for name, value in given.items():
        action = actions.get(name)
        if action is None:
            raise SpecError(f"vLLM's server has no argument {name!r}; see `vllm serve --help`")
        option = max(action.option_strings, key=len)
        if value is None:
            continue
        if isinstance(value, bool) and action.nargs == 0:
            yes = f"--{name.replace('_', '-')}"
            no = f"--no-{name.replace('_', '-')}"
            if value:
                words.append(yes if yes in action.option_strings else option)
            elif no in action.option_strings:
                words.append(no)
        elif isinstance(value, dict):
            words.append(f"{option}={json.dumps(value)}")
        elif isinstance(value, (list, tuple)):
            if action.nargs in ("+", "*"):
                words += [option, *map(str, value)]
            else:
                words.append(f"{option}={json.dumps(value)}")
        else:
            words.append(f"{option}={value}")
    return words
