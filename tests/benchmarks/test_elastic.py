"""What the elastic benchmark makes of a run; running it is `afflux bench elastic`."""

import pytest
from rich.console import Console

from benchmarks import elastic
from benchmarks.elastic import FLIPS, SCRIPT, Run, Step
from benchmarks.leaks import Process, Snapshot
from benchmarks.load import Stream
from cluster.status import ChangeReport

ZERO = 1_800_000_000.0


def step(number: int, text: str, counts: tuple[int, int], **changed) -> Step:
    """A step at ``ZERO + 10 * number`` that prepares for 2 s and commits for 10 ms."""
    facts = {
        "number": number,
        "verb": "scale",
        "text": text,
        "phase": "done",
        "started_at": ZERO + 10 * number + 0.5,
        "seconds": {"prepare": 2.0, "commit": 0.01, "release": 0.1, "total": 2.11},
        "epoch": number + 2,
    }
    report = ChangeReport.model_validate(facts | changed)
    return Step(text, counts, ZERO + 10 * number, report)


@pytest.fixture
def done() -> Run:
    """A run of the script with a hold-up of 80 ms in the second commit."""
    steps = [step(i, elastic._ratio(counts), counts) for i, counts in enumerate(SCRIPT)]
    steps.append(step(len(steps), "2A2F", (2, 2)))
    for role, other, after in FLIPS:
        steps.append(step(len(steps), f"{role}-1 to {other}", after, verb="flip"))
    ticks = [ZERO + 0.02 * i for i in range(5000)]
    held = [t for t in ticks if not ZERO + 12.5 < t < ZERO + 12.6]
    streams = [Stream(0, ZERO - 0.1, times, [7] * len(times)) for times in (held, held)]
    truth = [Stream(0, ZERO - 60, ticks, [7] * len(held))]
    return Run(steps, [], streams, truth, script_ended=ZERO + 95)


def test_summary(done: Run):
    summary = elastic._summary(done, emulated=False)
    assert (summary["sent"], summary["failed"], summary["wrong_tokens"]) == (2, 0, 0)
    assert summary["commit_pause_ms"] == pytest.approx(100, abs=21)
    assert summary["commit_pause_p50_ms"] == pytest.approx(0, abs=1)
    assert summary["flip_s"] == pytest.approx(2.51)
    assert summary["script"] == "1A1F -> 2A1F -> 2A3F -> 1A2F -> 3A1F -> 1A1F"
    assert summary["clean"] and summary["dtype"] == "float32" and summary["emulation"] is False


def test_a_change_that_was_rolled_back_is_not_clean(done: Run):
    done.steps[2] = step(2, "1A2F", (1, 2), phase="rolled_back", error="no room", seconds={})
    summary = elastic._summary(done, emulated=True)
    assert not summary["clean"] and summary["steps_done"] == summary["steps"] - 1
    assert len(elastic._marks(done)) == len(elastic._counts(done)) - 1 == len(done.steps) - 1


def test_growth_is_in_the_summary(done: Run):
    sizes = (100, 101, 102)
    done.snapshots = snapshots(raylet=sizes)
    summary = elastic._summary(done, emulated=False)
    assert summary["grown_rss_mib"] == summary["grown_beside_ray_mib"] == 2.0


def test_growth_is_compared_with_ray_alone_and_with_no_changes(done: Run):
    manager = "ray::Manager"
    done.snapshots = snapshots(**{"gcs_server": (100, 105, 110), manager: (50, 52, 53)})
    done.plain = snapshots(**{"gcs_server": (110, 115, 119), manager: (53, 53, 53)})
    for number, snap in enumerate(done.plain):
        snap.processes[9, 0.0] = Process("ray::Owner", 40 + number << 20, 9, 9)
    rows = {row["name"]: row for row in elastic._growth(done)["processes"]}
    assert (rows["gcs_server"]["grown_mib"], rows["gcs_server"]["ray_alone_mib"]) == (10.0, 9.0)
    assert (rows[manager]["grown_mib"], rows[manager]["ray_alone_mib"]) == (3.0, 2.0)
    assert rows[manager]["no_changes_mib"] is None
    done.still = snapshots(**{"gcs_server": (110, 110, 111), manager: (53, 54, 55)})
    grown = elastic._growth(done)
    assert [row["no_changes_mib"] for row in grown["processes"]] == [1.0, 2.0]
    assert grown["series_mib"] == {"gcs_server 0": [100, 105, 110], "ray::Manager 1": [50, 52, 53]}
    assert elastic._summary(done, emulated=False)["grown_beside_ray_mib"] == 1.0


def snapshots(**mib: tuple[int, ...]) -> list[Snapshot]:
    """One per size; processes by name."""
    each = zip(*mib.values(), strict=True)
    return [
        Snapshot(
            {
                (pid, 0.0): Process(name, size << 20, 9, 9)
                for pid, (name, size) in enumerate(zip(mib, sizes, strict=True))
            },
            frozenset(),
            2,
        )
        for sizes in each
    ]


def test_it_prints(done: Run, capsys: pytest.CaptureFixture[str]):
    done.streams[0].error = "HTTP 503: no actor"
    report = {"summary": {"bench": "elastic"}, "details": elastic._details(done)}
    elastic._print(report, done)
    elastic._tell(Console(), done.steps[0])
    text = capsys.readouterr()
    assert "2A3F" in text.out and "HTTP 503: no actor" in text.err
