"""A tokenizer with further tokens than a model knows: such a token is refused, never looked up."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import small_runs
from small_runs import write_decoder
import small_tokenizers

from gkd_jax import divergences, gkd
from gkd_jax.batch import Batch
from gkd_jax.evaluation import infer, score
from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.input.data import DataConfig, check_ids
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.training import train


MESSAGE = "have the id {}, .* share the ids 0 to {} alone"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(student, teacher, number of the teacher's tokens); the student has one token more.

    The teacher has spare rows, so that the student's token has a row there, which means nothing.
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizer = small_tokenizers.train("qwen")
    count = tokenizer.get_vocab_size()
    teacher = write_decoder(folder / "teacher", tokenizer, count + 8, 1)
    tokenizer.add_special_tokens(["<|tool|>"])
    student = write_decoder(folder / "student", tokenizer, count + 1, 0)
    return student, teacher, count


def data(tmp_path, student, prompt="Ada has", **more):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"{prompt} {n} eggs", "completion": str(n)} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lengths = {"inputs": 16, "targets": 4}
    return DataConfig(
        task=str(path),
        vocabulary=student.checkpoint,
        feature_lengths=lengths,
        batch_size=8,
        **more,
    )


def losses(folder, student, **fields):
    train.train(**small_runs.options(folder, steps=2, student=student, **fields))
    return [line["train/loss"] for line in small_runs.step_lines(folder)]


def test_a_token_that_the_teacher_lacks_is_refused(pair, tmp_path):
    student, teacher, count = pair
    chosen = data(tmp_path, student, prompt="<|tool|> has")
    message = MESSAGE.format(count, count - 1)
    method = gkd.GKDConfig(on_policy_fraction=1.0, divergence=divergences.reverse_kl)
    with pytest.raises(ValueError, match=message):
        losses(tmp_path / "run", student, teacher=teacher, data=chosen, method=method)
    output = str(tmp_path / "out.jsonl")
    evaluation = EvalConfig(split="train")
    with pytest.raises(ValueError, match=message):
        infer.run(model=teacher, data=chosen, evaluation=evaluation, output=output)
    with pytest.raises(ValueError, match=message):
        score.run(model=teacher, data=chosen, output=str(tmp_path / "scores"))


def test_a_negative_id_is_refused():
    """It would read a row from the end of the embedding."""
    ids = np.array([[3, -1]])
    batch = Batch(ids, ids + 1, np.ones((1, 2)), input_lengths=np.array([2]))
    with pytest.raises(ValueError, match=MESSAGE.format(-1, 7)):
        check_ids(batch, 8)


def test_scores_are_of_the_ids_that_the_teacher_has(pair, tmp_path):
    """The loss with stored scores of all ids is that with the teacher itself."""
    student, teacher, count = pair
    chosen = data(tmp_path, student)
    scores = str(tmp_path / "scores")
    score.run(model=teacher, data=chosen, output=scores, k=1000)
    assert json.loads((tmp_path / "scores" / "about.json").read_text())["k"] == count
    more = {"divergence": divergences.forward_kl}
    live = losses(tmp_path / "live", student, data=chosen, teacher=teacher, **more)
    stored = data(tmp_path, student, teacher_cache=scores)
    found = losses(tmp_path / "stored", student, data=stored, **more)
    np.testing.assert_allclose(found, live, rtol=1e-5)


def test_scores_of_ids_that_the_student_lacks_are_refused(pair, tmp_path):
    bigger, smaller, count = pair
    chosen = data(tmp_path, bigger)
    scores = str(tmp_path / "scores")
    score.run(model=bigger, data=chosen, output=scores, k=1000)
    stored = data(tmp_path, bigger, teacher_cache=scores)
    with pytest.raises(ValueError, match=f"probabilities of {count + 1} ids, .* only {count}"):
        losses(tmp_path / "run", smaller, data=stored, divergence=divergences.forward_kl)


def test_a_token_without_a_row_is_refused(pair, tmp_path):
    student, _, count = pair
    tokenizer = small_tokenizers.train("qwen")
    tokenizer.add_special_tokens(["<|tool|>"])
    small = write_decoder(tmp_path / "small", tokenizer, count, 0)
    with pytest.raises(ValueError, match=f"{count} embedding rows, .* {count + 1} pieces"):
        losses(tmp_path / "run", small, data=data(tmp_path, student))


def test_a_trained_student_keeps_the_ids_of_its_run(pair, tmp_path):
    """Its other ids were never sampled in the run, and are not afterwards."""
    student, teacher, count = pair
    more = {"data": data(tmp_path, student), "teacher": teacher}
    losses(tmp_path / "run", student, divergence=divergences.forward_kl, **more)
    trained = ModelConfig(checkpoint=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=MESSAGE.format(count, count - 1)):
        score.run(
            model=trained,
            data=data(tmp_path, student, prompt="<|tool|> has"),
            output=str(tmp_path / "scores"),
        )


def test_a_decoder_without_a_tokenizer_does_not_get_t5_s(pair, tmp_path):
    student, teacher, _ = pair
    bare = shutil.copytree(student.checkpoint, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    chosen = dataclasses.replace(data(tmp_path, student), vocabulary=None)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*bare', whose model .* 'qwen3'"):
        losses(tmp_path / "run", ModelConfig(checkpoint=str(bare)), data=chosen, teacher=teacher)
