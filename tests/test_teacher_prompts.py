"""A teacher that reads prompts of its own: the loss, the data, the cache, evaluation and report."""

import functools
import json

from decoder_models import VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_params
from scipy import special
from small_runs import options, small, step_lines, write_teacher
import small_tokenizers

from gkd_jax import divergences, gkd, report, rl
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate, score
from gkd_jax.input import data, named_tasks, row_ids, rows, streams
from gkd_jax.input.data import DataConfig
from gkd_jax.models import lm
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.storage import loading, pretrained
from gkd_jax.text import teacher_template, vocabularies
from gkd_jax.text.tokenizer_folder import TokenizerVocabulary
from gkd_jax.training import train, train_state


pytestmark = pytest.mark.usefixtures("shared_steps")
B, S, R, T = 4, 5, 7, 6
T5 = small("tiny", VOCAB)
DECODER = DecoderConfig(
    vocab_size=VOCAB, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, num_layers=2
)
FAMILIES = {"t5": T5, "decoder": DECODER}
TEMPLATE = "{inputs} {targets}"
LENGTHS = {"inputs": 48, "targets": 32, "teacher_inputs": 80}


@functools.cache
def models(family):
    """(config, student's parameters, teacher's)"""
    config = FAMILIES[family]
    if family == "t5":
        return config, *(random_params(config, seed, norm_spread=0.0) for seed in (0, 1))
    return config, *(lm.init(config, jax.random.key(seed)) for seed in (0, 1))


def batch_of(seed, own_lengths, lengths=(3, 5, 1, 4)):
    rng = np.random.default_rng(seed)

    def prompts(length, lengths):
        ids = rng.integers(2, VOCAB, (B, length)).astype(np.int32)
        return np.where(np.arange(length) < np.asarray(lengths)[:, None], ids, 0)

    weights = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(np.float32)
    return Batch(
        prompts(S, lengths),
        rng.integers(2, VOCAB, (B, T)).astype(np.int32),
        weights,
        input_lengths=np.asarray(lengths, np.int32),
        teacher_inputs=prompts(R, own_lengths),
        teacher_input_lengths=np.asarray(own_lengths, np.int32),
    )


score_tokens = jax.jit(gkd.per_token_loss, static_argnums=(0, 1))
logits = jax.jit(lm.logits, static_argnums=0)


def log_probs_alone(config, params, prompt, targets):
    """Of one row without any padding, float64."""
    one = Batch(
        prompt[None], targets[None], np.ones((1, T)), input_lengths=np.asarray([len(prompt)])
    )
    return special.log_softmax(np.asarray(logits(config, params, one)[0], np.float64), axis=-1)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.integers(0, 2**31),
    st.lists(st.integers(1, R), min_size=B, max_size=B),
)
def test_unequal_prompts_equal_scoring_each_row_alone(family, seed, own_lengths):
    config, student, teacher = models(family)
    pair = gkd.ModelPair(student=config, teacher=config, num_pieces=VOCAB)
    batch = batch_of(seed, own_lengths)
    found = np.asarray(score_tokens(gkd.GKDConfig(), pair, student, teacher, batch))
    for row in range(B):
        own = batch.teacher_inputs[row, : own_lengths[row]]
        log_p = log_probs_alone(config, teacher, own, batch.targets[row])
        prompt = batch.inputs[row, : batch.input_lengths[row]]
        log_q = log_probs_alone(config, student, prompt, batch.targets[row])
        expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
        length = int(batch.weights[row].sum())
        np.testing.assert_allclose(found[row, :length], expected[:length], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_s_own_prompts_change_nothing(family):
    config, student, teacher = models(family)
    pair = gkd.ModelPair(student=config, teacher=config, num_pieces=VOCAB)
    batch = batch_of(0, (1, 2, 3, 4))
    plain = batch._replace(teacher_inputs=None, teacher_input_lengths=None)
    same = plain._replace(teacher_inputs=batch.inputs, teacher_input_lengths=batch.input_lengths)
    assert len(jax.tree.leaves(plain)) == 4
    expected, found, other = (
        score_tokens(gkd.GKDConfig(), pair, student, teacher, one) for one in (plain, same, batch)
    )
    np.testing.assert_array_equal(found, expected)
    assert np.abs(other - expected).max() > 1e-2


def test_samples_and_microbatches_keep_the_prompts():
    """Two samples a prompt in four microbatches: the update of each prompt's own rows."""
    config, student, teacher = models("t5")
    pair = gkd.ModelPair(student=config, teacher=config, num_pieces=VOCAB)
    method = gkd.GKDConfig(num_samples=2, divergence=divergences.reverse_kl)
    batch = jax.tree.map(jnp.asarray, batch_of(3, (7, 1, 4, 2)))
    drawn, _ = gkd.sample_targets(method, pair, student, batch, jax.random.key(0))
    state = train_state.create(student, optax.sgd(0.5))
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), batch)
    plain = repeated._replace(targets=drawn.targets, weights=drawn.weights)
    found = []
    for num_microbatches, rows_of in ((1, plain), (1, drawn), (4, drawn)):
        learner = gkd.Learner(
            config=method, models=pair, optimizer=optax.sgd(0.5), num_microbatches=num_microbatches
        )
        found.append(
            jax.jit(functools.partial(gkd.update, learner))(
                state, teacher, rows_of, jax.random.key(1)
            )[0].params
        )
    for params in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), params, found[0])


