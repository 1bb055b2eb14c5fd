"""What a run prints while it trains: a bar as wide as the terminal at most, or plain lines."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios

import jax
import pytest

from gkd_jax.training.progress import Progress


VALUES = {
    "train/loss": 0.12345,
    "time/sample_s": 0.15,
    "time/update_s": 0.05,
    "time/step_s": 0.2,
    "time/tokens_per_s": 12_345.0,
    "time/model_flops_share": 0.41,
}


def in_terminal(columns, monkeypatch, steps=30, name="on_policy_gkd"):
    """Everything that a run writes to a terminal of some width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        shown = Progress(steps, start=0, every=1, name=name)
        for done in range(1, steps + 1):
            shown.step(done, VALUES)
            if done == steps // 2:
                shown.clear()
                print("step 15: an evaluation", file=sys.stderr)
        shown.close()
        terminal.flush()
        monkeypatch.undo()
        os.set_blocking(ours, False)
        text = b""
        with contextlib.suppress(BlockingIOError):  # each call returns a part of it
            while part := os.read(ours, 65_536):
                text += part
    os.close(ours)
    return text.decode()


@pytest.mark.parametrize("columns", [40, 80, 132])
def test_the_bar_is_never_wider_than_the_terminal(columns, monkeypatch):
    text = in_terminal(columns, monkeypatch)
    lines = [line for part in text.split("\r") for line in part.split("\n")]
    assert max(map(len, lines)) <= columns
    assert "\rstep 15: an evaluation" in text  # on a line of its own
    assert text.count("\n") == 2  # that line, and the last bar
    if columns > 100:
        assert "30/30" in text
        assert "loss 0.1235, 200 ms/step, 12.3k tokens/s, 41% of peak" in text


def test_elsewhere_lines_are_printed_at_their_period_and_at_the_end(capfd, monkeypatch):
    shown = Progress(5, start=2, every=2)
    for done in (3, 4, 5):
        shown.step(done, VALUES)
    lines = capfd.readouterr().err.splitlines()
    assert [line[:8] for line in lines] == ["step 4/5", "step 5/5"]
    pattern = r"loss 0\.1235  \d+ ms/step \(sample 75%, update 25%\)  12\.3k tokens/s  41% of peak"
    assert re.search(pattern, lines[0])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    Progress(5, start=0, every=1).step(1, VALUES)
    assert capfd.readouterr().err == ""
