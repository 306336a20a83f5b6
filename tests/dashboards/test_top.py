"""What ``afflux top`` makes of two scrapes of a known deployment."""

from __future__ import annotations

import json
import random

import pytest

from dashboards.scrape import Scrape
from dashboards.top import STAGES, History, natural, view
from tests.dashboards.deployment import Deployment, busy, scraped


@pytest.fixture
def deployment() -> Deployment:
    made = Deployment(attention=1, ffn=2)
    busy(made)
    return made


def second(deployment: Deployment):
    """The view of one second in which ``busy`` happened."""
    old = Scrape(100.0, scraped(deployment))
    busy(deployment)
    return view(Scrape(101.0, scraped(deployment)), old, old)


def test_traffic(deployment):
    seen = second(deployment)
    assert (seen.interval_s, seen.window_s) == (1.0, 1.0)
    assert (seen.model, seen.deployment, seen.healthy, seen.epoch) == ("verse", "afflux", True, 4)
    assert (seen.running, seen.waiting) == (8, 0)
    assert seen.generation_tokens_per_s == 400 and seen.prompt_tokens_per_s == 100
    assert seen.requests_per_s == 10 and seen.outcomes == {"stop": 10}
    assert seen.states == {"attention": {"ready": 1}, "ffn": {"ready": 2}}
    assert seen.targets == {"attention": 1, "ffn": 2} and seen.ratio == 0.5
    assert seen.slo_s == {"ttft": 0.5, "tpot": 0.05}
    assert seen.attained == {"ttft": 0.9} and seen.objective == 0.99


def test_latencies(deployment):
    ttft = second(deployment).ttft
    assert ttft.count == 10 and ttft.mean == pytest.approx(0.09)
    assert 0.08 < ttft.p50 < ttft.p99 <= 0.1


def test_attention_row(deployment):
    (row,) = second(deployment).attention
    assert (row.actor, row.epoch, row.running, row.waiting) == ("attention-0", 4, 8, 0)
    assert row.compute == pytest.approx(0.5) and row.wait == pytest.approx(0.3)
    assert row.steps_per_s == 20 and row.step_s == pytest.approx(0.04)
    assert (row.batch_tokens, row.lanes, row.kv_usage) == (16, 2, 0.25)
    assert row.hop_s == pytest.approx(0.0006)


def test_ffn_rows(deployment):
    rows = second(deployment).ffn
    assert [row.actor for row in rows] == ["ffn-0", "ffn-1"]
    assert rows[0].busy == pytest.approx(0.6) and rows[0].compute == pytest.approx(0.4)
    assert rows[0].rides_per_s == 40 and rows[0].boarding_s == pytest.approx(0.001)
    assert (rows[0].queue, rows[0].experts, rows[0].balance) == (0, 64, 1.25)


def test_hops_add_up(deployment):
    seen = second(deployment)
    assert sum(seen.hops_s[stage] for stage in STAGES) == pytest.approx(seen.hops_s["total"])
    assert seen.bytes_per_s == {"dispatch": 1e6, "combine": 2e6}


def test_faults_and_rejections(deployment):
    old = Scrape(0.0, scraped(deployment))
    deployment.attention[0]("afd_faults_total", kind="lost").inc()
    deployment.attention[0]("afd_transport_resends_total").inc(3)
    deployment.ffn[0]("afd_transport_refusals_total", reason="stale_epoch").inc(2)
    deployment.frontend("afd_requests_rejected_total", reason="queue_full").inc(4)
    seen = view(Scrape(1.0, scraped(deployment)), old, old)
    assert seen.faults == {"lost": 1, "resends": 3, "refusals": 2}
    assert seen.rejected == 4


def test_one_scrape_has_no_rates_but_percentiles(deployment):
    seen = view(Scrape(1.0, scraped(deployment)))
    assert seen.interval_s is None and seen.window_s is None
    assert seen.generation_tokens_per_s is None and seen.attention[0].compute is None
    assert seen.ttft.count == 10


def test_an_actor_that_left_is_gone_and_one_that_came_has_a_row(deployment):
    old = Scrape(0.0, scraped(deployment))
    after = Deployment(attention=2, ffn=1)
    busy(after)
    seen = view(Scrape(1.0, scraped(after)), old, old)
    assert [row.actor for row in seen.attention] == ["attention-0", "attention-1"]
    assert [row.actor for row in seen.ffn] == ["ffn-0"]
    assert seen.attention[1].compute is None and seen.attention[1].epoch == 4


def test_of_nothing():
    seen = view(Scrape(1.0, {}))
    assert seen.epoch is None and seen.attention == () and seen.hops_s == {}


def test_two_frontends_add_up_and_repeat_their_targets(deployment):
    series = scraped(deployment)
    other = Deployment(attention=1, ffn=2)
    other.frontend._labels["actor_id"] = "frontend-1"
    busy(other)
    for name, values in scraped(other).items():
        series.setdefault(name, {}).update(values)
    seen = view(Scrape(1.0, series))
    assert seen.running == 16 and seen.slo_s["ttft"] == 0.5 and seen.ttft.count == 20


def test_history_has_a_window(deployment):
    history = History(window_s=3.0)
    views = []
    for moment in range(6):
        views.append(history.add(Scrape(float(moment), scraped(deployment))))
        busy(deployment)
    assert [seen.interval_s for seen in views] == [None, 1, 1, 1, 1, 1]
    assert [seen.window_s for seen in views] == [None, 1, 2, 3, 3, 3]
    assert views[-1].ttft.count == 30


def test_history_with_a_window_shorter_than_the_interval_still_has_rates(deployment):
    history = History(window_s=1.0)
    history.add(Scrape(0.0, scraped(deployment)))
    assert history.add(Scrape(5.0, scraped(deployment))).interval_s == 5.0


def test_names_are_sorted_as_people_count():
    names = [f"ffn-{n}" for n in range(12)]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=natural) == names


def test_json(deployment):
    data = json.loads(json.dumps(second(deployment).as_dict()))
    assert data["ffn"][1]["actor"] == "ffn-1" and data["ttft"]["count"] == 10
