"""A run checks before it writes and saves before it evaluates; a refused resume changes nothing."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal

import pytest
import seqio
import small_runs
from small_runs import LENGTHS, options, small
import small_tokenizers

from gkd_jax import divergences, gkd
from gkd_jax.evaluation import evaluate
from gkd_jax.input import streams
from gkd_jax.input.data import DataConfig
from gkd_jax.storage import checkpoints, saved_model
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.training import (
    interrupts,
    metrics,
    optimizers,
    program,
    run_lock,
    run_record,
    source,
    train,
)
from gkd_jax.training.evaluations import Evaluations
from gkd_jax.training.recipe import TrainConfig


pytestmark = pytest.mark.usefixtures("shared_steps")
EVALUATION = evaluate.EvalConfig(num_examples=3)


def run(folder, steps=3, *, dry_run=False, **more):
    config = TrainConfig(train_steps=steps, save_period=2)
    chosen = options(folder, steps=steps, **{"train": config, **more})
    train.train(**chosen, dry_run=dry_run)


def contents(folder):
    """Every file of a folder with its bytes, except TensorBoard's."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }


def step_losses(folder):
    return metrics.values_by_step(folder / "metrics.jsonl", "train/loss")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.fixture
def run_dir(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_an_evaluation_that_fails_costs_no_weights(tmp_path, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("the metric is broken")

    calls = iter([lambda *_: {"accuracy": 1.0}, fails])
    monkeypatch.setattr(evaluate, "compute_metrics", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(RuntimeError, match="the metric is broken"):
        run(tmp_path / "run", evaluation=EVALUATION)
    assert saved_model.saved_steps(tmp_path / "run") == [2, 3]
    steps = [line["step"] for line in metrics.read(tmp_path / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]  # an evaluation at step 0, and every step's numbers
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # as if it had failed before the first one
    monkeypatch.undo()
    other = optimizers.Linear(learning_rate=0.5)
    run(tmp_path / "run", evaluation=EVALUATION, schedule=other)
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]  # none of the earlier start


@pytest.mark.parametrize("broken", [2, 4])
def test_an_evaluation_that_was_cut_off_is_made_up_for(broken, tmp_path, monkeypatch):
    """A step is saved before its evaluation: the next start must not take it for evaluated."""
    config = TrainConfig(train_steps=4, save_period=2, eval_period=2)
    more = {"evaluation": EVALUATION, "train": config}
    run(tmp_path / "whole", 4, **more)
    real = Evaluations.__call__

    def cut_off(self, params, teacher, step):
        if step == broken:
            raise RuntimeError("killed")
        return real(self, params, teacher, step)

    monkeypatch.setattr(Evaluations, "__call__", cut_off)
    for _ in range(2):  # a second start that ends there leaves the run unfinished, too
        with pytest.raises(RuntimeError, match="killed"):
            run(tmp_path / "run", 4, **more)
    monkeypatch.undo()
    run(tmp_path / "run", 4, **more)
    found, expected = (
        metrics.values_by_step(tmp_path / name / "metrics.jsonl", "eval/arithmetic/accuracy")
        for name in ("run", "whole")
    )
    assert found == expected
    assert list(found) == [0, 2, 4]
    before = contents(tmp_path / "run")
    run(tmp_path / "run", 4, **more)  # now it is finished
    assert contents(tmp_path / "run") == before


def test_config_gin_is_made_when_all_steps_are_compiled(tmp_path, monkeypatch):
    """Gin counts a value as used when a function takes it, and tracing calls the functions."""
    compiled = []

    def start_compiling(built):
        def steps():
            compiled.append(built)
            return program.compile_steps(built)

        return steps

    monkeypatch.setattr(train, "start_compiling", start_compiling)
    given = options(tmp_path / "run", steps=1)
    train.train(**given, config_text=lambda: f"{len(compiled)} compiled")
    assert (tmp_path / "run" / "config.gin").read_text() == "1 compiled"


@pytest.mark.parametrize("broken", ["training", "evaluation"])
def test_data_that_cannot_be_read_claim_no_model_dir(broken, tmp_path, monkeypatch):
    def unreadable(*arguments, **more):
        raise OSError("the disk is gone")

    if broken == "training":
        monkeypatch.setattr(streams.TrainIterator, "__next__", unreadable)
    else:
        monkeypatch.setattr("gkd_jax.input.padded_batches.in_order", unreadable)
    with pytest.raises((OSError, ValueError), match="the disk is gone"):
        run(tmp_path / "run", evaluation=EVALUATION)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    other = DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=16)
    run(tmp_path / "run", steps=1, data=other)  # the corrected command starts


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("content", "split", "said"),
    [
        (None, "train", "there is no file .*data.jsonl"),
        (b"caf\xe9\n", "train", r"data\.jsonl, line 1: expected UTF-8 text"),
        (b'{"inputs": 3}\n', "train", r"data\.jsonl, line 1: 'inputs' must be a string, got 3"),
        (b'{"inputs": "a", "targets": "b"}\n', "train[:5]", r"parts of splits.* got 'train\[:5\]'"),
    ],
)
def test_a_fault_in_a_file_of_the_evaluation_is_found_first(
    content, split, said, dry_run, tmp_path
):
    """Also by a dry run, and with the vocabulary of the run, which the file has none of its own."""
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    evaluation = evaluate.EvalConfig(task=str(file), split=split, num_examples=3)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run(tmp_path / "run", evaluation=evaluation, dry_run=dry_run)
    assert not (tmp_path / "run").exists()
    file.write_text('{"inputs": "Ada has 3 apples.", "targets": "3"}\n')
    good = evaluate.EvalConfig(task=str(file), split="train", num_examples=3)
    run(tmp_path / "run", evaluation=good, dry_run=True)


def test_a_dry_run_reads_the_file_that_it_would_train_on(tmp_path):
    file = str(tmp_path / "data.jsonl")
    data = DataConfig(task=file, vocabulary="arithmetic", feature_lengths=LENGTHS, batch_size=8)
    on_policy = gkd.GKDConfig(divergence=divergences.jsd)  # nothing is learnt from targets
    teacher = ModelConfig(architecture=small, size="tiny")
    more = {"method": on_policy, "teacher": teacher, "data": data, "dry_run": True}
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run(tmp_path / "run", **more)
    (tmp_path / "data.jsonl").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"data\.jsonl, line 1: expected UTF-8 text"):
        run(tmp_path / "run", **more)
    (tmp_path / "data.jsonl").write_text('{"prompt": "Ada has 3 apples."}\n')
    run(tmp_path / "run", **more)


