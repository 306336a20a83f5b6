"""What a deployment is: the cluster spec, as YAML on disk and as frozen models in memory.

Everything that can be refused by reading the text alone is refused here. What needs the checkpoint
or the machine (is the model a mixture of experts, is the port free) is in ``preflight.py``.
A new section is a new model with defaults and a field on ``ClusterSpec``.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from actors.errors import AffluxError
from cluster.paths import default_spec, find_model
from cluster.spec_text import explain, parse_override, parse_yaml, show, with_override

Role = Literal["attention", "ffn"]
ROLES: tuple[Role, ...] = ("attention", "ffn")
MAX_LANES = 8

# Engine arguments that afflux sets itself, and what to use instead.
OWNED_ENGINE_ARGS = {
    "model": "set model.path",
    "tokenizer": "put the tokenizer into the model's folder",
    "served_model_name": "set model.served_name",
    "dtype": "set model.dtype",
    "worker_cls": "afflux brings its own worker (the lanes)",
    "load_format": "afflux decides which tensors are read",
    "distributed_executor_backend": "every actor is one process",
    "tensor_parallel_size": "every actor is one process; change the pool's count instead",
    "pipeline_parallel_size": "every actor is one process; change the pool's count instead",
    "data_parallel_size": "change attention.count instead",
    "enable_expert_parallel": "experts are spread over ffn.count actors",
    "enable_eplb": "experts are placed by afflux",
    "enable_dbo": "set lanes",
    "ubatch_size": "set lanes",
}
# Refused above only when they ask for more than one.
_HARMLESS_AT_ONE = {"tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"}
_HARMLESS_WHEN_FALSE = {"enable_expert_parallel", "enable_eplb", "enable_dbo"}
OWNED_FRONTEND_ARGS = {
    "host": "set frontend.host",
    "port": "set frontend.port",
    "api_key": "put the keys into the environment variable named by frontend.api_keys_env",
    "model": "set model.path",
    "served_model_name": "set model.served_name",
}
_RAY_RESOURCES = {"CPU": "cpus", "GPU": "gpus", "memory": "memory_gib"}


class SpecError(AffluxError):
    """A spec that can't be used; the text names the file, the key, the value and the remedy."""

    code = "bad_spec"


