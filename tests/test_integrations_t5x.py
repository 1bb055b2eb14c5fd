"""GKD inside T5X, run by T5X's own trainer; skipped if T5X is not installed.

docs/checkpoints.md, "Staying on T5X", says how to install it.
"""

import dataclasses
import functools
import gc
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params
import seqio


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # T5X's dependencies deprecate each other
    pytest.importorskip(
        "t5x", reason="needs T5X: docs/checkpoints.md, Staying on T5X", exc_type=ImportError
    )
    from t5x import adafactor, checkpoints, partitioning, trainer, utils
    from t5x.examples.t5 import network

    from gkd_jax.integrations import t5x as gkd_t5x

from gkd_jax import convert, divergences, gkd, losses
from gkd_jax.batch import Batch
from gkd_jax.models import t5


pytestmark = pytest.mark.filterwarnings("ignore")

PIECES, ROWS, LENGTH = 20, 16, 6
# T5X on CPU shards over all devices, 8 in these tests: heads, mlp and vocabulary divide by 8.
SHARED = {"vocab_size": 32, "num_heads": 8, "head_dim": 4}
STUDENT = t5.T5Config(d_model=16, d_ff=32, num_encoder_layers=1, num_decoder_layers=1, **SHARED)
TEACHER = t5.T5Config(d_model=24, d_ff=48, num_encoder_layers=2, num_decoder_layers=1, **SHARED)


@pytest.fixture(autouse=True, scope="module")
def t5x_habits():
    with jax.numpy_rank_promotion("allow"):
        yield
    gc.collect()  # T5X leaves event loops open: let them warn here, where it is ignored


def transformer(config: t5.T5Config, dropout_rate: float = 0.0) -> network.Transformer:
    return network.Transformer(
        network.T5Config(
            vocab_size=config.vocab_size,
            emb_dim=config.d_model,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            mlp_dim=config.d_ff,
            num_encoder_layers=config.num_encoder_layers,
            num_decoder_layers=config.num_decoder_layers,
            mlp_activations=config.mlp_activations,
            dropout_rate=dropout_rate,
        )
    )


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Both models as gkd_jax has them, the files that T5X reads, and the student as T5X read it."""
    folder = tmp_path_factory.mktemp("t5x")
    ours = {"student": random_params(STUDENT, 1), "teacher": random_params(TEACHER, 2)}
    configs = {"student": STUDENT, "teacher": TEACHER}
    paths = {
        name: convert.write_t5x(str(folder / name), configs[name], params, step=7)
        for name, params in ours.items()
    }
    student = checkpoints.load_t5x_checkpoint(paths["student"])["target"]
    # In numpy: the trainer donates what it is given.
    return types.SimpleNamespace(ours=ours, paths=paths, student=jax.tree.map(np.asarray, student))


@pytest.fixture(scope="module")
def partitioner():
    return partitioning.PjitPartitioner(
        num_partitions=1, logical_axis_rules=partitioning.standard_logical_axis_rules()
    )


def gkd_model(
    stored, dropout_rate: float = 0.0, teacher: t5.T5Config = TEACHER, **options
) -> gkd_t5x.GKDModel:
    vocabulary = seqio.PassThroughVocabulary(PIECES, eos_id=1)
    optimizer = adafactor.Adafactor(
        decay_rate=0.8, logical_factor_rules=adafactor.standard_logical_factor_rules()
    )
    return gkd_t5x.GKDModel(
        transformer(STUDENT, dropout_rate),
        transformer(teacher, dropout_rate),
        stored.paths["teacher"],
        vocabulary,
        vocabulary,
        optimizer,
        **options,
    )


@pytest.fixture(scope="module")
def teacher(stored, partitioner):
    return gkd_model(stored).load_teacher(partitioner)[0]


def random_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, (ROWS, 1))
    kept = np.arange(LENGTH) < lengths
    targets = rng.integers(2, PIECES, (ROWS, LENGTH)) * kept
    inputs = rng.integers(2, PIECES, (ROWS, 8)) * (np.arange(8) < rng.integers(1, 9, (ROWS, 1)))
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (inputs, targets)), jnp.float32(kept))


def features(batch: Batch) -> dict[str, jax.Array]:
    """A batch as seqio's converter makes it for T5X."""
    return {
        "encoder_input_tokens": batch.inputs,
        "decoder_target_tokens": batch.targets,
        "decoder_input_tokens": jnp.pad(batch.targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_loss_weights": batch.weights.astype(jnp.int32),
    }


def gkd_trainer(model, stored, partitioner, **options) -> gkd_t5x.GKDTrainer:
    initializer = utils.TrainStateInitializer(
        optimizer_def=model.optimizer_def,
        init_fn=model.get_initial_variables,
        input_shapes={name: x.shape for name, x in features(random_batch()).items()},
        partitioner=partitioner,
    )
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    student = type(state.params)(stored.student)  # frozen, as T5X has it
    state = state.replace_params(
        jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), student, state.params)
    )
    options = {"learning_rate_fn": lambda step: 0.1, "num_microbatches": None, **options}
    return gkd_t5x.GKDTrainer(
        model=model,
        train_state=state,
        partitioner=partitioner,
        eval_names=["dataset"],
        summary_dir=None,
        train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(3),
        **options,
    )