def test_with_a_reward_the_teacher_reads_its_prompts_and_the_policy_the_student_s():
    """The update's gradient is that of Eq. 5, written out."""
    config, student, teacher = models("t5")
    pair = gkd.ModelPair(student=config, teacher=config, num_pieces=VOCAB)
    alpha, rewards = 0.3, np.asarray([0.5, -1.0, 2.0, 1.0], np.float32)
    reward = rl.RLConfig(reward=lambda prompts, outputs, references: rewards, alpha=alpha)
    method = gkd.GKDConfig(rl=reward)
    batch = jax.tree.map(jnp.asarray, batch_of(3, (7, 1, 4, 2)))

    def objective(params):
        values = gkd.per_token_loss(method, pair, params, teacher, batch)
        mean = jnp.sum(values * batch.weights, axis=1) / batch.weights.sum(axis=1)
        own = lm.logits(config, params, batch)[..., 1:]  # the pad is never drawn
        log_q = jax.nn.log_softmax(own, axis=-1)
        picked = jnp.take_along_axis(log_q, batch.targets[..., None] - 1, axis=-1)[..., 0]
        policy = -rewards * jnp.sum(picked * batch.weights, axis=1)
        return jnp.mean(alpha * mean + (1 - alpha) * policy)

    learner = gkd.Learner(config=method, models=pair, optimizer=optax.sgd(1.0))
    state = train_state.create(student, learner.optimizer)
    new, _ = jax.jit(functools.partial(gkd.update, learner))(
        state, teacher, batch, jax.random.key(0), jnp.asarray(rewards)
    )
    jax.tree.map(
        lambda old, new, slope: np.testing.assert_allclose(old - new, slope, atol=1e-5),
        student,
        new.params,
        jax.jit(jax.grad(objective))(student),
    )


# The data -----------------------------------------------------------------------------------------


def test_a_template_is_a_text_with_the_two_fields():
    assert teacher_template.fill("a {{b}} {inputs}", inputs="{x}", targets=None) == "a {b} {x}"
    assert teacher_template.fill("{targets}|{inputs}", inputs="i", targets="t") == "t|i"
    for wrong, said in (
        ("{answer}", "'answer'"),
        ("{inputs!r}", "'inputs'"),
        ("no field", "every prompt would be the same"),
        ("{inputs", "expected '}'"),
    ):
        with pytest.raises(ValueError, match="teacher_template must") as error:
            teacher_template.parts(wrong)
        assert said in str(error.value)
    with pytest.raises(ValueError, match="needs a target, got only a prompt"):
        teacher_template.fill(TEMPLATE, inputs="i", targets=None)


def data_config(**more):
    fields = {"task": "arithmetic", "feature_lengths": LENGTHS, "batch_size": 8}
    fields["num_examples"] = 100
    return DataConfig(**{**fields, "teacher_template": TEMPLATE, **more})


