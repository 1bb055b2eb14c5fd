"""SIGTERM and Ctrl-C: the run finishes its current step, saves a checkpoint and exits."""

from collections.abc import Iterator
import contextlib
import signal
import sys
from typing import NoReturn

import jax
from jax.experimental import multihost_utils


_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Interruption:
    """The signal that asks the run to stop."""

    def __init__(self):
        self.signal: signal.Signals | None = None  # the first one that was received

    def is_due(self, done: int) -> bool:
        """Returns whether the run must stop after `done` steps; all processes ask at each step.

        In a job of several processes, each may get SIGTERM at another step, or only one may get it,
        so JAX's preemption service chooses a step that all of them have still to reach.
        """
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(done):
            self.signal = signal.SIGTERM
        return self.signal is not None

    def exit(self, done: int) -> NoReturn:
        """Ends the process of a run that was saved after `done` steps.

        Raises:
            SystemExit: with the status that stands for the signal, 143 for SIGTERM or 130 for
                Ctrl-C.
        """
        assert self.signal is not None
        advice = "run the same command to go on"
        print(f"{_NAMES[self.signal]}: saved step {done}; {advice}", file=sys.stderr)
        raise SystemExit(128 + self.signal)


@contextlib.contextmanager
def watch() -> Iterator[Interruption]:
    """Watches for signals while the context lasts.

    In a single process the first signal is noted, and a second Ctrl-C ends the run at once. In a
    job of several processes, SIGTERM is left to JAX's preemption service, and Ctrl-C, which reaches
    all processes of a terminal, to Python.
    """
    received = Interruption()

    def note(number: int, frame: object) -> None:
        del frame
        if received.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.signal = received.signal or signal.Signals(number)

    noted = _NAMES if jax.process_count() == 1 else ()
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
