"""T5 has the expected properties, and equals naive NumPy and Hugging Face's implementation."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from gkd_jax.batch import Batch
from gkd_jax.models import lm, t5, t5_layers


T5_1_1 = t5.T5Config(
    vocab_size=61,
    d_model=24,
    num_heads=3,
    head_dim=10,
    d_ff=36,
    num_encoder_layers=2,
    num_decoder_layers=3,
    relpos_buckets=8,
    relpos_max_distance=10,
)
T5_1_0 = dataclasses.replace(
    T5_1_1, mlp_activations=("relu",), tie_embeddings=True, scale_logits=True
)
CONFIGS = {
    "t5_1_1": T5_1_1,
    "t5_1_0": T5_1_0,
    "per_layer_relpos": dataclasses.replace(T5_1_1, per_layer_relpos=True),
    "unrolled": dataclasses.replace(T5_1_1, scan_unroll=3),
    "for_gpu": dataclasses.replace(T5_1_1, unroll_decoding=True, cache_segment=4),
    "unrolled_per_layer": dataclasses.replace(T5_1_1, scan_unroll=3, per_layer_relpos=True),
}
B, S, T = 3, 9, 11
logits = jax.jit(t5.logits, static_argnums=0)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 61, (B, S)).astype(np.int32)
    for row, length in enumerate((9, 4, 7)):
        inputs[row, length - 1] = 1
        inputs[row, length:] = 0
    targets = rng.integers(0, 61, (B, T)).astype(np.int32)
    return Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.ones((B, T)))


@pytest.fixture(scope="module")
def params():
    return {name: random_params(config, 2) for name, config in CONFIGS.items()}


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5_1_1", "per_layer_relpos"])
def test_more_padding_of_the_inputs_changes_nothing(name, batch, params):
    wider = batch._replace(inputs=jnp.pad(batch.inputs, ((0, 0), (0, 6))))
    expected = logits(CONFIGS[name], params[name], batch)
    got = logits(CONFIGS[name], params[name], wider)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_inputs_matter(batch, params):
    other = batch._replace(inputs=batch.inputs.at[1, 0].set(5))
    change = np.abs(
        logits(T5_1_1, params["t5_1_1"], other) - logits(T5_1_1, params["t5_1_1"], batch)
    )
    assert change[1].max() > 1e-3
    assert not change[[0, 2]].any()


@pytest.mark.parametrize("name", ["t5_1_1", "per_layer_relpos"])
def test_a_target_changes_only_later_logits(name, batch, params):
    position = 4
    other = batch._replace(targets=batch.targets.at[:, position].add(1) % 61)
    change = np.abs(
        logits(CONFIGS[name], params[name], other) - logits(CONFIGS[name], params[name], batch)
    )
    assert not change[:, : position + 1].any()
    assert (change[:, position + 1 :].max(axis=(0, 2)) > 1e-4).all()


def test_logits_are_float32_and_the_last_target_is_no_input(batch, params):
    other = batch._replace(targets=batch.targets.at[:, -1].set(3))
    first = logits(T5_1_1, params["t5_1_1"], batch)
    assert first.dtype == jnp.float32
    assert first.shape == (B, T, 61)
    np.testing.assert_array_equal(first, logits(T5_1_1, params["t5_1_1"], other))


def test_shift_right():
    got = t5.shift_right(jnp.asarray([[5, 6, 7], [8, 9, 1]]))
    np.testing.assert_array_equal(got, [[0, 5, 6], [0, 8, 9]])


def _naive_bucket(distance, bidirectional, buckets, max_distance):
    """T5's description in words: half of the buckets for exact distances, the rest logarithmic."""
    offset = 0
    if bidirectional:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    # 1e-9: exact powers fall on the lower edge of a bucket, whatever the rounding of log.
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return offset + min(exact + math.floor(share * (buckets - exact) + 1e-9), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (40, 40), (7, 3), (2, 9)])
def test_relative_position_bias_equals_a_table(bidirectional, queries, keys):
    config = dataclasses.replace(T5_1_1, num_heads=3, relpos_buckets=8, relpos_max_distance=20)
    module = t5_layers.RelativePositionBias(config, bidirectional=bidirectional)
    table = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    got = module.apply({"params": {"rel_embedding": jnp.asarray(table)}}, queries, keys)
    assert got.shape == (1, 3, queries, keys)
    for t in range(queries):
        for s in range(keys):
            bucket = _naive_bucket(s - t, bidirectional, 8, 20)
            np.testing.assert_array_equal(got[0, :, t, s], table[:, bucket])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_hugging_face(bidirectional):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = np.arange(-3000, 3001)
    got = t5_layers.relative_position_bucket(jnp.asarray(distances), bidirectional, 32, 128)
    expected = modeling.T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    np.testing.assert_array_equal(got, expected.numpy())


