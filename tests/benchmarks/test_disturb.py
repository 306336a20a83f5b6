"""Schedules of blows are drawn by seed; a blow hits one process."""

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.disturb import KINDS, schedule, strike, wake


@given(st.integers(0, 60), st.integers(), st.sampled_from([KINDS, (*KINDS, "frontend"), ("ffn",)]))
def test_a_schedule_is_complete_ordered_and_repeatable(kills, seed, kinds):
    blows = schedule(kills, seed, kinds)
    assert blows == schedule(kills, seed, kinds)
    assert [blow.number for blow in blows] == list(range(kills))
    assert [blow.after for blow in blows] == sorted(blow.after for blow in blows)
    assert all(0 <= blow.after < 1 and 0 <= blow.which < 1 for blow in blows)
    assert {blow.kind for blow in blows} <= set(kinds)
    if kills >= len(kinds):
        assert {blow.kind for blow in blows} == set(kinds)
    if kills >= 4:
        assert any(blow.how == "freeze" for blow in blows)
    assert all(blow.how == "kill" for blow in blows if blow.kind in ("manager", "frontend"))


def test_seeds_differ():
    assert schedule(20, 1) != schedule(20, 2)


@given(st.permutations(["ffn-0", "ffn-1", "ffn-10"]), st.integers(0, 99))
def test_the_victim_does_not_depend_on_the_order(names, seed):
    blow = schedule(1, seed)[0]
    assert blow.pick(names) == blow.pick(sorted(names))


def test_nobody_to_hit():
    with pytest.raises(ValueError, match="to hit"):
        schedule(1, 0)[0].pick([])


@pytest.fixture
def victim() -> Iterator[subprocess.Popen]:
    """A process that waits."""
    process = subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_a_kill(victim: subprocess.Popen):
    strike(victim.pid, "kill")
    assert victim.wait(10) == -9
    assert not wake(victim.pid)
    with pytest.raises(ProcessLookupError, match=str(victim.pid)):
        strike(victim.pid, "kill")


def test_a_freeze_and_its_end(victim: subprocess.Popen):
    strike(victim.pid, "freeze")
    process = psutil.Process(victim.pid)
    deadline = time.monotonic() + 10.0  # the signal is sent; the process stops when it is scheduled
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.status() == psutil.STATUS_STOPPED
    assert wake(victim.pid)
    assert process.status() != psutil.STATUS_STOPPED


def test_a_hiccup_is_over_by_itself(victim: subprocess.Popen):
    strike(victim.pid, "hiccup")
    assert psutil.Process(victim.pid).status() != psutil.STATUS_STOPPED
