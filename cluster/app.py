"""The Serve application: what ``serve run``, ``serve deploy`` and KubeRay start.

    serve run cluster.app:build spec=deploy/specs/embedded.yaml

or in a Serve configuration file ``import_path: cluster.app:build`` with ``args: {spec: ...}``. The
replicas find or start the deployment's manager, which starts everything else. Imports no vLLM:
this runs wherever an application is built.
"""

from __future__ import annotations

from typing import Any

from ray.serve import Application

from cluster import companion, preflight
from cluster.api_keys import KeyRing
from cluster.frontend import Frontend
from cluster.names import WORKER_ENV
from cluster.spec import ClusterSpec, SpecError, load_spec, make_spec

MORE_ONGOING = 1024
"""Requests that Serve lets one replica hold beyond frontend.max_requests, so that a refusal is ours
and says when to come back, and health checks always find room."""


def build(args: dict[str, Any]) -> Application:
    """Build the application from arguments.

    Args:
        args: ``spec``: path of a spec file, or the spec itself as a mapping; without it, the
            embedded model's. ``set``: overrides ``key=value``, a list or one text with commas.

    Raises:
        SpecError: unknown arguments, or a spec that can't be used.
        CheckpointError: the spec's model can't be served.
    """
    unknown = sorted(set(args) - {"spec", "set"})
    if unknown:
        raise SpecError(f"unknown arguments {unknown}; known are spec=FILE and set=KEY=VALUE,...")
    overrides = args.get("set") or []
    if isinstance(overrides, str):
        overrides = overrides.split(",")
    given = args.get("spec")
    spec = make_spec(given, overrides) if isinstance(given, dict) else load_spec(given, overrides)
    preflight.check_engine_args(spec)
    companion.check(spec)
    return application(spec, owned_by_serve=True)


def application(spec: ClusterSpec, *, owned_by_serve: bool) -> Application:
    """The application of a spec; API and admin keys are read from this process's environment.

    Args:
        owned_by_serve: deleting the application ends the whole deployment.
    """
    keys = KeyRing.from_env(spec.frontend.api_keys_env)
    admin_keys = KeyRing.from_env(spec.frontend.admin_keys_env)
    deployment = Frontend.options(  # type: ignore[attr-defined]
        num_replicas=spec.frontend.replicas,
        max_ongoing_requests=spec.frontend.max_requests + MORE_ONGOING,
        ray_actor_options={
            "num_cpus": spec.frontend.cpus,
            "label_selector": dict(spec.frontend.labels),
            "runtime_env": {"env_vars": {**WORKER_ENV, "OMP_NUM_THREADS": "1"}},
        },
        health_check_period_s=10,
        graceful_shutdown_timeout_s=10,
    )
    return deployment.bind(spec.model_dump(mode="json"), keys, admin_keys, owned_by_serve)
