"""Names and environment that every process of a deployment agrees on.

One place, because the launcher, the manager, the frontend and the tests must all find the same
actors. No logic beyond spelling.
"""

from __future__ import annotations

NAMESPACE = "afflux"

WORKER_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "NIXL_LOG_LEVEL": "WARN",
    # An engine is one process; without this, each of its groups resolves the host's name, listens
    # on what comes of it, and where no DNS knows the name, waits for minutes.
    "GLOO_SOCKET_IFNAME": "lo",
}
"""Environment of every process that imports vLLM; what the node has set already wins."""


def manager_name(deployment: str) -> str:
    """Ray name of a deployment's manager."""
    return f"{deployment}:manager"


def controller_name(deployment: str) -> str:
    """Ray name of a deployment's controller."""
    return f"{deployment}:controller"


def actor_name(deployment: str, member: str) -> str:
    """Ray name of an attention or FFN actor (``member`` as in ``ffn-0``) and of its place."""
    return f"{deployment}:{member}"
