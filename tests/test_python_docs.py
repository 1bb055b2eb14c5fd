"""docs/python.md: its code runs in the order of the page, and does what the text says."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

import gkd_jax
from gkd_jax import convert, sampling
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
        params = random_params(CONFIG, seed)
        saved_model.write_params(name, CONFIG, params, "a hash", 100 + seed)


PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
SMALL_MODELS, *BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_makes_small_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(SMALL_MODELS, {})
    for name in ("student", "teacher"):
        assert convert.read_config(name) == CONFIG


def test_the_page_runs(models, tmp_path):
    code = "\n".join(BLOCKS)
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
    params, key = random_params(CONFIG), jax.random.key(1)
    inputs = jnp.array([[5, 6, 1], [7, 1, 0]])
    more = {"max_length": 4, "sampling": SamplingConfig(top_k=5)}
    before = sampling._jitted._cache_size()
    found = gkd_jax.sample(CONFIG, params, inputs, key, **more)
    assert sampling._jitted._cache_size() == before + 1
    expected = sample(CONFIG, params, inputs, key, **more)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    plain = gkd_jax.sample(CONFIG, params, inputs, key, plain=True, **more)
    np.testing.assert_array_equal(plain.tokens, expected.tokens)


def test_num_pieces_without_a_record_are_the_rows(models, tmp_path):
    params = random_params(CONFIG)
    convert.write_hf(str(tmp_path / "hf"), CONFIG, params)
    assert gkd_jax.num_pieces("hf") == 128
    assert gkd_jax.num_pieces("hf", "teacher") == 101


# In a process of its own: here, signatures are checked before the functions can speak.
_CALLS = """
import pathlib
import jax, jax.numpy as jnp, numpy as np, optax
import gkd_jax
from gkd_jax import Batch, convert, gkd, gkd_config, load_model, rl
from gkd_jax.models import decoder_config, lm
from gkd_jax.sampling import SamplingConfig
from gkd_jax.training import train_state

def says(expected, call, *arguments, **settings):
    try:
        call(*arguments, **settings)
    except ValueError as error:
        assert expected in str(error), (expected, str(error))
    else:
        raise AssertionError(f"nothing was said: {expected}")

config = decoder_config.DecoderConfig(
    vocab_size=32, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, num_layers=1)
params = lm.init(config, jax.random.key(0))
here = pathlib.Path()
convert.write_hf(here / "hf", config, params)
assert convert.read_config(here / "hf") == config == load_model(here / "hf")[0]
kernel = convert.read_params(here / "hf", config)["token_embedder"]["embedding"]
np.testing.assert_array_equal(kernel, load_model("hf")[1]["token_embedder"]["embedding"])
assert gkd_jax.num_pieces(here / "hf", "hf") == 32
assert load_model(here / "student")[0].vocab_size == 128
student = load_model(here / "student")
written = convert.write_t5x(here / "t5x", *student, step=3)
assert load_model(pathlib.Path(written))[0] == student[0]
says("T5X's format is for T5s alone", convert.write_t5x, here / "x", config, params, step=1)
says("at least one checkpoint", gkd_jax.num_pieces)

inputs, targets = np.ones((2, 4), np.int32), np.ones((2, 3), np.int32)
greedy = SamplingConfig(temperature=0.0, eos_ids=[2])
lists = SamplingConfig(temperature=0.0, eos_ids=[np.int64(2)], banned_ids=[0])
assert lists.eos_ids == (2,) and lists.banned_ids == (0,)
says("eos_ids must be integers, got ['a']", SamplingConfig, eos_ids=["a"])
def sample(lengths, sampling=greedy, max_length=3):
    return gkd_jax.sample(
        config, params, inputs, max_length=max_length, input_lengths=lengths, sampling=sampling)
assert sample(np.array([4, 1])).tokens.shape == sample([4, 1], lists).tokens.shape == (2, 3)
for wrong in ([0, 4], [5, 1], [4], [[4, 1]], [4.0, 1.5]):
    said = f"input_lengths must be 2 integers from 1 to 4, the tokens of each prompt, got {wrong}"
    says(said, sample, np.array(wrong))
    batch = Batch(inputs, targets, np.ones((2, 3), np.float32), input_lengths=np.array(wrong))
    says(said, lm.logits, config, params, batch)
for wrong in (0, -1):
    says(f"max_length must be a positive integer, got {wrong}", sample, np.array([4, 1]),
         max_length=wrong)
