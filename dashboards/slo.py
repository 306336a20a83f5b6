"""The dashboard to look at first: do users get what the spec promises, and if not, why not?"""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from dashboards.frame import Row, dashboard, deployment_variables
from dashboards.panels import (
    GREEN,
    RED,
    YELLOW,
    AnyPanel,
    Query,
    heat,
    lines,
    number,
)
from dashboards.queries import buckets, increase, mean, most, quantile, rate, series, share, total

UID = "afflux-slo"

BOTH = 'slo="both"'
_GOOD = "afd_slo_good_requests_total"
_COUNTED = "afd_slo_requests_total"
_BUDGET = f"(1 - {most(series('afd_slo_objective_ratio'))})"


def build() -> models.Dashboard:
    """The dashboard."""
    return dashboard(
        UID,
        "afflux / SLO overview",
        "What users see: latencies against the spec's targets, the share of requests that met "
        "them, how fast the error budget burns, and where a request's time goes.",
        deployment_variables(),
        [
            Row("Now", _now()),
            Row("Latency against the targets", _latency()),
            Row("Attainment and error budget", _attainment()),
            Row("Traffic", _traffic()),
            Row("Where the time goes", _breakdown()),
            Row("Lengths", _lengths()),
        ],
    )


def miss_ratio(window: str) -> str:
    """Share of requests that missed a target, 0 to 1."""
    good = total(increase(_GOOD, BOTH, window=window))
    return f"(1 - {good} / {total(increase(_COUNTED, BOTH, window=window))})"


def burn(window: str) -> str:
    """How many times faster than allowed requests miss their targets."""
    return f"{miss_ratio(window)} / {_BUDGET}"


def _now() -> list[AnyPanel]:
    return [
        number(
            "Attainment",
            "Share of the requests that finished lately and met both targets (time to first token "
            "and time per output token). The spec's slo.percentile is what it should be at least. "
            "Below it: look at the latencies below to see which target is missed, then at where "
            "the time goes.",
            "percentunit",
            Query(share(total(rate(_GOOD, BOTH)), total(rate(_COUNTED, BOTH)))),
            steps=((None, RED), (0.8, YELLOW), (0.9, GREEN)),
            decimals=1,
        ),
        number(
            "Burn rate, 1 h",
            "Error budget burnt in the last hour, as a multiple of what the objective allows. At "
            "most 1 is good. Above 2 for hours, or above 5 for minutes, an alert fires.",
            "short",
            Query(burn("1h")),
            steps=((None, GREEN), (1, YELLOW), (2, RED)),
            decimals=2,
        ),
        number(
            "Goodput",
            "Requests per second that met both targets: the number that capacity is bought for. "
            "From the recording rule afd:goodput_requests:rate1m.",
            "reqps",
            Query(total(series("afd:goodput_requests:rate1m"))),
            decimals=2,
        ),
        number(
            "Output tokens",
            "Tokens per second sent to users, counted while they stream.",
            "cps",
            Query(total(rate("afd_generation_tokens_total"))),
        ),
        number(
            "Time to first token, p90",
            "Nine of ten requests get their first token within this time, queueing included. "
            "Compare with the dashed target below.",
            "s",
            Query(quantile(0.9, "afd_time_to_first_token_seconds")),
        ),
        number(
            "Between tokens, p99",
            "99 of 100 tokens come within this time after the one before. Peaks that go with a "
            "change are its commit pause; see Elasticity.",
            "s",
            Query(quantile(0.99, "afd_inter_token_latency_seconds")),
        ),
        number(
            "Waiting",
            "Accepted requests that no attention actor has taken yet. More than a few for longer "
            "than a minute: add attention actors.",
            "short",
            Query(total(series("afd_requests_waiting"))),
            steps=((None, GREEN), (8, YELLOW), (32, RED)),
        ),
        number(
            "Serving as wanted",
            "Whether every actor that is wanted serves. If not, Elasticity shows which role is "
            "short and what the manager does about it; afflux status names the actor.",
            "bool_yes_no",
            Query(f"min({series('afd_healthy')})"),
            words={"0": ("no", RED), "1": ("yes", GREEN)},
            graph=False,
        ),
    ]


def _latency() -> list[AnyPanel]:
    return [
        lines(
            "Time to first token",
            "From a request's arrival at the front door to its first token. Above the dashed "
            "target: if the queue part (below) is large, add attention actors; if the prefill part "
            "is, prompts are long or the FFN side is slow.",
            "s",
            *_percentiles("afd_time_to_first_token_seconds", 0.5, 0.9, 0.99),
            _target("ttft"),
        ),
        lines(
            "Time per output token",
            "Mean time per token after the first, one value per finished request. Above the dashed "
            "target: see Data plane and experts for whether attention or FFN actors are the "
            "slower side, and move the ratio that way.",
            "s",
            *_percentiles("afd_time_per_output_token_seconds", 0.5, 0.9, 0.99),
            _target("tpot"),
        ),
        lines(
            "Between tokens",
            "Time between two tokens of a stream: what a reader sees as stutter. Single peaks are "
            "changes or lost actors (see the annotations); a steady gap between p50 and p99 is "
            "prefills of others in between.",
            "s",
            *_percentiles("afd_inter_token_latency_seconds", 0.5, 0.99, 0.999),
        ),
        lines(
            "Whole request",
            "From arrival to the last token. Grows with the length of outputs, so compare it with "
            "the lengths below before you blame the system.",
            "s",
            *_percentiles("afd_e2e_request_latency_seconds", 0.5, 0.9, 0.99),
        ),
    ]


