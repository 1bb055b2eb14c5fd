"""Sampling, beam search and distillation work for decoder-only models."""

import functools
import json
import tempfile

import decoder_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_tokenizers
import torch

from gkd_jax import divergences, gkd, load_model
from gkd_jax.batch import Batch
from gkd_jax.decoding.beam_search import beam_search
from gkd_jax.models import decoder, lm
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.sampling import SamplingConfig, sample
from gkd_jax.storage import saved_model
from gkd_jax.storage.conversion import convert_checkpoint


LENGTHS = (9, 4, 1, 7)


@functools.cache
def model(name):
    found = decoder_models.theirs(name)
    with tempfile.TemporaryDirectory() as folder:
        return *load_model(decoder_models.save(found, f"{folder}/{name}")), found


@pytest.mark.parametrize("name", ["llama", "qwen3_sliding", "gemma3"])
def test_greedy_tokens_are_those_of_generate(name):
    config, params, theirs = model(name)
    inputs, lengths, _ = decoder_models.prompts_and_targets(np.random.default_rng(3), LENGTHS)
    free = decoder_models.their_tokens(theirs, inputs, lengths, 20, (decoder_models.VOCAB + 1,))
    ends = (int(free[0, 6]), int(free[1, 11]))  # two ids, each of which ends some row
    expected = decoder_models.their_tokens(theirs, inputs, lengths, 20, ends)
    greedy = jax.jit(
        lambda params, inputs, lengths: sample(
            config,
            params,
            inputs,
            max_length=20,
            input_lengths=lengths,
            sampling=SamplingConfig(temperature=0.0, eos_ids=ends),
        )
    )
    found = greedy(params, jnp.asarray(inputs), jnp.asarray(lengths))
    np.testing.assert_array_equal(found.tokens, expected)
    for row, weights in zip(expected, np.asarray(found.weights), strict=True):
        stops = np.flatnonzero(np.isin(row, ends))
        assert weights.sum() == (stops[0] + 1 if stops.size else 20)


SMALL = DecoderConfig(
    vocab_size=7,
    d_model=12,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    d_ff=16,
    num_layers=2,
    qk_norm=True,
)


