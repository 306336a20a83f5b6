"""Waiting is cheap when it is long and quick when it is short."""

import threading
import time

import pytest

from actors.transport.backoff import Backoff


def test_spins_before_it_sleeps():
    backoff = Backoff(spin_us=1000, yield_us=20_000, patience_us=20_000)
    start = time.monotonic()
    while time.monotonic() - start < 0.01:
        backoff.pause()
    assert backoff.sleeps == 0
    while time.monotonic() - start < 0.06:
        backoff.pause()
    assert backoff.sleeps > 0


def test_reset_starts_over():
    backoff = Backoff(spin_us=100, yield_us=1000, patience_us=1000)
    time.sleep(0.001)
    backoff.pause()
    time.sleep(0.005)
    backoff.pause()
    assert backoff.sleeps == 1
    backoff.reset()
    backoff.pause()
    assert backoff.sleeps == 1


def test_overshoot_is_bounded():
    """Each sleep is at most an eighth of the wait so far (plus the kernel's timer slack)."""
    backoff = Backoff(patience_us=300, max_sleep_us=10**6)
    slept = []
    backoff._sleep = slept.append
    start = time.monotonic()
    while time.monotonic() - start < 0.05:
        backoff.pause()
    assert slept
    assert max(slept) <= 0.06 / 8


def test_lets_other_threads_run():
    """A waiting thread must not keep the GIL: a worker beside it gets most of the time."""

    def count(seconds):
        end, number = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            number += 1
        return number

    count(0.05)
    alone = count(0.2)
    stop = threading.Event()

    def waiter():
        backoff = Backoff()
        while not stop.is_set():
            backoff.pause()

    thread = threading.Thread(target=waiter)
    thread.start()
    try:
        beside = max(count(0.2) for _ in range(3))
    finally:
        stop.set()
        thread.join()
    assert beside > 0.4 * alone


def waits(monkeypatch, yield_takes_ns):
    """Milliseconds of the first sleep when every yield takes this long; on a clock of its own."""
    clock = [1]
    backoff = Backoff(yield_us=300, patience_us=20_000)
    backoff._now = lambda: clock[0]
    monkeypatch.setattr(
        "actors.transport.backoff.yield_cpu",
        lambda: clock.__setitem__(0, clock[0] + yield_takes_ns),
    )
    slept = []
    backoff._sleep = slept.append
    while not slept:
        clock[0] += 1000
        backoff.pause()
    return (clock[0] - 1) / 1e6


def test_patient_on_a_core_that_nobody_wants(monkeypatch):
    assert waits(monkeypatch, 1000) == pytest.approx(20, rel=0.01)


def test_sleeps_soon_on_a_core_that_others_want(monkeypatch):
    assert waits(monkeypatch, 3_000_000) < 4


@pytest.mark.parametrize(
    ("spin", "yield_", "patience", "cap"),
    [(-1, 5, 9, 5), (10, 5, 9, 5), (1, 5, 4, 5), (1, 5, 9, 0)],
)
def test_bad_numbers(spin, yield_, patience, cap):
    with pytest.raises(ValueError, match="expected 0 <= spin_us"):
        Backoff(spin, yield_, patience, cap)
