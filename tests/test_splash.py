"""The TPU kernel, interpreted on CPU, equals the formula in float64 and our own attention.

tests/test_accelerator.py runs the kernel itself, on a TPU; here it is compiled for one.
"""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import sharding
from gkd_jax.batch import Batch
from gkd_jax.models import decoder, decoder_sizes, lm, splash
from gkd_jax.models.grouped_attention import NO_WINDOW
from gkd_jax.planning import analysis, hlo, hlo_text, precompile_table, topologies


ROWS, HEADS, KEY_HEADS, LENGTH, DIM = 2, 4, 2, 256, 64
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'gkd_jax[tpu]'"
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Makes a text of 256 tokens two blocks."""
    monkeypatch.setattr(splash, "_BLOCKS", (128,))


def arrays():
    rng = np.random.default_rng(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)  # the last are for the gradient of the output
    return [jnp.asarray(rng.normal(size=(ROWS, n, LENGTH, DIM)), jnp.float32) for n in heads]


def exact(queries, keys, values, gradient, window, scale, softcap):
    """Attention and its gradients by their formulas, in float64."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (queries, keys, values, gradient))
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = scale * q @ k.swapaxes(2, 3)
    slope = 1.0
    if softcap is not None:
        slope = 1 / np.cosh(scores / softcap) ** 2
        scores = softcap * np.tanh(scores / softcap)
    place = np.arange(q.shape[2])
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - window)
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed = weights @ v
    d_scores = weights * (g @ v.swapaxes(2, 3) - np.sum(g * mixed, axis=-1, keepdims=True))
    d_products = scale * slope * d_scores
    d_keys, d_values = d_products.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ g
    summed = (x.reshape(ROWS, KEY_HEADS, group, *x.shape[2:]).sum(2) for x in (d_keys, d_values))
    return mixed, d_products @ k, *summed


@pytest.mark.parametrize(
    ("mesh", "windows", "softcap"),
    [((1, 1, 1), (NO_WINDOW, 130), 2.0), ((1, 2, 2), (5, NO_WINDOW, 5), None)],
)
def test_attention_and_its_gradients_are_those_of_float64(mesh, windows, softcap):
    q, k, v, g = arrays()

    @jax.jit
    def found(q, k, v, g, window):
        def attend(q, k, v):
            return splash.attend(q, k, v, window, windows, scale=0.3, softcap=softcap)

        mixed, pull = jax.vjp(attend, q, k, v)
        return mixed, *pull(g)

    data, fsdp, tensor = mesh
    sizes = sharding.MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    with sharding.use(sharding.make_mesh(sizes, jax.devices()[: data * fsdp * tensor])):
        for window in set(windows):
            wanted = exact(q, k, v, g, window, 0.3, softcap)
            for one, other in zip(found(q, k, v, g, jnp.int32(window)), wanted, strict=True):
                assert np.max(np.abs(one - other)) < 3e-6 * np.max(np.abs(other))


def test_queries_in_bfloat16_are_rounded_after_they_are_scaled():
    """A scale that is rounded first would move the scores of all keys by the same 0.1 %."""
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in arrays())
    scaled = (0.3 * q.astype(jnp.float32)).astype(jnp.bfloat16)
    window, windows = jnp.int32(NO_WINDOW), (NO_WINDOW,)
    found = splash.attend(q, k, v, window, windows, scale=0.3)
    np.testing.assert_array_equal(found, splash.attend(scaled, k, v, window, windows, scale=1.0))


def serves(
    monkeypatch,
    *,
    rows=4,
    heads=4,
    key_heads=2,
    length=256,
    keys=256,
    dim=64,
    dtype="bfloat16",
    platform="tpu",
):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    queries = jnp.zeros((rows, heads, length, dim), dtype)
    return splash.serves(queries, jnp.zeros((rows, key_heads, keys, dim), dtype))


def test_what_the_kernel_computes(monkeypatch):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    with sharding.use(mesh):
        assert serves(monkeypatch)
        assert not serves(monkeypatch, platform="cpu")
        assert not serves(monkeypatch, dtype="float32")
        assert not serves(monkeypatch, dim=32)
        assert not serves(monkeypatch, length=200, keys=200)
        assert not serves(monkeypatch, keys=384)
        assert not serves(monkeypatch, rows=6)
        assert not serves(monkeypatch, heads=3)
        assert not serves(monkeypatch, key_heads=1)


