"""Growth is seen in processes that last, and only there."""

import pytest

from benchmarks.leaks import Process, Snapshot, growth

MIB = 2**20


def snap(*sizes: float | None, shm: tuple[str, ...] = (), groups: int = 2) -> Snapshot:
    """Process number i with ``sizes[i]`` MiB; None: it is not there."""
    processes = {
        (i, 0.0): Process(f"p{i}", int(size * MIB), 10, 3)
        for i, size in enumerate(sizes)
        if size is not None
    }
    return Snapshot(processes, frozenset(shm), groups)


def test_nothing_grows():
    found = growth([snap(100, 50)] * 6)
    assert (found["rss_mib"], found["shm"], found["groups"]) == (0.0, 0, 0)
    assert [row["name"] for row in found["processes"]] == ["p0", "p1"]


def test_what_grows_is_named():
    found = growth([snap(100 + i, 50) for i in range(9)])
    assert found["rss_mib"] == 6.0
    assert found["processes"][0]["grown_mib"] == 6.0


def test_one_odd_sample_does_not_decide():
    assert growth([snap(100)] * 8 + [snap(130)])["rss_mib"] == 0.0


def test_processes_that_come_and_go_do_not_count():
    assert growth([snap(100, None), snap(100, 900), snap(100, 950)])["rss_mib"] == 0.0


def test_things_left_behind():
    found = growth([snap(1, shm=("a", "b"), groups=2), snap(1, shm=("b", "c"), groups=5)])
    assert (found["shm"], found["groups"]) == (1, 3)


def test_one_snapshot_says_nothing():
    with pytest.raises(ValueError, match="at least 2"):
        growth([snap(1)])
