"""Gives every test eight CPU devices, checked array shapes and the shared data.

With GKD_JAX_TEST_PLATFORMS=cuda,cpu (or tpu,cpu) the tests run on an accelerator: those that are
marked `accelerator` are made for it.
"""

import gc
import getpass
import importlib.metadata
import os
import pathlib
import sys
import tempfile


# Before jax is imported anywhere: it reads these once.
PLATFORMS = os.environ.get("GKD_JAX_TEST_PLATFORMS", "cpu")
os.environ["JAX_PLATFORMS"] = PLATFORMS
# The tests compile thousands of small programs. With LLVM's optimizations off and XLA's older code
# for fusions that takes a third of the time; XLA's passes before it are as for users.
COMPILE_FAST = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # jaxlib 0.12 has no older code
    COMPILE_FAST += " --xla_cpu_use_fusion_emitters=false"
FLAGS = f"--xla_force_host_platform_device_count=8 {COMPILE_FAST}"
if PLATFORMS == "cpu":
    os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip()  # later ones win
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# A CUDA build of torch brings Triton, and transformers imports it through torch. The process
# crashes if that happens after TensorFlow was imported. No test needs Triton.
sys.modules.setdefault("triton", None)  # type: ignore[arg-type]

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import gin  # noqa: E402


# Every jaxtyping signature in gkd_jax is checked at each call. Nothing of gkd_jax may have been
# imported before this line.
install_import_hook("gkd_jax", "beartype.beartype")

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"  # see its README.md
CACHE = pathlib.Path(tempfile.gettempdir()) / f"gkd_jax_test_cache_{getpass.getuser()}"
# Of what tests start in processes of their own: commands, and programs that import gkd_jax.
os.environ["GKD_JAX_COMPILATION_CACHE"] = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

# "a [B T] plus b [T]" is a silent broadcast, and usually a wrong axis.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# By default the collector looks so often through the million objects of the packages that it takes
# a tenth of the time. Here it runs behind each module, and leaves out what the imports made.
gc.set_threshold(100_000, 50, 1000)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _drop_what_a_module_made():
    """Frees its compiled programs, which hold most of a worker's memory, and its garbage."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Deals `pytest -n 2` in two halves, so that most modules are one worker's.

    What a module makes once (its fixtures, and functions that JAX compiled) is then made in one
    process. The worker that ends first takes over tests of the other.
    """
    if config.getoption("dist") != "load":  # not the default
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder with shared data: GKD_JAX_SHARED, or ../shared beside the repository."""
    default = ROOT.parent / "shared"
    path = pathlib.Path(os.environ.get("GKD_JAX_SHARED") or default).resolve()
    if not path.is_dir():
        pytest.skip(f"needs the shared data: {path} is not a folder (set GKD_JAX_SHARED)")
    return path


@pytest.fixture
def fresh_gin():
    """Clears gin's configuration, which is global, before and after a test."""
    gin.clear_config()
    yield
    gin.clear_config()


@pytest.fixture(scope="module")
def shared_steps():
    """Lets the runs of a module share compiled steps; see `shared_steps.shared`."""
    import shared_steps as module

    with module.shared():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of a small tokenizer of each kind."""
    import small_tokenizers

    where = tmp_path_factory.mktemp("tokenizers")
    return {kind: small_tokenizers.write(where / kind, kind) for kind in small_tokenizers.KINDS}


@pytest.fixture
def t5x_checkpoint(request):
    """A function (network, kind) -> path of a checkpoint that T5X wrote, ours or shared."""

    def path(network: str, kind: str) -> str:
        folder = GOLDEN / f"{network}_{kind}"
        if not folder.is_dir():
            folder = request.getfixturevalue("shared") / "t5x_checkpoints" / folder.name
        return str(folder / "checkpoint_3")

    return path


def golden(network: str) -> dict[str, np.ndarray]:
    """The numbers that T5X computed with its checkpoint of a network."""
    with np.load(GOLDEN / f"{network}_golden.npz") as arrays:
        return dict(arrays)
