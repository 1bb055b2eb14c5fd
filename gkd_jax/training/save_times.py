"""When a run saves: every so many steps, or after every so many minutes of training.

Saving by time needs no knowledge of how long a step takes, so it is the default. Where a job has
several processes, they must save at the same step, and their clocks differ. Process 0 therefore
decides for all of them. It does so at steps that all processes know, because each broadcast makes
the processes wait for each other.
"""

import re
import time

import jax
from jax.experimental import multihost_utils
import numpy as np


_SECONDS = {"s": 1.0, "second": 1.0, "m": 60.0, "minute": 60.0, "h": 3600.0, "hour": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|m|h|seconds?|minutes?|hours?)")


def seconds(period: str) -> float:
    """Returns the seconds of a time such as "10 minutes", "90 s" or "1.5h".

    Raises:
        ValueError: for a text that is no such time, or a time of 0.
    """
    match = _TIME.fullmatch(period)
    found = float(match[1]) * _SECONDS[match[2].rstrip("s") or "s"] if match else 0.0
    if not found:
        raise ValueError(
            f"save_period must be a number of steps or a time such as '10 minutes', '90 seconds' "
            f"or '2h', got {period!r}"
        )
    return found


class SaveTimes:
    """Decides after which steps a run saves, beside its evaluations and its end."""

    def __init__(self, period: int | str):
        """Starts the clock. The period is a number of steps, or a time (see `seconds`)."""
        self._steps = period if isinstance(period, int) else None
        self._seconds = seconds(period) if isinstance(period, str) else 0.0
        self._saved_at = self._looked_at = time.monotonic()
        self._looked_after: int | None = None
        self._next_look = 0

    def is_due(self, done: int) -> bool:
        """Returns whether to save after `done` steps; all processes ask at each step, in order.

        All processes get the same answer at the same step.
        """
        if self._steps is not None:
            return done % self._steps == 0
        if jax.process_count() == 1:
            return time.monotonic() - self._saved_at >= self._seconds
        if self._looked_after is None:
            self._looked_after = self._next_look = done - 1
        if done < self._next_look:
            return False
        now = time.monotonic()
        is_due = now - self._saved_at >= self._seconds
        wait = self._steps_until_next_look(now, done, now if is_due else self._saved_at)
        answer = multihost_utils.broadcast_one_to_all(np.asarray([is_due, wait], np.int32))
        self._looked_at, self._looked_after = now, done
        self._next_look = done + int(answer[1])
        return bool(answer[0])

    def saved(self) -> None:
        """Restarts the clock: everything up to now has been saved."""
        self._saved_at = time.monotonic()

    def _steps_until_next_look(self, now: float, done: int, saved_at: float) -> int:
        """Returns how many steps fit into the time left, but at most twice as many as last time.

        The first limit keeps a save from coming late. The second one keeps a few unusually fast
        steps from putting the next look off for long.
        """
        assert self._looked_after is not None
        last = max(done - self._looked_after, 1)
        pace = max((now - self._looked_at) / last, 1e-6)
        return max(1, min(2 * last, int((saved_at + self._seconds - now) / pace)))
