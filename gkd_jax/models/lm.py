"""The functions that every family of models offers, called by the config of a model.

    config, params = load_model("path")
    logits = lm.logits(config, params, batch)

Training, sampling and evaluation run models through these functions only. A family is a module that
implements `init`, `encode`, `hidden`, `apply_head`, `init_cache`, `decode_step` and `from_fields`
for its own frozen config, and the config's constant `family` is the module's name. A config has at
least `vocab_size`, `d_model`, `context_length` and the `ExecutionSettings`. Parameters are nested
dicts with T5X's names (`gkd_jax.models.parameters`). The family's constants `BANNED_IDS` and
`EOS_IDS` are the defaults of sampling.

A model first reads a prompt and then continues it. Reading gives a `Context`: the encoder's states
in an encoder-decoder, the KV cache of the prompt in a decoder-only model. Several samples of one
prompt share its context. `Context.first` is the token that decoding feeds first.

Axes: B prompts, N rows (N = B x samples a prompt), S prompt, T target, V vocabulary, D model.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax
from jax import core
from jaxtyping import Array, Float, Int, Key
import numpy as np

from gkd_jax.batch import Batch
from gkd_jax.models import decoder, kv_cache, parameters, quantized, stacks, t5
from gkd_jax.models.execution import ExecutionSettings


Params = parameters.Params
logical_axes, num_params = parameters.logical_axes, parameters.num_params
Config = t5.T5Config | decoder.DecoderConfig
Context = t5.Context | decoder.Context
Cache = kv_cache.Cache
DEFAULT_ARCHITECTURE = t5.t5_1_1
# The modules of the families, by the name that a config has and that checkpoints store.
_FAMILIES: dict[str, ModuleType] = {"t5": t5, "decoder": decoder}


def _family(config: Config) -> ModuleType:
    return _FAMILIES[config.family]


def init(config: Config, key: Key[Array, ""]) -> Params:
    """Returns random float32 parameters."""
    return _family(config).init(config, key)


def abstract_params(config: Config, dtype: str = "float32") -> Params:
    """Returns the shapes of `init`'s parameters, as `jax.ShapeDtypeStruct`s of `dtype`.

    With dtype "int8", kernels are `quantized.Int8` and all other parameters float32.
    """
    shapes = jax.eval_shape(lambda key: init(config, key), jax.random.key(0))
    if dtype == "int8":
        return jax.eval_shape(quantized.quantize, shapes)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)


def encode(
    config: Config,
    params: Params,
    inputs: Int[Array, "B S"],
    input_lengths: Int[Array, " B"] | None = None,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> Context:
    """Reads prompts in one pass and returns their `Context`.

    Args:
        inputs: prompts, padded on the right.
        input_lengths: the number of tokens of each prompt. An encoder-decoder does not need
            lengths: without them, id 0 is padding.
        dropout_key: the key of dropout; None turns dropout off.

    Raises:
        ValueError: if a decoder-only model is given no lengths.
    """
    check_prompts(inputs, input_lengths)
    return _family(config).encode(config, params, inputs, input_lengths, dropout_key=dropout_key)


def check_batch(batch: Batch) -> None:
    """Checks that the arrays of a batch belong together; see `Batch` for their shapes.

    Raises:
        ValueError: if they do not, because arrays of other shapes might be broadcast.
    """
    check_prompts(batch.inputs, batch.input_lengths)
    num_prompts, shape = batch.inputs.shape[0], np.shape(batch.targets)
    if len(shape) != 2 or 0 in shape or shape[0] % num_prompts:
        raise ValueError(
            "targets must have the axes [N T] with as many rows for each of the "
            f"{num_prompts} prompts, got the shape {shape}"
        )
    if np.shape(batch.weights) != shape:
        raise ValueError(
            f"weights must have the shape of the targets, {shape}, got {np.shape(batch.weights)}"
        )
    if batch.teacher_inputs is not None and batch.teacher_inputs.shape[0] != num_prompts:
        raise ValueError(
            f"teacher_inputs must have a row for each of the {num_prompts} prompts, got the shape "
            f"{batch.teacher_inputs.shape}"
        )


def check_prompts(inputs: Any, input_lengths: Any | None) -> None:
    """Checks prompts and their lengths, whose values it skips if they are traced or elsewhere.

    Args:
        inputs: prompts [B S], padded on the right.
        input_lengths: the number of tokens of each prompt [B]; None passes.

    Raises:
        ValueError: if the prompts have other axes or none of them has a token, or if there is not
            one length from 1 to S for each prompt.
    """
    if np.ndim(inputs) != 2 or 0 in np.shape(inputs):
        raise ValueError(
            "inputs must have the axes [B S], with a prompt and a token or more, got the shape "
            f"{np.shape(inputs)}"
        )
    if input_lengths is None:
        return
    (rows, longest), shape = inputs.shape, np.shape(input_lengths)
    is_right, got = shape == (rows,), f"the shape {shape}"
    is_traced = isinstance(input_lengths, core.Tracer)
    if not is_traced and getattr(input_lengths, "is_fully_addressable", True):
        lengths = np.asarray(input_lengths)
        is_right = is_right and lengths.dtype.kind in "iu"
        is_right = is_right and lengths.min() >= 1 and lengths.max() <= longest
        got = str(lengths.tolist())
    if not is_right:
        raise ValueError(
            f"input_lengths must be {rows} integers from 1 to {longest}, the tokens of each "
            f"prompt, got {got}"
        )


def hidden(
    config: Config,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "N T D"]:
    """Returns the last hidden states for teacher-forced targets, the input of `apply_head`.

    Args:
        batch: prompts and targets. The state at position t sees the prompt and the targets before
            t. Each row of inputs may have n neighbouring rows of targets; a prompt is read once.
        context: `encode`'s result, where the caller has it already.
        dropout_key: the key of dropout; None turns dropout off.
    """
    check_batch(batch)
    return _family(config).hidden(config, params, batch, context=context, dropout_key=dropout_key)


def apply_head(
    config: Config, params: Params, states: Float[Array, "*B D"]
) -> Float[Array, "*B V"]:
    """Returns the float32 logits of hidden states."""
    return _family(config).apply_head(config, params, states)


def head_params(params: Params) -> Params:
    """Returns the part of a model's parameters that `apply_head` reads."""
    if "logits_dense" in params["decoder"]:
        return {"decoder": {"logits_dense": params["decoder"]["logits_dense"]}}
    return {"token_embedder": params["token_embedder"]}


