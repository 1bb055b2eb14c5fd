"""`set_up`: the settings of the whole process, made before JAX touches a device."""

import contextlib
import ctypes
import gc
import os
import pathlib
import re
import sys
import tempfile

from gkd_jax.command_line.flags import UsageError


_OPTIONAL_FOR_KERAS = ("IPython", "matplotlib", "pandas")


def set_up(*, reads_data: bool, tfds_data_dir: str | None = None) -> None:
    """Sets up memory, compilation cache and processes, and TensorFlow if the command reads data.

    Args:
        reads_data: whether the command needs TensorFlow and seqio; the core runs without them.
        tfds_data_dir: the folder of TFDS's data sets; None takes TFDS's default.

    Raises:
        UsageError: if the folder does not exist, or the variables for several processes are
            incomplete.
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


@contextlib.contextmanager
def importing():
    """Turns Python's garbage collector off while a command imports its packages.

    The imports make a million objects, which live as long as the process. The collector would look
    through them again and again, in vain. Later collections leave these objects out.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def _set_compilation_cache() -> None:
    import jax

    cache = os.environ.get("GKD_JAX_COMPILATION_CACHE")
    if cache is None:
        cache = str(pathlib.Path.home() / ".cache" / "gkd_jax" / "compiled")
    if cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _import_tensorflow() -> None:
    """Imports TensorFlow without its log, and hides the accelerators from it.

    TensorFlow only reads data here. While it is imported, before its log level applies, it writes
    directly to the file descriptor of standard error.
    """
    from absl import logging

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr(), _as_if_missing(*_OPTIONAL_FOR_KERAS):
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
        import seqio  # noqa: F401
    logging.set_verbosity(logging.ERROR)  # seqio's warnings are about how it was called
    # orbax logs an exception of its threads and raises it as well. It is printed once, as the error
    # of the command.
    logging.get_absl_logger().addFilter(lambda record: not record.exc_info)


@contextlib.contextmanager
def _as_if_missing(*packages: str):
    """Lets imports of packages fail as if they were not installed; imported ones are left alone.

    TensorFlow imports Keras, which imports these packages where they are installed, for figures and
    tables that no command makes through it. Without them a command starts 0.7 s sooner.
    """
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextlib.contextmanager
def _quiet_stderr():
    """Discards what is written to file descriptor 2; an exception prints it after all."""
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
    """Makes glibc keep freed memory if JAX runs on the CPU. Call this before JAX starts threads.

    XLA's CPU programs allocate their temporaries at every call. By default glibc maps large blocks
    and unmaps them when they are freed, and the kernel clears each page again: a tenth to a fifth
    of a step. Threads with an arena other than the main one map large blocks whatever M_MMAP_MAX
    says, so there is only one arena. The process then keeps its largest size. Hosts of accelerators
    keep glibc's defaults, because their many threads need several arenas. Settings of the user
    (MALLOC_*, or glibc.malloc in GLIBC_TUNABLES) win.
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
    """Joins the processes of a job, if environment variables ask for it.

    GKD_JAX_DISTRIBUTED=1 serves TPU pods, SLURM and other clusters that JAX detects by itself.
    Elsewhere GKD_JAX_COORDINATOR=host:port, GKD_JAX_NUM_PROCESSES and GKD_JAX_PROCESS_ID are set.
    """
    import jax

    names = ("GKD_JAX_COORDINATOR", "GKD_JAX_NUM_PROCESSES", "GKD_JAX_PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    wait = os.environ.get("GKD_JAX_HEARTBEAT_TIMEOUT") or "100"
    if not wait.isdecimal() or int(wait) == 0:
        raise UsageError(
            f"GKD_JAX_HEARTBEAT_TIMEOUT must be a positive number of seconds, got {wait!r}"
        )
    timeout, detects = int(wait), os.environ.get("GKD_JAX_DISTRIBUTED") or "0"
    if detects not in ("0", "1"):
        raise UsageError(f"GKD_JAX_DISTRIBUTED must be 1, or not set, got {detects!r}")
    if detects == "1":
        jax.distributed.initialize(heartbeat_timeout_seconds=timeout)
    elif given:
        shapes = dict(zip(names, (r".+:\d+", r"\d+", r"\d+"), strict=True))
        if not all(re.fullmatch(shapes[name], given.get(name, "")) for name in names):
            raise UsageError(
                f"several processes need {', '.join(names)}: host:port and two numbers; got {given}"
            )
        jax.distributed.initialize(
            given[names[0]],
            int(given[names[1]]),
            int(given[names[2]]),
            heartbeat_timeout_seconds=timeout,
        )
