"""Settings of the whole process, made before a device is touched."""

import contextlib
import ctypes
import os
import pathlib
import sys
import tempfile

from gkd_jax.command_line.flags import UsageError


def set_up(*, reads_data: bool, tfds_data_dir: str | None = None) -> None:
    """Memory, compilation cache, processes; and TensorFlow, where the command reads data.

    Args:
        reads_data: whether TensorFlow and seqio are needed; the core runs without them.
        tfds_data_dir: where TFDS data sets lie; None is TFDS's own place.

    Raises:
        UsageError: for a folder that does not exist, or half a setting of several processes.
    """
    _keep_freed_memory()
    if tfds_data_dir and "://" not in tfds_data_dir and not os.path.isdir(tfds_data_dir):
        raise UsageError(f"--tfds_data_dir: no folder {tfds_data_dir!r}")
    if reads_data:
        _import_tensorflow()
    _set_compilation_cache()
    _join_processes()
    if reads_data and tfds_data_dir:
        import seqio

        seqio.set_tfds_data_dir_override(tfds_data_dir)


def _set_compilation_cache() -> None:
    import jax

    cache = os.environ.get("GKD_JAX_COMPILATION_CACHE")
    if cache is None:
        cache = str(pathlib.Path.home() / ".cache" / "gkd_jax" / "compiled")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _import_tensorflow() -> None:
    """Imports TensorFlow without its log, and keeps accelerators to JAX: it only reads data here.

    What it writes before its log has a level goes to the file descriptor of standard error.
    """
    from absl import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr():
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        import seqio  # noqa: F401
    logging.set_verbosity(logging.ERROR)  # seqio's warnings are about how it was called


@contextlib.contextmanager
def _quiet_stderr():
    """Swallows what is written to file descriptor 2, unless an exception leaves the block."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(before, 2)
            written.seek(0)
            sys.stderr.write(written.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)


def _keep_freed_memory() -> None:
    """Has glibc keep what programs free, where they run on the CPU; before JAX starts its threads.

    XLA's CPU programs allocate their temporaries at every call. glibc maps large blocks and hands
    them back, and the kernel clears each page anew: a tenth to a fifth of a step. A thread whose
    arena is not the main one maps them whatever M_MMAP_MAX says, hence one arena, which an
    accelerator's host with its many threads is spared. The process stays as large as it was at its
    largest. Who sets MALLOC_* or glibc.malloc's GLIBC_TUNABLES has the last word.
    """
    devices = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
    platforms = os.environ.get("JAX_PLATFORMS")
    found = any(any(pathlib.Path("/dev").glob(device)) for device in devices)
    on_cpu = platforms == "cpu" if platforms else not found
    if not on_cpu:
        return
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # malloc.h
        for parameter, value in ((arena_max, 1), (mmap_max, 0), (trim_threshold, -1)):
            mallopt(parameter, value)


def _join_processes() -> None:
    """Several processes make one job where the environment says so.

    GKD_JAX_DISTRIBUTED=1: TPU pods, SLURM and others that JAX detects by itself. Otherwise
    GKD_JAX_COORDINATOR=host:port with GKD_JAX_NUM_PROCESSES and GKD_JAX_PROCESS_ID.
    """
    import jax

    names = ("GKD_JAX_COORDINATOR", "GKD_JAX_NUM_PROCESSES", "GKD_JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    timeout = int(os.environ.get("GKD_JAX_HEARTBEAT_TIMEOUT", "100"))
    if os.environ.get("GKD_JAX_DISTRIBUTED") == "1":
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
    elif given:
        missing = [name for name in names if name not in given]
        if missing or not all(given[name].isdecimal() for name in names[1:]):
            raise UsageError(
                f"several processes need {', '.join(names)}: host:port and two numbers; got {given}"
            )
        jax.distributed.initialize(
            given[names[0]],
            int(given[names[1]]),
            int(given[names[2]]),
            heartbeat_timeout_seconds=timeout,
        )
