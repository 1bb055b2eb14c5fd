"""When a run saves: by steps, by a clock, and by the clock of process 0 for several processes."""

import jax
from jax.experimental import multihost_utils
import numpy as np
import pytest

from gkd_jax.training import save_times
from gkd_jax.training.save_times import SaveTimes


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(save_times.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def saves(times, clock, steps, seconds_a_step):
    """The steps after which a run of `steps` steps saves."""
    found = []
    for done in range(1, steps + 1):
        clock.now += seconds_a_step(done)
        if times.is_due(done):
            found.append(done)
            times.saved()
    return found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10 minutes", 600), ("1 minute", 60), ("90s", 90), ("1.5h", 5400), ("2 hours", 7200)],
)
def test_times_are_read(text, seconds):
    assert save_times.seconds(text) == seconds


@pytest.mark.parametrize("text", ["10", "ten minutes", "0 s", "-1 s", "10 days", "", "5 minutess"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="such as '10 minutes'"):
        save_times.seconds(text)


def test_steps_are_counted(clock):
    assert saves(SaveTimes(4), clock, 13, lambda done: 100.0) == [4, 8, 12]


def test_one_process_saves_at_the_first_step_after_the_time(clock):
    assert saves(SaveTimes("60 s"), clock, 30, lambda done: 7.0) == [9, 18, 27]


@pytest.mark.parametrize("seconds_a_step", [0.01, 0.5, 7.0, 100.0])
@pytest.mark.parametrize("drift", [0.5, 1.0, 2.0])
def test_all_processes_save_when_process_0_says_so(clock, monkeypatch, seconds_a_step, drift):
    """The clock of another process runs at another speed, and its answer is the same."""
    steps = int(min(30_000, 1500 / seconds_a_step))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = []

    def broadcast(answer):
        told.append(np.array(answer))
        return answer

    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", broadcast)
    first = saves(SaveTimes("60 s"), clock, steps, lambda done: seconds_a_step)
    answers = iter(told)
    # Another number of broadcasts would end the iterator or leave some of it.
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda answer: next(answers))
    other = saves(SaveTimes("60 s"), clock, steps, lambda done: drift * seconds_a_step)
    assert other == first
    assert next(answers, None) is None
    gaps = np.diff([0, *first]) * seconds_a_step
    assert gaps.min() >= 60 - seconds_a_step
    assert gaps.max() <= 60 + 2 * seconds_a_step


def test_steps_that_become_four_times_slower_delay_a_save_by_less_than_half(clock, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda answer: answer)
    seconds = np.where(np.arange(201) < 20, 1.0, 4.0)
    found = saves(SaveTimes("60 s"), clock, 200, lambda done: seconds[done])
    gaps = np.diff([0.0, *np.cumsum(seconds)[found]])
    assert len(gaps) > 5
    assert gaps.max() < 90
