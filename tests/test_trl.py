"""TRL's GKDTrainer on a decoder-only pair, beside the loss here: pip install trl==1.16.0."""

import decoder_models
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from gkd_jax import divergences, gkd, load_model, losses
from gkd_jax.batch import Batch


LENGTHS, ANSWERS, TARGET = (11, 4, 7), (6, 3, 1), 6


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Returns (model of transformers, config, parameters) of a student and of a teacher."""
    folder = tmp_path_factory.mktemp("pair")
    found = []
    for name, layers in (("student", 2), ("teacher", 3)):
        model = decoder_models.theirs("qwen3", num_hidden_layers=layers)
        found.append((model, *load_model(decoder_models.save(model, folder / name))))
    return found


@pytest.fixture(scope="module")
def trainer_class():
    pytest.importorskip("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.gkd import GKDTrainer

        return GKDTrainer


def rows():
    rng = np.random.default_rng(0)
    inputs, lengths, targets = decoder_models.prompts_and_targets(rng, LENGTHS, TARGET)
    weights = (np.arange(TARGET)[None] < np.asarray(ANSWERS)[:, None]).astype(np.float32)
    return inputs, lengths, targets, weights


def their_loss(trainer_class, pair, beta, num_items):
    """TRL's loss of answers behind prompts, padded on the right."""
    inputs, lengths, targets, _ = rows()
    width = max(LENGTHS) + TARGET
    ids, labels = np.zeros((3, width), np.int64), np.full((3, width), -100)
    mask = np.zeros_like(ids)
    for row, (length, answer) in enumerate(zip(lengths, ANSWERS, strict=True)):
        ids[row, : length + answer] = [*inputs[row, :length], *targets[row, :answer]]
        labels[row, length : length + answer] = targets[row, :answer]
        mask[row, : length + answer] = 1
    trainer = trainer_class.__new__(trainer_class)
    trainer.beta, trainer.teacher_model = beta, pair[1][0]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    with torch.no_grad():
        return float(trainer.compute_loss(pair[0][0], batch, num_items_in_batch=num_items))


def our_loss(pair, divergence, reduction):
    inputs, lengths, targets, weights = rows()
    (_, student, student_params), (_, teacher, teacher_params) = pair
    models = gkd.ModelPair(student=student, teacher=teacher, num_pieces=decoder_models.VOCAB)
    arrays = (jnp.asarray(x) for x in (inputs, targets, weights))
    batch = Batch(*arrays, input_lengths=jnp.asarray(lengths))
    method = gkd.GKDConfig(divergence=divergence)
    values = gkd.per_token_loss(method, models, student_params, teacher_params, batch)
    total, count = reduction(values, batch.weights)
    return float(total / count)


@pytest.mark.parametrize(
    ("beta", "divergence"),
    [
        (0.0, divergences.forward_kl),
        (0.1, divergences.JSD(beta=0.1)),
        (0.5, divergences.JSD(beta=0.5)),
        (1.0, divergences.reverse_kl),
    ],
)
def test_the_mean_over_tokens_is_trl_s_loss(pair, trainer_class, beta, divergence):
    found = our_loss(pair, divergence, losses.token_mean)
    assert found == pytest.approx(their_loss(trainer_class, pair, beta, None), rel=1e-5)


def test_where_the_losses_differ(pair, trainer_class):
    """The paper's Eq. 2 is a mean over each answer first, and TRL's count may be another's."""
    theirs = their_loss(trainer_class, pair, 1.0, None)
    by_sequence = our_loss(pair, divergences.reverse_kl, losses.sequence_mean)
    assert abs(by_sequence - theirs) > 0.01 * theirs
    # The trainer counts the tokens of the data set's answers, before it replaces them by samples.
    other_count = their_loss(trainer_class, pair, 1.0, 2 * sum(ANSWERS))
    assert other_count == pytest.approx(theirs / 2, rel=1e-5)