def logits(
    config: Config,
    params: Params,
    batch: Batch,
    *,
    context: Context | None = None,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "N T V"]:
    """Returns teacher-forced float32 logits; those at position t predict `batch.targets[:, t]`."""
    states = hidden(config, params, batch, context=context, dropout_key=dropout_key)
    return apply_head(config, params, states)


def decode_params(config: Config, params: Params) -> Params:
    """Returns the parameters that decoding reads, prepared once for all tokens.

    They have the compute dtype and are not sharded over `fsdp`, and the layers are as
    `stacks.unstack` has them.
    """
    read = {name: params[name] for name in ("token_embedder", "decoder")}
    read = parameters.for_decoding(read, config.dtype)
    layers = stacks.unstack(config, read["decoder"]["layers"])
    return {**read, "decoder": {**read["decoder"], "layers": layers}}


def init_cache(config: Config, params: Params, context: Context, length: int) -> Cache:
    """Returns an empty `Cache` for at most `length` tokens after a context.

    The parameters are those that `decode_step` will be given, usually from `decode_params`.
    """
    return _family(config).init_cache(config, params, context, length)


def decode_step(
    config: Config, params: Params, tokens: Int[Array, " N"], cache: Cache
) -> tuple[Float[Array, "N V"], Cache]:
    """Feeds one token of each row; returns the logits of the next token, and the new cache.

    The first tokens to feed are `Context.first`.
    """
    return _family(config).decode_step(config, params, tokens, cache)


def banned_ids(config: Config) -> tuple[int, ...]:
    """Returns the ids that sampling never draws by default: a T5's pad, and none elsewhere."""
    return _family(config).BANNED_IDS


def eos_ids(config: Config) -> tuple[int, ...]:
    """Returns the ids that end a sequence by default; () where every tokenizer has its own."""
    return _family(config).EOS_IDS


def architecture(config: Config) -> dict[str, Any]:
    """Returns what decides the function that a model computes from its parameters, as plain values.

    These are the family and the fields of the config that differ from their default, without the
    `ExecutionSettings`. A new field, whose default is what models did without it, therefore leaves
    the architecture of earlier checkpoints as it was.
    """
    values = dataclasses.asdict(config)
    own = {field.name: field.default for field in dataclasses.fields(config)}
    for field in dataclasses.fields(ExecutionSettings):
        del own[field.name]
    fields = {name: values[name] for name in own if getattr(config, name) != own[name]}
    return {"family": config.family, **fields}


def from_fields(name: str, fields: dict[str, Any]) -> Config:
    """Restores a config of the family `name` from the fields of `dataclasses.asdict` as JSON.

    Raises:
        ValueError: if no family has this name.
    """
    if name not in _FAMILIES:
        raise ValueError(f"family must be one of {', '.join(_FAMILIES)}, got {name!r}")
    return _FAMILIES[name].from_fields(fields)
