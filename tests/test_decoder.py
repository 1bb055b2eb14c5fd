"""Decoder-only models equal transformers on torch, and themselves on any mesh."""

import dataclasses
import functools

import decoder_models
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import convert, sharding
from gkd_jax.batch import Batch
from gkd_jax.models import decoder, grouped_attention, kv_cache, lm, quantized
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.models.grouped_attention import NO_WINDOW, Sight


LENGTHS = (11, 4, 1)


@functools.cache
def model(name):
    """Returns (config, params, the transformers model)."""
    import tempfile

    found = decoder_models.theirs(name)
    with tempfile.TemporaryDirectory() as folder:
        path = decoder_models.save(found, f"{folder}/{name}")
        config = convert.read_config(path)
        return config, convert.read_params(path, config), found


def batch_of(inputs, lengths, targets):
    weights = jnp.ones(targets.shape)
    return Batch(*map(jnp.asarray, (inputs, targets)), weights, input_lengths=jnp.asarray(lengths))


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, batch):
    """The logits computed in three ways: in one pass, behind a context, and token by token."""
    context = decoder.encode(config, params, batch.inputs, batch.input_lengths)
    read = lm.decode_params(config, params)
    length = batch.targets.shape[1]

    def step(cache, tokens):
        logits, cache = decoder.decode_step(config, read, tokens, cache)
        return cache, logits

    fed = jnp.concatenate([context.first[:, None], batch.targets[:, :-1]], axis=1)
    cache = decoder.init_cache(config, read, context, length)
    return (
        lm.logits(config, params, batch),
        lm.logits(config, params, batch, context=context),
        lax.scan(step, cache, fed.T)[1].swapaxes(0, 1),
    )


@pytest.mark.parametrize("name", decoder_models.MODELS)
def test_logits_equal_transformers(name):
    config, params, theirs = model(name)
    inputs, lengths, targets = decoder_models.prompts_and_targets(np.random.default_rng(0), LENGTHS)
    expected = decoder_models.their_logits(theirs, inputs, lengths, targets)
    assert expected.std() > 0.5  # logits that say something
    # Unrolled where the layers are few, so that both ways of decoding are seen.
    config = dataclasses.replace(config, scan_unroll=8 if config.num_layers == 3 else 1)
    for found in all_logits(config, params, batch_of(inputs, lengths, targets)):
        assert np.max(np.abs(found - expected)) < 2e-5 * np.max(np.abs(expected))


def test_what_pads_a_prompt_does_not_matter():
    config, params, _ = model("qwen3")
    inputs, lengths, targets = decoder_models.prompts_and_targets(np.random.default_rng(0), LENGTHS)
    other = np.where(np.arange(inputs.shape[1]) < lengths[:, None], inputs, 3)
    one = all_logits(config, params, batch_of(inputs, lengths, targets))
    two = all_logits(config, params, batch_of(other, lengths, targets))
    for found, again in zip(one, two, strict=True):
        np.testing.assert_array_equal(found, again)


def test_several_targets_of_a_prompt_are_as_many_rows():
    config, params, _ = model("gemma2")
    rng = np.random.default_rng(1)
    inputs, lengths, _ = decoder_models.prompts_and_targets(rng, LENGTHS)
    targets = rng.integers(0, decoder_models.VOCAB, (9, 6)).astype(np.int32)
    together = lm.logits(config, params, batch_of(inputs, lengths, targets))
    rows = batch_of(np.repeat(inputs, 3, axis=0), np.repeat(lengths, 3), targets)
    np.testing.assert_allclose(together, lm.logits(config, params, rows), atol=2e-5)