# Decoding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CONFIGS))
def test_decoding_with_a_cache_equals_teacher_forcing(name, batch, params):
    config = CONFIGS[name]
    encoded = jax.jit(t5.encode, static_argnums=0)(config, params[name], batch.inputs)
    read = lm.decode_params(config, params[name])
    cache = t5.init_cache(config, read, encoded, T)
    step = jax.jit(t5.decode_step, static_argnums=0)
    expected = logits(config, params[name], batch)
    tokens = jnp.zeros((B,), jnp.int32)
    for position in range(T):
        assert cache.time == position
        got, cache = step(config, read, tokens, cache)
        np.testing.assert_allclose(got, expected[:, position], rtol=1e-4, atol=2e-5)
        tokens = batch.targets[:, position]


# Memory and precision -----------------------------------------------------------------------------


def _loss_and_gradient(config, params, batch):
    def loss(p):
        out = t5.logits(config, p, batch)
        return jnp.mean(jax.nn.logsumexp(out, axis=-1)), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def plain(batch, params):
    return _loss_and_gradient(T5_1_1, params["t5_1_1"], batch)


@pytest.mark.parametrize("changes", [{"remat": True}, {"scan_unroll": 3}, {"scan_unroll": 99}])
def test_remat_and_unrolling_change_neither_logits_nor_gradients(changes, batch, params, plain):
    config = dataclasses.replace(T5_1_1, **changes)
    (_, got), gradient = _loss_and_gradient(config, params["t5_1_1"], batch)
    (_, expected), expected_gradient = plain
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
        gradient,
        expected_gradient,
    )


def test_every_parameter_has_a_gradient(plain):
    for path, leaf in jax.tree_util.tree_flatten_with_path(plain[1])[0]:
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["t5_1_1", "t5_1_0"])
def test_bfloat16_is_close_to_float32(name, batch, params):
    exact = logits(CONFIGS[name], params[name], batch)
    config = dataclasses.replace(CONFIGS[name], dtype="bfloat16")
    got = logits(config, params[name], batch)
    assert got.dtype == jnp.float32
    # Of the whole, not of the worst logit: single ones cancel, and have no relative precision.
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.03  # 0 would mean that the setting does nothing


def test_dropout_is_off_without_a_key_and_centred_with_one(batch, params):
    # The mean of a nonlinear model shifts by O(rate), while the noise is O(rate^0.5).
    config = dataclasses.replace(T5_1_1, dropout_rate=0.01)
    exact = logits(T5_1_1, params["t5_1_1"], batch)
    np.testing.assert_array_equal(logits(config, params["t5_1_1"], batch), exact)

    @jax.jit
    def dropped(key):
        return t5.logits(config, params["t5_1_1"], batch, dropout_key=key)

    draws = np.stack([dropped(jax.random.key(seed)) for seed in range(200)])
    np.testing.assert_array_equal(dropped(jax.random.key(0)), draws[0])
    assert (draws.std(axis=0) > 0).all()
    noise = np.abs(draws[0] - exact).mean()
    assert np.abs(draws.mean(axis=0) - exact).mean() < 0.5 * noise


def test_the_norm_of_small_states_counts_epsilon():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(0, 1e-3, (2, 5, 24)), rng.normal(1, 0.2, 24)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
    norm = t5_layers.RMSNorm(T5_1_1)
    found = norm.apply({"params": {"scale": jnp.asarray(scale, jnp.float32)}}, jnp.float32(x))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_all_positions_of_a_row_share_one_draw_of_dropout():
    dropped = t5_layers.Dropout(0.25).apply(
        {}, jnp.ones((2, 5, 400)), rngs={"dropout": jax.random.key(0)}
    )
    np.testing.assert_array_equal(dropped, jnp.broadcast_to(dropped[:, :1], dropped.shape))
    assert (dropped[0] != dropped[1]).any()
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.75)}
    assert abs(np.mean(dropped == 0) - 0.25) < 0.05


