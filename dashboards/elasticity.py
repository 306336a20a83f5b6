"""The dashboard of who serves: actors by role, changes of the ratio, losses, recovery, cost."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

from dashboards.frame import Row, dashboard, deployment_variables
from dashboards.panels import GREEN, RED, YELLOW, AnyPanel, Query, facts, lines, number
from dashboards.queries import increase, mean, most, quantile, rate, series, total

UID = "afflux-elasticity"

_STARTING = 'state=~"pending|placed|importing|starting|loading|connected"'


def build() -> models.Dashboard:
    """The dashboard."""
    return dashboard(
        UID,
        "afflux / Elasticity",
        "Who serves and who should: actors by role, the ratio, every change with its phases, what "
        "was lost and how long until it was replaced, and what it costs. Changes and failures are "
        "marked on every graph once afflux dashboards annotate runs.",
        deployment_variables(),
        [
            Row("Now", _now()),
            Row("Actors and ratio", _actors()),
            Row("Controller", _controller()),
            Row("Changes", _changes()),
            Row("Losses and recovery", _losses()),
            Row("Cost", _cost()),
            Row("Manager, versions and settings", _manager()),
        ],
    )


def _now() -> list[AnyPanel]:
    return [
        number(
            "Attention actors ready",
            "Attention actors that serve. Compare with the wanted number below.",
            "short",
            Query(_ready("attention")),
        ),
        number(
            "FFN actors ready",
            "FFN actors that serve. Compare with the wanted number below.",
            "short",
            Query(_ready("ffn")),
        ),
        number(
            "Attention per FFN actor",
            "The ratio that serves now. Compare it with what afflux size advises.",
            "short",
            Query(f"max({series('afd_attention_ffn_ratio')})"),
            decimals=2,
        ),
        number(
            "Change under way",
            "For how long the change under way has been going on; 0 without one. Changes take "
            "seconds with a warm worker, a minute without. Longer: afflux status names its phase, "
            "and what fails is rolled back.",
            "s",
            Query(most(series("afd_change_age_seconds"))),
            steps=((None, GREEN), (120, YELLOW), (600, RED)),
        ),
        number(
            "Experts without holder",
            "(layer, expert) pairs that no live actor holds. Above 0 requests stall until a "
            "survivor has loaded them, which takes a second; ffn.min_replicas: 2 avoids it.",
            "short",
            Query(total(series("afd_experts_without_holder"))),
            steps=((None, GREEN), (1, RED)),
        ),
        number(
            "Warm workers ready",
            "Processes without a role that are ready to take one. At 0 a lost actor takes a "
            "process start (tens of seconds) to replace instead of about 2 s.",
            "short",
            Query(total(series("afd_warm_workers"))),
        ),
        number(
            "Lost actors",
            "Actors lost in the chosen time, by crash or silence, not by retiring.",
            "short",
            Query(total(increase("afd_actors_lost_total", window="$__range"))),
            steps=((None, GREEN), (0.5, YELLOW), (5, RED)),
            decimals=0,
        ),
        number(
            "Epoch",
            "Number of the newest expert table; one more with every change of who holds what.",
            "short",
            Query(most(series("afd_epoch"))),
        ),
    ]


def _actors() -> list[AnyPanel]:
    return [
        _of_role("attention", "Attention actors"),
        _of_role("ffn", "FFN actors"),
        lines(
            "Attention actors per FFN actor",
            "The ratio that serves, the one that is wanted (by you or a policy), and the one that "
            "the policy advises (autoscaler.mode advise or on). Ready and wanted apart for long: "
            "the change fails; see the changes below.",
            "short",
            Query(most(series("afd_attention_ffn_ratio")), "ready"),
            Query(most(series("afd_attention_ffn_target_ratio")), "wanted", "wanted"),
            Query(most(series("afd_controller_advised_ratio")), "advised", "limit"),
            stepped=True,
            width=8,
        ),
        lines(
            "Actors by state",
            "All actors of both roles and their states. Many in 'starting' or 'loading' without "
            "getting ready: afflux status shows the reason.",
            "short",
            Query(total(series("afd_actors"), "role", "state"), "{{role}}: {{state}}"),
            stepped=True,
            stacked=True,
            width=16,
        ),
        lines(
            "Warm workers",
            "Processes without a role: ready ones and how many are wanted (warm_workers in the "
            "spec).",
            "short",
            Query(total(series("afd_warm_workers")), "ready"),
            Query(total(series("afd_warm_workers_target")), "wanted", "wanted"),
            stepped=True,
            width=8,
        ),
    ]


def _controller() -> list[AnyPanel]:
    return [
        lines(
            "Advised actors",
            "Actors that the policy wants within its limits, by role. Apart from the ready ones "
            "for long: afflux policy log says whether it is paused, only advises, or waits.",
            "short",
            Query(most(series("afd_controller_advised_actors"), "role"), "{{role}}"),
            stepped=True,
            width=8,
        ),
        lines(
            "Decisions by reason",
            "Ticks of the controller by every reason that they gave. as_it_is: all is well. "
            "stale_data, policy_failed, manager_away: it can't see or decide; its log says more.",
            "short",
            Query(
                f"round({total(increase('afd_controller_decisions_total'), 'reason')}) > 0",
                "{{reason}}",
            ),
            bars=True,
            width=16,
        ),
        lines(
            "Since the last tick",
            "The controller decides every autoscaler.interval_s. Growing: it hangs or is gone; "
            "serving goes on, but nobody changes the ratio.",
            "s",
            Query(
                f"time() - {most(series('afd_controller_last_tick_timestamp_seconds'))}",
                "since the last tick",
            ),
            Query(most(series("afd_controller_telemetry_age_seconds")), "age of its measurements"),
            limits=((30, RED),),
            width=8,
        ),
        lines(
            "Duration of a tick",
            "From asking the actors to the decision. Near autoscaler.interval_s: actors answer "
            "slowly, or the model is refitted on a machine without a core to spare.",
            "s",
            Query(quantile(0.5, "afd_controller_tick_seconds"), "p50"),
            Query(quantile(0.99, "afd_controller_tick_seconds"), "p99"),
            width=8,
        ),
        lines(
            "Error of the latency model",
            "Median of |predicted / observed - 1| of TPOT over recent windows. Policies that "
            "derive numbers from the model wait while it is not reliable: afflux model show says "
            "why.",
            "percentunit",
            Query(most(series("afd_controller_model_error_ratio")), "error"),
            limits=((0.25, RED),),
            width=8,
        ),
        number(
            "Model reliable",
            "1 while decisions are derived from the latency model.",
            "short",
            Query(most(series("afd_controller_model_reliable"))),
            width=12,
        ),
        number(
            "Controller acts",
            "1: it changes the numbers of actors. 0: it is paused or only advises.",
            "short",
            Query(most(series("afd_controller_acting"))),
            width=12,
        ),
    ]


def _changes() -> list[AnyPanel]:
    return [
        lines(
            "Changes",
            "Changes that ended, by verb and outcome. 'repair' and 'replace' are the manager's "
            "answer to losses. 'rolled_back' left the old table serving: afflux changes says why.",
            "short",
            Query(
                f"round({total(increase('afd_scale_events_total'), 'verb', 'outcome')})",
                "{{verb}}: {{outcome}}",
            ),
            bars=True,
            width=8,
        ),
        lines(
            "Duration by phase",
            "Mean duration of changes by phase. prepare starts, loads and connects in the "
            "background; commit publishes the table (milliseconds); release drains. Only a long "
            "commit is felt by users.",
            "s",
            Query(
                mean("afd_scale_duration_seconds", "phase", matchers=('phase!="total"',)),
                "{{phase}}",
            ),
            width=8,
        ),
        lines(
            "Commit pause",
            "What the first step under a new table took more than a usual one, by attention "
            "actor: what a change costs users. Tens of milliseconds are usual. More: the machine "
            "is overloaded, or weights are still being read.",
            "s",
            Query(quantile(0.5, "afd_commit_pause_seconds"), "p50"),
            Query(quantile(0.99, "afd_commit_pause_seconds"), "p99"),
            width=8,
        ),
        lines(
            "Duration of whole changes",
            "From a change's begin to its end. A flip with a warm worker takes about 2 s; a new "
            "process tens of seconds.",
            "s",
            *(
                Query(
                    quantile(q, "afd_scale_duration_seconds", matchers=('phase="total"',)),
                    f"p{q * 100:g}",
                )
                for q in (0.5, 0.95)
            ),
            width=8,
        ),
        lines(
            "Age of the change under way",
            "Grows while a change is under way, 0 without one. One that only grows is stuck: its "
            "phase has a deadline and will be rolled back; afflux status says what it waits for.",
            "s",
            Query(most(series("afd_change_age_seconds"), "deployment"), "{{deployment}}"),
            limits=((600, RED),),
            width=8,
        ),
        lines(
            "Epoch in use",
            "Epoch of the expert table at each actor, beside the newest. An attention actor "
            "behind for more than a step is frozen; an FFN actor behind still serves the older "
            "table to somebody.",
            "short",
            Query(most(series("afd_epoch")), "newest", "wanted"),
            Query(most(series("afd_table_epoch"), "actor_id"), "{{actor_id}}"),
            stepped=True,
            lowest=None,
            width=8,
        ),
    ]


def _losses() -> list[AnyPanel]:
    return [
        lines(
            "Lost and restarted actors",
            "Actors lost (crashed or silent) and actors started in their place. Losses that go on "
            "point at memory or at one bad node: look at the actors' logs in Ray.",
            "short",
            Query(f"round({total(increase('afd_actors_lost_total'), 'role')})", "lost: {{role}}"),
            Query(
                f"round({total(increase('afd_actor_restarts_total'), 'role')})",
                "restarted: {{role}}",
            ),
            bars=True,
            width=8,
        ),
        lines(
            "Recovery",
            "From the loss of an actor until as many serve as are wanted. About 1.5 s with a warm "
            "worker; without one a process has to start. Raise warm_workers if this matters.",
            "s",
            Query(mean("afd_recovery_seconds", "role"), "mean: {{role}}"),
            Query(quantile(0.95, "afd_recovery_seconds", "role"), "p95: {{role}}"),
            width=8,
        ),
        lines(
            "Faults seen by attention actors",
            "FFN actors that an attention actor stopped using. lost: the transport said so; "
            "silent: no answer within transport.timeout_s; refused: wrong table or model. Many "
            "'silent' without losses: the timeout is too short for this machine.",
            "short",
            Query(f"round({total(increase('afd_faults_total'), 'kind')})", "{{kind}}"),
            bars=True,
            width=8,
        ),
        lines(
            "Replays and repeated steps",
            "Requests started again at another attention actor, and forward passes run again "
            "under a newer table. Both are how losses stay invisible; both cost time.",
            "short",
            Query(f"round({total(increase('afd_requests_replayed_total'))})", "requests replayed"),
            Query(
                f"round({total(increase('afd_attention_steps_repeated_total'))})",
                "steps repeated",
            ),
            bars=True,
            width=12,
        ),
        lines(
            "Experts without holder over time",
            "Pairs of layer and expert that nobody holds at the moment. Requests that need them "
            "wait. It should be 0 but for moments after a loss.",
            "short",
            Query(total(series("afd_experts_without_holder")), "without holder"),
            limits=((1, RED),),
            stepped=True,
            width=12,
        ),
    ]


def _cost() -> list[AnyPanel]:
    return [
        lines(
            "GPUs reserved",
            "GPUs that actors of each role hold (GPU-seconds per second). 0 on a machine without "
            "GPUs.",
            "short",
            Query(total(rate("afd_gpu_seconds_total"), "role"), "{{role}}"),
            stacked=True,
            width=8,
        ),
        lines(
            "CPUs reserved",
            "CPUs that actors of each role hold (CPU-seconds per second).",
            "short",
            Query(total(rate("afd_cpu_seconds_total"), "role"), "{{role}}"),
            stacked=True,
            width=8,
        ),
        lines(
            "Device seconds per 1000 output tokens",
            "What a thousand tokens cost in reserved GPUs and CPUs: compare two ratios, or two "
            "times of day, by this.",
            "s",
            Query(_per_token("afd_gpu_seconds_total"), "GPU"),
            Query(_per_token("afd_cpu_seconds_total"), "CPU"),
            width=8,
        ),
        number(
            "GPU-seconds",
            "GPU-seconds reserved in the chosen time, by role.",
            "s",
            Query(total(increase("afd_gpu_seconds_total", window="$__range"), "role"), "{{role}}"),
            width=12,
            names=True,
            graph=False,
        ),
        number(
            "CPU-seconds",
            "CPU-seconds reserved in the chosen time, by role.",
            "s",
            Query(total(increase("afd_cpu_seconds_total", window="$__range"), "role"), "{{role}}"),
            width=12,
            names=True,
            graph=False,
        ),
    ]


def _manager() -> list[AnyPanel]:
    return [
        number(
            "Manager's heartbeat",
            "Seconds since the manager's event loop last turned. Above 30: it hangs or is gone. "
            "Serving goes on, but nothing is repaired; Ray restarts it when it dies.",
            "s",
            Query(f"time() - {most(series('afd_manager_heartbeat_timestamp_seconds'))}"),
            steps=((None, GREEN), (15, YELLOW), (30, RED)),
            width=4,
        ),
        facts(
            "Versions",
            "What runs: after an upgrade, one row per version that is still there.",
            series("afd_build_info"),
            {
                "version": "afflux",
                "vllm": "vLLM",
                "ray": "Ray",
                "torch": "PyTorch",
                "nixl": "NIXL",
            },
            width=10,
        ),
        facts(
            "Settings",
            "The deployment's settings that most explain its figures. 'emulated': the times are "
            "those of emulated devices, not of this machine.",
            series("afd_config_info"),
            {name: name for name in ("deployment", "lanes", "dtype", "emulated")},
            width=10,
        ),
    ]


def _ready(role: str) -> str:
    return total(series("afd_actors", f'role="{role}"', 'state="ready"'))


def _of_role(role: str, title: str) -> AnyPanel:
    return lines(
        title,
        "Actors that serve, those on their way, and how many are wanted. Ready below wanted with "
        "none on the way: the manager has no room to place one, or gave up; afflux status says "
        "which.",
        "short",
        Query(_ready(role), "ready"),
        Query(total(series("afd_actors", f'role="{role}"', _STARTING)), "on the way"),
        Query(most(series("afd_actors_target", f'role="{role}"')), "wanted", "wanted"),
        stepped=True,
        width=8,
    )


def _per_token(seconds: str) -> str:
    return f"1000 * {total(rate(seconds))} / {total(rate('afd_generation_tokens_total'))}"
