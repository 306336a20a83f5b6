"""Actors in plain processes, without Ray: what the offline benchmarks and the token tests run on.

``Remote`` puts an object into a spawned process with its own environment and cores, and calls its
methods over a pipe. Not for serving: there Ray starts, places and restarts the actors.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Sequence
from typing import Any

VLLM_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "NIXL_LOG_LEVEL": "WARN",
    "TOKENIZERS_PARALLELISM": "false",
}


def _serve(pipe: Any, env: dict[str, str], cores: Sequence[int] | None, make: Callable[[], Any]):
    os.environ.update(env)
    if cores:
        os.sched_setaffinity(0, cores)
    try:
        target = make()
        pipe.send((True, None))
    except BaseException as error:
        pipe.send((False, _portable(error)))
        return
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, getattr(target, method)(*args, **kwargs)))
        except BaseException as error:
            pipe.send((False, _portable(error)))


def _portable(error: BaseException) -> BaseException:
    error.__notes__ = ["".join(traceback.format_exception(error))]
    return error


class Remote:
    """An object in another process. Attribute access gives a method that calls over.

    Args:
        make: picklable function that builds the object there.
        threads: OpenMP threads of the process.
        cores: cores that it may run on, or None for all.
        wait: seconds until a call is given up (and the process killed).
    """

    def __init__(
        self,
        make: Callable[[], Any],
        *,
        threads: int = 1,
        cores: Sequence[int] | None = None,
        env: dict[str, str] | None = None,
        wait: float = 300.0,
    ):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._wait = wait
        full = VLLM_ENV | {"OMP_NUM_THREADS": str(threads)} | (env or {})
        # OpenMP reads the environment when torch is loaded, which unpickling ``make`` may do first
        saved = {key: os.environ.get(key) for key in full}
        os.environ.update(full)
        try:
            self.process = context.Process(
                target=_serve, args=(child, full, cores, make), daemon=True
            )
            self.process.start()
        finally:
            for key, value in saved.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        child.close()
        self._built = False

    def ready(self) -> "Remote":
        """Wait until the object is built; raises what its constructor raised."""
        if not self._built:
            self._receive()
            self._built = True
        return self

    def _receive(self) -> Any:
        if not self._pipe.poll(self._wait):
            self.kill()
            raise TimeoutError(f"no answer from process {self.process.pid} in {self._wait:g} s")
        ok, value = self._pipe.recv()
        if not ok:
            raise value
        return value

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.ready()
            self._pipe.send((method, args, kwargs))
            return self._receive()

        return call

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.join(10)
