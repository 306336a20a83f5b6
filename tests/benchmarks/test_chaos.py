"""What the chaos benchmark makes of a run; running it is `afflux bench chaos`."""

import pytest

from benchmarks import chaos
from benchmarks.chaos import Act, Hit
from benchmarks.load import Stream

ZERO = 1_800_000_000.0


def act(*hits: Hit, stall: float = 0.0, error: str = "") -> Act:
    """A stream of 20 s that stalls for ``stall`` seconds from ``ZERO + 5`` on."""
    times = [ZERO + 0.05 * i + (stall if 0.05 * i > 5 else 0.0) for i in range(400)]
    ended = ZERO + 7 if error else times[-1]
    if error:
        times = [time for time in times if time <= ended]
    stream = Stream(0, ZERO - 0.2, times, [3] * len(times), ended, error)
    made = Act(reference=[Stream(0, ZERO - 90, [], [3] * 400)], hits=list(hits))
    made.end([stream])
    return made


def hit(scenario: str = "attention", **changed) -> Hit:
    facts = {"kind": "attention", "how": "kill", "victim": "attention-0", "at": ZERO + 5.01}
    times = {"detected": ZERO + 5.11, "recovered": ZERO + 7.0}
    return Hit(scenario, **(facts | times | changed))


def test_the_worst_is_reported_with_the_median_beside_it():
    acts = [act(hit(), stall=2.0), act(hit()), act(hit("ffn_frozen", how="freeze", kind="ffn"))]
    summary = chaos._summary(acts, None, 1, 2.0, 8, emulated=False)
    assert summary["gap_attention_s"] == pytest.approx(2.05, abs=0.01)
    assert summary["gap_attention_p50_s"] == pytest.approx(1.05, abs=0.02)
    assert summary["gap_ffn_frozen_s"] == pytest.approx(0.05, abs=0.01)
    assert summary["gap_ffn_replica_s"] is None
    assert summary["detect_s"] == pytest.approx(0.1, abs=0.01)
    assert summary["recover_s"] == pytest.approx(1.99, abs=0.01)
    assert (summary["sent"], summary["failed"], summary["wrong_tokens"]) == (3, 0, 0)
    assert summary["kills"] == 0 and summary["clean"]


def test_the_random_run_is_what_counts_are_of():
    summary = chaos._summary([act(hit())], act(hit("")), 1, 2.0, 8, emulated=True)
    assert (summary["sent"], summary["scenario_sent"], summary["kills"]) == (1, 1, 1)
    assert summary["emulation"]


def test_failures_and_what_is_not_whole_again():
    broken = act(hit("", recovered=None), error="ClientPayloadError")
    summary = chaos._summary([], broken, 1, 2.0, 8, emulated=False)
    assert (summary["failed"], summary["wrong_tokens"], summary["not_whole_again"]) == (1, 0, 1)
    assert not summary["clean"] and not chaos._clean(broken)


def test_streams_of_a_dead_frontend_are_counted_apart():
    broken = act(hit("", kind="frontend", at=ZERO + 6.5), error="ClientPayloadError")
    summary = chaos._summary([], broken, 1, 2.0, 8, emulated=False)
    assert (summary["failed"], summary["cut_by_frontend"]) == (0, 1)
    assert summary["clean"] and chaos._clean(broken)


def test_it_prints(capsys: pytest.CaptureFixture[str]):
    broken = act(hit("", woken=ZERO + 9), error="ClientPayloadError")
    chaos._print({"summary": {"bench": "chaos"}, "details": chaos._details([], broken)})
    text = capsys.readouterr()
    assert "kill attention-0" in text.out and "ClientPayloadError" in text.err
    kinds = [mark.kind for mark in chaos._marks(broken.hits[0])]
    assert kinds == ["kill", "wake"]


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="nothing to do"):
        chaos.run(kills=0, repeats=0)
