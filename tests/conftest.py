"""Fixtures for every test: random small checkpoints, made once per session when first asked for."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.models import make_dense, make_moe, stack_experts

# A shared machine may stall for seconds; how long an example takes says nothing about the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``moe_checkpoint(family, dtype=torch.float32)`` -> folder of that family's checkpoint.

    Families are the keys of ``tests.models.CONFIGS`` and ``"stacked"``: the same model as
    ``"qwen3_moe"``, with all experts of a layer in one 3-D tensor on disk.
    """
    made: dict[tuple[str, torch.dtype], Path] = {}

    def checkpoint(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"{family}-{str(dtype)[6:]}"
            if family == "stacked":
                made[family, dtype] = stack_experts(checkpoint("qwen3_moe", dtype), folder)
            else:
                made[family, dtype] = make_moe(family, folder, dtype=dtype)
        return made[family, dtype]

    return checkpoint


@pytest.fixture(scope="session")
def dense_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without experts."""
    return make_dense(tmp_path_factory.mktemp("checkpoints") / "dense")


VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}


@pytest.fixture(scope="session")
def vllm_process() -> Iterator[Callable[..., Any]]:
    """``vllm_process(function, *args)`` calls a module-level function in a process of its own.

    vLLM's registries, process groups and caches are global to a process, so tests that build
    expert shards share this one process and none of them touches pytest's. The function returns
    plain data and raises what it raises; the test asserts here, where pytest explains.
    """
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment:
        for name, value in VLLM_ENVIRONMENT.items():
            environment.setenv(name, value)
        pid = pool.submit(os.getpid).result()  # the process starts here and inherits these
    yield lambda function, *args: pool.submit(function, *args).result(timeout=240)
    os.kill(pid, signal.SIGKILL)  # it may be stuck in a kernel, and the session shall end
    pool.shutdown()