def test_rows_of_a_cache_are_taken():
    config, params, _ = model("llama")
    inputs, lengths, targets = decoder_models.prompts_and_targets(np.random.default_rng(0), (5, 5))
    inputs[1] = inputs[0]  # beams of one prompt
    for choice in ({}, {"scan_unroll": 3}, {"unroll_decoding": True}):
        chosen = dataclasses.replace(config, **choice)
        context = decoder.encode(chosen, params, jnp.asarray(inputs), jnp.asarray(lengths))
        read = lm.decode_params(chosen, params)
        cache = decoder.init_cache(chosen, read, context, 4)
        _, cache = decoder.decode_step(chosen, read, context.first, cache)
        _, cache = decoder.decode_step(chosen, read, jnp.asarray(targets[:, 0]), cache)
        swapped = kv_cache.take_rows(cache, jnp.asarray([[1, 0]]))
        tokens = jnp.asarray(targets[:, 1])
        logits, _ = decoder.decode_step(chosen, read, tokens, cache)
        found, _ = decoder.decode_step(chosen, read, tokens[::-1], swapped)
        np.testing.assert_allclose(found, logits[::-1], atol=1e-5)
        assert np.max(np.abs(logits[0] - logits[1])) > 0.1


def test_lengths_are_needed():
    config, params, _ = model("llama")
    batch = Batch(jnp.ones((2, 3), int), jnp.ones((2, 3), int), jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="needs input_lengths"):
        lm.logits(config, params, batch)


MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 2), "tensor 6": (1, 1, 6)}


@pytest.mark.parametrize("mesh", MESHES)
def test_one_device_equals_a_mesh(mesh):
    """With 6 tensor shards, which the 2 key heads do not fill, each device holds all key heads."""
    data, fsdp, tensor = MESHES[mesh]
    config = DecoderConfig(
        vocab_size=96,
        d_model=48,
        num_heads=6,
        num_kv_heads=2,
        head_dim=12,
        d_ff=48,
        num_layers=2,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=True,
        windows=(0, 5),
    )
    params = decoder.init(config, jax.random.key(0))
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 7, 8)
    batch = batch_of(*decoder_models.prompts_and_targets(rng, tuple(lengths), 8))

    def loss(params, batch):
        logits = jax.nn.log_softmax(lm.logits(config, params, batch))
        return jnp.mean(jnp.take_along_axis(logits, batch.targets[..., None], axis=-1))

    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    sizes = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    devices = sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])
    axes = lm.logical_axes(params)
    placed = jax.device_put(params, sharding.tree_shardings(params, axes, devices))
    rows = jax.device_put(batch, sharding.batch_sharding(devices))
    with sharding.use(devices):
        step = jax.jit(jax.value_and_grad(lambda p, b: loss(p, b)))
        found = step(placed, rows)
        tokens = jax.jit(functools.partial(all_logits.__wrapped__, config))(placed, rows)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), found, expected)
    for logits, one in zip(tokens, all_logits(config, params, batch), strict=True):
        np.testing.assert_allclose(logits, one, atol=1e-4)


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan_unroll": 3}])
def test_gradients_do_not_depend_on_how_layers_run(changes):
    config, params, _ = model("gemma2")
    batch = batch_of(*decoder_models.prompts_and_targets(np.random.default_rng(0), LENGTHS))

    def gradient(config):
        return jax.jit(jax.grad(lambda params: jnp.mean(lm.logits(config, params, batch) ** 2)))(
            params
        )

    expected = gradient(config)
    found = gradient(dataclasses.replace(config, **changes))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.max(np.abs(y))),
        found,
        expected,
    )


def test_gradients_equal_torch():
    import torch

    config, params, theirs = model("qwen3_sliding")
    rng = np.random.default_rng(0)
    inputs, lengths, targets = decoder_models.prompts_and_targets(rng, (5, 5), 9)
    text = torch.tensor(np.concatenate([inputs, targets], axis=1), dtype=torch.long)
    theirs.zero_grad()
    torch.square(theirs(input_ids=text).logits[:, 4:-1]).mean().backward()
    batch = batch_of(inputs, lengths, targets)
    found = jax.grad(lambda params: jnp.mean(lm.logits(config, params, batch) ** 2))(params)
    layer = found["decoder"]["layers"]
    attention = theirs.model.layers[1].self_attn
    for ours, weight in (
        (found["token_embedder"]["embedding"].T, theirs.model.embed_tokens.weight),
        (layer["self_attention"]["key"]["kernel"][1], attention.k_proj.weight),
        (layer["self_attention"]["query_norm"]["scale"][1], attention.q_norm.weight),
        (layer["mlp"]["wi_0"]["kernel"][2], theirs.model.layers[2].mlp.gate_proj.weight),
    ):
        expected = weight.grad.numpy().T
        np.testing.assert_allclose(ours, expected, atol=2e-5 * np.max(np.abs(expected)))


