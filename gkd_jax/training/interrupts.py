"""SIGTERM and Ctrl-C: the run finishes its current step, saves a checkpoint and exits."""

from collections.abc import Callable, Iterator
import contextlib
import signal

import jax
from jax.experimental import multihost_utils


SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Interruption:
    """The signal that asked the run to stop.

    Attributes:
        signal: the first signal that was received; None before.
    """

    def __init__(self):
        self.signal: signal.Signals | None = None

    @property
    def status(self) -> int:
        """The exit status that stands for the signal: 143 for SIGTERM, 130 for Ctrl-C."""
        assert self.signal is not None
        return 128 + self.signal

    @property
    def name(self) -> str:
        """The name of the signal for messages: "SIGTERM" or "Ctrl-C"."""
        assert self.signal is not None
        return SIGNALS[self.signal]


@contextlib.contextmanager
def watch() -> Iterator[tuple[Interruption, Callable[[int], bool]]]:
    """Watches for signals while the context lasts.

    In a single process the first signal is noted, and a second Ctrl-C ends the run at once. In a
    job of several processes, each may get SIGTERM at another step, or only one may get it, so JAX's
    preemption service chooses a step that all of them have still to reach. Ctrl-C, which reaches
    all processes of a terminal, is left to Python there.

    Yields:
        The interruption, and a function of the number of steps done that returns whether the run
        must save and stop now.
    """
    received = Interruption()
    if jax.process_count() > 1:

        def reached(done: int) -> bool:
            stops = multihost_utils.reached_preemption_sync_point(done)
            if stops:
                received.signal = signal.SIGTERM
            return stops

        yield received, reached
        return

    def note(number: int, frame: object) -> None:
        del frame
        if received.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.signal = received.signal or signal.Signals(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield received, lambda done: received.signal is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
