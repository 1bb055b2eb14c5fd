"""Creates a run's models: from a checkpoint of any format, or of some size with random weights.

`ModelConfig` states which model is wanted; `initial_params` loads or initialises its parameters.
"""

from collections.abc import Callable, Mapping
import dataclasses
import resource
import sys
from typing import Any

import jax
from jax.sharding import Mesh

from gkd_jax import convert, sharding
from gkd_jax.input.data import DataConfig
from gkd_jax.models import kv_cache, lm, quantized
from gkd_jax.models.execution import ExecutionSettings, check_dtype
from gkd_jax.storage import hub, loading
from gkd_jax.text import files, settings


_HOST = "pinned_host"
_PUBLIC_SIZES = ("small", "base", "large", "xl", "xxl")
# The step of each published checkpoint of a family, in the order of `_PUBLIC_SIZES`.
_PUBLIC = {
    "t5_1_1_lm100k": (1_100_000,) * 5,
    "flan_t5": (1_198_000, 1_184_000, 1_164_000, 1_138_000, 1_114_000),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """States which model a run uses as its student or as its teacher.

    Attributes:
        architecture: a function from a size's name to the model's config, such as `t5.t5_1_1`.
        size: "tiny", "small", "base", "large", "xl" or "xxl"; None takes the checkpoint's config.
        checkpoint: a MODEL_DIR, a Hugging Face folder, a T5X checkpoint or a name on the Hugging
            Face hub ("google/flan-t5-small", see `hub`); None means random weights.
        dropout_rate: the dropout rate while this model is trained.
        dtype: the dtype of computations, "float32" or "bfloat16".
        param_dtype: the dtype of the parameters in memory. A frozen teacher may have "bfloat16" or
            "int8" (quantized kernels with one scale per column).
        memory: where the kernels of the layers are kept, "device" or "host". Kernels of a teacher
            on the host are copied to the device one layer at a time. This needs a backend with
            pinned host memory.
        remat: whether the backward pass recomputes activations instead of keeping them in memory.
        scan_unroll: the number of layers per iteration of the scan over layers; None unrolls up to
            64 layers on CPU and none elsewhere.
        unroll_decoding: whether decoding runs the layers one by one, where training scans over
            them. No slices of stacked arrays are copied, but compiling takes longer. None means yes
            on GPUs.
        cache_segment: the number of positions of the KV cache's first segment; None means 64 on
            CPUs, 1,024 on GPUs and all positions on TPUs (see `kv_cache`).
        attention_by_row: whether attention over long inputs computes one batch row at a time, so
            that the scores stay in the CPU's cache; None means yes on CPU and no elsewhere.
        mesh: the axis sizes of this model's own mesh over the devices of the run; None means those
            of the run. A student has the mesh of the run.
    """

    architecture: Callable[..., lm.Config] = lm.DEFAULT_ARCHITECTURE
    size: str | None = None
    checkpoint: str | None = None
    dropout_rate: float = 0.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    memory: str = "device"
    remat: bool = False
    scan_unroll: int | None = None
    unroll_decoding: bool | None = None
    cache_segment: int | None = None
    attention_by_row: bool | None = None
    mesh: sharding.MeshConfig | None = None

    def __post_init__(self):
        settings.check_types(self)
        if self.size is None and self.checkpoint is None:
            raise settings.SettingError(
                "a model needs a size (tiny, small, base, large, xl, xxl) or a checkpoint, got "
                "None for both",
                "ModelConfig.checkpoint",
                "ModelConfig.size",
            )
        check_dtype(self.dtype)
        if self.param_dtype not in ("float32", "bfloat16", "int8"):
            raise ValueError(
                f"param_dtype must be 'float32', 'bfloat16' or 'int8', got {self.param_dtype!r}"
            )
        if self.memory not in ("device", "host"):
            raise ValueError(f"memory must be 'device' or 'host', got {self.memory!r}")

    def config(self, num_pieces: int, *, pending: bool = False) -> lm.Config:
        """Returns the model's config, which comes from the checkpoint if there is one.

        Args:
            num_pieces: the number of ids of the vocabulary. The embedding of a new model has this
                many rows, rounded up to a multiple of 128.
            pending: whether the checkpoint does not exist yet because another run will write it.
                The config is then that of `size`.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if the checkpoint has other sizes than `size`, or an embedding with fewer
                rows than ids, or is no checkpoint.
        """
        chosen = None
        if self.size is not None:
            chosen = self.architecture(self.size, vocab_size=-(-num_pieces // 128) * 128)
        if self.checkpoint is not None and not pending:
            stored = loading.load_config(self.checkpoint)
            if chosen is not None:
                _check_sizes(self.checkpoint, self.size, stored, chosen)
            chosen = stored
            _check_rows(self.checkpoint, stored.vocab_size, num_pieces)
        assert chosen is not None
        here = self.on(jax.default_backend())
        names = [field.name for field in dataclasses.fields(ExecutionSettings)]
        return dataclasses.replace(chosen, **{name: getattr(here, name) for name in names})

    @property
    def layers_on_host(self) -> bool:
        """The setting of `ExecutionSettings` that `memory` stands for."""
        return self.memory == "host"

    def on(self, platform: str) -> "ModelConfig":
        """Returns the config with the fields that are None chosen for "cpu", "gpu" or "tpu"."""
        chosen = {
            "scan_unroll": 64 if platform == "cpu" else 1,
            "unroll_decoding": platform == "gpu",
            "cache_segment": kv_cache.FIRST_ON.get(platform, ExecutionSettings.cache_segment),
            "attention_by_row": platform == "cpu",
        }
        missing = {name: x for name, x in chosen.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)


def with_local_files(
    models: Mapping[str, ModelConfig],
    data: DataConfig,
    pinned: Mapping[str, str] = {},
    *,
    dry_run: bool = False,
) -> tuple[dict[str, ModelConfig], DataConfig, dict[str, str]]:
    """Downloads the checkpoints and the vocabulary that are names on the Hugging Face hub.

    Args:
        models: the models by any names.
        pinned: the commits to take, by the names on the hub.
        dry_run: download nothing, and leave checkpoints as they are named.

    Returns:
        The models and the data with the downloaded folders, and the commit of each name.

    Raises:
        FileNotFoundError: as `hub.download` does.
        ValueError: for a vocabulary on the hub in a dry run, which cannot know the tokenizer.
    """
    found, commits = dict(models), {}
    for name, model in models.items():
        if model.checkpoint is not None and not dry_run:
            folder, own = hub.local_copy(model.checkpoint, pinned)
            found[name] = dataclasses.replace(model, checkpoint=folder)
            commits |= own
    vocabulary = data.vocabulary
    if vocabulary is not None and hub.is_name(vocabulary):
        if dry_run:
            raise ValueError(
                f"no vocabulary at {vocabulary!r}: there is no such file or folder, and a dry run "
                "does not look on the Hugging Face hub; if it is a model there, name a local copy"
            )
        folder, own = hub.local_copy(vocabulary, {**pinned, **commits}, tokenizer_only=True)
        data = dataclasses.replace(data, vocabulary=folder)
        commits |= own
    return found, data, commits


def remote_checkpoints(*models: ModelConfig) -> frozenset[str]:
    """Returns the remote checkpoints of `models`, which a dry run does not open.

    Raises:
        ValueError: if a model with a remote checkpoint states no size, because its shapes are then
            unknown without the network.
    """
    remote = set()
    for model in models:
        if model.checkpoint is not None and is_remote(model.checkpoint):
            if model.size is None:
                raise ValueError(
                    f"a dry run does not open {model.checkpoint!r}: it needs the model's size"
                    if files.is_remote(model.checkpoint)
                    else f"no checkpoint at {model.checkpoint!r}: there is no such file or folder, "
                    "and a dry run does not look on the Hugging Face hub; if it is a model there, "
                    "give its size"
                )
            remote.add(model.checkpoint)
    return frozenset(remote)


def check_exists(checkpoint: str | None) -> None:
    """Checks that there is a checkpoint at a path, by the names of its files, unless it is remote.

    Errors are those of `convert.detect`.
    """
    if checkpoint is not None and not is_remote(checkpoint):
        convert.detect(checkpoint)


def is_remote(checkpoint: str | None) -> bool:
    """Returns whether a checkpoint is in a bucket or on the Hugging Face hub; False for None."""
    return checkpoint is not None and (files.is_remote(checkpoint) or hub.is_name(checkpoint))


def public_checkpoint(*, family: str, size: str) -> str:
    """Returns the path of Google's published T5X checkpoint of a family and size.

    Args:
        family: "t5_1_1_lm100k" (LM-adapted T5 1.1, the paper's models for XSum and WMT) or
            "flan_t5" (the paper's models for GSM8K and instruction tuning).
        size: "small", "base", "large", "xl" or "xxl".

    Raises:
        ValueError: for any other family or size.
    """
    if family not in _PUBLIC or size not in _PUBLIC_SIZES:
        raise ValueError(
            f"family must be one of {sorted(_PUBLIC)} and size one of {list(_PUBLIC_SIZES)}, "
            f"got {family!r} and {size!r}"
        )
    step = _PUBLIC[family][_PUBLIC_SIZES.index(size)]
    return f"gs://t5-data/pretrained_models/t5x/{family}_{size}/checkpoint_{step}"


def _check_rows(path: str, rows: int, num_pieces: int) -> None:
    """Refuses an embedding with fewer rows than the vocabulary has pieces, and warns of more."""
    if rows < num_pieces:
        raise ValueError(
            f"{path} has {rows} embedding rows, fewer than the vocabulary's {num_pieces} pieces: "
            "tokens that were added to a tokenizer need rows (`resize_token_embeddings`)"
        )
    if rows > num_pieces:
        print(
            f"WARNING: {path} has {rows} embedding rows for {num_pieces} pieces of the vocabulary: "
            f"ids {num_pieces} to {rows - 1} are left out of every softmax and are never written",
            file=sys.stderr,
        )


def warn_of_long_texts(config: lm.Config, name: str, prompt: int, target: int) -> None:
    """Warns if a model was made for shorter texts than the longest prompt and answer of a run.

    This is no error, because the texts of a task may all be shorter than the lengths allow. The
    name is what the warning calls the model.
    """
    limit = config.context_length
    if limit is not None and prompt + target > limit:
        print(
            f"WARNING: TASK_FEATURE_LENGTHS allows texts of {prompt + target} tokens ({prompt} of "
            f"the prompt and {target} of the answer), and the {name} was made for texts of at most "
            f"{limit} (max_position_embeddings): what it writes beyond them may be poor",
            file=sys.stderr,
        )


def _check_sizes(path: str, size: str | None, stored: lm.Config, chosen: lm.Config) -> None:
    names = ("d_model", "num_heads", "head_dim", "d_ff")
    names += ("num_encoder_layers", "num_decoder_layers", "num_kv_heads", "num_layers")
    if type(stored) is not type(chosen):
        raise ValueError(
            f"checkpoint {path!r} is a {type(stored).__name__}, not the {type(chosen).__name__} of "
            f"size {size!r}; leave the size None to take the checkpoint's"
        )
    wrong = [
        f"{name} {getattr(stored, name)} != {getattr(chosen, name)}"
        for name in names
        if getattr(stored, name, None) != getattr(chosen, name, None)
    ]
    if wrong:
        raise ValueError(
            f"checkpoint {path!r} is not of size {size!r}: {', '.join(wrong)}; leave the size None "
            "to take the checkpoint's"
        )


def place_params(model: ModelConfig, config: lm.Config, mesh: Mesh) -> lm.Params:
    """Returns the parameters, sharded over a mesh, of a model that only decodes or scores."""
    target = frozen_shapes(model, config, mesh)
    return initial_params(model, config, target, jax.random.key(0), "model")


def frozen_shapes(model: ModelConfig, config: lm.Config, mesh: Mesh) -> lm.Params:
    """Returns the shapes, dtypes and shardings of the parameters of a model that is not trained.

    Raises:
        ValueError: if `model.memory` is "host" and the backend has no pinned host memory, or if the
            model's own mesh does not fit the devices or the parameters.
    """
    mesh = sharding.with_sizes(mesh, model.mesh)
    shapes = lm.abstract_params(config, model.param_dtype)
    placed = sharding.tree_shardings(shapes, lm.logical_axes(shapes), mesh)
    if model.memory == "host":
        kinds = [memory.kind for memory in mesh.devices.flat[0].addressable_memories()]
        if _HOST not in kinds:
            raise ValueError(f"memory='host' needs a backend with {_HOST} memory, got {kinds}")
        placed = jax.tree_util.tree_map_with_path(
            lambda path, where: where.with_memory_kind(_HOST) if _goes_to_host(path) else where,
            placed,
        )
    return sharding.with_shardings(shapes, placed)


def _goes_to_host(path: tuple[Any, ...]) -> bool:
    """Returns whether a parameter is a kernel of a layer, which `memory="host"` keeps on the host.

    The other parameters of a layer are small, and a TPU cannot slice them in host memory.
    """
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return "/layers/" in name and name.endswith(("/kernel", "/values"))


def initial_params(
    model: ModelConfig, config: lm.Config, target: lm.Params, key: jax.Array, name: str
) -> lm.Params:
    """Returns parameters from the model's checkpoint, or random ones if there is no checkpoint.

    Args:
        target: the shapes, dtypes and shardings of the result.
        name: what the message about a loaded checkpoint calls the model.
    """
    where = jax.tree.map(lambda x: x.sharding, target)

    def loaded_with(**changes: str) -> lm.Params:
        """Returns the parameters of the model with some other settings."""
        other = dataclasses.replace(model, **changes)
        shapes = frozen_shapes(other, config, jax.tree.leaves(where)[0].mesh)
        return initial_params(other, config, shapes, key, name)

    # The parameters are checked and cast on the devices before they are moved to the host.
    if model.memory == "host":
        return jax.device_put(loaded_with(memory="device"), where)
    if model.param_dtype == "int8":
        quantize = jax.jit(quantized.quantize, out_shardings=where, donate_argnums=0)
        return quantize(loaded_with(param_dtype="float32"))
    if model.checkpoint is not None:
        params = loading.load_params(model.checkpoint, target, config)
        # Linux reports ru_maxrss in KiB.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"loaded the {name} from {model.checkpoint}; peak host memory so far "
            f"{peak / 2**30:.2f} GiB",
            file=sys.stderr,
        )
        return params
    dtype = jax.tree.leaves(target)[0].dtype
    return jax.jit(_random_params, static_argnums=(0, 1), out_shardings=where)(config, dtype, key)


def _random_params(config: lm.Config, dtype: Any, key: jax.Array) -> lm.Params:
    """Returns random parameters of a dtype, of which `initial_params` compiles one program."""
    return jax.tree.map(lambda x: x.astype(dtype), lm.init(config, key))
