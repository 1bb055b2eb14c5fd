"""A teacher's stored scores: their divergence, their files, and runs without a teacher."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import LENGTHS, options, small, step_lines

import gin
from gkd_jax import divergences, main
from gkd_jax.batch import Batch
from gkd_jax.evaluation import made_by, score
from gkd_jax.input import teacher_cache
from gkd_jax.input.data import DataConfig
from gkd_jax.storage import pretrained
from gkd_jax.training import train
from gkd_jax.training.recipe import TrainConfig


pytestmark = pytest.mark.usefixtures("shared_steps")
V = 23
DIVERGENCES = {
    "forward_kl": divergences.forward_kl,
    "reverse_kl": divergences.reverse_kl,
    "jsd": lambda q, p: divergences.jsd(q, p, beta=0.3),
    "total_variation": divergences.total_variation,
}


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, 3, (4, 5, V)), jnp.float32) for _ in range(2)]


def merged(log_probs, ids):
    """The probabilities of the ids and of all other ids together, in float64."""
    probs = np.exp(np.asarray(jax.nn.log_softmax(log_probs), np.float64))
    probs /= probs.sum(-1, keepdims=True)
    picked = np.take_along_axis(probs, np.asarray(ids), -1)
    others = probs.copy()
    np.put_along_axis(others, np.asarray(ids), 0, -1)
    return np.concatenate([picked, others.sum(-1, keepdims=True)], -1)


def test_outcomes_are_the_probabilities_of_the_ids_and_of_the_rest(logits):
    student, teacher = logits
    top = divergences.top_k(teacher, 6)
    assert np.all(np.diff(top.log_probs) <= 0)
    q, p = divergences.outcomes(student, top)
    np.testing.assert_allclose(np.exp(q), merged(student, top.ids), rtol=1e-5)
    np.testing.assert_allclose(np.exp(p), merged(teacher, top.ids), rtol=1e-5)
    # The forward KL of merged outcomes, by its formula.
    expected = merged(teacher, top.ids) * np.log(
        merged(teacher, top.ids) / merged(student, top.ids)
    )
    got = divergences.forward_kl(q, p)
    np.testing.assert_allclose(got, expected.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_more_ids_say_more_and_all_say_all(logits, name):
    student, teacher = logits
    divergence = DIVERGENCES[name]
    full, gradient = jax.value_and_grad(lambda q: divergence(q, teacher).sum())(student)
    before = jnp.zeros(student.shape[:2])
    for k in (1, 9, V):
        top = divergences.top_k(teacher, k)

        @jax.jit
        def of_top(q, top=top):
            return divergence(*divergences.outcomes(q, top))

        gradient_of_top = jax.jit(jax.grad(lambda q: of_top(q).sum()))
        found = of_top(student)
        assert np.all(found >= before - 1e-6)
        before, grads = found, gradient_of_top(student)
        assert np.all(np.isfinite(grads))
        if name != "total_variation":  # whose gradient has the sign of rounding errors
            # Nothing to learn from a teacher that is the student.
            assert np.all(np.abs(gradient_of_top(teacher)) < 2e-6)
    np.testing.assert_allclose(before.sum(), full, rtol=1e-5)
    np.testing.assert_allclose(grads, gradient, atol=2e-6)


def test_a_tail_of_next_to_nothing_keeps_its_digits():
    logits = jnp.asarray([[[40.0, 1.0, 0.0, -1.0]]])
    top = divergences.top_k(logits, 1)
    expected = np.log(np.exp(np.array([1.0, 0.0, -1.0]) - 40.0).sum())
    np.testing.assert_allclose(top.tails, [[expected]], rtol=1e-6)


# Files --------------------------------------------------------------------------------------------

ABOUT = {"batch_size": 2, "num_pieces": V, "k": 3, "task": "t", "split": "s", "feature_lengths": {}}


def rows(seed, num=2):
    rng = np.random.default_rng(seed)
    weights = (np.arange(5) < rng.integers(1, 6, (num, 1))).astype(np.float32)
    inputs = rng.integers(1, V, (num, 4)).astype(np.int32)
    inputs[0, 2:] = 0
    lengths = np.asarray([2, *[4] * (num - 1)], np.int32)
    targets = (rng.integers(0, V, (num, 5)) * weights).astype(np.int32)
    scores = divergences.top_k(jnp.asarray(rng.normal(size=(num, 5, V)), jnp.float32), 3)
    batch = Batch(inputs, targets, weights, input_lengths=lengths)
    return batch, jax.tree.map(np.asarray, scores)


def write(folder, batches, about=ABOUT):
    writer = teacher_cache.Writer(str(folder), about)
    for batch, scores, num in batches:
        writer.append(batch, scores, num)
    return writer


def test_what_was_written_is_found_in_any_order_and_padding(tmp_path):
    stored = [rows(0), rows(1), rows(2)]
    write(tmp_path, [(*stored[0], 2), (*stored[1], 2), (*stored[2], 1)]).finish()
    cache = teacher_cache.TeacherCache(str(tmp_path))
    picked = [(2, 0), (0, 1), (1, 0), (0, 0)]
    parts = [jax.tree.map(lambda x, i=i: x[i], stored[b]) for b, i in picked]
    batch = jax.tree.map(lambda *x: np.stack(x), *[part[0] for part in parts])
    # More padding than when they were scored.
    padded = (np.pad(x, ((0, 0), (0, 2))) for x in batch[:3])
    batch = Batch(*padded, input_lengths=batch.input_lengths)
    found = cache.attach(batch).teacher_scores
    for row, (_, scores) in enumerate(parts):
        length = int(batch.weights[row].sum())
        for got, expected in zip(found, scores, strict=True):
            np.testing.assert_array_equal(got[row, :length], expected[:length])
    mass = np.exp(found.log_probs).sum(-1) + np.exp(found.tails)
    np.testing.assert_allclose(mass, 1, rtol=1e-5)  # of padding too
    with pytest.raises(ValueError, match="lacks a row of the training data: inputs"):
        cache.attach(rows(2)[0])  # its second row was no example


def test_rows_are_told_apart_by_their_lengths_and_by_where_a_feature_ends(tmp_path):
    """A decoder-only model's prompt may hold the id 0, and padding may be any id."""
    batch, scores = rows(0)
    batch = batch._replace(inputs=np.asarray([[0, 5, 0, 9], [0, 5, 9, 9]], np.int32))
    batch = batch._replace(input_lengths=np.asarray([3, 2], np.int32))
    batch = batch._replace(targets=batch.targets * (np.arange(5) > 0))  # as targets may
    write(tmp_path, [(batch, scores, 2)]).finish()
    cache = teacher_cache.TeacherCache(str(tmp_path))
    padded = batch._replace(inputs=np.asarray([[0, 5, 0, 7, 7], [0, 5, 7, 7, 7]], np.int32))
    counts = batch.weights > 0
    for one in (batch, padded):
        found = cache.attach(one).teacher_scores
        np.testing.assert_array_equal(found.ids[counts], scores.ids[counts])
    with pytest.raises(ValueError, match="lacks a row of the training data: inputs"):
        cache.attach(batch._replace(input_lengths=np.asarray([3, 3], np.int32)))
    one, two = np.asarray([1, 2]), np.asarray([3])
    assert teacher_cache.row_key(one, two) != teacher_cache.row_key(one[:1], np.asarray([2, 3]))


