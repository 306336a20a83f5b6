"""Waiting without a busy core: spin, then yield, then sleep in proportion to the time waited.

Frames of a running step arrive within microseconds, so a poller spins first. Then it yields,
because whoever it waits for may want this core (not at once: on a shared core a yield costs a
time slice, longer than a small frame takes). A yield that returns at once says that nobody else
wants the core, so the poller goes on yielding for as long as a step may leave it waiting; where
others do, it soon sleeps, and so it does when idle. A sleep is never longer than an eighth of the
time already waited (and never longer than the cap), so backing off adds at most about 12 % to any
wait. Not for deadlines: the caller keeps those.
"""

from __future__ import annotations

import ctypes
import sys
import time

_PR_SET_TIMERSLACK = 29
_SLACK_NS = 2_000

if sys.platform == "linux":
    # Through ctypes because it drops the GIL around the call; os.sched_yield (3.11) keeps it, and
    # a poller that keeps the GIL starves the threads of its own process.
    _libc = ctypes.CDLL(None)
    yield_cpu = _libc.sched_yield

    def sharpen_sleeps() -> None:
        """Let this thread's sleeps end within microseconds; Linux rounds them up by 50 us."""
        _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_SLACK_NS), 0, 0, 0)
else:

    def sharpen_sleeps() -> None:
        """Nothing to do here."""

    def yield_cpu() -> int:
        time.sleep(0)
        return 0


_OTHERS_RAN_NS = 30_000
"""A yield that takes longer than this gave the core to somebody."""


class Backoff:
    """One per polling loop; not shared between threads.

    Args:
        spin_us: microseconds of polling before the first ``sched_yield``.
        yield_us: microseconds, from the start, before the first sleep on a core that others want.
        patience_us: likewise on a core that nobody else wants.
        max_sleep_us: longest sleep; bounds both the idle load and the wake-up delay.
    """

    __slots__ = (
        "_limit",
        "_max_sleep",
        "_now",
        "_patience",
        "_since",
        "_sleep",
        "_spin",
        "_yield",
        "sleeps",
    )

    def __init__(
        self,
        spin_us: float = 60.0,
        yield_us: float = 300.0,
        patience_us: float = 20_000.0,
        max_sleep_us: float = 2000.0,
    ):
        if not 0 <= spin_us <= yield_us <= patience_us or max_sleep_us <= 0:
            raise ValueError(
                f"spin_us is {spin_us}, yield_us {yield_us}, patience_us {patience_us} and "
                f"max_sleep_us {max_sleep_us}; expected 0 <= spin_us <= yield_us <= patience_us "
                "and max_sleep_us > 0"
            )
        self._spin = int(spin_us * 1000)
        self._yield = int(yield_us * 1000)
        self._patience = int(patience_us * 1000)
        self._max_sleep = max_sleep_us * 1e-6
        self._now = time.monotonic_ns
        self._sleep = time.sleep
        self._since = 0
        self._limit = self._patience
        self.sleeps = 0

    def reset(self) -> None:
        """Call when something arrived."""
        self._since = 0

    def pause(self) -> None:
        """Call when nothing arrived: returns at once, yields the core or sleeps."""
        now = self._now()
        if not self._since:
            self._since = now
            self._limit = self._patience
            return
        waited = now - self._since
        if waited < self._spin:
            return
        if waited < self._limit:
            yield_cpu()
            if self._now() - now > _OTHERS_RAN_NS:
                self._limit = self._yield
            return
        self.sleeps += 1
        self._sleep(min(waited * 0.125e-9, self._max_sleep))
