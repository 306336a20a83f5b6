"""An attention engine: vLLM's engine core with its routed experts taken out. No Ray here.

Builds the engine in this process, binds the seam to an ``ExpertsClient``, and offers the few verbs
an actor needs: add, abort, step. One engine per process (vLLM's own registries are per process).
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from actors import replay
from actors.emulate import Emulation
from actors.errors import AffluxError
from actors.lanes import MAX_LANES, LaneChooser
from actors.metrics.config import MetricsConfig
from actors.table import ExpertTable
from actors.tracing import TracingConfig
from actors.transport.endpoint import Endpoint, Offer
from actors.transport.geometry import Geometry

if TYPE_CHECKING:
    from actors.request_spans import RequestSpans

logger = logging.getLogger(__name__)

# What afflux decides itself; a spec that sets one of these is refused at the door.
OWNED_ENGINE_ARGS = frozenset(
    {
        "model",
        "dtype",
        "load_format",
        "worker_cls",
        "distributed_executor_backend",
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "enable_expert_parallel",
        "enable_eplb",
        "enable_dbo",
        "ubatch_size",
        "all2all_backend",
    }
)


@dataclass(frozen=True)
class AttentionConfig:
    """What an attention actor is told when it starts.

    Args:
        name: actor name, unique in the cluster.
        model: checkpoint folder.
        dtype: vLLM's ``dtype`` argument (``auto``, ``bfloat16``, ``float32``, ...).
        engine: engine arguments passed to vLLM as they are.
        lanes: lanes of a step, or None to choose per step.
        max_frame_tokens: rows per dispatch frame.
        timeout_s: deadline of a frame.
        ucx_tls: UCX transport list, or None for UCX's own choice.
        wait_s: how long a step that lost its experts waits for a newer expert table.
        emulate: modelled times of attention and wire, or None for the real ones alone.
        threads: torch threads of the engine; None leaves torch's choice.
        metrics: export metrics, see ``metrics.attention``; None exports none.
        tracing: export spans of traced requests; None traces nothing.
        secret: shared by the deployment's actors, see ``transport.trust``; never logged.
        address: of this node in the cluster; see ``transport.interfaces``.
    """

    name: str
    model: str
    dtype: str = "auto"
    engine: dict[str, Any] = field(default_factory=dict)
    lanes: int | None = None
    max_frame_tokens: int = 512
    timeout_s: float = 10.0
    ucx_tls: str | None = None
    wait_s: float = 60.0
    emulate: Emulation | None = None
    threads: int | None = None
    metrics: MetricsConfig | None = None
    tracing: TracingConfig | None = None
    secret: bytes = field(default=b"", repr=False)
    address: str | None = None


_KV_CACHE_BYTES = 1 << 30


def _size_kv_cache(engine: dict[str, Any]) -> None:
    """On a CPU: the KV cache that the engine arguments ask for, else 1 GiB.

    vLLM would take nearly all of the machine's memory for one engine, and lets its old environment
    variable win over the argument; here what the spec says wins.
    """
    variable = "VLLM_CPU_KVCACHE_SPACE"
    if "kv_cache_memory_bytes" in engine or "gpu_memory_utilization" in engine:
        os.environ.pop(variable, None)
    elif not os.environ.get(variable):
        engine["kv_cache_memory_bytes"] = _KV_CACHE_BYTES


class AttentionEngine:
    """vLLM's engine core in this process, attention and everything but routed experts.

    Args:
        config: see ``AttentionConfig``.

    Raises:
        CheckpointError: the checkpoint is missing, truncated or dense.
        UnsupportedModel: vLLM builds no routed experts for it through the seam.
        AffluxError: engine arguments that afflux owns, or that vLLM refuses.
    """

    def __init__(self, config: AttentionConfig):
        from actors.checkpoint import Checkpoint

        owned = sorted(OWNED_ENGINE_ARGS & config.engine.keys())
        if owned:
            raise AffluxError(
                f"attention.engine sets {owned}, which afflux decides itself; remove them",
                code="bad_engine_args",
            )
        self.config = config
        self.checkpoint = Checkpoint.open(config.model)
        self.chooser = LaneChooser(config.lanes)
        self.core, self.vllm_config = self._build_core()
        self.weight_bytes = self._count_weights()
        """Bytes of the parameters and buffers that this process holds."""
        self.geometry = self._geometry()
        self.endpoint = Endpoint(
            config.name,
            self.geometry,
            self.checkpoint.digest,
            device=self.vllm_config.device_config.device.type,
            ucx_tls=config.ucx_tls,
            secret=config.secret,
        )
        self._bind()

    def _build_core(self) -> tuple[Any, Any]:
        # The engine is single-process here: vLLM's own process per engine would put the model, and
        # with it the seam, where this object can't reach.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        from vllm.engine.arg_utils import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.core import EngineCore
        from vllm.v1.executor.abstract import Executor

        from actors import seam
        from actors.loader import LOAD_FORMAT
        from actors.runner import AttentionWorker
        from actors.vllm_models import inspect_in_process

        inspect_in_process(self.checkpoint.config.get("architectures") or ())
        AttentionWorker.chooser = self.chooser
        engine = dict(self.config.engine)
        if current_platform.is_cpu():
            _size_kv_cache(engine)
        else:
            # the remote call is host code between kernels, which a captured graph would not repeat
            engine.setdefault("compilation_config", {"cudagraph_mode": "NONE"})
        try:
            args = EngineArgs(
                model=self.config.model,
                dtype=self.config.dtype,  # type: ignore[arg-type]
                load_format=LOAD_FORMAT,
                worker_cls="actors.runner.AttentionWorker",
                distributed_executor_backend="uni",
                **engine,
            )
        except TypeError as error:
            raise AffluxError(f"attention.engine: {error}", code="bad_engine_args") from error
        vllm_config = args.create_engine_config()
        core = EngineCore(vllm_config, Executor.get_class(vllm_config), log_stats=True)
        seam.check_layers(self.config.model)
        return core, vllm_config

    def _geometry(self) -> Geometry:
        from actors.seam import Seam

        shapes = {(e.moe_config.hidden_dim, e.top_k) for e in Seam.layers.values()}
        if len(shapes) != 1:
            raise AffluxError(
                f"{self.config.model}: MoE layers differ in (hidden size, top-k): "
                f"{sorted(shapes)}; afflux needs them equal",
                code="unsupported_model",
            )
        ((hidden, top_k),) = shapes
        return Geometry(
            hidden=hidden,
            top_k=top_k,
            dtype=str(self.vllm_config.model_config.dtype).removeprefix("torch."),
            max_tokens=self.config.max_frame_tokens,
            lanes=MAX_LANES,
        )

    def _bind(self) -> None:
        from actors.experts_client import ExpertsClient
        from actors.seam import Seam

        self.client = ExpertsClient(
            self.endpoint,
            self.chooser,
            max_tokens=self.config.max_frame_tokens,
            timeout=self.config.timeout_s,
            wait_s=self.config.wait_s,
            emulate=self.config.emulate,
        )
        Seam.bind(self.client)
        runner = self.core.model_executor.driver_worker.worker.model_runner
        runner.emitted_of = self._emitted_of

    # -- peers and table (callable from any thread) ----------------------------------------------

    def offer(self, peer: str) -> Offer:
        """This side's half of a connection with ``peer``."""
        return self.endpoint.offer(peer)

    def connect(self, offer: Offer) -> None:
        """Complete a connection.

        A peer that the table in use names may get frames at once: connect its side first.

        Raises:
            PeerMismatch: the peer serves something else.
        """
        self.endpoint.connect(offer)
        self.client.peer_joined(offer.name)

    def disconnect(self, peer: str) -> None:
        """Forget a peer; a step that waits for it asks others instead."""
        self.endpoint.disconnect(peer)

    def adopt(self, table: ExpertTable) -> "Future[int]":
        """Use ``table`` from the next step on; the future gives the epoch once it is in use.

        Raises:
            AffluxError: the table's layers are not the layers of this model, or see
                ``Adoption.adopt``.
        """
        from actors.seam import Seam

        mine = tuple(sorted(Seam.layers))
        if table.layers != mine:
            raise AffluxError(
                f"expert table of epoch {table.epoch} has layers {table.layers}, but the model's "
                f"MoE layers are {mine}",
                code="bad_table",
            )
        return self.client.adopt(table)

    # -- requests --------------------------------------------------------------------------------

    def add(self, request: Any, emitted: Sequence[int] = ()) -> None:
        """Queue an ``EngineCoreRequest``, to go on after the tokens ``emitted`` elsewhere.

        Raises:
            ReplayError: it can't go on from them.
        """
        self.admit(self.prepare(request), emitted)

    def prepare(self, request: Any) -> Any:
        """vLLM's ``Request``; its grammar, if it has one, is being compiled on another thread."""
        prepared, _ = self.core.preprocess_add_request(request)
        return prepared

    def admit(self, prepared: Any, emitted: Sequence[int] = ()) -> None:
        """Queue what ``prepare`` made; see ``add``."""
        old = self.core.scheduler.requests.get(prepared.request_id)
        if old is not None and not old.resumable:
            self.abort([prepared.request_id])  # its client has started it again
        replay.restore(self.core, prepared, emitted)
        self.core.add_request(prepared)
        if self.spans is not None:
            self.spans.admitted(prepared, len(emitted))

    def abort_client(self, client_index: int) -> None:
        """Forget every request of a client."""
        requests = self.core.scheduler.requests.values()
        self.abort([r.request_id for r in requests if r.client_index == client_index])

    def _emitted_of(self, request_id: str) -> Sequence[int]:
        request = self.core.scheduler.requests.get(request_id)
        return () if request is None or request.resumable else request.output_token_ids

    def abort(self, request_ids: list[str]) -> None:
        """Forget requests; unknown ids are ignored."""
        if request_ids:
            self.core.abort_requests(request_ids)
            if self.spans is not None:
                self.spans.ended(request_ids, "abort")

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return self.core.scheduler.has_requests() or bool(self.core.batch_queue)

    def step(self) -> dict[int, Any]:
        """One engine step. Returns ``EngineCoreOutputs`` per client index.

        When the step fails (experts without a holder, and no newer table in time) every unfinished
        request ends with finish reason ``error`` and the stop reason "[code] text"; the engine can
        go on with new requests. The exception is kept in ``last_error``.
        """
        began = time.perf_counter()
        try:
            outputs, executed = self.core.step_fn()
            self.core.post_step(model_executed=executed)
        except Exception as error:
            self.last_error = error
            self.last_error_at = time.time()
            outputs = self._fail_all(error)
        outputs = outputs or {}
        if self.observer is not None:
            self.observer(began, outputs)
        if self.spans is not None:
            self.spans.stepped(began, outputs)
        return outputs

    last_error: Exception | None = None
    last_error_at: float | None = None
    observer: Callable[[float, dict[int, Any]], None] | None = None
    """Told of every step: when it began (``time.perf_counter()``) and what it returns."""
    spans: "RequestSpans | None" = None
    """Told of requests and steps, for traces."""

    def _fail_all(self, error: Exception) -> dict[int, Any]:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.request import RequestStatus

        code = error.code if isinstance(error, AffluxError) else "step_failed"
        reason = f"[{code}] {error}"
        scheduler = self.core.scheduler
        lost = list(scheduler.requests.values())
        scheduler.finish_requests(
            [request.request_id for request in lost], RequestStatus.FINISHED_ERROR
        )
        if self.core.batch_queue:
            self.core.batch_queue.clear()
        # vLLM enters a prompt's blocks into the prefix cache when it schedules them, and this step
        # never filled them: whoever hit them would read what lay there before.
        if not scheduler.reset_prefix_cache():
            logger.error("the prefix cache could not be emptied after a failed step")
        by_client: dict[int, list[str]] = defaultdict(list)
        for request in lost:
            by_client[request.client_index].append(request.request_id)
        return {
            client: EngineCoreOutputs(
                outputs=[
                    EngineCoreOutput(
                        request_id, [], finish_reason=FinishReason.ERROR, stop_reason=reason
                    )
                    for request_id in ids
                ],
                finished_requests=set(ids),
            )
            for client, ids in by_client.items()
        }

    # -- facts -----------------------------------------------------------------------------------

    def _count_weights(self) -> int:
        model = self.core.model_executor.driver_worker.worker.model_runner.model
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.is_meta)

    def close(self) -> None:
        """Release the endpoint and the engine."""
        from actors.seam import Seam

        Seam.unbind()
        self.endpoint.close()
        self.core.shutdown()