class _Section(BaseModel):
    """Frozen, strict about types, and closed: an unknown key is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelSpec(_Section):
    """Which checkpoint is served."""

    path: str = Field(min_length=1)
    """Folder in Hugging Face layout (config.json, *.safetensors, tokenizer), readable under the
    same path on every node. A relative path is tried against the spec file's folder, the working
    directory and the project's root, in this order."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto takes the checkpoint's own."""

    served_name: str | None = None
    """The model name that clients use; null takes the name of the folder."""


class ResourceSpec(_Section):
    """What Ray reserves for one actor. Ray counts these; it does not enforce them."""

    cpus: float = Field(default=1.0, ge=0)
    """Logical CPUs. An actor computes with max(1, whole part) threads."""

    gpus: float = Field(default=0.0, ge=0)
    """GPUs: a whole number, or a fraction below 1 to share one."""

    memory_gib: float | None = Field(default=None, gt=0)
    """Main memory in GiB to reserve; null reserves none."""

    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Custom Ray resources by name, such as {afd_ffn: 1}, to pick nodes by type."""

    @field_validator("gpus")
    @classmethod
    def _whole_gpus(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("expected a whole number, or a fraction below 1")
        return gpus

    @field_validator("custom")
    @classmethod
    def _really_custom(cls, custom: dict[str, float]) -> dict[str, float]:
        for name in custom:
            if name in _RAY_RESOURCES:
                raise ValueError(f"{name} is Ray's own; set resources.{_RAY_RESOURCES[name]}")
        return custom

    @model_validator(mode="after")
    def _something(self) -> "ResourceSpec":
        if not (self.cpus or self.gpus or self.memory_gib or self.custom):
            raise ValueError("an actor needs some resource; set cpus (0.01 is enough), gpus, ...")
        return self

    def bundle(self) -> dict[str, float]:
        """The same as a Ray placement group bundle, zeros left out (memory in bytes)."""
        memory = (self.memory_gib or 0.0) * 2**30
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": memory, **self.custom}
        return {name: amount for name, amount in named.items() if amount}


class PoolSpec(_Section):
    """A pool of equal actors."""

    count: int = Field(default=1, ge=1)
    """Actors at start."""

    min: int = Field(default=1, ge=1)
    """The fewest that scaling may leave."""

    max: int = Field(default=4, ge=1)
    """The most that scaling may make."""

    resources: ResourceSpec = ResourceSpec()
    """What each actor gets."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Ray label selector for the nodes of this pool, such as {afflux.io/role: ffn}."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Arguments passed to vLLM's engine in each actor, by vLLM's own names (max_model_len,
    enforce_eager, ...). Those that afflux owns are refused."""

    @field_validator("engine")
    @classmethod
    def _engine_is_not_ours(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for name, value in engine.items():
            harmless = (name in _HARMLESS_AT_ONE and value == 1 and value is not True) or (
                name in _HARMLESS_WHEN_FALSE and value is False
            )
            if not harmless:
                _refuse_owned(name, value, OWNED_ENGINE_ARGS)
        return engine

    @model_validator(mode="after")
    def _in_range(self) -> "PoolSpec":
        if self.min > self.max:
            raise ValueError(f"min is {self.min} and max is {self.max}; expected min <= max")
        if not self.min <= self.count <= self.max:
            side = "max" if self.count > self.max else "min"
            raise ValueError(
                f"count is {self.count}, outside min..max = {self.min}..{self.max}; "
                f"change count or {side}"
            )
        return self


class AttentionSpec(PoolSpec):
    """The pool of attention actors."""


class FFNSpec(PoolSpec):
    """The pool of FFN actors; together they hold every routed expert."""

    count: int = Field(default=2, ge=1)
    """Actors at start; at most the number of the model's experts."""

    max: int = Field(default=8, ge=1)
    """The most that scaling may make."""

    min_replicas: int = Field(default=1, ge=1)
    """FFN actors that hold each expert, at least. With 2, the loss of one actor is not felt: its
    frames go to the other holder at once."""

    redundant_experts: int = Field(default=0, ge=0)
    """Further copies per layer, given to the experts with the highest measured load, so that their
    load is shared (vLLM's num_redundant_experts)."""

    expert_memory_gib: float | None = Field(default=None, gt=0)
    """The most GiB of expert weights that one actor may hold; null sets no limit. Copies that don't
    fit are left out; a change under which an expert would have no holder is refused."""


class TransportSpec(_Section):
    """The data plane between attention and FFN actors."""

    ucx_tls: str | None = Field(default=None, min_length=1)
    """UCX transports to use, as in UCX_TLS ("tcp", "rc,cuda_copy"); null lets UCX choose."""

    net_devices: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.:,-]+$")
    """Network devices to use, as in UCX_NET_DEVICES ("eth1", "mlx5_0:1,mlx5_1:1"). null: on a node
    without RDMA devices the interface that has the node's address in Ray, else UCX's choice."""

    probe_links: bool = True
    """Measure the links between nodes before the first actors are placed, about a second per node;
    false goes by the nodes' labels. A single node has no links."""

    max_frame_tokens: int = Field(default=512, ge=1, le=65536)
    """The most tokens in one frame; a larger batch travels as several frames, two at a time: one is
    computed while the next is on its way. Smaller hides more of a slow network, larger reads the
    experts' weights less often. Sizes the buffers that every pair of actors registers."""

    timeout_s: float = Field(default=10.0, gt=0)
    """Seconds an attention actor waits for an answer before it takes the FFN actor for lost and
    asks another holder."""

    peer_weights_mib: float = Field(default=64.0, ge=0)
    """MiB of expert weights from which on an FFN actor may read them from the memory of another
    that holds them, where that is quicker than the checkpoint. 0 always asks."""


class FrontendSpec(_Section):
    """The OpenAI-compatible HTTP server."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on; 0.0.0.0 for every interface."""

    port: int = Field(default=8000, ge=1, le=65535)
    """TCP port to listen on."""

    replicas: int = Field(default=1, ge=1, le=64)
    """Ray Serve replicas."""

    cpus: float = Field(default=0.25, ge=0)
    """Logical CPUs that Ray reserves per replica."""

    labels: dict[str, str] = Field(default_factory=dict)
    """Ray label selector for the nodes of the replicas, of the manager and of the controller, such
    as {afflux.io/role: head}: what a lost GPU node should not take with it."""

    api_keys_env: str | None = Field(default="AFFLUX_API_KEYS", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Name of the environment variable with the API keys, separated by commas. When it is unset
    or empty, or this is null, every request is let in. Keys themselves never go into a spec."""

    max_requests: int = Field(default=1024, ge=1)
    """Requests that one replica has in hand, running or waiting; beyond it, HTTP 429."""

    admin_keys_env: str | None = Field(
        default="AFFLUX_ADMIN_KEYS", pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"
    )
    """Name of the environment variable with the keys for /admin (scale, retire, flip, ...),
    separated by commas. When it is unset or empty, or this is null, /admin is closed."""

    engine: dict[str, Any] = Field(default_factory=dict)
    """Arguments of vLLM's OpenAI server by vLLM's own names (enable_auto_tool_choice, ...)."""

    @field_validator("engine")
    @classmethod
    def _server_is_not_ours(cls, engine: dict[str, Any]) -> dict[str, Any]:
        for name, value in engine.items():
            _refuse_owned(name, value, OWNED_FRONTEND_ARGS)
        return engine


class MembershipSpec(_Section):
    """How actors come and go while serving."""

    replace_lost: bool = True
    """Start an actor in place of one that was lost."""

    silence_s: float = Field(default=5.0, gt=0)
    """Seconds without a sign of life after which an actor counts as lost. (An FFN actor that leaves
    a frame unanswered is lost after transport.timeout_s; an ended process at once.)"""

    wait_s: float = Field(default=60.0, gt=0)
    """Seconds that requests wait for lost experts or for any attention actor; then HTTP 503."""

    drain_s: float = Field(default=10.0, ge=0)
    """Seconds that a retiring attention actor may go on with its requests; what is left then goes
    on at another actor."""

    prepare_s: float = Field(default=300.0, gt=0)
    """Seconds that a change may take to start processes, load weights and connect; then it is
    rolled back. A repair that failed has twice as long at its next attempt, up to eight times."""

    commit_s: float = Field(default=10.0, gt=0)
    """Seconds within which every attention actor must have adopted a new expert table; one that has
    not counts as lost."""


class LineSpec(_Section):
    """Seconds as a line: a_s per unit of load, and b_s."""

    a_s: float = Field(default=0.0, ge=0)
    """Seconds per unit of load."""

    b_s: float = Field(default=0.0, ge=0)
    """Seconds whatever the load."""


class EmulateSpec(_Section):
    """Emulated devices: every stage of a layer lasts at least its modelled time, by sleeping.

    For trying out ratios with more actors than the machine has cores. Control plane, data plane and
    tokens are real; times are the model's wherever the machine is quicker. The lines are t_A, t_F
    and t_C of arXiv 2601.21351, per layer.
    """

    attention: LineSpec = LineSpec()
    """One layer's attention of one lane; the load is the sum of its requests' context tokens."""

    ffn: LineSpec = LineSpec()
    """One kernel call of an FFN actor; the load is its (token, expert) pairs."""

    transfer: LineSpec = LineSpec()
    """One frame one way; the load is its bytes."""


class SLOSpec(_Section):
    """Service level targets: reported, and what the autoscaler holds when it is on."""

    ttft_s: float = Field(default=2.0, gt=0)
    """Time to first token in seconds, queueing included."""

    tpot_s: float = Field(default=0.2, gt=0)
    """Time per output token after the first, in seconds."""

    percentile: float = Field(default=0.9, gt=0, lt=1)
    """Share of requests that must meet both."""


class AutoscalerSpec(_Section):
    """The controller, which changes the numbers of actors so that the targets in ``slo`` hold."""

    mode: Literal["off", "advise", "on"] = "off"
    """off: no controller. advise: it says what it would do, and does nothing. on: it acts."""

    policy: str = Field(default="slo_feedback", min_length=1)
    """What decides: the name of a policy (afflux policy list), or module:Class of your own."""

    parameters: dict[str, Any] = Field(default_factory=dict)
    """The policy's parameters; afflux policy list shows them."""

    interval_s: float = Field(default=2.0, ge=0.1)
    """Seconds between two decisions."""

    window_s: float = Field(default=20.0, gt=0)
    """Seconds of measurements that a decision rests on, fewer after a change."""

    min_total: int | None = Field(default=None, ge=2)
    """The fewest actors of both roles together; null: the sum of the pools' min."""

    max_total: int | None = Field(default=None, ge=2)
    """The most actors of both roles together; null: the sum of the pools' max. Equal to min_total
    it fixes the budget: only the ratio moves, both roles at once or neither."""

    max_step: int = Field(default=2, ge=1)
    """The most actors of one role that one decision adds or takes away."""

    cooldown_s: float = Field(default=10.0, ge=0)
    """Seconds after a change in which nothing is changed."""

    shrink_cooldown_s: float = Field(default=60.0, ge=0)
    """Seconds after a change in which nothing shrinks, and no role goes back to where it was."""

    weight_attention: float = Field(default=1.0, gt=0)
    """Price or power of an attention actor, in any unit, for policies that weigh roles."""

    weight_ffn: float = Field(default=1.0, gt=0)
    """Price or power of an FFN actor, in the same unit."""

    latencies: str | None = Field(default=None, min_length=1)
    """File of afflux fit with the stage times to begin with; what is measured while serving takes
    over. null begins with what emulate says, or with nothing."""

    rebalance: bool = True
    """Ask for a new placement of the experts when their imbalance costs more than moving them."""

    @field_validator("mode", mode="before")
    @classmethod
    def _yaml_word(cls, mode: Any) -> Any:
        """YAML takes on and off for truth values; who writes them means the words."""
        return {True: "on", False: "off"}[mode] if isinstance(mode, bool) else mode


class MetricsSpec(_Section):
    """Prometheus metrics: every process serves its own, the manager lists where."""

    enabled: bool = True
    """Serve them. Without, `afflux top` and dashboards have nothing to show."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address that every process listens on; 0.0.0.0 for every interface, which a Prometheus on
    another machine and a deployment on several nodes need. Metrics need no key: open the address to
    nobody else."""

    port: int = Field(default=9464, ge=0, le=65535)
    """TCP port of the manager's metrics and of /sd, the list for Prometheus. When it is taken, or
    0, any free one; `afflux status` shows it. The other processes take any free port."""

    expert_tokens: bool = False
    """Count tokens by layer and expert too: one series for each pair."""


class TracingSpec(_Section):
    """OpenTelemetry traces of requests: at the front door, at each attention actor, per step."""

    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://[^\s/]+(/\S*)?$")
    """URL of an OTLP receiver, such as http://localhost:4318; null traces nothing. Every node must
    reach it. Headers for it, such as a token, go into the environment variable
    OTEL_EXPORTER_OTLP_HEADERS of every node."""

    protocol: Literal["http/protobuf", "grpc"] = "http/protobuf"
    """What the receiver speaks; its usual ports are 4318 and 4317. For http/protobuf an endpoint
    without a path means /v1/traces."""

    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of requests to trace. A client that sends a traceparent header decides itself."""


class ClusterSpec(_Section):
    """A whole deployment."""

    name: str = Field(default="afflux", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$")
    """Name of the deployment: lower case letters, digits and dashes, at most 40. Several may share
    a Ray cluster under different names."""

    model: ModelSpec
    """The model to serve."""

    attention: AttentionSpec = AttentionSpec()
    """The actors that hold everything but the routed experts."""

    ffn: FFNSpec = FFNSpec()
    """The actors that hold the routed experts."""

    transport: TransportSpec = TransportSpec()
    """How they reach each other."""

    lanes: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_LANES)] = "auto"
    """Micro-batches that take turns, so that attention computes while experts are remote: auto
    chooses for every step from measured times, a number fixes it (1 never splits)."""

    frontend: FrontendSpec = FrontendSpec()
    """The front door."""

    warm_workers: int = Field(default=1, ge=0, le=64)
    """Processes kept ready without a role: everything is imported, so that starting or flipping an
    actor takes about the time of loading weights. Each takes main memory and no device."""

    membership: MembershipSpec = MembershipSpec()
    """How actors come and go."""

    slo: SLOSpec = SLOSpec()
    """What a good answer is."""

    autoscaler: AutoscalerSpec = AutoscalerSpec()
    """Who decides how many actors there are."""

    metrics: MetricsSpec = MetricsSpec()
    """What is measured, and where it can be read."""

    tracing: TracingSpec = TracingSpec()
    """Where traces of requests go."""

    emulate: EmulateSpec | None = None
    """Emulated devices; null uses the real ones."""

    startup_timeout_s: float = Field(default=600.0, gt=0)
    """Seconds until a deployment that isn't ready counts as failed."""

    @field_validator("lanes", mode="before")
    @classmethod
    def _lanes(cls, lanes: Any) -> Any:
        number = isinstance(lanes, int) and not isinstance(lanes, bool)
        if lanes == "auto" or (number and 1 <= lanes <= MAX_LANES):
            return lanes
        raise ValueError(f"expected auto, or a whole number from 1 to {MAX_LANES}")

    @property
    def served_name(self) -> str:
        """The model name that clients use."""
        return self.model.served_name or Path(self.model.path).name

    def pool(self, role: Role) -> PoolSpec:
        """The pool of ``role``."""
        return self.attention if role == "attention" else self.ffn


def load_spec(path: str | Path | None = None, overrides: Sequence[str] = ()) -> ClusterSpec:
    """Read, override and validate a spec.

    Args:
        path: a YAML file; None takes the spec of the embedded model.
        overrides: texts ``a.b=c`` whose value is read as YAML, applied in order.

    Returns:
        the spec; ``model.path`` is absolute if the folder was found, else as it was written
        (``preflight`` refuses it with the places that were tried).

    Raises:
        SpecError: with every problem in one text.
    """
    file = default_spec() if path is None else Path(path)
    try:
        data = parse_yaml(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SpecError(f"cannot read the spec {file}: {reason}") from None
    except ValueError as error:
        raise SpecError(f"the spec {file} is not valid YAML\n  {error}") from None
    return make_spec(data, overrides, file=file)


def make_spec(data: Any, overrides: Sequence[str] = (), *, file: Path | None = None) -> ClusterSpec:
    """``load_spec`` for data that has been parsed already; ``file`` is for paths and errors."""
    name = f"the spec {file}" if file else "the spec"
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise SpecError(f"{name} holds {show(data)}; expected a mapping of keys to values")
    for text in overrides:
        try:
            key, value = parse_override(text)
            data = with_override(data, key, value)
        except ValueError as error:
            raise SpecError(f"cannot use --set {text}: {error}") from None
    try:
        spec = ClusterSpec.model_validate(data)
    except ValidationError as error:
        problems = explain(error, ClusterSpec, overrides)
        raise SpecError(f"{name} cannot be used\n{problems}") from None
    found, _ = find_model(spec.model.path, file)
    if found is None:
        return spec
    model = spec.model.model_copy(update={"path": str(found)})
    return spec.model_copy(update={"model": model})


def _refuse_owned(name: str, value: Any, owned: dict[str, str]) -> None:
    if not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
        plain = name.lstrip("-").replace("-", "_")
        raise ValueError(f"{name} is no argument name of vLLM's Python API; write {plain}")
    if name in owned:
        raise ValueError(f"{name}: {show(value)} is not yours to set here; {owned[name]}")