def test_ids_of_a_large_vocabulary_are_kept(tmp_path):
    batch, scores = rows(0)
    scores = scores._replace(ids=scores.ids + 2**16)
    write(tmp_path, [(batch, scores, 2)], {**ABOUT, "num_pieces": 2**16 + V}).finish()
    found = teacher_cache.TeacherCache(str(tmp_path)).attach(batch).teacher_scores
    counts = batch.weights > 0
    np.testing.assert_array_equal(found.ids[counts], scores.ids[counts])


@pytest.mark.parametrize("broken", ["ids", "log_probs", "tails", "lengths"])
def test_no_key_is_written_before_the_rest_of_its_row(tmp_path, broken):
    writer = write(tmp_path, [(*rows(0), 2)])
    before = (tmp_path / "keys").read_bytes()
    (tmp_path / broken).unlink()
    (tmp_path / broken).mkdir()  # so that it cannot be written
    with pytest.raises(OSError, match=broken):
        writer.append(*rows(1), 2)
    assert (tmp_path / "keys").read_bytes() == before


def mass_of_tails(stored):
    weights = np.concatenate([batch.weights for batch, *_ in stored])
    tails = np.concatenate([scores.tails for _, scores, *_ in stored])
    return (np.exp(tails) * weights).sum() / weights.sum()


