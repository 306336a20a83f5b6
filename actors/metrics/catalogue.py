"""Every metric that afflux exports, as data: name, kind, labels, help, and who exports it.

One list for the processes that export, for the dashboards, rules and alerts that ask, and for the
tests that hold the two together. Names start with ``afd_``, are in base units and hold no colon
(Ray's agents and OpenMetrics scrapes would rewrite one). Not for values: see ``exporter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Side = Literal["frontend", "attention", "ffn", "manager", "controller"]
Kind = Literal["counter", "gauge", "histogram"]

MODEL = "model_name"
WHO = (MODEL, "role", "actor_id")
"""Labels of everything that one process says of itself; manager and controller have only the first,
because their ``role`` is the role that is counted."""

# vLLM's buckets (vllm.v1.metrics.loggers), plus 1, 2.5, 5 and 7.5 ms between tokens.
TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_S = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
STEP_S = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
    10.0,
)  # fmt: skip
# Edges that the hop histograms of the transport have too, so that nothing is counted anew.
HOP_S = tuple(2.0**n * 1e-6 for n in (*range(2, 16), 17, 19, 21, 23))
CHANGE_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
BATCH = tuple(float(1 << n) for n in range(15))
LANES = tuple(float(n) for n in range(1, 9))
LENGTH = (
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0,
    50000.0, 100000.0, 200000.0, 500000.0, 1000000.0,
)  # fmt: skip

OUTCOMES = ("stop", "length", "abort", "error")
REJECTIONS = ("queue_full", "no_actor")
SLOS = ("ttft", "tpot", "both")
FAULTS = ("lost", "silent", "refused")
DIRECTIONS = ("dispatch", "combine")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: as Prometheus shows it, a counter's ``_total`` included; a histogram's without
            ``_bucket``.
        kind: its Prometheus type.
        help: one line, with the unit where the name has none.
        sides: which processes export it.
        labels: besides those that every series of its process has (``base_labels``).
        buckets: upper edges of a histogram.
        opt_in: exported only if the spec asks for it.
    """

    name: str
    kind: Kind
    help: str
    sides: tuple[Side, ...]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    opt_in: bool = False

    @property
    def label_names(self) -> tuple[str, ...]:
        """All labels of a series, in order."""
        return (*base_labels(self.sides[0]), *self.labels)


def base_labels(side: Side) -> tuple[str, ...]:
    """Labels of every series of a process."""
    return (MODEL,) if side in ("manager", "controller") else WHO


def of(side: Side) -> dict[str, Metric]:
    """What a process of one side exports, by name."""
    return {metric.name: metric for metric in METRICS if side in metric.sides}


def _h(side: Side, name: str, help: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, "histogram", help, (side,), labels, buckets)