def test_a_dropout_key_without_a_rate_changes_nothing(batch, params):
    expected = logits(T5_1_1, params["t5_1_1"], batch)
    got = logits(T5_1_1, params["t5_1_1"], batch, dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(got, expected)


# Sizes and parameters -----------------------------------------------------------------------------

SIZES = ("tiny", "small", "base", "large", "xl", "xxl")
# What Hugging Face's public checkpoints hold: google/t5-v1_1-* and t5-*.
COUNTS = {
    (t5.t5_1_1, "small"): 76_961_152,
    (t5.t5_1_1, "base"): 247_577_856,
    (t5.t5_1_1, "large"): 783_150_080,
    (t5.t5_1_1, "xl"): 2_849_757_184,
    (t5.t5_1_1, "xxl"): 11_135_332_352,
    (t5.t5_1_0, "small"): 60_506_624,
    (t5.t5_1_0, "base"): 222_903_552,
    (t5.t5_1_0, "large"): 737_668_096,
}


@pytest.mark.parametrize(("make", "size"), list(COUNTS))
def test_parameter_counts_of_the_public_sizes(make, size):
    assert lm.num_params(lm.abstract_params(make(size))) == COUNTS[make, size]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [t5.t5_1_0, t5.t5_1_1])
def test_every_parameter_has_logical_axes_of_its_rank(make, size):
    for per_layer_relpos in (False, True):
        config = dataclasses.replace(make(size), per_layer_relpos=per_layer_relpos)
        params = lm.abstract_params(config)
        axes = lm.logical_axes(params)
        flat = jax.tree_util.tree_flatten_with_path(params)[0]
        names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        width = {
            "vocab": config.vocab_size,
            "embed": config.d_model,
            "mlp": config.d_ff,
            "joined_kv": config.num_heads * config.head_dim,
            "heads": config.num_heads,
            "relpos_buckets": config.relpos_buckets,
        }
        for (path, leaf), entry in zip(flat, names, strict=True):
            depth = (
                config.num_encoder_layers if path[0].key == "encoder" else config.num_decoder_layers
            )
            expected = tuple(depth if axis == "layers" else width[axis] for axis in entry)
            assert leaf.shape == expected, jax.tree_util.keystr(path)


def test_abstract_parameters_describe_the_real_ones(params):
    for name in ("t5_1_1", "t5_1_0", "per_layer_relpos"):
        jax.tree.map(
            lambda real, shape: np.testing.assert_equal(
                (real.shape, real.dtype), (shape.shape, shape.dtype)
            ),
            params[name],
            lm.abstract_params(CONFIGS[name]),
        )
    low = lm.abstract_params(T5_1_1, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(low)} == {jnp.dtype("bfloat16")}


def test_initial_scales_are_t5x_s():
    """Standard deviations: embedding 1, query (D K)^-0.5, other kernels fan_in^-0.5, scales 1."""
    config = t5.t5_1_1("tiny", vocab_size=500)
    params = jax.jit(t5.init, static_argnums=0)(config, jax.random.key(0))
    decoder = params["decoder"]["layers"]
    d, k, f = config.d_model, config.head_dim, config.d_ff
    deviations = {
        1.0: params["token_embedder"]["embedding"],
        (d * k) ** -0.5: decoder["self_attention"]["query"]["kernel"],
        d**-0.5: decoder["self_attention"]["key"]["kernel"],
        (config.num_heads * k) ** -0.5: params["encoder"]["layers"]["attention"]["out"]["kernel"],
        f**-0.5: decoder["mlp"]["wo"]["kernel"],
        d**-0.5 * (1 + 1e-9): params["decoder"]["logits_dense"]["kernel"],
    }
    for expected, kernel in deviations.items():
        np.testing.assert_allclose(np.std(kernel), expected, rtol=0.05)
    np.testing.assert_array_equal(decoder["pre_mlp_layer_norm"]["scale"], np.ones((2, d)))
    first, second = decoder["mlp"]["wo"]["kernel"]
    assert np.abs(first - second).max() > 0.1  # every layer has a key of its own


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"num_heads": -1}, "num_heads must be a positive integer, got -1"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be a positive integer, got 0"),
        ({"scan_unroll": 0}, "scan_unroll must be a positive integer, got 0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"dropout_rate": -0.1}, r"dropout_rate must lie in \[0, 1\), got -0.1"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"mlp_activations": ()}, r"mlp_activations must be one or more of .* got \(\)"),
        ({"mlp_activations": ("swish",)}, r"mlp_activations .* got \('swish',\)"),
    ],
)
def test_bad_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(T5_1_1, **changes)