def test_a_folder_that_is_no_checkpoint_is_said_before_the_data(tmp_path):
    """Without config.json the folder's tokenizer is not looked for, but T5's on the network."""
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    data = DataConfig(task=str(tmp_path / "data.jsonl"), feature_lengths=LENGTHS, batch_size=8)
    student = ModelConfig(checkpoint=str(folder))
    with pytest.raises(ValueError, match=r"It has model\.safetensors but no config\.json"):
        run(tmp_path / "run", student=student, data=data, dry_run=True)


def test_every_task_of_a_mixture_is_evaluated(tmp_path, capfd):
    task = seqio.TaskRegistry.get("arithmetic")
    for name in ("one_half", "other_half"):
        if name not in seqio.TaskRegistry.names():
            seqio.TaskRegistry.add_provider(name, task.replace(name=name))
    if "both_halves" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("both_halves", ["one_half", "other_half"], default_rate=1.0)
    mixed = DataConfig(task="both_halves", feature_lengths=LENGTHS, batch_size=8)
    config = TrainConfig(train_steps=1, eval_period=1, best_metric="one_half/accuracy")
    run(tmp_path, data=mixed, evaluation=EVALUATION, train=config)
    last = metrics.read(tmp_path / "metrics.jsonl")[-1]
    assert {"eval/one_half/accuracy", "eval/other_half/accuracy"} <= set(last)
    assert "best checkpoint: step 1, one_half/accuracy" in capfd.readouterr().out


