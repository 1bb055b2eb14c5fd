"""What a family of models must offer; everything above this room knows models by it alone.

    config, params = load_model("path")
    logits = lm.logits(config, params, batch)

A family is a module with the functions below, written for its own frozen config, whose property
`family` is that module. A config has at least `vocab_size`, `d_model`, `dtype`, `dropout_rate`,
`remat`, `scan_unroll`, `attention_by_row` and `layers_on_host`. Parameters are nested dicts with
T5X's names (`gkd_jax.models.parameters`). `BANNED_IDS` and `EOS_IDS` of the module are what
sampling takes where nothing else is said.

A model reads a prompt, which gives a `Context`, and continues it: an encoder-decoder's context is
its encoder's states, a decoder-only model's the keys and values of the prompt. It is read once for
several samples of a prompt. `Context.first` is the token that decoding feeds first.

Axes: B prompts, N rows (N = B x samples a prompt), S prompt, T target, V vocabulary, D model.
"""

from typing import Any

from jaxtyping import Array, Float, Int, Key

from gkd_jax.batch import Batch
from gkd_jax.models import decoder, decoder_config, t5, t5_config
from gkd_jax.models.parameters import Params, logical_axes, num_params
from gkd_jax.models.products import check_dtype


__all__ = [
    "Cache",
    "Config",
    "Context",
    "Params",
    "check_dtype",
    "logical_axes",
    "num_params",
]

Config = t5.T5Config | decoder.DecoderConfig
Context = t5.Context | decoder.Context
Cache = t5.Cache | decoder.Cache
DEFAULT_ARCHITECTURE = t5.t5_1_1
# The names that checkpoints give to families, and what reads a config that went through JSON.
_FAMILIES = {
    "t5": (t5, t5_config.from_fields),
    "decoder": (decoder, decoder_config.from_fields),
}


def init(config: Config, key: Key[Array, ""]) -> Params:
    """Random float32 parameters."""
    return config.family.init(config, key)


def abstract_params(config: Config, dtype: str = "float32") -> Params:
    """The shapes of `init`, as `jax.ShapeDtypeStruct`s; "int8" has kernels as `quantized.Int8`."""
    return config.family.abstract_params(config, dtype)


def encode(
    config: Config,
    params: Params,
    inputs: Int[Array, "B S"],
    input_lengths: Int[Array, " B"] | None = None,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> Context:
    """Reads prompts in one pass, as a `Context`.

    Args:
        config: the model's sizes.
        params: its parameters.
        inputs: prompts, padded on the right.
        input_lengths: tokens of each prompt. An encoder-decoder may do without: it counts the ids
            that are not 0.
        dropout_key: turns dropout on.

    Raises:
        ValueError: where a decoder-only model is given no lengths.
    """
    return config.family.encode(config, params, inputs, input_lengths, dropout_key=dropout_key)


def repeat(config: Config, context: Context, num: int) -> Context:
    """Each row of a context `num` times, as neighbours."""
    return config.family.repeat(context, num)


def hidden(
    config: Config,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "N T D"]:
    """The last hidden states for teacher-forced targets, ready for `apply_head`.

    Args:
        config: the model's sizes.
        params: its parameters.
        batch: position t sees the prompt and targets < t. There may be n rows of targets for each
            of inputs, as neighbours: a prompt is read once.
        context: `encode`'s result where the caller has it already.
        dropout_key: turns dropout on.
    """
    return config.family.hidden(config, params, batch, context=context, dropout_key=dropout_key)


def apply_head(
    config: Config, params: Params, states: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Hidden states to float32 logits."""
    return config.family.apply_head(config, params, states)


def logits(
    config: Config,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "N T V"]:
    """Teacher-forced logits, float32: those at t predict `batch.targets[:, t]`."""
    states = hidden(config, params, batch, context=context, dropout_key=dropout_key)
    return apply_head(config, params, states)


def decode_params(config: Config, params: Params) -> Params:
    """What decoding reads: in the compute dtype, whole over `fsdp`, once for all tokens."""
    return config.family.decode_params(config, params)


def init_cache(config: Config, params: Params, context: Context, length: int) -> Cache:
    """A `Cache` for at most `length` tokens behind a context; `params` are `decode_params`'s."""
    return config.family.init_cache(config, params, context, length)


def decode_step(
    config: Config, params: Params, tokens: Int[Array, " N"], cache: Cache
) -> tuple[Float[Array, "N V"], Cache]:
    """Logits after one more token of each row (first `Context.first`), and the new cache."""
    return config.family.decode_step(config, params, tokens, cache)


def take_rows(config: Config, cache: Cache, rows: Int[Array, " N"]) -> Cache:
    """The cache in which row i goes on with the past of row `rows[i]`, which has its prompt."""
    return config.family.take_rows(cache, rows)


def family_name(config: Config) -> str:
    """The name of a model's family in a checkpoint."""
    return next(name for name, (module, _) in _FAMILIES.items() if module is config.family)


def from_fields(name: str, fields: dict[str, Any]) -> Config:
    """The config of a family from `dataclasses.asdict`'s fields, after a passage through JSON.

    Raises:
        ValueError: for a family that there is not.
    """
    if name not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name][1](fields)
