"""Calibrations against the tables they are of, published times against ours, and the formulas."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.barrier import distinct_holders
from planner.errors import PlannerError
from planner.explore import published
from planner.explore.calibration import (
    BLACKWELL,
    HOPPER,
    Calibration,
    Link,
    Measurement,
    fit,
    predicted,
)
from planner.explore.exchanges import (
    blackwell_tables,
    deepep_bytes,
    deepep_published,
    hopper_tables,
)
from planner.explore.kernels.base import Load, Provenance, Sides, Time
from planner.explore.model import read_model
from planner.explore.network import fan_out

NO_TABLES = "aiconfigurator-core, whose tables are fitted, is not installed"
QUICK = settings(max_examples=30, deadline=None)


class Fixed:
    """A source whose attention takes a second per request, and whose experts a second per token."""

    name = "fixed"

    def __init__(self, attention: float, experts: float):
        self.per_request, self.per_token = attention, experts

    def attention(self, model, tp, sides: Sides, load: Load) -> Time:
        return Time({Provenance.MEASURED: load.decode * self.per_request})

    def experts(self, model, tp, ep, sides: Sides, tokens) -> Time:
        return Time({Provenance.MEASURED: np.asarray(tokens) * self.per_token})

    def exchange(self, *given) -> Time:
        raise AssertionError("comparisons take the network's time")


# -- fits ----------------------------------------------------------------------------------------


@QUICK
@given(
    st.floats(0.2, 1.0), st.floats(0, 2e-5), st.floats(0.2, 1.0), st.floats(0, 2e-5),
    st.floats(1e-9, 1e-6),
)  # fmt: skip
def test_a_fit_finds_what_made_the_measurements(share, overhead, share_2, overhead_2, per_peer):
    truth = Calibration(
        "t", "", {"nvlink": Link(share, overhead), "cluster": Link(share_2, overhead_2)}, per_peer
    )
    made = []
    for tier, bandwidth in (("nvlink", 450e9), ("cluster", 50e9)):
        for peers in (7, 63):
            for size in (1e3, 1e6, 1e8):
                one = Measurement("made", tier, 10e-6, bandwidth, peers, size, 1.0)
                made.append(replace(one, seconds=predicted(truth, one)))
    found = fit("t", "", made)
    for tier, link in truth.links.items():
        assert found.links[tier].share == pytest.approx(link.share, rel=1e-3)
        assert found.links[tier].overhead == pytest.approx(link.overhead, abs=2e-8)
    assert found.per_peer == pytest.approx(per_peer, rel=0.05, abs=2e-9)
    assert found.spread == pytest.approx(1.0, abs=0.01)


def test_what_is_held_out_changes_no_fit():
    made = [
        Measurement("made", "nvlink", 10e-6, 450e9, peers, size, 2e-5 + size / 200e9)
        for peers in (3, 7)
        for size in (1e3, 1e6, 1e8)
    ]
    outlier = replace(made[0], seconds=1.0, held_out=True)
    assert fit("t", "", [*made, outlier]) == fit("t", "", made)
    with pytest.raises(PlannerError, match="2 measurements of t"):
        fit("t", "", made[:2])


@pytest.mark.parametrize(
    ("used", "tables"), [(HOPPER, hopper_tables), (BLACKWELL, blackwell_tables)]
)
def test_constants_are_those_of_the_fit(used, tables):
    pytest.importorskip("aiconfigurator_core", reason=NO_TABLES)
    pytest.importorskip("pandas", reason=NO_TABLES)
    again = fit(used.name, used.source, tables())
    for tier, link in again.links.items():
        assert used.links[tier].share == pytest.approx(link.share, rel=2e-3)
        assert used.links[tier].overhead == pytest.approx(link.overhead, abs=2e-8)
    assert used.per_peer == pytest.approx(again.per_peer, rel=5e-3)
    assert used.spread == pytest.approx(again.spread, rel=2e-3)


def test_the_hopper_tables_are_met_within_a_sixth_for_nine_of_ten():
    pytest.importorskip("aiconfigurator_core", reason=NO_TABLES)
    pytest.importorskip("pandas", reason=NO_TABLES)
    measured = hopper_tables()
    errors = np.abs([predicted(HOPPER, one) / one.seconds - 1 for one in measured])
    assert np.median(errors) < 0.07
    assert np.quantile(errors, 0.9) < 1 / 6
    rows = published.table_rows(HOPPER, measured)
    assert sum(row.count for row in rows) == len(measured)
    multi = [row for row in rows if row.tier == "cluster"]
    assert len(multi) == 2 and all(row.median < 0.04 for row in multi)


# -- DeepEP ----------------------------------------------------------------------------------------


def test_bytes_meet_the_bandwidths_that_deepep_states():
    # its README: 98 GB/s for 77 us of dispatch and 127 GB/s for 114 us of combine at 8 GPUs
    sent = deepep_bytes(128, 8, 7168)
    assert sent["dispatch"] / 77e-6 == pytest.approx(98e9, rel=0.01)
    assert sent["combine"] / 114e-6 == pytest.approx(127e9, rel=0.02)


def test_deepep_on_h800_is_predicted_from_other_tables():
    rows = published.deepep_rows()
    errors = {(row.op, row.gpus): abs(row.error) for row in rows}
    assert len(errors) == 12
    assert np.median(list(errors.values())) < 0.07
    assert max(errors.values()) < 0.18


def test_the_network_says_what_the_fit_says():
    # the fit takes the slowest tier alone; the network shares all of them
    fitted = [predicted(HOPPER, one) for _, _, one in deepep_published()]
    assert [row.ours for row in published.deepep_rows()] == pytest.approx(fitted)


@pytest.mark.parametrize("ranks", [1, 2, 16, 64, 256])
def test_even_ranks_have_the_closed_form(ranks):
    assert fan_out("distinct", 256, 8, ranks) == pytest.approx(distinct_holders(ranks, 8, 256))


# -- DeepSeek-V3 on H800 ---------------------------------------------------------------------------


def test_two_micro_batches_take_the_longest_of_three():
    assert published.two_batch_step(3, 1) == 6
    assert published.two_batch_step(1, 3) == 6
    assert published.two_batch_step(2, 2) == 4


def test_decode_where_the_gpu_is_the_bottleneck():
    # 64 requests at 1 ms, 64 * 128 tokens at 1 us: 72.2 ms of a micro-batch
    row = published.decode_row(read_model("deepseek-v3"), Fixed(1e-3, 1e-6))
    assert row.tpot == pytest.approx(2 * (0.064 + 0.008192))
    assert row.ours == pytest.approx(128 / row.tpot)
    assert row.error == pytest.approx(row.ours / 2324 - 1)
    assert row.shares == {Provenance.MEASURED: 1.0}


def test_decode_where_the_network_is_the_bottleneck():
    row = published.decode_row(read_model("deepseek-v3"), Fixed(1e-9, 1e-12))
    # 58 layers of half a batch: 20.7 us and 127 peers each way, and 15 of 16 bytes between nodes
    sent = deepep_bytes(64, 8, 7168)
    once = 10e-6 + 10.70e-6 + 127 * 0.1098e-6
    both = sum(once + size * 15 / 16 / (0.9358 * 50e9) for size in sent.values())
    assert row.tpot == pytest.approx(2 * 58 * both, rel=1e-3)


def test_fewer_requests_where_a_token_may_take_less():
    model = read_model("deepseek-v3")
    slow = Fixed(1e-3, 0.0)
    row = published.decode_within(model, slow, tpot=0.100)
    assert row.batch == 100 and row.tpot == pytest.approx(0.1)
    with pytest.raises(PlannerError, match="allowed are"):
        published.decode_within(model, Fixed(1.0, 0.0))


# -- Ascend ----------------------------------------------------------------------------------------


def test_published_ratios_are_those_that_the_recipe_states():
    rows = [published.AscendRow(run, 1.0, 1.0, {}) for run in published.ASCEND_RUNS]
    ratios = {(r.name, r.prompt): r.published for r in published.ratio_rows(rows)}
    stated = {
        ("48A16F", 16_384): -0.053,
        ("64A16F", 16_384): 0.113,
        ("48A16F", 32_768): -0.100,
        ("64A16F", 32_768): 0.090,
    }
    assert ratios == pytest.approx(stated, abs=5e-4)


def test_steps_that_the_published_throughput_means():
    base, _, wide = published.ASCEND_RUNS[:3]
    assert base.name == "EP64" and base.step == pytest.approx(16 / 232.6)
    # 64 dies of attention make the tokens of 80
    assert wide.name == "64A16F" and wide.step == pytest.approx(28 * 64 / (258.9 * 80))


def test_ascend_where_attention_is_all_there_is():
    # lanes hide nothing of attention: a die makes as many tokens with any batch, and FFN dies
    # make none, so AFD loses its share of the dies
    rows = published.ascend_rows(read_model("deepseek-v3.2"), Fixed(10.0, 0.0))
    ratios = {r.name: r.ours for r in published.ratio_rows(rows)}
    assert ratios["64A16F"] == pytest.approx(64 / 80 - 1, abs=1e-3)
    assert ratios["48A16F"] == pytest.approx(48 / 64 - 1, abs=1e-3)


def test_ascend_where_experts_are_all_there_is():
    # 28 * 64 tokens on 16 dies: a token costs the same anywhere, 64 + 16 dies against 64
    rows = published.ascend_rows(read_model("deepseek-v3.2"), Fixed(0.0, 1.0))
    ratios = {r.name: r.ours for r in published.ratio_rows(rows)}
    assert ratios["64A16F"] == pytest.approx(64 / 80 - 1, abs=1e-3)