def _attainment() -> list[AnyPanel]:
    return [
        lines(
            "Attainment by target",
            "Share of requests that met the target for the first token, for the time per token, "
            "and for both. The dashed line is the objective. The lower of the two parts says what "
            "to work on.",
            "percentunit",
            Query(
                f"{total(rate(_GOOD), 'slo')} / {total(rate(_COUNTED), 'slo')}",
                "{{slo}}",
            ),
            Query(most(series("afd_slo_objective_ratio")), "objective", "limit"),
            width=8,
            highest=1,
        ),
        lines(
            "Burn rate",
            "How many times faster than allowed the error budget burns, over three windows. 1 uses "
            "it up exactly. The fast alert fires when both 5 min and 1 h are above 5, the slow one "
            "when both 30 min and 6 h are above 2.",
            "short",
            *(Query(burn(window), window) for window in ("5m", "1h", "6h")),
            limits=((2, YELLOW), (5, RED)),
            width=8,
        ),
        lines(
            "Goodput and all requests",
            "Requests per second that met both targets, beside all that count. The gap between the "
            "two lines is work that was done too late.",
            "reqps",
            Query(total(series("afd:goodput_requests:rate1m")), "good"),
            Query(total(rate(_COUNTED, BOTH)), "all", "wanted"),
            width=8,
        ),
    ]


def _traffic() -> list[AnyPanel]:
    return [
        lines(
            "Requests by outcome",
            "Finished requests per second. 'abort' is a client that left; 'error' is ours: look at "
            "the frontend's log and at Elasticity for what was lost at that time.",
            "reqps",
            Query(total(rate("afd_requests_total"), "outcome"), "{{outcome}}"),
            stacked=True,
            width=6,
        ),
        lines(
            "Running and waiting",
            "Requests at attention actors, and those that wait for one. A growing queue with low "
            "KV use means that admission is too strict; with full KV it means too few attention "
            "actors.",
            "short",
            Query(total(series("afd_requests_running")), "running"),
            Query(total(series("afd_requests_waiting")), "waiting"),
            stacked=True,
            width=6,
        ),
        lines(
            "Tokens",
            "Output tokens per second, and prompt tokens whose computation has ended.",
            "cps",
            Query(total(rate("afd_generation_tokens_total")), "output"),
            Query(total(rate("afd_prompt_tokens_total")), "prompt"),
            width=6,
        ),
        lines(
            "Rejected and replayed",
            "Requests turned away per second (queue_full: HTTP 429, no_actor: HTTP 503), and "
            "requests started again at another attention actor after theirs was lost. Rejections "
            "are users lost: add actors or raise frontend.max_requests.",
            "reqps",
            Query(total(rate("afd_requests_rejected_total"), "reason"), "rejected: {{reason}}"),
            Query(total(rate("afd_requests_replayed_total")), "replayed"),
            width=6,
        ),
    ]


def _breakdown() -> list[AnyPanel]:
    parts = (
        ("queue", "afd_request_queue_time_seconds"),
        ("prefill", "afd_request_prefill_time_seconds"),
        ("decode", "afd_request_decode_time_seconds"),
    )
    return [
        lines(
            "Latency breakdown, mean",
            "A request's mean time in the queue, until its first token, and until its last. The "
            "part that grows is the one to work on: queue: attention actors; prefill: prompts or "
            "batch budget; decode: the slower of attention and FFN.",
            "s",
            *(Query(mean(name), part) for part, name in parts),
            stacked=True,
            width=8,
        ),
        lines(
            "Latency breakdown, p90",
            "The same parts for the slow tenth of the requests. These are quantiles of each part "
            "and don't add up.",
            "s",
            *(Query(quantile(0.9, name), part) for part, name in parts),
            width=8,
        ),
        heat(
            "Time to first token, distribution",
            "Each cell is how many requests per second got their first token within that time. Two "
            "bands mean two kinds of request, or prefix-cache hits beside misses.",
            "s",
            buckets("afd_time_to_first_token_seconds"),
        ),
    ]


def _lengths() -> list[AnyPanel]:
    return [
        heat(
            "Prompt lengths",
            "Prompt tokens of finished requests. The workload that the ratio was sized for: when "
            "this moves, run afflux size again.",
            "short",
            buckets("afd_request_prompt_tokens"),
            scheme="Blues",
            width=12,
        ),
        heat(
            "Output lengths",
            "Output tokens of finished requests. Long outputs hold KV cache: when this moves, run "
            "afflux size again.",
            "short",
            buckets("afd_request_generation_tokens"),
            scheme="Greens",
            width=12,
        ),
    ]


def _percentiles(name: str, *quantiles: float) -> list[Query]:
    return [Query(quantile(q, name), f"p{q * 100:g}") for q in quantiles]


def _target(slo: str) -> Query:
    return Query(most(series("afd_slo_target_seconds", f'slo="{slo}"')), "target", "limit")
