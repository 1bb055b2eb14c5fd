"""One run at a time trains in a MODEL_DIR; others wait, give up, or take over a stale lock."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

from jax.experimental import multihost_utils
import pytest

from gkd_jax.training import run_lock


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)


def write(folder, **owner):
    folder.mkdir(exist_ok=True)
    (folder / run_lock.FILE).write_text(json.dumps(owner))


def test_a_lock_is_there_while_it_is_held_and_gone_after(tmp_path):
    folder = tmp_path / "run"
    with run_lock.hold(folder):
        first = (folder / run_lock.FILE).stat().st_mtime
        time.sleep(0.5)
        assert (folder / run_lock.FILE).stat().st_mtime > first  # renewed
        (folder / "something").touch()
    assert not (folder / run_lock.FILE).exists()
    assert folder.exists()


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    with pytest.raises(OSError, match="data"), run_lock.hold(tmp_path / "run"):
        raise OSError("no data")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_ends_every_process(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: told.append(own) or own)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), run_lock.hold(tmp_path / "file" / "run"):
        pytest.fail("there is no folder")
    assert told == [True]  # so that the other processes do not wait for this one


def test_a_full_disk_leaves_no_lock(tmp_path):
    """The next start would wait for it, although nobody renews it."""
    script = FULL_DISK.format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"OSError: [Errno 27] File too large: '{tmp_path}/lock.json'" in done.stderr
    assert [*tmp_path.iterdir()] == []


FULL_DISK = """
import resource, signal
from gkd_jax.training import run_lock
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG
resource.setrlimit(resource.RLIMIT_FSIZE, (5, resource.RLIM_INFINITY))
with run_lock.hold({folder!r}):
    pass
"""


def test_a_lock_that_is_renewed_is_waited_for_and_then_said(tmp_path, capfd):
    refused = pytest.raises(ValueError, match="one run at a time")
    with run_lock.hold(tmp_path), refused as error, run_lock.hold(tmp_path):
        pytest.fail("two runs in one folder")
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(error.value)
    assert "waiting for process" in capfd.readouterr().err


def test_a_lock_that_nobody_renews_is_taken_over(tmp_path, capfd):
    write(tmp_path, pid=1, host="another-machine", started="0")
    began = time.monotonic()
    with run_lock.hold(tmp_path):
        assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == os.getpid()
    assert 0.5 < time.monotonic() - began < 10
    assert "taking over" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["ended", "another process of its number", "half written"])
def test_a_lock_of_a_process_that_has_ended_here_is_taken_over(tmp_path, content):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    if content == "ended":
        write(tmp_path, pid=ended.pid, host=socket.gethostname(), started="1")
    elif content == "another process of its number":
        write(tmp_path, pid=os.getpid(), host=socket.gethostname(), started="1")
    else:
        (tmp_path / run_lock.FILE).write_text('{"pi')
    with run_lock.hold(tmp_path):
        assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == os.getpid()


def test_of_two_starts_that_see_a_stale_lock_one_takes_it(tmp_path, monkeypatch):
    write(tmp_path, pid=1, host="another-machine", started="0")
    os.utime(tmp_path / run_lock.FILE, (1, 1))
    look = run_lock._owner
    refused = pytest.raises(ValueError, match="one run at a time")
    with contextlib.ExitStack() as other_start:

        def look_and_be_slow(path):
            seen = look(path)
            monkeypatch.setattr(run_lock, "_owner", look)
            other_start.enter_context(run_lock.hold(tmp_path))
            return seen

        monkeypatch.setattr(run_lock, "_owner", look_and_be_slow)
        with refused, run_lock.hold(tmp_path):
            pytest.fail("two runs in one folder")


def test_a_lock_that_another_start_has_taken_over_is_not_released(tmp_path):
    with run_lock.hold(tmp_path):
        write(tmp_path, pid=1, host="another-machine", started="0")
    assert json.loads((tmp_path / run_lock.FILE).read_text())["pid"] == 1
