"""Several teachers, each for the rows of one task of the batch."""

import dataclasses
import functools
import itertools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_models import random_params
from scipy import special
import seqio
from small_runs import LENGTHS, options, small, step_lines

from gkd_jax import accumulation, divergences, gkd, losses, rl, sharding
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate
from gkd_jax.gkd_config import TeacherShare
from gkd_jax.input import data, named_tasks, streams
from gkd_jax.input.data import DataConfig, Shard
from gkd_jax.models import lm
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.planning import hlo
from gkd_jax.storage import loading, pretrained, saved_model
from gkd_jax.tasks import features
from gkd_jax.text import vocabularies
from gkd_jax.training import metrics, program, train, train_state
from gkd_jax.training import teachers as random_teachers
from gkd_jax.training.recipe import TaskTeachers, TrainConfig


pytestmark = pytest.mark.usefixtures("shared_steps")
VOCAB = 40
KEY = jax.random.key(0)
SGD = optax.sgd(1.0)
T5 = small("tiny", VOCAB)
DECODER = DecoderConfig(
    vocab_size=48, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, num_layers=2
)
SIZES = {"one": 2, "two": 1}  # rows in a block
TEACHERS = {"one": T5, "two": DECODER}  # two families, and embeddings of two sizes
PAIRS = {
    task: gkd.ModelPair(student=T5, teacher=config, num_pieces=VOCAB)
    for task, config in TEACHERS.items()
}
STUDENT_ALONE = gkd.ModelPair(student=T5, teacher=None, num_pieces=VOCAB)
SEVERAL = tuple(
    TeacherShare(task=task, models=PAIRS[task], num_rows=rows) for task, rows in SIZES.items()
)


@functools.cache
def parameters():
    """(the student's, the teachers' by task)"""
    teachers = {"one": random_params(T5, 1), "two": lm.init(DECODER, KEY)}
    return random_params(T5, 0), teachers


def batch_of(num_prompts, num_samples=1):
    rng = np.random.default_rng(0)
    rows = num_prompts * num_samples
    weights = (np.arange(6) < rng.integers(1, 7, (rows, 1))).astype(np.float32)
    return Batch(
        rng.integers(2, VOCAB, (num_prompts, 5)).astype(np.int32),
        rng.integers(2, VOCAB, (rows, 6)).astype(np.int32),
        weights,
        input_lengths=rng.integers(1, 6, num_prompts).astype(np.int32),
    )


@functools.partial(jax.jit, static_argnums=0)
def gradient(learner, params, teachers, batch, advantages=None):
    """The gradient that `gkd.update` descends, and its numbers."""
    state = train_state.create(params, SGD)
    new, numbers = gkd.update(learner, state, teachers, batch, KEY, advantages)
    return jax.tree.map(lambda old, new: old - new, params, new.params), numbers


def learner_of(models, several=(), num_microbatches=1, **method):
    return gkd.Learner(
        config=gkd.GKDConfig(**method),
        models=models,
        optimizer=SGD,
        num_microbatches=num_microbatches,
        teacher_shares=several,
    )


def rewarded(prompts, outputs, references):
    return np.zeros(len(outputs))