@pytest.mark.parametrize("reduction", [losses.sequence_mean, losses.token_mean])
@pytest.mark.parametrize("divergence", [divergences.forward_kl, divergences.jsd])
def test_loss_is_that_of_gkd(stored, teacher, divergence, reduction):
    options = {"divergence": divergence, "reduction": reduction, "teacher_temperature": 0.5}
    model = gkd_model(stored, **options)
    batch = random_batch()
    loss, (computed, _) = jax.jit(model.loss_fn)(
        stored.student, features(batch), None, {"teacher": teacher}
    )

    values = gkd.per_token_loss(
        gkd.GKDConfig(**options),
        gkd.ModelPair(student=STUDENT, teacher=TEACHER, num_pieces=PIECES),
        stored.ours["student"],
        stored.ours["teacher"],
        batch,
        None,
    )
    total, count = reduction(values, batch.weights)
    assert total / count > 0.05
    np.testing.assert_allclose(loss, total / count, rtol=1e-4)
    np.testing.assert_allclose(computed["loss"].total, loss)


def test_eval_has_no_dropout_and_no_samples(stored, teacher):
    model = gkd_model(stored, dropout_rate=0.5)
    arguments = stored.student, features(random_batch())
    mutables = {"teacher": teacher}
    expected, _ = jax.jit(gkd_model(stored).loss_fn)(*arguments, None, mutables)
    np.testing.assert_allclose(jax.jit(model.eval_fn)(*arguments, mutables)[0], expected, rtol=1e-5)
    noisy, _ = jax.jit(model.loss_fn)(*arguments, jax.random.PRNGKey(0), mutables)
    assert abs(noisy - expected) > 1e-3 * expected


def test_no_gradient_reaches_the_teacher(stored, teacher):
    model = gkd_model(stored)

    def loss(student, teacher):
        return model.loss_fn(student, features(random_batch()), None, {"teacher": teacher})[0]

    of_student, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(stored.student, teacher)
    assert all(np.any(g) for g in jax.tree.leaves(of_student))
    assert not any(np.any(g) for g in jax.tree.leaves(of_teacher))


