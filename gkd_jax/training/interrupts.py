"""SIGTERM and Ctrl-C: the run saves after the step it is at, says how to go on, and ends."""

from collections.abc import Callable, Iterator
import contextlib
import signal

import jax
from jax.experimental import multihost_utils


SIGNALS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Interruption:
    """Which signal has asked the run to stop; None until one has."""

    def __init__(self):
        self.signal: signal.Signals | None = None

    @property
    def status(self) -> int:
        """The exit status of a process that ends by the signal: 143 or 130."""
        assert self.signal is not None
        return 128 + self.signal

    @property
    def name(self) -> str:
        """What the user did or the cluster sent."""
        assert self.signal is not None
        return SIGNALS[self.signal]


@contextlib.contextmanager
def watch() -> Iterator[tuple[Interruption, Callable[[int], bool]]]:
    """What was received, and a function of the steps done: whether to save and end after this one.

    The first signal is noted; a second Ctrl-C ends the run at once. Of several processes each may
    get SIGTERM at another step, or only one may get it: JAX's preemption service then chooses a
    step that all have still to reach. Ctrl-C reaches all processes of a terminal alike and is left
    to Python there.
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