def test_the_stream_of_a_task_with_a_template_is_that_of_the_task_with_prompts_beside():
    plain = {name: LENGTHS[name] for name in ("inputs", "targets")}
    configs = (
        data_config(num_examples=100),
        data_config(num_examples=100, feature_lengths=plain, teacher_template=None),
    )
    task, vocabulary = named_tasks.open_task(configs[0])
    with_own, without = (
        next(streams.TrainIterator(named_tasks.open_tasks(config)[0], config)) for config in configs
    )
    assert without.teacher_inputs is None
    for name in ("inputs", "targets", "weights", "input_lengths"):
        np.testing.assert_array_equal(getattr(with_own, name), getattr(without, name))
    for row in range(8):
        text = vocabulary.decode(with_own.teacher_inputs[row].tolist())
        question, chain = (vocabulary.decode(x[row].tolist()) for x in with_own[:2])
        assert text == f"{question} {chain}"
        assert with_own.teacher_input_lengths[row] == (with_own.teacher_inputs[row] != 0).sum()
    bucketed = data_config(length_buckets=(44, 60), num_examples=100)
    assert bucketed.shapes() == [(44, 32, 44), (48, 32, 60), (48, 32, 80)]
    stream = streams.TrainIterator({task.name: task}, bucketed)
    found = [next(stream) for _ in range(4)]
    assert {data.shape_of(batch) for batch in found} <= set(bucketed.shapes())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature_lengths": {"inputs": 8, "targets": 8}}, "'teacher_inputs'. is missing"),
        ({"feature_lengths": {"inputs": 8, "teacher_inputs": 8}}, "feature_lengths must be"),
        ({"teacher_template": None}, "task 'arithmetic' has no feature 'teacher_inputs'"),
        ({"use_cached": True}, "use_cached must be False"),
    ],
)
def test_what_gives_no_prompts_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.train(**options(tmp_path, steps=1, data=data_config(**changes)))


def lines_file(path, objects):
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return str(path)


def test_lines_of_a_file_name_the_teacher_s_prompt_or_share_the_student_s(tmp_path, capsys):
    path = lines_file(
        tmp_path / "x.jsonl",
        [
            {"inputs": "ab", "targets": "c", "teacher_inputs": "ab, hint: c"},
            {"prompt": "de", "completion": "f"},
        ],
    )
    lengths = {"inputs": 8, "targets": 4, "teacher_inputs": 16}
    config = DataConfig(task=path, feature_lengths=lengths, batch_size=2, vocabulary="bytes")
    task, vocabulary = named_tasks.open_task(config)
    batch = next(streams.TrainIterator({task.name: task}, config))
    texts = {vocabulary.decode(x[x > 1].tolist()) for x in batch.teacher_inputs}
    assert texts == {"ab, hint: c", "de"}
    assert sorted(batch.teacher_input_lengths) == [3, 12]  # EOS too

    # Longer ones are skipped or cut, as prompts are.
    short = {**lengths, "teacher_inputs": 5}
    for how, kept in (("skip", {"de"}), ("cut", {"t: c", "de"})):
        config = DataConfig(
            task=path, feature_lengths=short, batch_size=1, vocabulary="bytes", long_prompts=how
        )
        stream = streams.TrainIterator(named_tasks.open_tasks(config)[0], config)
        found = [next(stream).teacher_inputs[0] for _ in range(4)]
        assert {vocabulary.decode(x[x > 1].tolist()) for x in found} == kept
    assert "1 of 2 prompts of the teacher (50.0 %) are longer than 5" in capsys.readouterr().err

    # Without a length they are left alone, which is said.
    plain = DataConfig(
        task=path, feature_lengths={"inputs": 8, "targets": 4}, batch_size=2, vocabulary="bytes"
    )
    task, _ = named_tasks.open_task(plain)
    assert next(streams.TrainIterator({task.name: task}, plain)).teacher_inputs is None
    assert "has prompts for the teacher, which are left alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"teacher_inputs": 3}, "'teacher_inputs' must be a string"),
        ({"teacher_inputs": " "}, "a teacher's prompt with text, got an empty one"),
        ({"teacher_messages": []}, "'teacher_messages' must be a list of messages"),
        ({"teacher_inputs": "a", "teacher_messages": []}, "one of 'teacher_inputs' and"),
        (
            {"teacher_messages": [{"role": "assistant", "content": "x"}]},
            "'teacher_messages' must end before",
        ),
        ({}, "no line has 'teacher_inputs' or 'teacher_messages'"),
    ],
)
def test_a_bad_prompt_of_the_teacher_is_named_by_line(tmp_path, row, message):
    path = lines_file(tmp_path / "x.jsonl", [{"inputs": "a", "targets": "b", **row}])
    lengths = {"inputs": 8, "targets": 4, "teacher_inputs": 16}
    config = DataConfig(task=path, feature_lengths=lengths, batch_size=1, vocabulary="bytes")
    with pytest.raises(ValueError, match=message) as error:
        streams.TrainIterator(named_tasks.open_tasks(config)[0], config)
    assert "x.jsonl" in str(error.value)