def test_t5x_trains_the_student_alone(stored, partitioner):
    model = gkd_model(stored, dropout_rate=0.1)
    batches = [features(random_batch(seed)) for seed in range(3)]
    with gkd_trainer(model, stored, partitioner) as run:
        before = jax.tree.map(np.asarray, run._teacher[0])
        student = jax.tree.map(np.asarray, run.train_state.params)
        run.compile_train(batches[0])
        summary = run.train(iter(batches), num_steps=3, start_step=7).result()
        run.compile_eval({"dataset": batches[0]})
        evaluated = run.eval({"dataset": iter(batches)})["dataset"]
        after = jax.tree.map(np.asarray, run._teacher[0])
        state = run.train_state
    assert state.step == 3
    assert not state.flax_mutables
    assert "flax_mutables" not in state.state_dict()  # which is what a checkpoint holds
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, student, state.params)))
    assert summary["on_policy"].value == 1.0
    assert summary["loss"].value > evaluated["loss"].value * 0.1 > 0


def test_training_approaches_the_teacher(stored, partitioner):
    model = gkd_model(stored)
    batch = features(random_batch())
    with gkd_trainer(model, stored, partitioner) as run:
        losses_seen = [
            run.eval({"dataset": iter([batch])})["dataset"]["loss"].value
            for _ in range(2)
            if run.train(iter([batch] * 20), num_steps=20, start_step=0).result()
        ]
        mutables = {"teacher": run._teacher[0]}
        first, _ = model.eval_fn(stored.student, batch, mutables)
    assert first > losses_seen[0] > losses_seen[1]


def constants(step, *arguments) -> int:
    """The numbers that are compiled into a jitted function as constants."""
    return sum(np.size(x) for x in step.trace(*arguments).jaxpr.consts)


def test_teacher_is_no_constant_of_the_program(stored, partitioner):
    model = gkd_model(stored)
    batch = features(random_batch())
    with gkd_trainer(model, stored, partitioner) as run:
        teacher = run._teacher[0]
        size = sum(x.size for x in jax.tree.leaves(teacher))
        jitted = run._partitioned_train_step.step._pjitted_fn
        with partitioner.mesh:
            assert constants(jitted, run.train_state, batch, teacher) < size / 10
            # The control: a step that closes over the teacher does hold it.
            closed = jax.jit(lambda state, batch: jitted(state, batch, teacher))
            assert constants(closed, run.train_state, batch) >= size


def test_teacher_is_sharded_as_t5x_shards_it(stored, partitioner):
    teacher, axes = gkd_model(stored).load_teacher(partitioner)
    embedding = teacher["token_embedder"]["embedding"]
    assert axes["token_embedder"]["embedding"] == partitioning.PartitionSpec("model", None)
    assert {s.data.shape for s in embedding.addressable_shards} == {(32 // 8, 24)}


def test_microbatches_have_the_gradient_of_the_batch(stored, partitioner, teacher):
    # Rows differ in length: a mean of microbatches' token means would be another number.
    model = gkd_model(stored, on_policy_fraction=0.0, reduction=losses.token_mean)
    with gkd_trainer(model, stored, partitioner) as run:
        state = run.train_state.replace_flax_mutables({"teacher": teacher})
    key = jax.random.PRNGKey(0)
    batch, _ = model.training_batch(state.params, features(random_batch()), key)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(num_microbatches, state):
        grads, computed, _ = trainer.accumulate_grads_microbatched(
            model, state, batch, key, num_microbatches
        )
        return grads, computed["loss"].total

    (whole, loss), (parts, loss_of_parts) = gradient(None, state), gradient(4, state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)
    np.testing.assert_allclose(loss, loss_of_parts, rtol=1e-5)


def test_samples_are_whole_sequences_of_pieces(stored):
    model = gkd_model(stored)
    dataset = features(random_batch())
    choose = jax.jit(model.training_batch)
    drawn, on_policy = choose(stored.student, dataset, jax.random.PRNGKey(0))
    tokens, weights = (np.asarray(drawn[f"decoder_{n}"]) for n in ("target_tokens", "loss_weights"))
    assert on_policy
    assert not np.array_equal(tokens, dataset["decoder_target_tokens"])
    assert tokens.max() < PIECES
    ended = np.cumsum(tokens == 1, axis=1) - (tokens == 1) > 0
    np.testing.assert_array_equal(tokens == 0, ended)
    np.testing.assert_array_equal(weights, ~ended)
    np.testing.assert_array_equal(drawn["decoder_input_tokens"][:, 1:], tokens[:, :-1])
    np.testing.assert_array_equal(drawn["decoder_input_tokens"][:, 0], 0)


def test_samples_follow_the_students_distribution(stored):
    """T5X's sampler is greedy by default; greedy, top-k or another temperature would fail here."""
    temperature, rows = 2.0, 4096
    one = features(random_batch())
    many = {name: jnp.repeat(x[:1], rows, axis=0)[:, :8] for name, x in one.items()}
    model = gkd_model(stored, sampling_temperature=temperature)
    drawn = jax.jit(model.sample_targets)(stored.student, many, jax.random.PRNGKey(0))
    found = np.bincount(drawn["decoder_target_tokens"][:, 0], minlength=PIECES) / rows

    logits = t5.logits(
        STUDENT,
        stored.ours["student"],
        Batch(one["encoder_input_tokens"][:1], jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))),
    )[0, 0, :PIECES]
    logits = logits.at[0].set(-jnp.inf)
    expected = jax.nn.softmax(logits / temperature)
    assert expected.max() < 0.5
    assert 0.5 * np.abs(found - expected).sum() < 0.04
    assert 0.5 * np.abs(found - jax.nn.softmax(logits)).sum() > 0.08