def _c(side: Side, name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", help, (side,), labels)


def _g(side: Side, name: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", help, (side,), labels)


_BOTH: tuple[Side, ...] = ("attention", "ffn")

_FRONTEND = (
    _h(
        "frontend",
        "afd_time_to_first_token_seconds",
        "From a request's arrival at the front door, queueing included, to its first token.",
        TTFT_S,
    ),
    _h(
        "frontend",
        "afd_inter_token_latency_seconds",
        "Between two messages of a stream that follow each other, per token after the first.",
        ITL_S,
    ),
    _h(
        "frontend",
        "afd_time_per_output_token_seconds",
        "Mean time per output token after the first, one value per finished request.",
        ITL_S,
    ),
    _h(
        "frontend",
        "afd_e2e_request_latency_seconds",
        "From a request's arrival at the front door to its last token.",
        REQUEST_S,
    ),
    _h(
        "frontend",
        "afd_request_queue_time_seconds",
        "From a request's arrival until an attention actor first scheduled it.",
        REQUEST_S,
    ),
    _h(
        "frontend",
        "afd_request_prefill_time_seconds",
        "From a request's first scheduling to its first token.",
        REQUEST_S,
    ),
    _h(
        "frontend",
        "afd_request_decode_time_seconds",
        "From a request's first token to its last, replays and waits included.",
        REQUEST_S,
    ),
    _h("frontend", "afd_request_prompt_tokens", "Prompt tokens of finished requests.", LENGTH),
    _h("frontend", "afd_request_generation_tokens", "Output tokens of finished requests.", LENGTH),
    _c(
        "frontend",
        "afd_prompt_tokens_total",
        "Prompt tokens whose computation has ended, counted with a request's first token.",
    ),
    _c("frontend", "afd_generation_tokens_total", "Output tokens, counted while they stream."),
    _c("frontend", "afd_requests_total", "Finished requests by outcome.", "outcome"),
    _c(
        "frontend",
        "afd_requests_rejected_total",
        "Requests that were not accepted or found no actor in time (HTTP 429, 503).",
        "reason",
    ),
    _c(
        "frontend",
        "afd_requests_replayed_total",
        "Times that a request was started again at another attention actor.",
    ),
    _g("frontend", "afd_requests_running", "Requests that are at an attention actor."),
    _g("frontend", "afd_requests_waiting", "Accepted requests that wait for an attention actor."),
    _g("frontend", "afd_slo_target_seconds", "The spec's target.", "slo"),
    _g(
        "frontend",
        "afd_slo_objective_ratio",
        "Share of requests that must meet their targets (slo.percentile).",
    ),
    _c("frontend", "afd_slo_requests_total", "Requests that count for a target.", "slo"),
    _c("frontend", "afd_slo_good_requests_total", "Requests that met a target.", "slo"),
)

_ATTENTION = (
    _g("attention", "afd_attention_requests_running", "Requests that the engine's steps hold."),
    _g("attention", "afd_attention_requests_waiting",
       "Requests that wait in the engine's scheduler."),
    _g("attention", "afd_attention_kv_cache_usage_ratio", "KV-cache blocks in use, 0 to 1."),
    _g("attention", "afd_attention_kv_cache_tokens",
       "Tokens that the KV-cache blocks in use have room for."),
    _g("attention", "afd_attention_kv_cache_capacity_tokens",
       "Tokens that the KV cache has room for."),
    _h("attention", "afd_attention_batch_tokens", "Tokens scheduled in a step.", BATCH),
    _h("attention", "afd_attention_step_seconds", "One engine step, scheduling included.", STEP_S),
    _h("attention", "afd_attention_compute_seconds",
       "Of a step: everything but the wait for FFN actors.", STEP_S),
    _h("attention", "afd_attention_wait_seconds",
       "Of a step: nothing to do until an FFN actor answers.", STEP_S),
    _h("attention", "afd_attention_lanes", "Lanes that a step ran in.", LANES),
    _c("attention", "afd_attention_preemptions_total",
       "Requests that lost their KV cache for lack of room."),
    _c("attention", "afd_attention_prefix_cache_queries_total",
       "Prompt tokens looked up in the prefix cache."),
    _c("attention", "afd_attention_prefix_cache_hits_total",
       "Prompt tokens found in the prefix cache."),
    _c("attention", "afd_attention_steps_repeated_total",
       "Forward passes that lost their experts and were run again under a newer table."),
    _h("attention", "afd_commit_pause_seconds",
       "What the first step under a new expert table took more than a usual one, the gap before it "
       "included; not of steps that had lost their experts.", CHANGE_S),
    _c("attention", "afd_faults_total",
       "FFN actors that this attention actor stopped using, by what it noticed.", "kind"),
    _c("attention", "afd_transport_resends_total",
       "Frames sent again to another holder of their experts."),
    _c("attention", "afd_transport_bytes_total",
       "Payload of frames, dispatch (to FFN actors) and combine (back).",
       "direction", "transport"),
    _c("attention", "afd_transport_seconds_total",
       "Time of frames on the wire by direction, summed over frames.", "direction", "transport"),
    _c("attention", "afd_transport_frames_total",
       "Frames by direction.", "direction", "transport"),
    _h("attention", "afd_transport_hop_seconds",
       "Round trips of frames by stage (queue, wire_out, boarding, compute, reply, wire_back, "
       "total).", HOP_S, "stage"),
)  # fmt: skip

_FFN = (
    _h("ffn", "afd_ffn_step_seconds",
       "One ride of frames, from taking them up to the last answer sent.", STEP_S),
    _h("ffn", "afd_ffn_compute_seconds", "Of a ride: the kernels.", STEP_S),
    _h("ffn", "afd_ffn_boarding_wait_seconds", "From a frame's arrival until its ride left.",
       HOP_S),
    _h("ffn", "afd_ffn_batch_tokens", "Tokens of a ride.", BATCH),
    _c("ffn", "afd_ffn_busy_seconds_total", "Time spent on rides."),
    _c("ffn", "afd_ffn_idle_seconds_total", "Time without anything to do."),
    _g("ffn", "afd_ffn_queue_depth", "Frames that wait for a ride."),
    _g("ffn", "afd_ffn_experts", "Experts held, all layers together."),
    _g("ffn", "afd_ffn_weight_bytes", "Memory of the experts held."),
    _g("ffn", "afd_ffn_expert_load_balance_ratio",
       "Greatest over mean load of the experts held, mean over layers; 1 is even."),
    Metric("afd_ffn_expert_tokens_total", "counter",
           "(token, expert) pairs asked for, a sample of every eighth step times eight.",
           ("ffn",), ("layer", "expert"), opt_in=True),
    _c("ffn", "afd_transport_refusals_total",
       "Frames refused, by reason (stale_epoch, unknown_expert, ...).", "reason"),
)  # fmt: skip

_SHARED = (
    Metric("afd_table_epoch", "gauge",
           "Attention: epoch of the expert table in use; FFN: the oldest one still served.", _BOTH),
)  # fmt: skip

_MANAGER = (
    _g("manager", "afd_actors", "Actors by role and state.", "role", "state"),
    _g("manager", "afd_actors_target", "Actors wanted.", "role"),
    _g("manager", "afd_actors_slow",
       "Actors that frames take long to reach, for the links between nodes.", "role"),
    _g("manager", "afd_attention_ffn_ratio", "Ready attention actors per ready FFN actor."),
    _g("manager", "afd_attention_ffn_target_ratio", "Wanted attention per wanted FFN actor."),
    _g("manager", "afd_epoch", "Epoch of the newest expert table."),
    _g("manager", "afd_experts_without_holder", "(layer, expert) pairs that no live actor holds."),
    _g("manager", "afd_healthy", "1 when every actor that is wanted serves, else 0."),
    _g("manager", "afd_warm_workers", "Processes without a role that are ready to take one."),
    _g("manager", "afd_warm_workers_target", "Processes without a role that are wanted."),
    _c("manager", "afd_scale_events_total", "Ended changes.", "verb", "outcome"),
    _h("manager", "afd_scale_duration_seconds",
       "Duration of changes by phase (prepare, commit, release, total).", CHANGE_S, "phase"),
    _g("manager", "afd_change_age_seconds",
       "Since the begin of the change under way; 0 without one."),
    _h("manager", "afd_recovery_seconds",
       "From the loss of an actor until as many serve as are wanted, by the lost actor's role.",
       CHANGE_S, "role"),
    _c("manager", "afd_actors_lost_total", "Actors lost (not those retired).", "role"),
    _c("manager", "afd_actor_restarts_total", "Actors started in place of lost ones.", "role"),
    _c("manager", "afd_gpu_seconds_total", "GPUs reserved times seconds.", "role"),
    _c("manager", "afd_cpu_seconds_total", "CPUs reserved times seconds.", "role"),
    _g("manager", "afd_manager_heartbeat_timestamp_seconds",
       "Unix time at which the manager's event loop last turned."),
    _g("manager", "afd_wire_slowness_ratio",
       "Frames' time on the wire to an actor over that to the fastest of its role.",
       "role", "actor_id"),
    _g("manager", "afd_build_info", "1; versions are in the labels.",
       "version", "vllm", "ray", "torch", "nixl"),
    _g("manager", "afd_config_info", "1; the deployment's settings are in the labels.",
       "deployment", "lanes", "emulated", "dtype"),
)  # fmt: skip

_CONTROLLER = (
    _g("controller", "afd_controller_advised_actors",
       "Actors that the policy wants, within its limits, whether or not that is done.", "role"),
    _g("controller", "afd_controller_advised_ratio", "The same as attention per FFN actor."),
    _c("controller", "afd_controller_decisions_total",
       "Ticks by every reason that they gave.", "reason"),
    _g("controller", "afd_controller_acting",
       "1 when the controller acts, 0 when it is paused or only advises."),
    _g("controller", "afd_controller_last_tick_timestamp_seconds", "Unix time of the last tick."),
    _h("controller", "afd_controller_tick_seconds",
       "Duration of a tick, from asking the actors to the decision.", CHANGE_S),
    _g("controller", "afd_controller_telemetry_age_seconds",
       "Age of the newest measurement at the last tick."),
    _g("controller", "afd_controller_model_error_ratio",
       "Median of |predicted / observed - 1| of TPOT over recent windows."),
    _g("controller", "afd_controller_model_reliable",
       "1 when decisions are derived from the latency model, else 0."),
)  # fmt: skip

METRICS: tuple[Metric, ...] = (
    *_FRONTEND,
    *_ATTENTION,
    *_FFN,
    *_SHARED,
    *_MANAGER,
    *_CONTROLLER,
)
