"""`program`: the process `gkd-jax`, which is also `python -m gkd_jax`."""

import atexit
import os
import signal
import sys
import threading

from gkd_jax.main import main


_WAIT_FOR_OTHERS_S = 20.0  # seconds in which processes that fail together all come to their end


def program() -> None:
    """Runs the command of the process's arguments, and ends the process as soon as it is done.

    Python would go on to free every module. With TensorFlow and JAX that takes more than a second,
    and has no use. Functions that other packages registered with `atexit` run as always, and
    threads that are no daemons are waited for.
    """
    status = [1]  # that of an exception that `main` lets pass
    # Functions of `atexit` run in the reverse order, so the first one that is registered runs last.
    atexit.register(lambda: _end(status[0]))
    try:
        main()
        status[0] = 0
    except SystemExit as ending:
        status[0] = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if status[0] in (1, 2):  # an error; a signal has another status and ends all processes
            _wait_no_longer(status[0])
        raise
    finally:  # Ctrl-C while Python itself ends would print a traceback, and end nothing
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _wait_no_longer(status: int) -> None:
    """Lets a process that failed wait for the other processes of its job for a short time only.

    JAX waits at the end until all processes have come to their end, for at most five minutes, and
    then aborts. If this process failed alone, the others wait for it in the meantime. When it is
    gone, JAX's coordination service ends them.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        timer = threading.Timer(_WAIT_FOR_OTHERS_S, _end, [status])
        timer.daemon = True
        timer.start()


def _end(status: int) -> None:
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader of a pipe is gone
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    program()