def test_chats_have_messages_or_a_template_for_the_teacher(tmp_path):
    vocabulary = TokenizerVocabulary(small_tokenizers.write(tmp_path / "qwen", "qwen"))
    user = {"role": "user", "content": "four eggs"}
    answer = {"role": "assistant", "content": "7."}
    hinted = {"role": "user", "content": "four eggs, 7."}

    def example(row, **more):
        read = rows._row(row, "x.jsonl", 1)
        return row_ids.tokenize([read], vocabulary, "x.jsonl", with_teacher=True, **more)[0]

    plain = example({"messages": [user, answer]})
    np.testing.assert_array_equal(plain.teacher_inputs, plain.inputs)
    own = example({"messages": [user, answer], "teacher_messages": [hinted]})
    made = example({"messages": [user, answer]}, template="{inputs}, {targets}")
    expected = example({"messages": [hinted, answer]})
    for found in (own, made):
        np.testing.assert_array_equal(found.inputs, plain.inputs)
        np.testing.assert_array_equal(found.targets, plain.targets)
        np.testing.assert_array_equal(found.teacher_inputs, expected.inputs)
        assert found.teacher_prompt == expected.prompt
    with pytest.raises(ValueError, match="TEACHER_TEMPLATE is set"):
        example({"messages": [user], "teacher_messages": [hinted]}, template="{inputs}")


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = write_teacher(tmp_path_factory.mktemp("teacher") / "teacher")
    return pretrained.ModelConfig(architecture=small, checkpoint=path)


def losses(folder):
    return [line["train/loss"] for line in step_lines(folder)]


@pytest.mark.slow
def test_scores_on_disk_are_those_of_a_teacher_with_its_own_prompts(tmp_path, teacher):
    own = data_config(num_examples=24)
    more = {"steps": 3, "teacher": teacher, "divergence": divergences.forward_kl}
    train.train(**options(tmp_path / "live", data=own, **more))
    score.run(model=teacher, data=own, output=str(tmp_path / "scores"), k=1000)
    cached = data_config(num_examples=24, teacher_cache=str(tmp_path / "scores"))
    train.train(**options(tmp_path / "cached", data=cached, **{**more, "teacher": None}))
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "live"), rtol=1e-4)
    plain = {name: LENGTHS[name] for name in ("inputs", "targets")}
    other = data_config(
        feature_lengths=plain, teacher_template=None, teacher_cache=str(tmp_path / "scores")
    )
    with pytest.raises(ValueError, match="made with prompts of the teacher's own"):
        train.train(**options(tmp_path / "other", data=other, **more))


def test_evaluation_and_report_show_both_prompts(tmp_path, teacher):
    evaluation = evaluate.EvalConfig(num_examples=3)
    more = {"steps": 1, "fraction": 1.0, "divergence": divergences.forward_kl, "teacher": teacher}
    folder = tmp_path / "run"
    train.train(**options(folder, data=data_config(), evaluation=evaluation, **more))
    path = folder / "eval" / "arithmetic" / "1.jsonl"
    for line in map(json.loads, path.read_text().splitlines()):
        assert line["teacher_inputs"] == f"{line['inputs']} {line['targets']}"
    report.write([str(folder)], str(tmp_path / "report"))
    (page,) = (tmp_path / "report" / "runs").glob("*.html")
    assert "<th>the teacher's prompt</th>" in page.read_text()
    assert line["teacher_inputs"] in page.read_text()

    # The numbers are the teacher's with its own prompt against the student's with its own.
    vocabulary = vocabularies.arithmetic()
    targets = np.asarray([vocabulary.pieces.index(piece) for piece in line["tokens"]], np.int32)
    found = []
    for model, prompt in ((teacher.checkpoint, line["teacher_inputs"]), (folder, line["inputs"])):
        ids = np.asarray([*vocabulary.encode(prompt), 1], np.int32)
        one = Batch(ids[None], targets[None], np.ones((1, len(targets))))
        scores = np.asarray(logits(*loading.load_model(str(model)), one)[0], np.float64)
        found.append(special.log_softmax(scores[:, : len(vocabulary.pieces)], axis=-1))
    log_p, log_q = found
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    np.testing.assert_allclose(line["token_divergence"], expected, atol=2e-4)
