"""A spec's autoscaler section becomes a core, or is refused with a reason."""

from __future__ import annotations

import pytest

from autoscaler.registry import BadPolicy
from autoscaler.settings import check, limits_of, make_core, system_of, timing_of
from cluster.spec import ClusterSpec, SpecError, load_spec


def spec(*overrides: str) -> ClusterSpec:
    return load_spec(None, ["autoscaler.mode=on", "autoscaler.policy=static", *overrides])


def test_the_core_of_a_spec() -> None:
    wanted = spec(
        "autoscaler.min_total=3",
        "autoscaler.max_total=3",
        "autoscaler.max_step=1",
        "autoscaler.weight_ffn=2.5",
        "autoscaler.cooldown_s=7",
        "autoscaler.rebalance=false",
        "slo.tpot_s=0.25",
        "attention.engine.max_num_seqs=32",
        "lanes=2",
    )
    check(wanted)
    core = make_core(wanted)
    assert core.limits.fixed == 3 and core.limits.max_step == 1 and core.limits.weight_ffn == 2.5
    assert core.limits.attention == (wanted.attention.min, wanted.attention.max)
    assert core.slo.tpot == 0.25 and core.timing.cooldown == 7 and core.mode == "on"
    assert core.rebalance_over is None
    assert (core.system.slots, core.system.lanes) == (32, 2)
    assert make_core(wanted, mode="advise").mode == "advise"
    assert system_of(load_spec()).lanes > 1, "lanes=auto chooses"


def test_parameters_belong_to_the_policy_that_they_were_given_for() -> None:
    wanted = spec("autoscaler.parameters={attention: 2, ffn: 2}")
    assert make_core(wanted).policy.parameters.model_dump() == {"attention": 2, "ffn": 2}
    other = make_core(wanted, "slo_feedback")
    assert other.policy.name == "slo_feedback"
    with pytest.raises(BadPolicy, match="attention"):
        make_core(wanted, "slo_feedback", {"attention": 2})


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["autoscaler.min_total=4", "autoscaler.max_total=3"], SpecError, "4..3"),
        (["autoscaler.max_total=2"], SpecError, "3 together"),
        (["autoscaler.min_total=40"], SpecError, "40"),
        (["autoscaler.policy=statics"], BadPolicy, "known are"),
        (["autoscaler.parameters={atention: 2}"], BadPolicy, "atention"),
        (["autoscaler.policy=nowhere:Policy"], BadPolicy, "imported"),
    ],
)
def test_what_cannot_work_is_refused(
    overrides: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check(spec(*overrides))


def test_off_is_not_looked_at() -> None:
    check(load_spec(None, ["autoscaler.policy=nobody"]))


def test_data_may_be_older_than_a_few_ticks() -> None:
    timing = timing_of(spec("autoscaler.interval_s=5", "autoscaler.window_s=20"))
    assert timing.stale >= 3 * timing.interval
    assert limits_of(spec()).total == (2, 8)