says("eos_ids must lie in [0, 32), the model's vocabulary; got (40,)", sample, np.array([4, 1]),
     SamplingConfig(temperature=0.0, eos_ids=(40,)))
says("num_samples must be a positive integer, got 0", gkd_jax.sample, config, params, inputs,
     max_length=3, input_lengths=np.array([4, 1]), sampling=greedy, num_samples=0)

# Shapes that do not belong together, traced or not, and what an update lacks.
def trace(batch, of=config):
    return jax.eval_shape(lambda params, batch: lm.logits(of, params, batch), params, batch)
good = Batch(inputs, targets, np.ones((2, 3), np.float32), input_lengths=np.array([4, 1]))
for said, changes in (
    ("with a prompt and a token or more, got the shape (4,)", {"inputs": inputs[0]}),
    ("with a prompt and a token or more, got the shape (0, 4)", {"inputs": inputs[:0]}),
    ("with a prompt and a token or more, got the shape (2, 0)", {"inputs": inputs[:, :0]}),
    ("rows for each of the 2 prompts, got the shape (2, 0)", {"targets": targets[:, :0]}),
    ("input_lengths must be 2 integers from 1 to 4, the tokens of each prompt, got the shape (1,)",
     {"input_lengths": np.array([4])}),
    ("rows for each of the 2 prompts, got the shape (3, 3)", {"targets": targets[[0, 0, 1]]}),
    ("rows for each of the 2 prompts, got the shape (3,)", {"targets": targets[0]}),
    ("weights must have the shape of the targets, (2, 3), got (2, 1)",
     {"weights": np.ones((2, 1))}),
    ("weights must have the shape of the targets, (2, 3), got (3,)", {"weights": np.ones(3)}),
    ("teacher_inputs must have a row for each of the 2 prompts, got the shape (1, 4)",
     {"teacher_inputs": inputs[:1], "teacher_input_lengths": np.array([4])}),
):
    says(said, trace, good._replace(**changes))
assert trace(good).shape == (2, 3, 32)
pair = gkd.ModelPair(student=config, teacher=config, num_pieces=32)
method = gkd.GKDConfig(sampling=SamplingConfig(eos_ids=[2]))
def update(teacher=params, batch=good, advantages=None, **changes):
    learner = gkd.Learner(config=method, models=pair, optimizer=optax.sgd(0.1), **changes)
    state = train_state.create(params, learner.optimizer)
    key = jax.random.key(0)
    return jax.eval_shape(lambda *rest: gkd.update(learner, *rest), state, teacher, batch, key,
                          advantages)
assert update()[0].params.keys() == params.keys()
says("num_microbatches=3 does not divide the 2 prompts", update, num_microbatches=3)
says("a divergence needs the teacher's config and its parameters, got None", update, None)
says("with_average=True", update, None, self_teacher=gkd.MovingAverage())
says("advantages need GKDConfig.rl", update, advantages=np.ones(2))
blocks = tuple(gkd_config.TeacherShare(task=task, models=pair, num_rows=2) for task in "ab")
says("whole blocks of 4 prompts", update, {"a": params, "b": params}, teacher_shares=blocks)
for wrong in (np.ones((2, 1)), np.ones(1), np.float32(1)):
    said = f"one number for each of the 2 sequences, got the shape {wrong.shape}"
    says(said, rl.policy_loss, jnp.zeros((2, 3)), jnp.ones((2, 3)), wrong)

# Arrays of NumPy, and ids of a dtype that is too small for the other ids.
half = gkd.GKDConfig(sampling=method.sampling, mixing="example", on_policy_fraction=0.5)
drawn, _ = gkd.sample_targets(half, pair, params, good, jax.random.key(0))
assert (drawn.targets[1] == 1).all() and (drawn.targets[0] != 1).any()
large = decoder_config.DecoderConfig(**{**vars(config), "vocab_size": 300})
params = lm.init(large, jax.random.key(0))
ids = good._replace(targets=targets + 290)
found = lm.logits(large, params, ids._replace(inputs=inputs.astype(np.uint8)))
np.testing.assert_array_equal(found, lm.logits(large, params, ids))

logits = jnp.zeros((2, 3, 5))
for name in ("forward_kl", "reverse_kl", "jsd", "total_variation"):
    for other in (logits[:1], logits[..., :4]):
        says("must have the same shape, got (2, 3, 5) and", getattr(gkd_jax, name), logits, other)
"""


def test_paths_may_be_pathlib_s_and_wrong_arguments_are_said(models, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _CALLS], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
