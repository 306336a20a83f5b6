"""The dashboard of a step: who waits for whom, what a hop costs, which experts are hot."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from dashboards.frame import Row, dashboard, deployment_variables, query_variable
from dashboards.panels import (
    GREEN,
    RED,
    YELLOW,
    AnyPanel,
    Query,
    gauges,
    heat,
    lines,
    number,
)
from dashboards.queries import buckets, mean, most, quantile, rate, series, share, total

UID = "afflux-dataplane"

ATTENTION = 'actor_id=~"$attention"'
FFN = 'actor_id=~"$ffn"'
LAYER = 'layer=~"$layer"'

_STEP = "afd_attention_step_seconds"
_WAIT = "afd_attention_wait_seconds"
_COMPUTE = "afd_attention_compute_seconds"
_HOP = "afd_transport_hop_seconds"
_STAGES = 'stage!="total"'
_BUSY, _IDLE = "afd_ffn_busy_seconds_total", "afd_ffn_idle_seconds_total"


def build() -> models.Dashboard:
    """The dashboard."""
    return dashboard(
        UID,
        "afflux / Data plane and experts",
        "Inside a step: attention and FFN time beside each other, the bubble between them, every "
        "stage of a hop, bytes on the wire, how full batches are, which experts are hot, and the "
        "KV cache. Answers the question: which side is short?",
        [
            *deployment_variables(),
            query_variable(
                "attention",
                "Attention actor",
                'label_values(afd_attention_step_seconds_count{job=~"$job", '
                'deployment=~"$deployment"}, actor_id)',
                "Attention actors that are shown.",
            ),
            query_variable(
                "ffn",
                "FFN actor",
                'label_values(afd_ffn_step_seconds_count{job=~"$job", '
                'deployment=~"$deployment"}, actor_id)',
                "FFN actors that are shown.",
            ),
            query_variable(
                "layer",
                "Layer",
                'label_values(afd_ffn_expert_tokens_total{job=~"$job", '
                'deployment=~"$deployment"}, layer)',
                "Layers of the expert heatmap; there with metrics.expert_tokens: true only.",
            ),
        ],
        [
            Row("Now", _now()),
            Row("Attention and FFN time", _time()),
            Row("Hops and wire", _hops()),
            Row("Batches and lanes", _batches()),
            Row("Experts", _experts()),
            Row("KV cache and scheduling", _kv()),
            Row("Trouble on the way", _trouble()),
        ],
    )


def bubble(*by: str) -> str:
    """Share of attention steps in which there is nothing to do until an FFN actor answers."""
    return share(
        total(rate(f"{_WAIT}_sum", ATTENTION), *by), total(rate(f"{_STEP}_sum", ATTENTION), *by)
    )


def ffn_busy(*by: str) -> str:
    """Share of the time in which FFN actors work."""
    busy, idle = total(rate(_BUSY, FFN), *by), total(rate(_IDLE, FFN), *by)
    return f"{busy} / ({busy} + {idle})"


def _now() -> list[AnyPanel]:
    return [
        number(
            "Bubble",
            "Share of attention steps spent waiting for FFN actors with nothing else to do. Below "
            "20 % is good. High with busy FFN actors: add FFN actors. High with idle ones: the "
            "wire or small batches; look at the hops, try more lanes.",
            "percentunit",
            Query(f"avg({series('afd:bubble_ratio:rate1m', ATTENTION)})"),
            steps=((None, GREEN), (0.2, YELLOW), (0.4, RED)),
            decimals=1,
        ),
        number(
            "FFN actors busy",
            "Share of the time in which FFN actors work. Near 100 %: they are the short side. "
            "Below 40 %: there are more of them than attention actors can feed.",
            "percentunit",
            Query(ffn_busy()),
            decimals=1,
        ),
        number(
            "Attention step",
            "Mean duration of an engine step: about the time between two tokens of a stream. Its "
            "parts are below.",
            "s",
            Query(mean(_STEP, matchers=(ATTENTION,))),
        ),
        number(
            "Round trip",
            "Median time of a frame from attention to FFN and back, compute included.",
            "s",
            Query(quantile(0.5, _HOP, matchers=(ATTENTION, 'stage="total"'))),
        ),
        number(
            "Wire",
            "Bytes of hidden states per second, both directions.",
            "Bps",
            Query(total(rate("afd_transport_bytes_total", ATTENTION))),
        ),
        number(
            "Lanes",
            "Mean number of lanes that steps ran in. 1 at small batches is right: lanes pay only "
            "where compute hides the wire.",
            "short",
            Query(mean("afd_attention_lanes", matchers=(ATTENTION,))),
            decimals=1,
        ),
        number(
            "Expert imbalance",
            "Greatest over mean load of an FFN actor's experts, worst actor. Above 2: afflux "
            "rebalance places them anew from their measured load.",
            "short",
            Query(f"max({series('afd_ffn_expert_load_balance_ratio', FFN)})"),
            steps=((None, GREEN), (2, YELLOW), (4, RED)),
            decimals=2,
        ),
        number(
            "KV cache",
            "Use of the KV cache at the fullest attention actor. Above 90 % requests wait or are "
            "preempted: add attention actors, or give each more memory.",
            "percentunit",
            Query(f"max({series('afd_attention_kv_cache_usage_ratio', ATTENTION)})"),
            steps=((None, GREEN), (0.8, YELLOW), (0.95, RED)),
            decimals=0,
        ),
    ]


def _time() -> list[AnyPanel]:
    return [
        lines(
            "Attention step: compute and wait",
            "A mean step in its two parts: computing, and waiting for FFN actors with no lane "
            "left to compute. If waiting is the larger part, the FFN side or the wire is short.",
            "s",
            Query(mean(_COMPUTE, matchers=(ATTENTION,)), "compute"),
            Query(mean(_WAIT, matchers=(ATTENTION,)), "wait for FFN"),
            stacked=True,
            width=8,
        ),
        lines(
            "Bubble by attention actor",
            "Share of each attention actor's steps that is waiting. One actor above the others: "
            "its machine or link is slow.",
            "percentunit",
            Query(bubble("actor_id"), "{{actor_id}}"),
            highest=1,
            limits=((0.4, RED),),
            width=8,
        ),
        lines(
            "FFN actors: busy share",
            "Share of the time in which each FFN actor works; the rest is idle. All near 100 %: "
            "add FFN actors. One above the others: its experts are hot; afflux rebalance.",
            "percentunit",
            Query(ffn_busy("actor_id"), "{{actor_id}}"),
            highest=1,
            width=8,
        ),
        lines(
            "Attention step, p50 and p99",
            "Duration of engine steps. A p99 far above p50 is prefills among decodes, or commits.",
            "s",
            Query(quantile(0.5, _STEP, matchers=(ATTENTION,)), "p50"),
            Query(quantile(0.99, _STEP, matchers=(ATTENTION,)), "p99"),
            width=8,
        ),
        lines(
            "Attention compute and wait, p99",
            "The slow steps in their two parts. Slow compute: prefills or long contexts here. Slow "
            "waits: an FFN actor that is late, see the busy shares.",
            "s",
            Query(quantile(0.99, _COMPUTE, matchers=(ATTENTION,)), "compute p99"),
            Query(quantile(0.99, _WAIT, matchers=(ATTENTION,)), "wait p99"),
            width=8,
        ),
        lines(
            "FFN ride: kernels and the rest",
            "A mean ride of frames at an FFN actor: the kernels, and what is around them (taking "
            "frames up, packing, answering). The rest should be small beside the kernels.",
            "s",
            Query(mean("afd_ffn_compute_seconds", matchers=(FFN,)), "kernels"),
            Query(
                f"{mean('afd_ffn_step_seconds', matchers=(FFN,))} - "
                f"{mean('afd_ffn_compute_seconds', matchers=(FFN,))}",
                "the rest",
            ),
            stacked=True,
            width=8,
        ),
    ]


def _hops() -> list[AnyPanel]:
    return [
        lines(
            "Hop breakdown, mean",
            "A frame's round trip by stage. queue: at the sender; wire_out and wire_back: the "
            "transport; boarding: waiting for a ride at the FFN actor; compute: the kernels; "
            "reply: until the answer is sent. The stage that grows is the one to work on.",
            "s",
            Query(mean(_HOP, "stage", matchers=(ATTENTION, _STAGES)), "{{stage}}"),
            stacked=True,
            width=12,
        ),
        lines(
            "Hop breakdown, p99",
            "The slow hundredth of each stage. A boarding p99 above compute means that frames of "
            "several attention actors queue: add FFN actors.",
            "s",
            Query(quantile(0.99, _HOP, "stage", matchers=(ATTENTION,)), "{{stage}}"),
            width=12,
        ),
        lines(
            "Bytes per second",
            "Payload by direction (dispatch: to FFN actors; combine: back) and transport. Compare "
            "with what afflux bench dataplane measures on this link.",
            "Bps",
            Query(
                total(rate("afd_transport_bytes_total", ATTENTION), "direction", "transport"),
                "{{direction}} over {{transport}}",
            ),
            width=8,
        ),
        lines(
            "Speed on the wire",
            "Bytes over the time that frames were on the wire: what the link gives while it is "
            "used. A fall at the same frame size is congestion.",
            "Bps",
            Query(
                share(
                    total(rate("afd_transport_bytes_total", ATTENTION), "direction", "transport"),
                    total(rate("afd_transport_seconds_total", ATTENTION), "direction", "transport"),
                ),
                "{{direction}} over {{transport}}",
            ),
            width=8,
        ),
        lines(
            "Frames per second",
            "Frames by direction. More frames with the same bytes are smaller batches or more "
            "lanes.",
            "cps",
            Query(
                total(rate("afd_transport_frames_total", ATTENTION), "direction"), "{{direction}}"
            ),
            width=8,
        ),
        lines(
            "Slow to reach",
            "How much longer frames are on the wire to an actor than to the fastest of its role. "
            "Every layer waits for the slowest; above 2 afflux status --topology says what to do. "
            "Only roles with two actors or more.",
            "short",
            Query(most(series("afd_wire_slowness_ratio"), "role", "actor_id"), "{{actor_id}}"),
            Query(total(series("afd_actors_slow"), "role"), "slow {{role}} actors"),
            limits=((2, RED),),
            width=24,
        ),
    ]


def _batches() -> list[AnyPanel]:
    return [
        heat(
            "Attention batch",
            "Tokens scheduled per engine step. Small batches leave FFN kernels bound by reading "
            "weights: fewer attention actors then do the same work.",
            "short",
            buckets("afd_attention_batch_tokens", ATTENTION),
            scheme="Blues",
        ),
        heat(
            "FFN batch",
            "Tokens per ride at FFN actors. It should be above the attention batch where several "
            "attention actors share an FFN actor.",
            "short",
            buckets("afd_ffn_batch_tokens", FFN),
            scheme="Greens",
        ),
        lines(
            "Lanes, mean",
            "Mean number of lanes per step by attention actor. It is chosen per step from the "
            "measured times.",
            "short",
            Query(mean("afd_attention_lanes", "actor_id", matchers=(ATTENTION,)), "{{actor_id}}"),
            width=8,
        ),
        lines(
            "Batch fill, mean",
            "Mean tokens per attention step and per FFN ride. Both grow with the load; while they "
            "do, tokens get cheaper.",
            "short",
            Query(mean("afd_attention_batch_tokens", matchers=(ATTENTION,)), "attention step"),
            Query(mean("afd_ffn_batch_tokens", matchers=(FFN,)), "FFN ride"),
            width=8,
        ),
        lines(
            "Boarding wait",
            "From a frame's arrival at an FFN actor until its ride left. Above the ride's own "
            "duration: FFN actors are the short side.",
            "s",
            Query(quantile(0.5, "afd_ffn_boarding_wait_seconds", matchers=(FFN,)), "p50"),
            Query(quantile(0.99, "afd_ffn_boarding_wait_seconds", matchers=(FFN,)), "p99"),
            width=8,
        ),
        lines(
            "Frames that wait",
            "Frames at each FFN actor that wait for a ride. It should go back to 0 all the time.",
            "short",
            Query(total(series("afd_ffn_queue_depth", FFN), "actor_id"), "{{actor_id}}"),
            width=8,
        ),
    ]


def _experts() -> list[AnyPanel]:
    tokens = rate("afd_ffn_expert_tokens_total", FFN, LAYER)
    return [
        lines(
            "Load balance of experts",
            "Greatest over mean load of the experts that each FFN actor holds; 1 is even. Above 2 "
            "for long: afflux rebalance, or ffn.min_replicas for the hot ones.",
            "short",
            Query(
                f"max by (actor_id) ({series('afd_ffn_expert_load_balance_ratio', FFN)})",
                "{{actor_id}}",
            ),
            limits=((2, YELLOW), (4, RED)),
            lowest=1,
            width=8,
        ),
        gauges(
            "Experts held",
            "(layer, expert) pairs per FFN actor. Uneven numbers are fine: experts are placed by "
            "load.",
            "short",
            Query(total(series("afd_ffn_experts", FFN), "actor_id"), "{{actor_id}}"),
        ),
        gauges(
            "Memory of experts",
            "Bytes of expert weights per FFN actor. ffn.expert_memory_gib limits it.",
            "bytes",
            Query(total(series("afd_ffn_weight_bytes", FFN), "actor_id"), "{{actor_id}}"),
        ),
        heat(
            "Tokens by expert",
            "(token, expert) pairs per second by expert, over the chosen layers. A bright row is a "
            "hot expert: choose one layer at the top, and give it a replica. Needs "
            "metrics.expert_tokens: true in the spec.",
            "string",
            total(tokens, "expert"),
            legend="{{expert}}",
            scheme="Inferno",
            rows=True,
            width=16,
            height=10,
        ),
        gauges(
            "Busiest experts",
            "The ten busiest (layer, expert) pairs of the chosen layers. Needs "
            "metrics.expert_tokens: true in the spec.",
            "cps",
            Query(f"topk(10, {total(tokens, 'layer', 'expert')})", "layer {{layer}}: {{expert}}"),
            height=10,
        ),
    ]


def _kv() -> list[AnyPanel]:
    return [
        lines(
            "KV cache in use",
            "Share of each attention actor's KV cache that is in use. All near 100 %: add "
            "attention actors. One above the others: its prefixes are popular.",
            "percentunit",
            Query(
                f"max by (actor_id) ({series('afd_attention_kv_cache_usage_ratio', ATTENTION)})",
                "{{actor_id}}",
            ),
            highest=1,
            limits=((0.95, RED),),
            width=8,
        ),
        lines(
            "KV cache in tokens",
            "Tokens held, beside what there is room for: how many more requests fit.",
            "short",
            Query(total(series("afd_attention_kv_cache_tokens", ATTENTION)), "held"),
            Query(
                total(series("afd_attention_kv_cache_capacity_tokens", ATTENTION)), "room", "limit"
            ),
            width=8,
        ),
        lines(
            "Requests at attention actors",
            "Requests in the engines' steps and in their queues. Waiting ones while the KV cache "
            "has room: the batch budget is the limit.",
            "short",
            Query(
                total(series("afd_attention_requests_running", ATTENTION), "actor_id"),
                "{{actor_id}} running",
            ),
            Query(
                total(series("afd_attention_requests_waiting", ATTENTION), "actor_id"),
                "{{actor_id}} waiting",
            ),
            width=8,
        ),
        lines(
            "Prefix cache hits",
            "Share of prompt tokens that were found in the prefix cache. A fall after scaling up "
            "is normal: a new actor starts with an empty one.",
            "percentunit",
            Query(
                share(
                    total(rate("afd_attention_prefix_cache_hits_total", ATTENTION), "actor_id"),
                    total(rate("afd_attention_prefix_cache_queries_total", ATTENTION), "actor_id"),
                ),
                "{{actor_id}}",
            ),
            highest=1,
            width=12,
        ),
        lines(
            "Preemptions",
            "Requests per second that lost their KV cache for lack of room and are computed again. "
            "More than now and then: fewer requests at a time, or more attention actors.",
            "cps",
            Query(
                total(rate("afd_attention_preemptions_total", ATTENTION), "actor_id"),
                "{{actor_id}}",
            ),
            width=12,
        ),
    ]


def _trouble() -> list[AnyPanel]:
    return [
        lines(
            "Frames sent again",
            "Frames per second that went to another holder of their experts, after a loss or a "
            "silence. 0 but around losses.",
            "cps",
            Query(
                total(rate("afd_transport_resends_total", ATTENTION), "actor_id"), "{{actor_id}}"
            ),
            width=12,
        ),
        lines(
            "Frames refused",
            "Frames per second that FFN actors refused, by reason. stale_epoch around a change is "
            "how an old table ends; steady refusals are a bug: please report them.",
            "cps",
            Query(total(rate("afd_transport_refusals_total", FFN), "reason"), "{{reason}}"),
            width=12,
        ),
    ]
