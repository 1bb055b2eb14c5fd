"""Random parameters that differ from the initial values, updates and comparisons of them."""

import jax
import jax.numpy as jnp
import numpy as np

from gkd_jax import gkd
from gkd_jax.models import lm, t5
from gkd_jax.models.parameters import flatten


def tiny_t5(vocab_size: int) -> t5.T5Config:
    """The config of a T5 with one layer a stack, for tests in which the numbers do not matter."""
    return t5.T5Config(
        vocab_size=vocab_size,
        d_model=16,
        num_heads=2,
        head_dim=8,
        d_ff=16,
        num_encoder_layers=1,
        num_decoder_layers=1,
        relpos_buckets=8,
        relpos_max_distance=20,
    )


def random_params(config: t5.T5Config, seed: int = 0, *, norm_spread: float = 0.2) -> t5.Params:
    """Parameters drawn at random by NumPy.

    Fan-in scaling keeps activations near 1, and embeddings are large enough for logits that differ.
    Norms vary around 1, so that they affect the result; with `norm_spread` 0 they are 1.
    """
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        if path[-1].key == "scale" and not norm_spread:
            return jnp.ones(shape.shape)
        if path[-1].key == "scale":
            return jnp.asarray(1 + norm_spread * rng.normal(0, 1, shape.shape), jnp.float32)
        size = 1.0 if "embedding" in path[-1].key else shape.shape[-2] ** -0.5
        return jnp.asarray(rng.normal(0, size, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, lm.abstract_params(config))


def update_with(config, models, optimizer, num_microbatches, *arguments):
    """`gkd.update` with the parts of its learner."""
    learner = gkd.Learner(
        config=config, models=models, optimizer=optimizer, num_microbatches=num_microbatches
    )
    return gkd.update(learner, *arguments)


update = jax.jit(update_with, static_argnums=(0, 1, 2, 3))


def assert_same(left, right) -> None:
    """Fails unless two trees have the same names, dtypes and numbers."""
    left, right = flatten(left), flatten(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(np.asarray(left[path]), np.asarray(right[path]), path)
