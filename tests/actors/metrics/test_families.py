"""The catalogue as prometheus_client objects: names, labels, values at scrape time."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from actors.metrics import catalogue
from actors.metrics.families import Distribution, Families, Rising, Value

WHO = {"model_name": "tiny", "role": "attention", "actor_id": "attention-0"}


def make() -> Families:
    return Families("attention", WHO)


def samples(families: Families) -> dict:
    """(name, own labels) -> value of every series."""
    return {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k not in WHO)): sample.value
        for family in text_string_to_metric_families(generate_latest(families.registry).decode())
        for sample in family.samples
        if {k: v for k, v in sample.labels.items() if k in WHO} == WHO
    }


def test_counting_and_observing():
    families = make()
    families["afd_faults_total"].labels("lost").inc(2)
    families["afd_faults_total"].labels("silent")
    families["afd_attention_step_seconds"].observe(0.0003)
    families["afd_table_epoch"].set(7)
    seen = samples(families)
    assert seen["afd_faults_total", "lost"] == 2
    assert seen["afd_faults_total", "silent"] == 0
    assert seen["afd_attention_step_seconds_bucket", "0.00025"] == 0
    assert seen["afd_attention_step_seconds_bucket", "0.0005"] == 1
    assert seen["afd_attention_step_seconds_sum",] == 0.0003
    assert seen["afd_table_epoch",] == 7
    assert not [name for name, *_ in seen if name.endswith("_created")]


def test_reading_at_scrape_time():
    families = make()
    epoch = 1
    counts = [0] * (len(catalogue.HOP_S) + 1)
    counts[0], counts[-1] = 2, 1

    def read():
        yield Value("afd_table_epoch", (), epoch)
        yield Distribution("afd_transport_hop_seconds", ("queue",), counts, 1.5)

    families.collect_from(read, ["afd_table_epoch", "afd_transport_hop_seconds"])
    assert samples(families)["afd_table_epoch",] == 1
    epoch = 2
    seen = samples(families)
    assert seen["afd_table_epoch",] == 2
    assert seen["afd_transport_hop_seconds_bucket", "8.388608", "queue"] == 2
    assert seen["afd_transport_hop_seconds_bucket", "+Inf", "queue"] == 3
    assert seen["afd_transport_hop_seconds_count", "queue"] == 3
    assert seen["afd_transport_hop_seconds_sum", "queue"] == 1.5


@pytest.mark.parametrize("wrong", ["afd_ffn_step_seconds", "afd_epochs"])
def test_a_name_that_this_side_does_not_export_is_refused(wrong):
    with pytest.raises(ValueError, match=f"side 'attention' does not export {wrong}"):
        make()[wrong]
    with pytest.raises(ValueError, match=wrong):
        make().collect_from(list, [wrong])


def test_a_metric_has_one_source():
    families = make()
    families["afd_table_epoch"].set(1)
    with pytest.raises(ValueError, match="afd_table_epoch is filled already"):
        families.collect_from(list, ["afd_table_epoch"])
    assert families["afd_table_epoch"] is families["afd_table_epoch"]


def test_base_labels_are_needed():
    with pytest.raises(ValueError, match=r"base labels \('model_name', 'role', 'actor_id'\)"):
        Families("ffn", {"model_name": "tiny"})
    assert Families("manager", {"model_name": "tiny"}).missing


def test_missing_names_what_nobody_fills():
    families = Families("ffn", WHO | {"role": "ffn"})
    everything = set(catalogue.of("ffn"))
    assert families.missing == everything - {"afd_ffn_expert_tokens_total"}  # opt-in
    families.collect_from(list, sorted(families.missing - {"afd_ffn_queue_depth"}))
    assert families.missing == {"afd_ffn_queue_depth"}


@pytest.mark.parametrize(
    "wrong",
    [
        Value("afd_attention_preemptions_total", (), 1),  # not one of the names given
        Value("afd_table_epoch", ("too", "many"), 1),
        Distribution("afd_transport_hop_seconds", ("queue",), [1, 2], 0.1),
    ],
)
def test_a_source_that_fails_spoils_nothing_else(wrong, caplog):
    families = make()
    families["afd_attention_step_seconds"].observe(1)

    def read():
        yield Value("afd_faults_total", ("lost",), 1)
        yield wrong
        yield Value("afd_faults_total", ("silent",), 1)

    families.collect_from(
        read, ["afd_faults_total", "afd_table_epoch", "afd_transport_hop_seconds"]
    )
    with caplog.at_level(logging.ERROR):
        seen = samples(families)
        samples(families)
    assert seen["afd_faults_total", "lost"] == 1
    assert ("afd_faults_total", "silent") not in seen
    assert seen["afd_attention_step_seconds_count",] == 1
    assert len(caplog.records) == 1  # not one per scrape


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_a_rising_total_never_falls(values):
    rising = Rising()
    seen = [rising("x", value) for value in values]
    assert seen == sorted(seen)
    assert seen[-1] == max(0.0, *values)
    assert rising("y", -1.0) == 0.0