def test_a_writer_that_was_cut_off_goes_on_after_whole_batches(tmp_path):
    stored = [(*rows(seed), 2) for seed in range(4)]
    write(tmp_path / "whole", stored).finish()
    write(tmp_path / "cut", stored[:2])
    with pytest.raises(ValueError, match="not whole"):
        teacher_cache.TeacherCache(str(tmp_path / "cut"))
    for name in ("ids", "tails", "lengths", "keys"):  # of a batch of which one key was written
        with (tmp_path / "cut" / name).open("ab") as file:
            file.write(bytes(8))
    writer = teacher_cache.Writer(str(tmp_path / "cut"), ABOUT)
    assert writer.num_rows == 4
    for batch in stored[2:]:
        writer.append(*batch)
    writer.finish()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert writer.finish() == pytest.approx(mass_of_tails(stored))
    with pytest.raises(ValueError, match="something else: k 3 -> 4"):
        made_by.check_scores(str(tmp_path / "cut"), {**ABOUT, "k": 4})
    made_by.check_scores(str(tmp_path / "cut"), ABOUT)
    (tmp_path / "cut" / "ids").write_bytes(b"")  # of a machine that lost what was not on disk yet
    with pytest.raises(ValueError, match=r"damaged teacher cache: .*ids should have"):
        teacher_cache.Writer(str(tmp_path / "cut"), ABOUT)


def test_a_file_of_another_size_is_refused(tmp_path):
    write(tmp_path, [(*rows(0), 2)]).finish()
    (tmp_path / "tails").write_bytes(b"")
    with pytest.raises(ValueError, match=r"damaged teacher cache: .*tails should have"):
        teacher_cache.TeacherCache(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no teacher cache"):
        teacher_cache.read_about(str(tmp_path / "none"))
    for content, said in (("{", ", line 1: not JSON"), ("[]", ": expected a JSON object")):
        (tmp_path / "about.json").write_text(content)
        with pytest.raises(ValueError, match=rf"about\.json{said}"):
            teacher_cache.read_about(str(tmp_path))
        with pytest.raises(ValueError, match=rf"about\.json{said}"):
            made_by.check_scores(str(tmp_path), ABOUT)


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    train.train(**options(folder, steps=6))
    return folder


@pytest.fixture(scope="module")
def scores(teacher_dir, tmp_path_factory):
    """The teacher's distributions over all ids, for the first 40 problems."""
    folder = tmp_path_factory.mktemp("scores") / "all"
    gin.clear_config()
    flags = {
        "CHECKPOINT": f"'{teacher_dir}'",
        "MIXTURE_OR_TASK_NAME": "'arithmetic'",
        "TASK_FEATURE_LENGTHS": str(LENGTHS),
        "NUM_EXAMPLES": 40,
        "BATCH_SIZE": 16,
        "K": 1000,
        "OUTPUT": f"'{folder}'",
    }
    main.main(["score", "--gin_file=gin/score.gin", *(f"--gin.{n}={v}" for n, v in flags.items())])
    gin.clear_config()
    return folder


def test_a_cache_goes_on_with_the_same_contents_only(tmp_path, teacher_dir, scores):
    """A dry run says so before the teacher is loaded."""

    def run(checkpoint=teacher_dir, **changes):
        data = {"feature_lengths": LENGTHS, "batch_size": 16, "num_examples": 40, **changes}
        score.run(
            model=pretrained.ModelConfig(checkpoint=str(checkpoint)),
            data=DataConfig(task="arithmetic", **data),
            output=str(scores),
            k=1000,
            dry_run=True,
        )

    before = (scores / "about.json").read_bytes()
    run()
    run(vocabulary="arithmetic")  # the task's own by its name
    (tmp_path / "moved").symlink_to(teacher_dir)
    run(tmp_path / "moved")
    for checkpoint, changes, said in (
        (teacher_dir / "checkpoints" / "3", {}, "checkpoint .*3'; content "),
        (teacher_dir, {"data_dir": str(tmp_path)}, f"data_dir None -> '{tmp_path}'"),
        (teacher_dir, {"use_cached": True}, "use_cached False -> True"),
        (teacher_dir, {"seed": 1}, "seed 0 -> 1"),
    ):
        with pytest.raises(ValueError, match=rf"holds the scores of something else: {said}"):
            run(checkpoint, **changes)
    assert (scores / "about.json").read_bytes() == before


def trained(folder, teacher, cache, fraction=0.0):
    data = DataConfig(
        task="arithmetic",
        feature_lengths=LENGTHS,
        batch_size=16,
        num_examples=40,
        teacher_cache=None if cache is None else str(cache),
    )
    trainer = TrainConfig(train_steps=6, save_period=3, num_microbatches=2)
    more = {"fraction": fraction, "divergence": divergences.forward_kl, "teacher": teacher}
    train.train(**options(folder, steps=6, data=data, train=trainer, **more))
    return step_lines(folder)


def test_a_run_on_scores_of_all_ids_is_that_with_the_teacher(tmp_path, teacher_dir, scores):
    assert json.loads((scores / "about.json").read_text())["num_rows"] == 40
    teacher = pretrained.ModelConfig(architecture=small, checkpoint=str(teacher_dir))
    for fraction in (0.0, 0.5):
        live = trained(tmp_path / f"live{fraction}", teacher, None, fraction)
        without = teacher if fraction else None
        cached = trained(tmp_path / f"cached{fraction}", without, scores, fraction)
        for name in ("train/loss", "train/grad_norm"):
            got, expected = ([line[name] for line in run] for run in (cached, live))
            np.testing.assert_allclose(got, expected, rtol=1e-4)
        assert {line["train/on_policy"] for line in cached} == ({0.0, 1.0} if fraction else {0.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.5}, "a divergence needs a teacher"),
        ({"divergence": None}, "needs a divergence, and mixing='step'"),
    ],
)
def test_what_a_cache_cannot_serve_is_said(tmp_path, scores, changes, message):
    data = DataConfig(
        task="arithmetic", feature_lengths=LENGTHS, batch_size=8, teacher_cache=str(scores)
    )
    more = {"fraction": 0.0, "divergence": divergences.forward_kl, **changes}
    with pytest.raises(ValueError, match=message):
        train.train(**options(tmp_path, steps=1, data=data, **more))