def test_int8_kernels_are_restored():
    config, params, _ = model("llama")
    batch = batch_of(*decoder_models.prompts_and_targets(np.random.default_rng(0), LENGTHS))
    small = quantized.quantize(params)
    for found, expected in zip(
        all_logits(config, small, batch),
        all_logits(config, quantized.restore(small), batch),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    shapes = lm.abstract_params(config, "int8")
    assert jax.tree.structure(shapes) == jax.tree.structure(small)
    assert lm.num_params(small) == lm.num_params(params)


def test_bfloat16_is_near_float32():
    config, params, _ = model("gemma3")
    inputs, lengths, targets = decoder_models.prompts_and_targets(np.random.default_rng(0), LENGTHS)
    batch = batch_of(inputs, lengths, targets)
    expected = lm.logits(config, params, batch)
    for found in all_logits(dataclasses.replace(config, dtype="bfloat16"), params, batch):
        assert found.dtype == jnp.float32
        assert np.mean(np.abs(found - expected)) < 0.05


def test_dropout_needs_a_key_and_keeps_the_mean():
    config, params, _ = model("llama")
    config = dataclasses.replace(config, dropout_rate=0.3)
    batch = batch_of(*decoder_models.prompts_and_targets(np.random.default_rng(0), LENGTHS))
    still = decoder.hidden(config, params, batch)
    np.testing.assert_array_equal(still, decoder.hidden(config, params, batch))
    one = decoder.hidden(config, params, batch, dropout_key=jax.random.key(0))
    two = decoder.hidden(config, params, batch, dropout_key=jax.random.key(1))
    assert np.mean(np.abs(one - still)) > 0.01 < np.mean(np.abs(one - two))


# Attention ----------------------------------------------------------------------------------------


def plain_attention(queries, keys, values, sight, scale, softcap):
    """Attention by its definition, in float64 and without blocks."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(np.asarray(x, np.float64), group, axis=1) for x in (keys, values))
    scores = np.einsum("bhtk,bhsk->bhts", np.asarray(queries, np.float64), keys) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    at, to = np.asarray(sight.queries)[:, :, None], np.asarray(sight.keys)[:, None, :]
    seen = ((to <= at) & (to > at - int(sight.window)))[:, None]
    weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    return np.einsum("bhts,bhsk->bhtk", weights / weights.sum(-1, keepdims=True), values)


def attention_inputs(length, past):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(2, 6, length, 8)) * 2
    keys, values = (rng.normal(size=(2, 2, past + length, 8)) for _ in range(2))
    held = np.asarray([past, past // 2])
    place = np.arange(past)[None]
    old = np.where(place < held[:, None], place, grouped_attention.NOWHERE)
    positions = held[:, None] + np.arange(length)[None]
    to = np.concatenate([old, positions], axis=1)
    return (
        *(jnp.asarray(x, jnp.float32) for x in (queries, keys, values)),
        *(jnp.asarray(x, jnp.int32) for x in (positions, to)),
    )


@pytest.mark.parametrize("window", [NO_WINDOW, 10])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("block", "past"), [(64, 5), (8, 0), (8, 13)])
def test_attention_equals_its_definition(window, softcap, block, past):
    # The last block of 33 has one query, which sees one key there. With a window of 10, a block's
    # first query sees one key of the block before the last.
    *heads, positions, to = attention_inputs(33, past)
    sight = Sight(positions, to, jnp.asarray(window))
    attend = functools.partial(
        grouped_attention.attend, sight=sight, scale=0.3, softcap=softcap, block=block
    )
    expected = plain_attention(*heads, sight, 0.3, softcap)
    for by_row in (False, True):
        found = attend(*heads, by_row=by_row)
        np.testing.assert_allclose(found, expected, atol=5e-6)
    # The gradient against JAX's own of the plain formula.
    weights = jnp.asarray(np.random.default_rng(1).normal(size=expected.shape), jnp.float32)

    def formula(queries, keys, values):
        keys, values = (jnp.repeat(x, 3, axis=1) for x in (keys, values))
        scores = jnp.einsum("bhtk,bhsk->bhts", queries, keys) * 0.3
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        seen = (to[:, None] <= positions[..., None]) & (to[:, None] > positions[..., None] - window)
        scores = jnp.where(seen[:, None], scores, -1e10)
        mixed = jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(scores), values)
        return jnp.sum(mixed * weights)

    gradients = jax.grad(formula, argnums=(0, 1, 2))(*heads)
    found = jax.grad(lambda *x: jnp.sum(attend(*x) * weights), argnums=(0, 1, 2))(*heads)
    for one, other in zip(found, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_scores_far_below_zero_are_as_good_as_others():
    """The softmax of exp(-240) in float32 needs the maximum of each row, in blocks too."""
    queries, keys, values, positions, to = attention_inputs(33, 0)
    queries, keys = 10 + queries / 10, -10 + keys / 10
    sight = Sight(positions, to, jnp.asarray(NO_WINDOW))
    found = grouped_attention.attend(queries, keys, values, sight, scale=0.3, block=8)
    expected = plain_attention(queries, keys, values, sight, 0.3, None)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize(("window", "past"), [(NO_WINDOW, 0), (10, 0), (9, 13)])
def test_pairs_of_blocks_in_which_no_query_sees_a_key_are_skipped(window, past, monkeypatch):
    visit, visits = grouped_attention._visit, []

    def counted(*args):
        jax.debug.callback(lambda: visits.append(1))
        return visit(*args)

    monkeypatch.setattr(grouped_attention, "_visit", counted)
    heads = [x[1:] for x in attention_inputs(33, past)]  # the row whose past has padding
    sight = Sight(*heads[3:], jnp.asarray(window))
    jax.block_until_ready(grouped_attention.attend(*heads[:3], sight, scale=0.3, block=8))
    jax.effects_barrier()
    at, to = np.asarray(heads[3][0])[:, None], np.asarray(heads[4][0])[None]
    query, key = np.nonzero((to <= at) & (to > at - window))
    assert len(visits) == len(set(zip(query // 8, key // 8, strict=True)))


def test_memory_of_attention_grows_with_the_length_alone():
    def temporary_bytes(length):
        shape = jax.ShapeDtypeStruct((1, 4, length, 16), jnp.float32)
        positions = jnp.arange(length)[None]

        def loss(q, k, v):
            sight = Sight(positions, positions, jnp.asarray(NO_WINDOW))
            return jnp.sum(grouped_attention.attend(q, k, v, sight, scale=0.25) ** 2)

        step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape)
        return step.compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4096) < 3 * temporary_bytes(2048)
    assert temporary_bytes(4096) < 4 * 4096 * 4096 * 4 / 4  # of what all scores would take


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must be a multiple of num_kv_heads=2, got 5"),
        ({"head_dim": 5}, "head_dim must be even"),
        (
            {"layer_norm_epsilon": -1.0},
            r"layer_norm_epsilon must be a number in \(0, 1\), got -1.0",
        ),
        ({"activation": "relu"}, "activation must be one of silu"),
        ({"windows": (4,)}, "windows must have 2 entries, got 1"),
        ({"windows": (4, -1)}, "windows must be positive, or 0"),
        ({"rope_of_layer": (0, 1)}, "rope_of_layer must index 1 ropes"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16'"),
        ({"d_ff": 0}, "d_ff must be a positive integer, got 0"),
    ],
)
def test_bad_sizes_are_refused(changes, message):
    sizes = {"vocab_size": 8, "d_model": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**{**sizes, "d_ff": 8, "num_layers": 2, **changes})