@pytest.mark.parametrize(
    ("num_microbatches", "reduction", "alpha"),
    [
        pytest.param(1, losses.sequence_mean, None, id="plain"),
        pytest.param(2, losses.token_mean, None, id="token_mean", marks=pytest.mark.slow),
        pytest.param(2, losses.token_mean, 0.25, id="rl"),
    ],
)
def test_the_gradient_is_the_sum_of_those_of_the_sub_batches(num_microbatches, reduction, alpha):
    """Each sub-batch alone, with its one teacher, weighted by its part of the batch's count."""
    num_samples = 2
    batch = batch_of(12, num_samples)
    method = {"num_samples": num_samples, "reduction": reduction}
    if alpha is not None:
        method["rl"] = rl.RLConfig(reward=rewarded, alpha=alpha)
    rng = np.random.default_rng(1)
    advantages = None if alpha is None else rng.normal(size=24).astype(np.float32)
    student, teachers = parameters()
    whole = learner_of(STUDENT_ALONE, SEVERAL, num_microbatches, **method)
    found, numbers = gradient(whole, student, teachers, batch, advantages)

    prompts = {"one": [0, 1, 3, 4, 6, 7, 9, 10], "two": [2, 5, 8, 11]}  # written out by hand
    expected = jax.tree.map(np.zeros_like, found)
    for task, own in prompts.items():
        rows = [num_samples * prompt + sample for prompt in own for sample in range(num_samples)]
        part = Batch(
            batch.inputs[own],
            batch.targets[rows],
            batch.weights[rows],
            input_lengths=batch.input_lengths[own],
        )
        share = len(rows) / 24
        if reduction is losses.token_mean:
            share = part.weights.sum() / batch.weights.sum()
        theirs = None if advantages is None else advantages[rows]
        if alpha is not None:  # the policy's part is a mean over sequences, and not over tokens
            theirs = theirs * np.float32(len(rows) / 24 / share)
        one = learner_of(PAIRS[task], **method)
        of_part, alone = gradient(one, student, teachers[task], part, theirs)
        np.testing.assert_allclose(numbers[f"divergence/{task}"], alone["divergence"], rtol=1e-5)
        expected = jax.tree.map(lambda x, y, share=share: x + y * share, expected, of_part)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-6), found, expected)
    assert max(abs(x).max() for x in jax.tree.leaves(found)) > 1e-2


def test_the_rows_of_each_teacher_have_a_dropout_of_their_own():
    """Two teachers with the same weights and the same row: only dropout can tell them apart."""
    student, teachers = parameters()
    batch = jax.tree.map(lambda x: np.repeat(x[:1], 2, axis=0), batch_of(2))
    pair = gkd.ModelPair(
        student=dataclasses.replace(T5, dropout_rate=0.5), teacher=T5, num_pieces=VOCAB
    )
    both = tuple(TeacherShare(task=task, models=pair, num_rows=1) for task in SIZES)
    learner = learner_of(dataclasses.replace(pair, teacher=None), both)
    _, numbers = gradient(learner, student, dict.fromkeys(SIZES, teachers["one"]), batch)
    assert not np.isclose(numbers["divergence/one"], numbers["divergence/two"], rtol=1e-3)


def test_one_task_s_teacher_alone_gives_the_bits_of_one_teacher():
    student, teachers = parameters()
    batch = batch_of(4)
    alone = (TeacherShare(task="one", models=PAIRS["one"], num_rows=1),)
    found, numbers = gradient(learner_of(STUDENT_ALONE, alone), student, teachers, batch)
    expected, others = gradient(learner_of(PAIRS["one"]), student, teachers["one"], batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert numbers.pop("divergence/one") == others["divergence"]
    assert numbers == others


def test_blocks_are_split_by_task():
    rows = jnp.arange(12)
    targets = jnp.repeat(rows, 2)[:, None]
    first, second, third = accumulation.split_blocks((rows, targets), (3, 1, 2), 12)
    for (prompts, drawn), expected in zip(
        (first, second, third), ([0, 1, 2, 6, 7, 8], [3, 9], [4, 5, 10, 11]), strict=True
    ):
        np.testing.assert_array_equal(prompts, expected)
        np.testing.assert_array_equal(drawn[:, 0], np.repeat(expected, 2))


# The data -----------------------------------------------------------------------------------------


TASKS = {"arithmetic": 16, "arithmetic_backwards": 8}


def data_config(**more):
    fields = {"task": TASKS, "feature_lengths": LENGTHS, "batch_size": 24, "num_examples": 50}
    return DataConfig(**{**fields, **more})


def stream_of(config, shard=data.WHOLE):
    tasks, vocabulary = named_tasks.open_tasks(config)
    return streams.TrainIterator(tasks, config, shard), vocabulary


def test_every_batch_has_the_rows_of_each_task_in_its_own_order(tmp_path):
    """Each task's rows are those of a stream of that task alone; a restored stream goes on."""
    stream, _ = stream_of(data_config())
    alone = [stream_of(data_config(task=task, batch_size=rows))[0] for task, rows in TASKS.items()]
    places = np.arange(24).reshape(8, 3)
    places = [places[:, :2].ravel(), places[:, 2]]  # blocks of two rows and one
    for step in range(3):
        batch = next(stream)
        if step == 1:
            stream.save(tmp_path)
        for own, part in zip(places, map(next, alone), strict=True):
            for name, values in part._asdict().items():
                if values is not None:
                    np.testing.assert_array_equal(getattr(batch, name)[own], values)
    again, _ = stream_of(data_config())
    again.restore(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, next(again), batch)


def test_each_process_reads_whole_blocks_of_its_part():
    vocabulary = vocabularies.arithmetic()
    for index in range(2):
        stream, _ = stream_of(data_config(shard_by_process=True), Shard(index, 2))
        batch = next(stream)
        asks = ["How many" in vocabulary.decode(row.tolist()) for row in batch.inputs]
        assert asks == [True, True, False] * 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"arithmetic": 16}}, r"add up to 16, and batch_size is 24"),
        ({"task": {"arithmetic": 24, "xsum": 0}}, "with positive integers"),
        ({"task": {}}, "task must be the name of a seqio task"),
        ({"length_buckets": (24,)}, r"length_buckets must be \(\)"),
        ({"teacher_cache": "scores"}, "teacher_cache must be None, got 'scores'"),
    ],
)
def test_what_several_tasks_cannot_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        data_config(**changes)