@pytest.mark.parametrize(
    ("found", "message"),
    [("0" * 64, "with another vocabulary"), (None, "which vocabulary .*run `gkd-jax score` again")],
)
def test_a_cache_of_another_or_an_unknown_vocabulary_is_refused(tmp_path, scores, found, message):
    cache = shutil.copytree(scores, tmp_path / "scores")
    about = json.loads((cache / "about.json").read_text())
    about.pop("vocabulary_content")
    about |= {} if found is None else {"vocabulary_content": found}
    (cache / "about.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        trained(tmp_path / "run", None, cache)


def test_a_cache_of_another_teacher_is_refused_and_a_copy_of_its_teacher_taken(
    tmp_path, teacher_dir, scores
):
    """Teachers are compared by the content of their checkpoints, not by their paths."""
    other = tmp_path / "other"
    train.train(
        **options(
            other,
            steps=3,
            data=DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=8, seed=1),
        )
    )
    earlier = teacher_dir / "checkpoints" / "3"
    for index, (folder, fraction) in enumerate([(other, 0.5), (earlier, 0.5), (other, 0.0)]):
        teacher = pretrained.ModelConfig(architecture=small, checkpoint=str(folder))
        model_dir = tmp_path / f"refused{index}"
        with pytest.raises(ValueError, match=r"holds the scores of .* is another: ") as refused:
            trained(model_dir, teacher, scores, fraction)
        assert str(folder) in str(refused.value)
        assert not model_dir.exists()
    copy = shutil.copytree(teacher_dir, tmp_path / "copy")
    teacher = pretrained.ModelConfig(architecture=small, checkpoint=str(copy))
    assert len(trained(tmp_path / "taken", teacher, scores, 0.5)) == 6
