"""A run whose MODEL_DIR is in a bucket trains, resumes and is read as one on a disk is."""

import hashlib
import importlib.metadata
import json
import os
import shutil
import time

from etils import epath
import gcs_server
import jax
import numpy as np
import pytest
from random_models import random_params
import small_runs
from small_runs import LENGTHS, options, write_teacher

from gkd_jax import divergences, main
from gkd_jax.evaluation import evaluate, infer, made_by, score
from gkd_jax.input import named_tasks
from gkd_jax.input.data import DataConfig
from gkd_jax.models import t5
from gkd_jax.storage import conversion, loading, pretrained, saved_model, tokenizer_files
from gkd_jax.text import files, special_ids, vocabularies
from gkd_jax.training import metrics, run_lock, train
from gkd_jax.training.recipe import TrainConfig


# google-api-core says this when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore:Please install grpcio-status:ImportWarning")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder with the objects of gs://bucket."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with the command openssl, which is missing")
    with gcs_server.start(tmp_path / "server") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield tmp_path / "server"


@pytest.mark.usefixtures("shared_steps")
def test_a_run_in_a_bucket_goes_on_exactly_as_a_local_one(bucket, tmp_path):
    recipe = {
        "steps": 4,
        "fraction": 0.5,
        "divergence": divergences.forward_kl,
        "teacher": pretrained.ModelConfig(checkpoint=write_teacher(tmp_path / "teacher")),
        "train": TrainConfig(train_steps=4, save_period=2, log_period=100),
        "evaluation": evaluate.EvalConfig(num_examples=8),
    }
    local, remote = tmp_path / "run", "gs://bucket/run"
    train.train(**options(local, **recipe))
    train.train(**options(remote, **recipe))
    # A job that was killed while it wrote its last step: the step's mark is missing, and so are the
    # later lines. TensorFlow writes the lines, because it remembers sizes of files for seconds.
    gcs_server.path_of(bucket, "run/checkpoints/4/commit_success.txt").unlink()
    lines = gcs_server.path_of(bucket, "run/metrics.jsonl")
    first = lines.read_bytes().splitlines(keepends=True)[:3]
    epath.Path(f"{remote}/metrics.jsonl").write_bytes(b"".join(first))
    assert saved_model.saved_steps(remote) == [2]
    train.train(**options(remote, **recipe))

    assert saved_model.saved_steps(remote) == [2, 4]
    made = {name.removeprefix("run/").split("/")[0] for name in gcs_server.names(bucket)}
    assert made - {""} == {path.name for path in local.iterdir()}
    whole, parts = metrics.read(local / metrics.FILE), metrics.read(lines)
    assert [line["step"] for line in parts] == [0, 1, 2, 3, 4, 4]
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("time/")}.items() <= b.items()
    ours, theirs = loading.load_model(str(local)), loading.load_model(remote)
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    rows = gcs_server.path_of(bucket, "run/eval/arithmetic/4.jsonl").read_bytes()
    assert rows == (local / "eval" / "arithmetic" / "4.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.usefixtures("bucket")
def test_a_decoder_of_a_run_in_a_bucket_is_converted_with_the_tokenizer_there(tmp_path):
    student = str(tmp_path / "student")
    small_runs.write_decoder(tmp_path / "student", None, 448, 0)
    (tmp_path / "student" / "additional_chat_templates").mkdir()
    (tmp_path / "student" / "additional_chat_templates" / "x.jinja").write_text("more")
    config, params = loading.load_model(student)
    vocabulary = vocabularies.of_folder(student)
    content = vocabularies.content_hash(vocabulary)
    step = "gs://bucket/run/checkpoints/1"
    saved_model.write_params(step, config, params, content, vocabulary.vocab_size)
    tokenizer_files.copy(student, epath.Path("gs://bucket/run"))
    assert vocabularies.of_folder("gs://bucket/run/tokenizer") == vocabulary
    for number, source in enumerate(("gs://bucket/run", step)):
        output = tmp_path / f"out{number}"
        conversion.convert_checkpoint(source, str(output), to="hf")
        assert special_ids.stated(output) == special_ids.stated(student)
        for name in ("tokenizer.json", "additional_chat_templates/x.jinja"):
            assert (output / name).read_bytes() == (tmp_path / "student" / name).read_bytes()


@pytest.fixture
def no_network(monkeypatch):
    """Requests to a bucket fail."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("GCS_RETRY_CONFIG_MAX_RETRIES", "0")


def data_at(path, eval_fraction=None):
    lengths = {"inputs": 24, "targets": 8}
    return DataConfig(
        task=path,
        vocabulary="bytes",
        feature_lengths=lengths,
        batch_size=8,
        eval_fraction=eval_fraction,
    )


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("path", "eval_fraction"),
    [
        ("gs://bucket/folder", None),
        ("gs://bucket/data.jsonl", None),
        ("gs://bucket/data.jsonl", 0.1),
        ("gs://bucket/data.jsonl:mathematics", 0.1),
    ],
)
def test_a_dry_run_does_not_look_at_a_bucket(path, eval_fraction, tmp_path, capsys):
    data = data_at(path, eval_fraction)
    recipe = {"data": data, "evaluation": evaluate.EvalConfig(num_examples=8)}
    for folder in ("gs://bucket/run", tmp_path / "run"):
        train.train(**options(folder, steps=1, **recipe), dry_run=True)
        said = capsys.readouterr().err
        assert f"not checked: {path}" in said
        assert ("not checked: gs://bucket/run" in said) == (folder == "gs://bucket/run")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("command", "more"),
    [
        (infer.run, {"output": "out.jsonl"}),
        (infer.run, {"output": "out.jsonl", "text_file": "gs://bucket/prompts.txt"}),
        (infer.evaluate_checkpoint, {"output_dir": "out"}),
        (score.run, {"output": "scores"}),
    ],
    ids=["infer", "infer of a text file", "eval", "score"],
)
def test_no_dry_run_of_another_command_looks_at_a_bucket(command, more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {**more, "data": data_at("gs://bucket/data.jsonl"), "dry_run": True}
    more |= {} if command is score.run else {"evaluation": evaluate.EvalConfig()}
    command(model=pretrained.ModelConfig(size="tiny", checkpoint="gs://bucket/model"), **more)
    with pytest.raises(ValueError, match="'gs://bucket/model': it needs the model's size"):
        command(model=pretrained.ModelConfig(checkpoint="gs://bucket/model"), **more)


@pytest.mark.usefixtures("no_network", "fresh_gin")
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("infer", ["--gin.OUTPUT=out.jsonl"]),
        ("infer", ["--gin.OUTPUT=out.jsonl", "--gin.TEXT_FILE=gs://bucket/prompts.txt"]),
        ("eval", ["--gin.OUTPUT_DIR=out"]),
        ("score", ["--gin.OUTPUT=scores"]),
    ],
    ids=["infer", "infer of a text file", "eval", "score"],
)
def test_a_dry_run_that_looks_at_no_bucket_says_that_all_is_well(
    command, flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = [*flags, "--gin.CHECKPOINT=gs://bucket/model", "--gin.SIZE=tiny"]
    flags += ["--gin.MIXTURE_OR_TASK_NAME=gs://bucket/data.jsonl", "--gin.VOCABULARY=bytes"]
    main.main([command, f"--gin_file={command}", *flags, "--dry_run"])
    assert capsys.readouterr().err.splitlines()[-1] == "dry run: all is well"


def test_a_file_in_a_bucket_is_read_and_hashed_like_a_local_one(bucket, tmp_path):
    content = "".join(json.dumps({"inputs": str(i), "targets": "a"}) + "\n" for i in range(40))
    file = gcs_server.path_of(bucket, "data.jsonl")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    data = data_at("gs://bucket/data.jsonl", eval_fraction=0.25)
    task, _ = named_tasks.open_task(data)
    held_out, rest = (len(task.source.examples(split)) for split in ("validation", "train"))
    assert (held_out > 0, held_out + rest) == (True, 40)
    expected = hashlib.sha256(content.encode()).hexdigest()
    assert named_tasks.content_of("gs://bucket/data.jsonl:mathematics", "train") == expected
    # The record that `infer` writes beside a file, by which SeqKD is told from SFT.
    record = {"checkpoint": "gs://bucket/teacher", "num_lines": 40}
    made_by.write(tmp_path / "data.jsonl", record)
    assert made_by.read_made_by("gs://bucket/data.jsonl") is None
    written = made_by.path_of(tmp_path / "data.jsonl").read_bytes()
    gcs_server.path_of(bucket, "data.jsonl.made_by.json").write_bytes(written)
    assert made_by.read_made_by("gs://bucket/data.jsonl") == record


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("student", ["new", "checkpoint"])
def test_a_dry_run_does_not_look_at_a_vocabulary_in_a_bucket(student, tmp_path, capsys):
    run = tmp_path / "run"  # of an earlier start
    (run / "checkpoints" / "1" / "params").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    model = pretrained.ModelConfig(size="tiny")
    if student == "checkpoint":
        config = t5.t5_1_1("32x2", vocab_size=32128)
        params = random_params(config)
        saved_model.write_params(str(tmp_path / "student"), config, params, "hash", 32100)
        model = pretrained.ModelConfig(checkpoint=str(tmp_path / "student"))
    data = DataConfig(task="arithmetic", vocabulary="t5", feature_lengths=LENGTHS, batch_size=8)
    train.train(**options(run, steps=1, student=model, data=data), dry_run=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"not checked: {vocabularies.T5_PATH}"


@pytest.mark.usefixtures("no_network", "fresh_gin")
def test_a_dry_run_lists_what_it_did_not_check_before_it_says_that_all_is_well(tmp_path, capsys):
    needed = {"MODEL_DIR": tmp_path / "run", "MIXTURE_OR_TASK_NAME": "arithmetic"}
    needed |= {"VOCABULARY": "t5", "STUDENT_SIZE": "tiny", "TEACHER_SIZE": "tiny"}
    flags = [f"--gin.{name}={value}" for name, value in needed.items()]
    main.main(["train", "--gin_file=gkd", *flags, "--dry_run"])
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [f"not checked: {vocabularies.T5_PATH}", "dry run: all is well"]


def test_one_job_at_a_time_holds_a_run(bucket, monkeypatch):
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 0.5)
    folder = epath.Path("gs://bucket/run")
    lock = gcs_server.path_of(bucket, "run/lock.json")
    lock.write_text('{"pid": 1, "host": "another"}')
    os.utime(lock, (time.time() + 60, time.time() + 60))  # it is renewed all the time
    refusal = pytest.raises(ValueError, match="is being trained by process 1 on another")
    with refusal, run_lock.hold(folder):
        pass


def _without_packages(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_what_cannot_be_written_to_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="MODEL_DIR must be local or at gs://, got 's3://bucket"):
        files.check_can_be_folder("s3://bucket/run", "MODEL_DIR", may_be_in_bucket=True)
    monkeypatch.setattr(importlib.metadata, "version", _without_packages)
    with pytest.raises(ValueError, match="needs the package google-cloud-storage"):
        files.check_can_be_folder("gs://bucket/run", "MODEL_DIR", may_be_in_bucket=True)