def test_one_coin_decides_for_the_batch(stored):
    model = gkd_model(stored, on_policy_fraction=0.25)
    dataset = features(random_batch())
    choose = jax.jit(model.training_batch)
    fell = []
    for seed in range(80):
        chosen, on_policy = choose(stored.student, dataset, jax.random.PRNGKey(seed))
        same = np.array_equal(chosen["decoder_target_tokens"], dataset["decoder_target_tokens"])
        assert same != bool(on_policy)
        fell.append(bool(on_policy))
    assert 8 <= sum(fell) <= 32  # 20 expected, standard deviation 3.9


def test_supervised_steps_keep_the_targets(stored):
    model = gkd_model(stored, on_policy_fraction=0.0)
    dataset = features(random_batch())
    chosen, on_policy = model.training_batch(stored.student, dataset, jax.random.PRNGKey(0))
    assert not on_policy
    for name, x in dataset.items():
        np.testing.assert_array_equal(chosen[name], x)


@pytest.mark.parametrize("sizes", [{"num_encoder_layers": 1}, {"d_model": 32}])
def test_teacher_of_another_size_is_refused(stored, partitioner, sizes):
    model = gkd_model(stored, teacher=dataclasses.replace(TEACHER, **sizes))
    with pytest.raises(ValueError, match="holds 24,920 parameters, teacher_module has"):
        model.load_teacher(partitioner)


def test_missing_teacher_is_named(stored, partitioner):
    model = gkd_model(stored)
    model.teacher_checkpoint += "0"
    with pytest.raises(FileNotFoundError, match="checkpoint_70"):
        model.load_teacher(partitioner)


def test_errors_say_what_to_bind(stored):
    batch = features(random_batch())
    with pytest.raises(ValueError, match="trainer_cls = @GKDTrainer"):
        gkd_model(stored).loss_fn(stored.student, batch, None)
    packed = {**batch, "decoder_segment_ids": batch["decoder_target_tokens"]}
    with pytest.raises(ValueError, match="pack = False"):
        gkd_model(stored).loss_fn(stored.student, packed, None, {"teacher": stored.student})
    with pytest.raises(ValueError, match="on_policy_fraction must lie in"):
        gkd_model(stored, on_policy_fraction=1.5)
    with pytest.raises(ValueError, match="teacher_temperature must be positive, got 0"):
        gkd_model(stored, teacher_temperature=0.0)
