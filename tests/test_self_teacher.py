"""The teacher is the student itself: as it is at each step, or its moving average."""

import dataclasses
import functools
import json

import jax
import numpy as np
import optax
import pytest
from random_models import random_params
from small_runs import options, small, step_lines

from gkd_jax import divergences, gkd, main, sharding
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate
from gkd_jax.gkd_config import LiveStudent, MovingAverage
from gkd_jax.input.data import DataConfig
from gkd_jax.models import lm
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.planning import analysis, precompile
from gkd_jax.storage import checkpoints, pretrained
from gkd_jax.text import vocabularies
from gkd_jax.training import program, recipe, train, train_state


pytestmark = pytest.mark.usefixtures("shared_steps")
VOCAB = 40
FAMILIES = {
    "t5": small("tiny", VOCAB),
    "decoder": DecoderConfig(
        vocab_size=VOCAB, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=16, num_layers=2
    ),
}
KEY = jax.random.key(0)
SGD = optax.sgd(0.5)
LENGTHS = {"inputs": 48, "targets": 32, "teacher_inputs": 80}
HINTS = DataConfig(
    task="arithmetic",
    feature_lengths=LENGTHS,
    batch_size=8,
    num_examples=64,
    teacher_template="{inputs} {targets}",
)


@functools.cache
def student(family):
    config = FAMILIES[family]
    if family == "t5":
        return config, random_params(config, 0, norm_spread=0.0)
    return config, lm.init(config, KEY)


def batch_of(seed=0):
    rng = np.random.default_rng(seed)
    inputs, own = (rng.integers(2, VOCAB, (4, length)).astype(np.int32) for length in (5, 7))
    weights = (np.arange(6) < rng.integers(1, 7, (4, 1))).astype(np.float32)
    return Batch(
        inputs,
        rng.integers(2, VOCAB, (4, 6)).astype(np.int32),
        weights,
        input_lengths=np.asarray([5, 2, 3, 1], np.int32),
        teacher_inputs=own,
        teacher_input_lengths=np.asarray([1, 7, 2, 4], np.int32),
    )


def same_prompts(batch):
    return batch._replace(teacher_inputs=None, teacher_input_lengths=None)


def learner_of(config, self_teacher, divergence=divergences.forward_kl, num_microbatches=1):
    return gkd.Learner(
        config=gkd.GKDConfig(divergence=divergence),
        models=gkd.ModelPair(student=config, teacher=config, num_pieces=VOCAB),
        optimizer=SGD,
        self_teacher=self_teacher,
        num_microbatches=num_microbatches,
    )


@functools.partial(jax.jit, static_argnums=0)
def update(learner, state, frozen, batch):
    return gkd.update(learner, state, frozen, batch, KEY)


def assert_equal(found, expected, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), found, expected)


@pytest.mark.parametrize(
    ("family", "divergence"),
    [
        ("t5", divergences.forward_kl),
        ("t5", divergences.reverse_kl),
        ("t5", divergences.JSD(beta=0.1)),
        ("decoder", divergences.forward_kl),
    ],
    ids=["forward", "reverse", "jsd", "decoder"],
)
def test_a_live_teacher_that_reads_the_same_prompts_teaches_nothing(family, divergence):
    config, params = student(family)
    state = train_state.create(params, SGD)
    learner = learner_of(config, LiveStudent(), divergence)
    _, numbers = update(learner, state, None, same_prompts(batch_of()))
    assert abs(numbers["loss"]) < 1e-6
    assert numbers["grad_norm"] < 1e-5
    _, numbers = update(learner, state, None, batch_of())
    assert numbers["loss"] > 1e-3


@pytest.mark.parametrize("num_microbatches", [1, 2])
def test_a_live_teacher_is_a_frozen_one_with_the_weights_of_the_step(num_microbatches):
    config, params = student("t5")
    live = learner_of(config, LiveStudent(), num_microbatches=num_microbatches)
    frozen = learner_of(config, None, num_microbatches=num_microbatches)
    state = expected = train_state.create(params, SGD)
    for seed in range(3):
        batch = batch_of(seed)
        state, _ = update(live, state, None, batch)
        expected, _ = update(frozen, expected, expected.params, batch)
        assert_equal(state.params, expected.params, atol=1e-6)
    assert state.average is None


def test_a_moving_average_is_one_of_the_weights_after_each_update():
    config, params = student("t5")
    learner, frozen = learner_of(config, MovingAverage(decay=0.7)), learner_of(config, None)
    state = train_state.create(params, SGD, with_average=True)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for seed in range(3):
        batch = batch_of(seed)
        other = state._replace(average=None)
        taught, _ = update(frozen, other, state.average, batch)  # by the average before it
        state, _ = update(learner, state, None, batch)
        assert_equal(state.params, taught.params, atol=1e-6)
        expected = jax.tree.map(
            lambda old, new: 0.7 * old + 0.3 * np.asarray(new, np.float64), expected, state.params
        )
        assert_equal(state.average, expected, atol=1e-6)
    assert abs(jax.tree.leaves(state.average)[0] - jax.tree.leaves(state.params)[0]).max() > 1e-3


# Whole runs ---------------------------------------------------------------------------------------


def run(folder, steps, teacher, **more):
    fields = {"fraction": 0.5, "divergence": divergences.forward_kl, "data": HINTS, **more}
    made = options(folder, steps=steps, teacher=teacher, **fields)
    train.train(**made)
    return step_lines(folder)


