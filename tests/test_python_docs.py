"""docs/python.md: its code runs in the order of the page, and does what the text says."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gkd_jax
from gkd_jax import convert
from gkd_jax.models import t5
from gkd_jax.sampling import SamplingConfig, sample
from gkd_jax.storage import saved_model


ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = t5.t5_1_1("32x2", vocab_size=128)
CHECKS = """
assert logits.shape == (2, 3, 128) and logits.dtype == jnp.float32
assert drawn.tokens.shape == best.tokens.shape == (2, 8)
assert shared == 100
assert per_token.shape == (2, 3) and float(per_token.min()) > 0
assert int(state.step) == 20
assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
import sys
assert "tensorflow" not in sys.modules
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        params = t5.init(CONFIG, jax.random.key(seed))
        saved_model.write_params(name, CONFIG, params, "a hash", 100 + seed)


def test_the_page_runs(models, tmp_path):
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    assert code.count("gkd.update(") == 2
    done = subprocess.run(
        [sys.executable, "-c", code + CHECKS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert convert.read_config(str(tmp_path / "distilled")).d_model == CONFIG.d_model


def test_dir_lists_the_public_names_and_each_is_there():
    names = [name for name in dir(gkd_jax) if not name.startswith("_")]
    assert names == sorted(gkd_jax.__all__)
    assert all(getattr(gkd_jax, name) is not None for name in names)
    assert (ROOT / "gkd_jax" / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gkd_jax.nothing


def test_the_public_sample_is_compiled_and_draws_the_same():
    params, key = t5.init(CONFIG, jax.random.key(0)), jax.random.key(1)
    inputs = jnp.array([[5, 6, 1], [7, 1, 0]])
    more = {"max_length": 4, "sampling": SamplingConfig(top_k=5)}
    before = gkd_jax.sample._cache_size()
    found = gkd_jax.sample(CONFIG, params, inputs, key, **more)
    assert gkd_jax.sample._cache_size() == before + 1
    expected = sample(CONFIG, params, inputs, key, **more)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_num_pieces_without_a_record_are_the_rows(models, tmp_path):
    params = t5.init(CONFIG, jax.random.key(0))
    convert.write_hf(str(tmp_path / "hf"), CONFIG, params)
    assert gkd_jax.num_pieces("hf") == 128
    assert gkd_jax.num_pieces("hf", "teacher") == 101