def test_tasks_share_one_vocabulary_and_have_names_of_their_own(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.jsonl").write_text('{"inputs": "a", "targets": "b"}\n')
    first, second = (str(tmp_path / folder / "x.jsonl") for folder in "ab")
    source = seqio.FunctionDataSource(lambda split, shuffle_files: None, splits=["train"])
    features.register(
        "of_bytes",
        source=source,
        preprocessors=[],
        metric_fns=[],
        vocabulary=vocabularies.load("bytes"),
    )
    with pytest.raises(ValueError, match="'of_bytes' has another vocabulary than 'arithmetic'"):
        named_tasks.open_tasks(data_config(task={"arithmetic": 16, "of_bytes": 8}))
    with pytest.raises(ValueError, match="need different names"):
        named_tasks.open_tasks(data_config(task={first: 16, second: 8}, vocabulary="bytes"))
    config = data_config(task={"arithmetic": 16, first: 8}, vocabulary="bytes")
    stream, vocabulary = stream_of(config)
    assert vocabulary.decode(next(stream).inputs[2, :1].tolist()) == "a"
    with pytest.raises(ValueError, match="only training reads several tasks"):
        named_tasks.open_task(config)


def files_of_rows(folder):
    """The rows of two teachers in turns in one file, and in two: (tasks of the one, of the two)."""
    rows = {
        "numbers": [{"inputs": f"{n} + {n}", "targets": f"{2 * n}"} for n in range(40)],
        "words": [{"inputs": f"{n} eggs", "targets": "How many eggs ?"} for n in range(40)],
    }
    named = [
        {**row, "teacher": name}
        for pair in zip(*rows.values(), strict=True)
        for name, row in zip(rows, pair, strict=True)
    ]
    for name, lines in {**rows, "named": named}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    counts = {"numbers": 16, "words": 8}
    return (
        {f"{folder}/named.jsonl:{name}": count for name, count in counts.items()},
        {f"{folder}/{name}.jsonl": count for name, count in counts.items()},
    )


def test_rows_that_name_their_teacher_make_the_batches_of_two_files(tmp_path):
    configs = [data_config(task=task, vocabulary="arithmetic") for task in files_of_rows(tmp_path)]
    named, alone = (stream_of(config)[0] for config in configs)
    expected = []
    for step in range(5):
        expected.append(next(alone))
        jax.tree.map(np.testing.assert_array_equal, next(named), expected[-1])
        if step == 2:
            named.save(tmp_path)
    again = stream_of(configs[0])[0]
    again.restore(tmp_path)
    for batch in expected[3:]:
        jax.tree.map(np.testing.assert_array_equal, next(again), batch)


# Whole runs ---------------------------------------------------------------------------------------


def larger(size, vocab_size):
    return dataclasses.replace(small(size, vocab_size), d_model=24, num_decoder_layers=2)


def decoder(size, vocab_size):
    del size
    return dataclasses.replace(DECODER, vocab_size=vocab_size + 64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    model = pretrained.ModelConfig(architecture=larger, size="tiny")
    train.train(**options(folder, steps=1, student=model))
    return str(folder)


def teachers_of(checkpoint, **more):
    return TaskTeachers(
        models={
            "arithmetic": pretrained.ModelConfig(architecture=decoder, size="tiny", **more),
            "arithmetic_backwards": pretrained.ModelConfig(checkpoint=checkpoint, **more),
        }
    )


def run(folder, steps, teacher, **more):
    fields = {"data": data_config(), "divergence": divergences.forward_kl, "fraction": 0.5, **more}
    train.train(**options(folder, steps=steps, teacher=teacher, **fields))
    return step_lines(folder)


NUMBERS = ("loss", "grad_norm", "divergence/arithmetic", "divergence/arithmetic_backwards")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, checkpoint):
    """A run on eight devices: its folder, and its numbers of each step."""
    folder = tmp_path_factory.mktemp("whole")
    evaluation = evaluate.EvalConfig(num_examples=3)
    return folder, run(folder, 5, teachers_of(checkpoint), evaluation=evaluation)


def test_a_run_goes_on_bit_by_bit_and_other_teachers_are_refused_by_name(
    tmp_path, checkpoint, whole, capsys
):
    teacher = teachers_of(checkpoint)
    run(tmp_path / "parts", 3, teacher)
    parts = run(tmp_path / "parts", 5, teacher)
    said = capsys.readouterr().err
    assert re.search(r"teacher    [\d,]+ parameters for arithmetic; [\d,]+ parameters for", said)
    assert {line["train/on_policy"] for line in whole[1]} == {0.0, 1.0}
    for one, other in zip(whole[1], parts, strict=True):
        for name in NUMBERS:
            assert one[f"train/{name}"] == other[f"train/{name}"]
    target = program.build(options("", steps=1)["recipe"], 149).state.params
    read = [
        saved_model.read_params(saved_model.find_step(str(folder)), target)
        for folder in (whole[0], tmp_path / "parts")
    ]
    jax.tree.map(np.testing.assert_array_equal, *read)

    other = teachers_of(checkpoint, param_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"teacher\.models\.arithmetic\.param_dtype 'float32' ->"):
        run(tmp_path / "parts", 6, other)
    swapped = data_config(task={"arithmetic": 8, "arithmetic_backwards": 16})
    with pytest.raises(ValueError, match=r"data\.task\.arithmetic 16 -> 8; data\.task\."):
        run(tmp_path / "parts", 6, teacher, data=swapped)
    moved = tmp_path / "moved"
    shutil.copytree(checkpoint, moved)
    run(tmp_path / "parts", 5, teachers_of(str(moved)))  # the same weights
    with pytest.raises(ValueError, match=r"teacher\.models\.\w+_backwards\.checkpoint 'con"):
        run(tmp_path / "parts", 6, teachers_of(str(whole[0])))


def run_on_files(folder, name, steps, tasks):
    """The numbers of each step of the run `name`, whose teachers are random."""
    models = [
        pretrained.ModelConfig(architecture=architecture, size="tiny")
        for architecture in (decoder, larger)
    ]
    teacher = TaskTeachers(models=dict(zip(tasks, models, strict=True)))
    data = data_config(task=tasks, vocabulary="arithmetic")
    lines = run(folder / name, steps, teacher, data=data, fraction=0.0)
    parts = ("loss", "grad_norm", *(f"divergence/{task.split('/')[-1]}" for task in tasks))
    return [[line[f"train/{part}"] for part in parts] for line in lines]


def test_rows_that_name_their_teacher_train_as_two_files_do(tmp_path):
    """The same numbers, also behind a resume; a row of another teacher ends the run at once."""
    named, alone = files_of_rows(tmp_path)
    run_on = functools.partial(run_on_files, tmp_path)
    expected = run_on("alone", 4, alone)
    assert run_on("named", 2, named) == expected[:2]
    assert run_on("named", 4, named) == expected
    contents = json.loads((tmp_path / "named" / "run.json").read_text())["contents"]
    assert {f"data.task.{task}" for task in named} <= set(contents)

    def add_row(teacher):
        with (tmp_path / "named.jsonl").open("a") as file:
            file.write(json.dumps({"inputs": "1", "targets": "2", "teacher": teacher}) + "\n")

    add_row("numbers")
    with pytest.raises(ValueError, match=r"named\.jsonl:numbers 'content \w+' -> 'data\.task\./"):
        run_on("named", 5, named)
    add_row("someone")
    with pytest.raises(ValueError, match=r'line 82: .* "numbers" or "words", got "someone"'):
        run_on("new", 1, named)
    assert not (tmp_path / "new" / "run.json").exists()


def test_files_of_several_tasks_may_move_and_not_change_places(tmp_path):
    """As the file of a single task may."""
    named, alone = files_of_rows(tmp_path)
    whole = run_on_files(tmp_path, "whole", 3, alone)
    for name, tasks in (("named", named), ("alone", alone)):
        run_on_files(tmp_path, name, 2, tasks)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in tmp_path.glob("*.jsonl"):
        path.rename(moved / path.name)
    for name, tasks in (("named", named), ("alone", alone)):
        now = {task.replace(str(tmp_path), str(moved)): rows for task, rows in tasks.items()}
        assert run_on_files(tmp_path, name, 3, now) == whole
        changes = json.loads((tmp_path / name / "run.json").read_text())["changes"]
        assert [change["field"] for change in changes] == ["train.train_steps"]
    numbers, words = now
    for other, said in (
        (
            dict(reversed(now.items())),
            r"words\.jsonl 16 -> 8; data\.task\.\S+numbers\.jsonl 8 -> 16",
        ),
        (
            {numbers: 8, words: 16},
            r"numbers\.jsonl 16 -> 8; data\.task\.\S+words\.jsonl 8 -> 16\. T",
        ),
    ):
        with pytest.raises(ValueError, match=rf"run: data\.task\.\S+{said}"):
            run_on_files(tmp_path, "alone", 4, other)
    (moved / "words.jsonl").write_text((moved / "numbers.jsonl").read_text())
    with pytest.raises(
        ValueError, match=r"run: data\.task\.\S+words\.jsonl 'content \w+' -> 'data"
    ):
        run_on_files(tmp_path, "alone", 4, now)


def test_one_device_with_teachers_on_the_host_equals_eight(
    tmp_path, monkeypatch, checkpoint, whole
):
    one = jax.devices()[:1]
    monkeypatch.setattr(
        sharding, "make_mesh", lambda config, _, make=sharding.make_mesh: make(config, one)
    )
    teacher = teachers_of(checkpoint, memory="host")
    single = run(tmp_path, 3, teacher, mesh=sharding.MeshConfig())
    for a, b in zip(whole[1][:3], single, strict=True):
        for name in NUMBERS:
            assert a[f"train/{name}"] == pytest.approx(b[f"train/{name}"], rel=1e-3)


@pytest.mark.slow
def test_teachers_on_meshes_of_their_own_give_the_same_numbers(tmp_path, checkpoint, whole):
    teacher = teachers_of(checkpoint)
    sizes = [
        sharding.MeshConfig(data=4, tensor=2),
        sharding.MeshConfig(data=2, fsdp=4),
    ]
    models = {
        task: dataclasses.replace(model, mesh=own)
        for (task, model), own in zip(teacher.models.items(), sizes, strict=True)
    }
    evaluation = evaluate.EvalConfig(num_examples=3)
    found = run(tmp_path, 3, TaskTeachers(models=models), evaluation=evaluation)
    for a, b in zip(whole[1][:3], found, strict=True):
        for name in NUMBERS:
            assert a[f"train/{name}"] == pytest.approx(b[f"train/{name}"], rel=1e-3)
    described = (tmp_path / "model_info.txt").read_text()
    assert "tensor" in described.split("teacher of arithmetic_backwards")[0].split("teacher of")[1]


logits = jax.jit(lm.logits, static_argnums=0)


def test_the_evaluation_s_divergence_is_that_from_the_teacher_of_the_task(checkpoint, whole):
    folder, _ = whole
    lines = (folder / "eval" / "arithmetic_backwards" / "5.jsonl").read_text()
    line = json.loads(lines.splitlines()[0])
    vocabulary = vocabularies.arithmetic()
    targets = np.asarray([vocabulary.pieces.index(piece) for piece in line["tokens"]], np.int32)
    prompt = np.asarray([*vocabulary.encode(line["inputs"]), 1], np.int32)
    rows = Batch(prompt[None], targets[None], np.ones((1, len(targets))))
    log_p, log_q = (
        special.log_softmax(
            np.asarray(logits(*loading.load_model(str(path)), rows)[0], np.float64)[
                :, : len(vocabulary.pieces)
            ],
            axis=-1,
        )
        for path in (checkpoint, folder)
    )
    expected = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    np.testing.assert_allclose(line["token_divergence"], expected, atol=3e-4)
    values = metrics.read(folder / "metrics.jsonl")[-1]
    assert "eval/arithmetic/teacher_divergence" in values


def recipe_of(**more):
    fields = {"divergence": divergences.forward_kl, "data": data_config(), **more}
    model = pretrained.ModelConfig(architecture=small, size="tiny")
    fields.setdefault("teacher", TaskTeachers(models=dict.fromkeys(TASKS, model)))
    return options("", steps=1, **fields)["recipe"]


def test_models_without_a_checkpoint_all_have_weights_of_their_own():
    built = program.build(recipe_of(), 149)
    models = random_teachers.initial_params(built.recipe, built.learner, built.teacher)
    only = pretrained.ModelConfig(architecture=small, size="tiny")
    alone = program.build(recipe_of(teacher=only, data=data_config(task="arithmetic")), 149)
    models["alone"] = random_teachers.initial_params(alone.recipe, alone.learner, alone.teacher)
    recipe, config = built.recipe, built.models.student
    key = jax.random.key(recipe.train.seed)
    models["student"] = pretrained.initial_params(
        recipe.student, config, built.state.params, key, "student"
    )
    found = [np.asarray(model["token_embedder"]["embedding"]) for model in models.values()]
    for one, other in itertools.combinations(found, 2):
        assert (one != other).all()


def test_rows_stay_on_their_devices():
    """Over 8 devices the update sends nothing but the sums of gradients and numbers."""
    short = data_config(feature_lengths={"inputs": 8, "targets": 8})
    built = program.build(recipe_of(mesh=sharding.MeshConfig(), fraction=1.0, data=short), 149)
    function, arguments = program.step_functions(built)["update"]
    text = function.lower(*arguments).compile().as_text()
    found = {kind for kind in hlo.COLLECTIVES if re.search(rf" {kind}(-start)?\(", text)}
    assert found == {"all-reduce"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                "train": TrainConfig(train_steps=1, num_microbatches=2),
                "data": data_config(task=dict.fromkeys(TASKS, 24), batch_size=48),
            },
            "= 16 must divide the rows",
        ),
        (
            {"data": data_config(task={"arithmetic": 17, "arithmetic_backwards": 7})},
            r"data x fsdp \(8\) x num_microbatches \(1\) = 8 must divide the rows of every task",
        ),
        ({"data": data_config(task="arithmetic")}, "several teachers need several tasks"),
        (
            {"data": data_config(task={"arithmetic": 16, "arithmetic_hints": 8})},
            r"the teachers are those of \['arithmetic', 'arithmetic_backwards'\]",
        ),
        (
            {"method": gkd.GKDConfig(mixing="example", on_policy_fraction=0.5)},
            "mixing must be 'step'",
        ),
    ],
)
def test_what_several_teachers_cannot_have_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        program.build(recipe_of(**changes), 149)


def test_a_teacher_with_a_smaller_vocabulary_is_named_by_its_task():
    def few(size, vocab_size):
        return small(size, vocab_size - 128)

    models = {"arithmetic": small, "arithmetic_backwards": few}
    teacher = TaskTeachers(
        models={
            task: pretrained.ModelConfig(architecture=architecture, size="tiny")
            for task, architecture in models.items()
        }
    )
    with pytest.raises(ValueError, match="task 'arithmetic_backwards': the teacher's embedding"):
        program.build(recipe_of(teacher=teacher), 149)
