"""Frequencies of rotary embeddings equal those of transformers at the sizes of public models."""

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gkd_jax.models import rope
from gkd_jax.models.decoder_config import Rope


LLAMA3 = {"theta": 500_000.0, "original_length": 8192}
YARN = {"theta": 1_000_000.0, "original_length": 32768}
ROPES = {
    "linear": Rope(kind="linear", theta=1_000_000.0, factor=8.0),
    "llama 3.1": Rope(kind="llama3", factor=8.0, **LLAMA3),
    "llama 3.2": Rope(kind="llama3", factor=32.0, **LLAMA3),
    "other bounds": Rope(
        kind="llama3", factor=32.0, low_freq_factor=2.0, high_freq_factor=9.0, **LLAMA3
    ),
    "qwen3": Rope(kind="yarn", factor=4.0, **YARN),
    "not truncated": Rope(kind="yarn", factor=32.0, truncate=False, **YARN),
    "other rotations": Rope(kind="yarn", factor=4.0, beta_fast=20.0, beta_slow=3.0, **YARN),
    "one pair for both bounds": Rope(
        kind="yarn", factor=4.0, beta_fast=5.0, beta_slow=5.0, truncate=False, **YARN
    ),
}
THEIR_NAMES = {"theta": "rope_theta", "original_length": "original_max_position_embeddings"}
FIELDS = {
    "linear": ("theta", "factor"),
    "llama3": ("theta", "factor", "original_length", "low_freq_factor", "high_freq_factor"),
    "yarn": ("theta", "factor", "original_length", "beta_fast", "beta_slow", "truncate"),
}


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_equal_transformers(name, head_dim):
    ours = ROPES[name]
    fields = {THEIR_NAMES.get(key, key): getattr(ours, key) for key in FIELDS[ours.kind]}
    config = transformers.LlamaConfig(
        head_dim=head_dim, rope_parameters={"rope_type": ours.kind, **fields}
    )
    expected = ROPE_INIT_FUNCTIONS[ours.kind](config, "cpu")[0].numpy()
    found = rope.inverse_frequencies(ours, head_dim)
    assert found.dtype == np.float32
    np.testing.assert_array_max_ulp(found, expected, 1)  # torch's powers may be off by one
    if ours.kind == "linear":
        return
    # Some frequencies are kept, some are divided, and some lie between.
    plain = rope.inverse_frequencies(Rope(theta=ours.theta), head_dim)
    kept, divided = found == plain, np.isclose(found, plain / ours.factor, rtol=1e-6)
    assert kept.any()
    assert divided.any()
    assert (~kept & ~divided).any() == (ours.beta_fast > ours.beta_slow)