def test_a_best_metric_that_no_task_can_have_is_refused(tmp_path):
    config = TrainConfig(train_steps=1, eval_period=1, best_metric="arithmetic/accuracy")
    with pytest.raises(ValueError, match=r"a metric alone where .* got 'arithmetic/accuracy'"):
        run(tmp_path / "run", evaluation=EVALUATION, train=config)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_without_a_number_is_not_repeated(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(evaluate, "compute_metrics", lambda *_: calls.append("") or {})
    config = TrainConfig(train_steps=1)
    for _ in range(2):
        run(tmp_path, evaluation=EVALUATION, train=config)
        assert len(calls) == 2  # before the first step, and at the end


def test_an_evaluation_task_of_another_vocabulary_is_refused(tmp_path):
    if "bytes_arithmetic" not in seqio.TaskRegistry.names():
        task = seqio.TaskRegistry.get("arithmetic")
        feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
        other = task.replace(
            name="bytes_arithmetic", output_features={"inputs": feature, "targets": feature}
        )
        seqio.TaskRegistry.add_provider("bytes_arithmetic", other)
    evaluation = evaluate.EvalConfig(task="bytes_arithmetic", num_examples=3)
    with pytest.raises(ValueError, match="'bytes_arithmetic' has another vocabulary"):
        run(tmp_path / "run", evaluation=evaluation)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer": optimizers.Adafactor(max_grad_norm=1.0)}, "optimizer.max_grad_norm None"),
        ({"schedule": optimizers.Linear(learning_rate=0.5)}, "schedule.learning_rate 0.02 -> 0.5"),
    ],
)
@pytest.mark.parametrize("steps", [3, 5])
def test_a_refused_resume_changes_nothing(change, said, steps, run_dir):
    """This includes a finished run (3 steps), whose files stay as they are."""
    before = contents(run_dir)
    with pytest.raises(ValueError, match="another configuration") as error:
        run(run_dir, steps=steps, **change)
    assert said in str(error.value)
    assert contents(run_dir) == before


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """run.json of a run that finds its tokenizer beside the student, and of one that names it."""
    folder = tmp_path_factory.mktemp("records")
    tokenizer = small_tokenizers.train("qwen")
    student = small_runs.write_decoder(folder / "model", tokenizer, 1000, seed=0)
    small_tokenizers.write(folder / "same", "qwen", tokenizer)
    file = folder / "data.jsonl"
    file.write_text(json.dumps({"inputs": "How many?", "targets": "Two."}) + "\n")
    fields = {"task": str(file), "feature_lengths": LENGTHS, "batch_size": 8}

    def record(vocabulary):
        data = DataConfig(**fields, vocabulary=vocabulary)
        recipe = options(folder / "run", steps=1, student=student, data=data)["recipe"]
        opened = source.open_source(recipe)
        built = program.build(recipe, opened.num_pieces, eos_ids=opened.eos_ids)
        return run_record.describe_run(built, opened, name="")

    return {name: record(name and str(folder / name)) for name in (None, "same")}


@pytest.mark.parametrize(("before", "now"), [(None, "same"), ("same", None)])
def test_a_tokenizer_may_be_named_that_was_found_by_itself(before, now, records, tmp_path):
    assert run_record.changes(tmp_path, records[before], records[now]) == []
    contents = {**records[now]["contents"], "data.vocabulary": "0" * 64}
    other = {**records[now], "contents": contents}
    with pytest.raises(ValueError, match=r"another configuration's run: data\.vocabulary 'content"):
        run_record.changes(tmp_path, records[before], other)