def small_batch(length=5, rows=3):
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 7, (3, 4))
    targets = rng.integers(0, 7, (rows, length))
    weights = (np.arange(length)[None] < rng.integers(1, length + 1, rows)[:, None]) * 1.0
    return Batch(
        jnp.asarray(inputs, jnp.int32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
        input_lengths=jnp.asarray([4, 1, 2], jnp.int32),
    )


def test_log_probs_of_samples_are_those_of_teacher_forcing():
    """The samples include several of each prompt, and id 0, which is an ordinary token."""
    params = decoder.init(SMALL, jax.random.key(0))
    batch = small_batch()
    drawn = sample(
        SMALL,
        params,
        batch.inputs,
        jax.random.key(1),
        max_length=8,
        input_lengths=batch.input_lengths,
        sampling=SamplingConfig(eos_ids=(3,)),
        num_samples=4,
    )
    rows = batch._replace(targets=drawn.tokens, weights=drawn.weights)
    log_probs = jax.nn.log_softmax(lm.logits(SMALL, params, rows))
    expected = jnp.take_along_axis(log_probs, drawn.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(drawn.log_probs, expected * drawn.weights, atol=1e-5)
    assert np.any((np.asarray(drawn.tokens) == 0) & (np.asarray(drawn.weights) == 1))
    assert 0 < np.mean(drawn.weights) < 1


def test_beams_are_the_best_of_all_sequences():
    """Every sequence of at most 3 tokens, with two end ids, is scored by teacher forcing."""
    params = jax.tree.map(lambda x: 2 * x, decoder.init(SMALL, jax.random.key(0)))
    batch, ends = small_batch(), (2, 5)
    body = [token for token in range(7) if token not in ends]
    sequences = [[*middle, end] for end in ends for middle in ([], *([a] for a in body))]
    sequences += [[a, b, end] for end in ends for a in body for b in body]
    targets = np.zeros((len(sequences), 3), np.int32)
    for index, sequence in enumerate(sequences):
        targets[index, : len(sequence)] = sequence
    sizes = np.asarray([len(sequence) for sequence in sequences])
    beams = beam_search(
        SMALL,
        params,
        batch.inputs,
        max_length=3,
        input_lengths=batch.input_lengths,
        num_beams=60,
        eos_ids=ends,
    )
    for row in range(3):
        rows = Batch(
            batch.inputs[row : row + 1],
            jnp.asarray(targets),
            jnp.ones(targets.shape),
            input_lengths=batch.input_lengths[row : row + 1],
        )
        log_probs = np.asarray(jax.nn.log_softmax(lm.logits(SMALL, params, rows)))
        picked = np.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        scores = np.asarray([x[:size].sum() for x, size in zip(picked, sizes, strict=True)])
        scores = scores / ((5 + sizes) / 6) ** 0.6
        order = np.argsort(-scores)[:5]
        np.testing.assert_allclose(beams.scores[row, :5], scores[order], atol=2e-5)
        np.testing.assert_array_equal(beams.tokens[row, :5], targets[order])


# GKD ----------------------------------------------------------------------------------------------


def torch_logits(theirs, batch):
    """The logits of transformers in float64, one row at a time without padding."""
    found = []
    for row, length in enumerate(np.asarray(batch.input_lengths)):
        ids = np.concatenate([batch.inputs[row, :length], batch.targets[row]])[None]
        logits = theirs(input_ids=torch.tensor(ids, dtype=torch.long)).logits[0]
        found.append(logits[length - 1 : -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_loss_and_gradient_of_a_pair_equal_torch_in_float64(name):
    student, params, theirs = model("qwen3")
    teacher, teacher_params, their_teacher = model("gemma2")  # of another family
    inputs, lengths, targets = decoder_models.prompts_and_targets(
        np.random.default_rng(5), (6, 2, 4), 7
    )
    weights = np.asarray([[1.0] * 7, [1.0] * 3 + [0.0] * 4, [1.0] * 5 + [0.0] * 2], np.float32)
    batch = Batch(*map(jnp.asarray, (inputs, targets, weights)), input_lengths=jnp.asarray(lengths))
    divergence = divergences.forward_kl if name == "forward_kl" else divergences.JSD(beta=0.3)
    config = gkd.GKDConfig(divergence=divergence)
    pieces = decoder_models.VOCAB - 4
    models = gkd.ModelPair(student=student, teacher=teacher, num_pieces=pieces)

    def loss(params):
        values = gkd.per_token_loss(config, models, params, teacher_params, batch)
        means = jnp.sum(values * batch.weights, axis=1) / jnp.sum(batch.weights, axis=1)
        return jnp.mean(means)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    theirs.double().zero_grad()
    with torch.no_grad():
        p = torch.log_softmax(torch_logits(their_teacher.double(), batch)[..., :pieces], -1)
    q = torch.log_softmax(torch_logits(theirs, batch)[..., :pieces], -1)
    if name == "forward_kl":
        tokens = (p.exp() * (p - q)).sum(-1)
    else:
        mixed = torch.log(0.3 * p.exp() + 0.7 * q.exp())
        tokens = 0.3 * (p.exp() * (p - mixed)).sum(-1) + 0.7 * (q.exp() * (q - mixed)).sum(-1)
    counts = torch.tensor(weights, dtype=torch.float64)
    expected = ((tokens * counts).sum(1) / counts.sum(1)).mean()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=2e-6)
    layer = gradient["decoder"]["layers"]
    first = theirs.model.layers[0]
    for ours, weight in (
        (gradient["token_embedder"]["embedding"].T, theirs.model.embed_tokens.weight),
        (layer["self_attention"]["value"]["kernel"][0], first.self_attn.v_proj.weight),
        (layer["mlp"]["wo"]["kernel"][0], first.mlp.down_proj.weight),
    ):
        other = weight.grad.numpy().T
        np.testing.assert_allclose(ours, other, atol=3e-5 * np.max(np.abs(other)))
    theirs.float()
    their_teacher.float()


# Checkpoints --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_theirs_to_ours_to_theirs_is_the_same_bytes(tmp_path, dtype):
    theirs = decoder_models.theirs("qwen3_sliding").to(getattr(torch, dtype))
    decoder_models.save(theirs, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    convert_checkpoint(str(tmp_path / "a"), str(tmp_path / "b"), to="gkd")
    convert_checkpoint(str(tmp_path / "b"), str(tmp_path / "c"), to="hf")
    one, other = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in "ac"
    )
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert value.tobytes() == other[name].tobytes()
    assert (tmp_path / "c" / "tokenizer.json").read_text() == "{}"
    fields = json.loads((tmp_path / "c" / "config.json").read_text())
    assert fields["eos_token_id"] == [5, 9]
    step_folder = saved_model.find_step(str(tmp_path / "b"))
    assert step_folder is not None
    assert saved_model.read_description(step_folder)["family"] == "decoder"


def test_the_card_of_a_run_says_what_it_was(tmp_path):
    params = decoder.init(SMALL, jax.random.key(0))
    saved_model.write_params(str(tmp_path / "run" / "checkpoints" / "7"), SMALL, params, "")
    small_tokenizers.write(tmp_path / "run" / "tokenizer", "qwen")
    recipe = {
        "student": {"checkpoint": "small-model"},
        "teacher": {"checkpoint": "large-model"},
        "method": {"divergence": {"type": "JSD", "beta": 0.1}, "on_policy_fraction": 1.0},
        "data": {"task": "prompts.jsonl", "batch_size": 8},
        "train": {"train_steps": 7},
    }
    (tmp_path / "run" / "run.json").write_text(json.dumps({"name": "mine", "recipe": recipe}))
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 7, "eval/rouge": 31.25}\n{"cut')
    convert_checkpoint(str(tmp_path / "run"), str(tmp_path / "out"), to="hf")
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("# mine", "small-model", "large-model", "JSD(beta=0.1)", "prompts.jsonl", "31.25"):
        assert part in card


def test_another_family_in_a_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match="family must be one of t5, decoder, got 'rwkv'"):
        lm.from_fields("rwkv", {})