@pytest.mark.parametrize("window", [1, 2, 128, 129, 130, 257, 258, NO_WINDOW])
def test_visits_are_the_pairs_of_blocks_in_which_a_query_sees_a_key(window):
    query, key = np.nonzero(np.tri(512, dtype=bool) & ~np.tri(512, k=-window, dtype=bool))
    pairs = set(zip(query // 128, key // 128, strict=True))
    assert splash.visits(512, 128, window) == f"visits_{len(pairs)}_of_16"


def test_a_kernel_s_scope_says_in_how_many_layers_it_runs():
    q, k, v, _ = arrays()
    windows = (5, NO_WINDOW, 5, 256, 5)

    def attend(q, k, v):
        return splash.attend(q, k, v, jnp.int32(5), windows, scale=0.3)

    text = jax.jit(attend).lower(q, k, v).as_text(debug_info=True)
    assert set(re.findall(r"times_\d+_of_\d+", text)) == {"times_3_of_5", "times_2_of_5"}


def test_decoders_take_the_kernel_where_they_can(monkeypatch):
    """Logits through the kernel equal our own, with windows, a softcap and padded prompts."""
    config = decoder_sizes.gemma2(
        "tiny", vocab_size=64, head_dim=64, num_layers=2, windows=(100, 0), attention_scale=0.2
    )
    params = decoder.init(config, jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 256), 1, 64)
    lengths = jnp.array([128, 60])
    batch = Batch(ids[:, :128], ids[:, 128:], jnp.ones((2, 128)), input_lengths=lengths)
    wanted = lm.logits(config, params, batch)
    calls = []

    def always(queries, keys):
        calls.append(queries.shape)
        return True

    monkeypatch.setattr(splash, "serves", always)
    found = lm.logits(config, params, batch)
    assert calls == [(2, 4, 256, 64)]
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(jnp.max(jnp.abs(wanted))))


# Compiled for a TPU -------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "heads", "key_heads", "dim", "windows"),
    [("v5e:2x2", 16, 8, 128, (0,)), ("v5e:2x2", 8, 2, 64, (0,)), ("v6e:2x2", 4, 1, 256, (512, 0))],
)
def test_its_flops_and_traffic_on_a_tpu(monkeypatch, topology, heads, key_heads, dim, windows):
    """Head dims of Qwen3, Llama 3.2 and Gemma 3, at 2,048 tokens in blocks of 512."""
    monkeypatch.setattr(splash, "_BLOCKS", (512,))
    _, devices = topologies.describe_topology(topology)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2), devices)
    length, windows = 2048, [window or NO_WINDOW for window in windows]

    def shape(heads):
        rows = sharding.batch_sharding(mesh)
        return jax.ShapeDtypeStruct((4, heads, length, dim), jnp.bfloat16, sharding=rows)

    def gradients(q, k, v, g, window):
        def attend(q, k, v):
            with sharding.use(mesh):
                assert splash.serves(q, k)
                return splash.attend(q, k, v, window, windows, scale=0.1)

        return jax.vjp(attend, q, k, v)[1](g)

    arguments = [shape(n) for n in (heads, key_heads, key_heads, heads)]
    arguments.append(jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh)))
    monkeypatch.setenv("GKD_JAX_COMPILATION_CACHE", "")  # count anew
    summary = analysis.analyse(jax.jit(gradients), tuple(arguments), topology)
    assert summary["uncounted"] == []
    # Of 4 x 4 pairs of blocks, 10 meet without a window, and 7 with one of 512.
    pairs = np.mean([7 if window == 512 else 10 for window in windows])
    product = 2 * heads * 512 * 512 * dim * pairs
    assert summary["flops"] == pytest.approx((2 + 3 + 4) * product)
    # Of each query head: the forward pass and the queries' gradient read keys and values for every
    # pair, the other gradient reads queries and outputs; each also moves arrays once.
    again = 3 * 2 * heads * pairs * 512 * dim * 2
    assert again < summary["traffic_bytes"] < 3 * again


def test_traffic_by_hand():
    """Two rows of 4 query heads and 2 key heads: 3 of 4 pairs of blocks of 512 meet."""
    text = """HloModule m, num_partitions=1

ENTRY %main (q: bf16[2,4,1024,64], k: bf16[2,2,1024,64]) -> f32[512,128] {
  %q = bf16[2,4,1024,64]{3,2,1,0} parameter(0)
  %k = bf16[2,2,1024,64]{3,2,1,0} parameter(1)
  %out = (f32[512,128]{1,0}, bf16[2,4,1024,64]{3,2,1,0}) custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/visits_3_of_4/splash_mha_fwd_no_residuals/pallas_call"}
  ROOT %first = f32[512,128]{1,0} get-tuple-element(%out), index=0
}
"""
    queries, block = 2 * 4 * 1024 * 64 * 2, 512 * 64 * 2
    read_again = 2 * (2 * 4 * 3) * block  # keys and values of each row, query head and pair
    summary = hlo.summary(hlo_text.parse(text.replace("\\\n", "")))
    assert summary["traffic_bytes"] == 2 * queries + read_again + 512 * 128 * 4
    assert summary["flops"] == 2 * 2 * (2 * 4 * 3) * 512 * 512 * 64


def test_a_kernel_that_is_not_known_is_named():
    text = """HloModule m, num_partitions=1

ENTRY %main (a: bf16[64,32]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  ROOT %out = bf16[64,16]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/other_kernel/pallas_call"}
}
"""
    summary = hlo.summary(hlo_text.parse(text))
    assert summary["uncounted"] == ["jit(f)/other_kernel/pallas_call"]
    assert summary["flops"] == summary["traffic_bytes"] == 0
    names = {"num_slices": 1, "num_devices": 1, "device_kind": "TPU", "effort": "-1", "fits": True}
    report = {**names, "topology": "v5e:2x2", "mesh": {}, "hbm_bytes": 1, "chip_hours": None}
    assert "other_kernel" in precompile_table.table({**report, "phases": {"update": summary}})