@pytest.mark.parametrize("place", ["data.jsonl", "folder/train.jsonl"])
def test_a_row_that_was_edited_is_other_data(place, tmp_path):
    """It need not be in the first batch, which is compared as well."""
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    rows = [{"inputs": f"Ada has {n} apples.", "targets": str(n)} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = str(file if place == "data.jsonl" else file.parent)
    data = DataConfig(task=task, feature_lengths=LENGTHS, batch_size=8, vocabulary="arithmetic")
    run(tmp_path / "run", steps=1, data=data)
    changed = "".join(json.dumps({**row, "targets": "7"}) + "\n" for row in rows)
    file.write_text(changed)
    arguments = options(tmp_path / "run", steps=1, data=data, train=TrainConfig(train_steps=2))
    with pytest.raises(ValueError, match=r"another configuration's run: data.task 'content"):
        train.train(**arguments, dry_run=True)


def test_a_remote_student_does_not_stand_in_the_way_of_a_model_dir_that_exists(tmp_path):
    student = ModelConfig(checkpoint="gs://bucket/model", size="tiny", architecture=small)
    recipe = options(tmp_path, steps=1, student=student)["recipe"]
    train._check_places(recipe, tmp_path, frozenset())


def test_a_finished_run_is_not_written_again(run_dir, capfd):
    before = contents(run_dir)
    run(run_dir)
    assert contents(run_dir) == before
    assert "has its 3 steps already" in capfd.readouterr().err


def test_a_change_on_purpose_is_recorded(run_dir, capfd):
    changed = optimizers.Linear(learning_rate=0.5)
    arguments = options(run_dir, steps=5, train=TrainConfig(train_steps=5), schedule=changed)
    train.train(**arguments, allow_changes=["Linear.learning_rate"])
    record = json.loads((run_dir / "run.json").read_text())
    found = {change["field"]: change for change in record["changes"]}
    assert found["schedule.learning_rate"] == {
        "step": 3,
        "field": "schedule.learning_rate",
        "old": 0.02,
        "new": 0.5,
    }
    rates = [line["train/learning_rate"] for line in metrics.read(run_dir / "metrics.jsonl")]
    assert rates == pytest.approx([0.02] * 3 + [0.5] * 2)
    assert "schedule.learning_rate is 0.5 from here on, not 0.02" in capfd.readouterr().err


def test_another_optimizer_is_refused_with_what_to_do_also_on_purpose(run_dir):
    arguments = options(run_dir, steps=5, optimizer=optimizers.AdamW())
    before = contents(run_dir)
    with pytest.raises(ValueError, match="begin in another MODEL_DIR with this one as STUDENT_CH"):
        train.train(**arguments, allow_changes=["optimizer"])
    assert contents(run_dir) == before


def test_data_that_were_changed_begin_at_their_beginning(run_dir, tmp_path, monkeypatch):
    """Also where the start that changed them ended before its first checkpoint."""
    whole = shutil.copytree(run_dir, tmp_path / "whole")
    first = options("", steps=5)["recipe"].data
    other = dataclasses.replace(first, task="arithmetic_backwards")
    config = TrainConfig(train_steps=5, save_period=2)

    def start(folder, **more):
        train.train(**options(folder, steps=5, train=config, data=other), **more)

    with pytest.raises(ValueError, match=r"data\.task 'arithmetic' -> 'arithmetic_backwards'"):
        start(run_dir)
    start(whole, allow_changes=["data.task"])
    with monkeypatch.context() as patched:
        patched.delattr(train, "Rollouts")
        with pytest.raises(NameError):
            start(run_dir, allow_changes=["data.task"])
    start(run_dir)
    assert step_losses(run_dir) == step_losses(whole)


READING = 'Error reading "decoder.layers_0.corrupt.kernel/.zarray" in OCDBT database'


@pytest.mark.parametrize(
    "error",
    [
        OSError(5, "Input/output error"),
        PermissionError(13, "Permission denied", "/runs/corrupt/checkpoints"),
        RuntimeError("UNAVAILABLE: try again"),
        ValueError(f"UNAVAILABLE: {READING}: truncated response"),
        ValueError(f"PERMISSION_DENIED: {READING}"),
        ValueError(f"FAILED_PRECONDITION: {READING}"),
        ValueError(
            'INTERNAL: Failed [tensorstore_spec=\'{"kvstore":"file:///decode/DATA_LOSS"}\']'
        ),
    ],
)
def test_a_file_system_that_hiccups_damages_nothing(error, run_dir, monkeypatch):
    """The names of arrays and folders in a message, such as a decoder's, are no evidence."""

    def hiccups(*arguments, **more):
        raise error

    before = contents(run_dir)
    monkeypatch.setattr(checkpoints.Checkpoints, "_restore", hiccups)
    with pytest.raises(type(error)):
        run(run_dir, steps=5)
    assert saved_model.saved_steps(run_dir) == [2, 3]
    assert contents(run_dir) == before
    monkeypatch.undo()
    run(run_dir, steps=4)


def test_a_start_that_waited_for_the_lock_goes_on_from_what_was_saved_meanwhile(
    tmp_path, monkeypatch, capfd
):
    hold = run_lock.hold

    @contextlib.contextmanager
    def hold_after(folder):
        monkeypatch.setattr(run_lock, "hold", hold)
        run(tmp_path, steps=2)  # the job that holds the lock ends
        with hold(folder):
            yield

    monkeypatch.setattr(run_lock, "hold", hold_after)
    run(tmp_path, steps=4)
    assert "resumed from step 2" in capfd.readouterr().err
    steps = [line["step"] for line in metrics.read(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    assert saved_model.saved_steps(tmp_path) == [2, 4]
    before = contents(tmp_path)
    monkeypatch.setattr(run_lock, "hold", hold_after)
    run(tmp_path, steps=4)
    assert contents(tmp_path) == before


def test_a_signal_at_a_step_that_evaluates_does_not_wait_for_the_evaluation(tmp_path, monkeypatch):
    """The grace period after SIGTERM is short. The next start makes up for the evaluation."""

    def is_due(self, done):
        self.signal = signal.SIGTERM if done == 2 else None
        return done == 2

    config = TrainConfig(train_steps=4, save_period=2, eval_period=2)
    more = {"evaluation": EVALUATION, "train": config}
    with monkeypatch.context() as patched:
        patched.setattr(interrupts.Interruption, "is_due", is_due)
        with pytest.raises(SystemExit) as stopped:
            run(tmp_path, **more)
    assert stopped.value.code == 143
    file, name = tmp_path / "metrics.jsonl", "eval/arithmetic/accuracy"
    assert list(metrics.values_by_step(file, name)) == [0]
    assert saved_model.saved_steps(tmp_path) == [2]
    run(tmp_path, **more)
    assert list(metrics.values_by_step(file, name)) == [0, 2, 4]


def test_a_signal_costs_no_batch_that_was_drawn_ahead(tmp_path, monkeypatch):
    """The run stops one step later, when no batch waits. All targets are the data set's."""

    def is_due(self, done):
        self.signal = signal.SIGTERM if done >= 2 else None
        return done >= 2

    config = TrainConfig(train_steps=6, save_period=6, sample_ahead=True)
    run(tmp_path / "whole", train=config)
    with monkeypatch.context() as patched:
        patched.setattr(interrupts.Interruption, "is_due", is_due)
        with pytest.raises(SystemExit):
            run(tmp_path / "stopped", train=config)
    assert saved_model.saved_steps(tmp_path / "stopped") == [3]
    run(tmp_path / "stopped", train=config)
    assert step_losses(tmp_path / "stopped") == step_losses(tmp_path / "whole")


def test_where_all_is_damaged_nothing_starts_from_scratch(run_dir):
    (run_dir / "checkpoints").rename(run_dir / "damaged")
    with pytest.raises(ValueError, match="has damaged checkpoints in damaged/ and no other"):
        run(run_dir, steps=5)


def test_a_folder_that_was_copied_goes_on_and_one_that_was_trained_on_does_not(finished, tmp_path):
    """The checkpoint that a student starts from is identified by content, not by path."""
    from gkd_jax.storage import pretrained

    start = shutil.copytree(finished, tmp_path / "start")
    student = pretrained.ModelConfig(checkpoint=str(start))
    run(tmp_path / "run", student=student)
    moved = shutil.move(start, tmp_path / "moved")
    elsewhere = pretrained.ModelConfig(checkpoint=str(moved))
    run(tmp_path / "run", steps=4, student=elsewhere)
    run(moved, steps=4)
    with pytest.raises(ValueError, match=r"student\.checkpoint 'content "):
        run(tmp_path / "run", steps=5, student=elsewhere)