def test_a_run_with_a_moving_average_goes_on_bit_by_bit(tmp_path):
    teacher = MovingAverage(decay=0.6)
    whole = run(tmp_path / "whole", 5, teacher)
    run(tmp_path / "parts", 3, teacher)
    parts = run(tmp_path / "parts", 5, teacher)
    for a, b in zip(whole, parts, strict=True):
        assert a["train/loss"] == b["train/loss"]
        assert a["train/grad_norm"] == b["train/grad_norm"]
    target = program.build(options("", steps=1)["recipe"], 149).state.params
    for item in ("params", "average"):
        found = [
            checkpoints.ocp.StandardCheckpointer().restore(
                checkpoints.epath.Path(tmp_path / name / "checkpoints" / "5" / item), target
            )
            for name in ("whole", "parts")
        ]
        jax.tree.map(np.testing.assert_array_equal, *found)
    # What another teacher left cannot be gone on with.
    with pytest.raises(ValueError, match=r"teacher\.decay 0\.6 -> 0\.9"):
        run(tmp_path / "parts", 6, MovingAverage(decay=0.9))
    run(tmp_path / "live", 1, LiveStudent())
    made = options(
        tmp_path / "live",
        steps=2,
        teacher=teacher,
        fraction=0.5,
        divergence=divergences.forward_kl,
        data=HINTS,
    )
    with pytest.raises(ValueError, match="checkpoint 1 has no moving average"):
        train.train(**made, allow_changes=["teacher"])


@pytest.mark.parametrize(
    "teacher",
    [
        pytest.param(LiveStudent(), id="live", marks=pytest.mark.slow),
        pytest.param(MovingAverage(decay=0.6), id="ema"),
    ],
)
def test_one_device_equals_eight_and_the_evaluation_says_who_the_teacher_is(
    tmp_path, monkeypatch, capsys, teacher
):
    evaluation = evaluate.EvalConfig(num_examples=3)
    eight = run(tmp_path / "eight", 3, teacher, evaluation=evaluation)
    said = capsys.readouterr().err
    who = "the student itself" if isinstance(teacher, LiveStudent) else "moving average, decay 0.6"
    assert f"{who}, reads prompts of its own" in said
    assert f"{who}, reading prompts of its own)" in said
    one = jax.devices()[:1]
    monkeypatch.setattr(
        sharding, "make_mesh", lambda config, _, make=sharding.make_mesh: make(config, one)
    )
    single = run(tmp_path / "one", 3, teacher, mesh=sharding.MeshConfig())
    for a, b in zip(eight, single, strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=2e-4)


def test_a_live_teacher_needs_no_memory_of_its_own():
    def update_of(teacher):
        made = options("", steps=1, teacher=teacher, divergence=divergences.forward_kl, data=HINTS)
        built = program.build(made["recipe"], 149)
        found = analysis.analyse(*program.step_functions(built)["update"])
        return built, found, precompile._resident_bytes(built, "sample")

    built, live, beside = update_of(LiveStudent())
    _, average, beside_average = update_of(MovingAverage())
    frozen_model = pretrained.ModelConfig(architecture=small, size="tiny")
    _, frozen, beside_frozen = update_of(frozen_model)
    params = built.state.params
    size = sum(map(sharding.bytes_per_device, jax.tree.leaves(params)))
    assert frozen["argument_bytes"] - live["argument_bytes"] == size
    assert average["argument_bytes"] - live["argument_bytes"] == size
    assert live["peak_bytes"] < frozen["peak_bytes"] - 0.9 * size
    assert beside_frozen - beside == beside_average - beside == size


def test_what_a_learning_teacher_cannot_have_is_refused(tmp_path):
    cached = dataclasses.replace(HINTS, teacher_cache=str(tmp_path))
    about = {"feature_lengths": LENGTHS, "temperature": 1.0, "num_rows": 1, "k": 3}
    vocabulary = vocabularies.arithmetic()
    about["vocabulary_content"] = vocabularies.content_hash(vocabulary)
    about["num_pieces"] = vocabularies.num_pieces(vocabulary)
    (tmp_path / "about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="holds the scores of a frozen teacher, got the teacher"):
        run(tmp_path / "run", 1, LiveStudent(), data=cached, fraction=0.0)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1.0"):
        MovingAverage(decay=1.0)
    with pytest.raises(ValueError, match="TEACHER must be 'frozen', 'student' or 'ema'"):
        recipe.choose_teacher("live", lambda: None)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gin.TEACHER=student"], "teacher    the student itself, reads prompts of its own"),
        (["--gin.TEACHER=ema", "--gin.EMA_DECAY=0.5"], "the student's moving average, decay 0.5"),
    ],
)
def test_the_command_line_names_the_teacher(tmp_path, capsys, flags, said):
    lengths = "{'inputs': 40, 'targets': 24, 'teacher_inputs': 64}"
    values = {
        "MODEL_DIR": tmp_path / "run",
        "MIXTURE_OR_TASK_NAME": "arithmetic",
        "STUDENT_SIZE": "tiny",
        "TASK_FEATURE_LENGTHS": lengths,
        "TEACHER_TEMPLATE": "'{inputs} {targets}'",
    }
    given = [f"--gin.{name}={value}" for name, value in values.items()]
    with_gin = ["train", "--gin_file=gin/gkd.gin", "--dry_run", *given, *flags]
    main.main(with_gin)
    printed = capsys.readouterr().err
    assert said in printed
    assert "WARNING: the teacher is the student itself" not in printed


def test_a_live_teacher_with_the_student_s_prompts_is_warned_of(capsys):
    def build(**more):
        made = options("", steps=1, teacher=LiveStudent(), **more)
        program.build(made["recipe"], 149)
        return "loss and gradient are 0" in capsys.readouterr().err

    assert build(divergence=divergences.forward_kl)
    assert not build(divergence=divergences.forward_kl, data=HINTS)
    assert not build(divergence=None)