@pytest.mark.parametrize("make", [t5.t5_1_0, t5.t5_1_1])
def test_an_unknown_size_lists_the_known_ones(make):
    with pytest.raises(ValueError, match=r"one of .*tiny, .*, base, large, xl, xxl, got 'huge'"):
        make("huge")


# Hugging Face -------------------------------------------------------------------------------------


def _hugging_face(config):
    """A random transformers model of these sizes, with a head of its own if it is untied."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    gated = len(config.mlp_activations) == 2
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size,
            d_model=config.d_model,
            d_kv=config.head_dim,
            d_ff=config.d_ff,
            num_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.relpos_buckets,
            relative_attention_max_distance=config.relpos_max_distance,
            feed_forward_proj="gated-gelu" if gated else "relu",
            tie_word_embeddings=config.tie_embeddings,
            dropout_rate=0.0,
        )
    )
    if not config.tie_embeddings:
        # transformers 5 ties a model made from a configuration, whatever the configuration says.
        model.lm_head.weight = torch.nn.Parameter(
            torch.randn(config.vocab_size, config.d_model) * config.d_model**-0.5
        )
        model.config.scale_decoder_outputs = False
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "layer_norm" in name:
                value.add_(0.2 * torch.randn_like(value))
    return model.eval()


def _from_hugging_face(config, model):
    """Our tree of parameters from its state dict: kernels transposed, layers stacked."""
    state = {name: jnp.asarray(value.numpy()) for name, value in model.state_dict().items()}

    def stack(name, num_layers):
        values = [state[name.format(layer)] for layer in range(num_layers)]
        return jnp.stack([x.T if x.ndim == 2 else x for x in values])

    def attention(prefix, num_layers):
        letters = {"query": "q", "key": "k", "value": "v", "out": "o"}
        return {
            ours: {"kernel": stack(f"{prefix}.{theirs}.weight", num_layers)}
            for ours, theirs in letters.items()
        }

    names = ("wi_0", "wi_1", "wo") if len(config.mlp_activations) == 2 else ("wi", "wo")
    tree = {"token_embedder": {"embedding": state["shared.weight"]}}
    for side, depth in (
        ("encoder", config.num_encoder_layers),
        ("decoder", config.num_decoder_layers),
    ):
        block, last = f"{side}.block.{{}}.layer", 1 if side == "encoder" else 2
        stacked = {
            "mlp": {
                name: {"kernel": stack(f"{block}.{last}.DenseReluDense.{name}.weight", depth)}
                for name in names
            },
            "pre_mlp_layer_norm": {"scale": stack(f"{block}.{last}.layer_norm.weight", depth)},
        }
        own = "" if side == "encoder" else "self_"
        stacked[f"{own}attention"] = attention(f"{block}.0.SelfAttention", depth)
        scale = stack(f"{block}.0.layer_norm.weight", depth)
        stacked[f"pre_{own}attention_layer_norm"] = {"scale": scale}
        if side == "decoder":
            stacked["encoder_decoder_attention"] = attention(f"{block}.1.EncDecAttention", depth)
            scale = stack(f"{block}.1.layer_norm.weight", depth)
            stacked["pre_cross_attention_layer_norm"] = {"scale": scale}
        bias = state[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        tree[side] = {
            "layers": stacked,
            "relpos_bias": {"rel_embedding": bias.T},
            f"{side}_norm": {"scale": state[f"{side}.final_layer_norm.weight"]},
        }
    if not config.tie_embeddings:
        tree["decoder"]["logits_dense"] = {"kernel": state["lm_head.weight"].T}
    return tree


@pytest.mark.parametrize("name", ["t5_1_0", "t5_1_1"])
def test_logits_equal_hugging_face(name, batch):
    torch = pytest.importorskip("torch")
    config = CONFIGS[name]
    model = _hugging_face(config)
    params = _from_hugging_face(config, model)
    shapes = lm.abstract_params(config)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, shapes)
    inputs = torch.tensor(np.asarray(batch.inputs))
    with torch.no_grad():
        expected = model(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.tensor(np.asarray(t5.shift_right(batch.targets))),
        ).logits.numpy()
    got = logits(config, params, batch)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
