"""`infer` continues a file that the same command began, and refuses every other file."""

import dataclasses
import json
import shutil

import jax
import pytest
from random_models import random_params
import seqio
from small_runs import LENGTHS, small, write_decoder
import small_tokenizers

from gkd_jax.evaluation import decodings, infer, made_by, score
from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.input.data import DataConfig
from gkd_jax.storage import pretrained, saved_model


DATA = DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=8)
EVALUATION = EvalConfig(num_examples=20, target_length=4)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    config = small("tiny", vocab_size=256)
    for seed in (0, 1):
        params = random_params(config, seed)
        saved_model.write_params(str(folder / str(seed)), config, params, "")
    return folder


def run(models, output, *, model="0", data=DATA, evaluation=EVALUATION, **more):
    chosen = pretrained.ModelConfig(checkpoint=str(models / model))
    infer.run(model=chosen, data=data, evaluation=evaluation, output=str(output), **more)


def record_of(output):
    record = made_by.read_made_by(output)
    assert record is not None
    return record


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished") / "out.jsonl"
    run(models, output)
    return output


@pytest.fixture
def output(finished, tmp_path):
    """A copy of a finished file and its record."""
    for path in (finished, made_by.path_of(finished)):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / finished.name


def test_the_record_says_what_made_the_file(models, finished):
    record = record_of(finished)
    assert record["checkpoint"] == str(models / "0")
    assert len(record["content"]) == 64
    assert (record["task"], record["split"]) == ("arithmetic", "validation")
    assert (record["decoding"], record["num_examples"]) == ("greedy", 20)
    assert record["num_lines"] == len(finished.read_text().splitlines()) == 20
    assert made_by.read_made_by(finished.parent / "other.jsonl") is None


@pytest.mark.parametrize("decoding", decodings.USED_BY)
def test_the_record_has_the_settings_of_every_decoding(decoding, models, tmp_path):
    evaluation = EvalConfig(
        num_examples=2, target_length=2, decoding=decoding, choices=("7", "8"), num_beams=2
    )
    run(models, tmp_path / "out.jsonl", evaluation=evaluation)
    record = record_of(tmp_path / "out.jsonl")
    used = {name: getattr(evaluation, name) for name in decodings.USED_BY[decoding]}
    assert {name: record[name] for name in used} == json.loads(json.dumps(used))
    run(models, tmp_path / "out.jsonl", evaluation=evaluation, dry_run=True)  # may go on
    if decoding == "likeliest":
        lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert {line["targets"] for line in lines} <= {"7", "8"}


def test_a_setting_belongs_to_some_ways_to_decode_or_to_all():
    listed = {name for names in decodings.USED_BY.values() for name in names}
    concerns_all = {"task", "split", "decoding", "num_examples", "target_length", "batch_size"}
    no_effect = {"decode_rows", "rewards"}  # on what is decoded
    fields = {field.name for field in dataclasses.fields(EvalConfig)}
    assert listed == fields - concerns_all - no_effect


@pytest.mark.parametrize("lines", [0, 5, 8, 19])
def test_the_same_command_goes_on_where_it_stopped(lines, models, finished, output, capsys):
    record = record_of(output)
    del record["num_lines"]  # as a run leaves it that was stopped
    made_by.path_of(output).write_text(json.dumps(record))
    kept = finished.read_bytes().splitlines(keepends=True)[:lines]
    output.write_bytes(b"".join(kept) + b'{"inputs": "cut of')
    capsys.readouterr()
    run(models, output)
    assert output.read_bytes() == finished.read_bytes()
    assert record_of(output)["num_lines"] == 20
    cut_off = finished.read_text().count('"truncated": true}')
    assert f"WARNING: {cut_off} of 20 predictions reached 4 tokens" in capsys.readouterr().err


def test_a_checkpoint_may_have_moved(models, output, tmp_path):
    (tmp_path / "moved").symlink_to(models / "0")
    before = output.read_bytes()
    run(tmp_path, output, model="moved")
    assert output.read_bytes() == before


def test_a_vocabulary_is_compared_by_its_content(models, output):
    same = dataclasses.replace(DATA, vocabulary="arithmetic")  # the task's own by its name
    run(models, output, data=same, dry_run=True)
    other = dataclasses.replace(DATA, vocabulary="bytes")
    with pytest.raises(ValueError, match=r"vocabulary None -> 'bytes'; .*vocabulary_content"):
        run(models, output, data=other, dry_run=True)
    record = record_of(output)  # as if the words of the vocabulary had been others
    made_by.path_of(output).write_text(json.dumps({**record, "vocabulary_content": "0" * 64}))
    with pytest.raises(ValueError, match="something else: vocabulary_content 000000000000"):
        run(models, output, dry_run=True)


def test_a_dry_run_compares_all_but_a_remote_vocabulary(models, output):
    far = dataclasses.replace(DATA, vocabulary="t5")  # a file in a bucket
    with pytest.raises(ValueError, match=r"256 embedding rows, fewer than .* 32100 pieces"):
        run(models, output, data=far, dry_run=True)  # the check of the model comes after
    with pytest.raises(ValueError, match=r"something else: batch_size 8 -> 16\."):
        run(models, output, data=dataclasses.replace(far, batch_size=16), dry_run=True)


CHANGES = {
    "checkpoint": ({"model": "1"}, "checkpoint .*/0' -> .*/1'; content"),
    "decoding": (
        {"evaluation": dataclasses.replace(EVALUATION, decoding="sample", temperature=0.5)},
        "decoding 'greedy' -> 'sample'; .*temperature None -> 0.5",
    ),
    "calculator": (
        {"evaluation": dataclasses.replace(EVALUATION, calculator=True)},
        "calculator False -> True",
    ),
    "split": (
        {"evaluation": dataclasses.replace(EVALUATION, split="test")},
        "split 'validation' -> 'test'",
    ),
    "fewer examples": (
        {"evaluation": dataclasses.replace(EVALUATION, num_examples=4)},
        "num_examples 20 -> 4",
    ),
    "lengths": (
        {"data": dataclasses.replace(DATA, feature_lengths={"inputs": 20, "targets": 32})},
        "feature_lengths .*48.* -> .*20",
    ),
    "batch size": ({"data": dataclasses.replace(DATA, batch_size=16)}, "batch_size 8 -> 16"),
    "seqio's cache": (
        {"data": dataclasses.replace(DATA, use_cached=True)},
        "use_cached False -> True",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_something_else_made_is_left_as_it_is(change, dry_run, models, output):
    arguments, message = CHANGES[change]
    before = output.read_bytes(), made_by.path_of(output).read_bytes()
    with pytest.raises(ValueError, match=f"was made by something else: .*{message}"):
        run(models, output, dry_run=dry_run, **arguments)
    assert (output.read_bytes(), made_by.path_of(output).read_bytes()) == before


@pytest.mark.parametrize("content", ["", "one line", '{"inputs": "a", "targets": "b"}\n' * 10])
def test_a_file_of_the_users_is_left_as_it_is(content, models, tmp_path):
    output = tmp_path / "mine.jsonl"
    output.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.jsonl exists and was not made by `infer`"):
        run(models, output)
    assert output.read_text() == content
    assert not made_by.path_of(output).exists()


def test_a_file_that_was_edited_is_left_as_it_is(models, output):
    text = output.read_text() + '{"inputs": "mine", "targets": "mine", "reference": ""}\n'
    output.write_text(text)
    with pytest.raises(ValueError, match="was changed after it was complete with 20 lines"):
        run(models, output)
    assert output.read_text() == text


def test_a_folder_or_a_damaged_record_is_refused(models, output, tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        run(models, tmp_path)
    made_by.path_of(output).write_text("{")
    with pytest.raises(ValueError, match=r"made_by\.json, line 1: not JSON"):
        run(models, output)


def evaluate(models, folder, **more):
    chosen = pretrained.ModelConfig(checkpoint=str(models / "0"))
    infer.evaluate_checkpoint(
        model=chosen,
        output_dir=str(folder),
        **{"data": DATA, "evaluation": EVALUATION, **more},
    )


def test_an_evaluation_replaces_another_and_no_file_of_the_users(models, tmp_path, monkeypatch):
    evaluate(models, tmp_path / "ours")
    (tmp_path / "ours" / "metrics.json").unlink()  # as if it had been killed while writing
    with (tmp_path / "ours" / "predictions.jsonl").open("r+b") as file:
        file.truncate(200)
    evaluate(models, tmp_path / "ours")
    assert len((tmp_path / "ours" / "predictions.jsonl").read_text().splitlines()) == 20
    # What is wrong is found before the first batch is decoded, and in a dry run, too.
    monkeypatch.setattr(infer.evaluate, "make_decoder", None)
    for number, (name, content) in enumerate(
        [("metrics.json", '{"a": 1}'), ("metrics.json", "[1"), ("predictions.jsonl", "a line\n")]
    ):
        mine = tmp_path / str(number) / name
        mine.parent.mkdir()
        mine.write_text(content)
        for dry_run in (True, False):
            with pytest.raises(ValueError, match=rf"{name} exists and was not made by `eval`"):
                evaluate(models, mine.parent, dry_run=dry_run)
        assert mine.read_text() == content


def test_what_is_read_and_recorded_is_of_one_step_while_a_run_goes_on(
    models, finished, tmp_path, monkeypatch
):
    """The run saves a newer step before the model is read, and deletes the older one behind it."""
    steps = tmp_path / "checkpoints"

    def place_params(*arguments):
        shutil.copytree(models / "1", steps / "6")
        params = pretrained.place_params(*arguments)
        shutil.rmtree(steps / "5")
        return params

    monkeypatch.setattr(infer, "place_params", place_params)
    model = pretrained.ModelConfig(checkpoint=str(tmp_path))
    told = {"model": model, "data": DATA, "evaluation": EVALUATION}
    shutil.copytree(models / "0", steps / "5")
    infer.run(**told, output=str(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_bytes() == finished.read_bytes()
    content = record_of(finished)["content"]
    assert record_of(tmp_path / "out.jsonl")["content"] == content
    shutil.rmtree(steps / "6")
    shutil.copytree(models / "0", steps / "5")
    infer.evaluate_checkpoint(**told, output_dir=str(tmp_path / "eval"))
    about = json.loads((tmp_path / "eval" / "metrics.json").read_text())["evaluation"]
    assert (about["checkpoint"], about["step"]) == (str(tmp_path), 5)
    assert about["content"] == content
    recorded = record_of(tmp_path / "out.jsonl")
    assert about["model_and_data"].items() <= recorded.items()
    assert {"task_content", "feature_lengths", "dtype"} <= about["model_and_data"].keys()
    lines = (tmp_path / "eval" / "predictions.jsonl").read_text().splitlines()
    targets = [json.loads(line)["targets"] for line in finished.read_text().splitlines()]
    assert [json.loads(line)["prediction"] for line in lines] == targets


def test_only_the_first_process_writes_and_says_the_result(models, tmp_path, monkeypatch, capfd):
    evaluate(models, tmp_path / "first")
    printed, _ = capfd.readouterr()
    metrics = json.loads((tmp_path / "first" / "metrics.json").read_text())
    assert json.loads(printed) == {"arithmetic": metrics["arithmetic"]}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    evaluate(models, tmp_path / "second")
    run(models, tmp_path / "second.jsonl")
    printed, messages = capfd.readouterr()
    assert (printed, "wrote" in messages) == ("", False)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_rows_without_targets_are_said_to_have_no_metric(models, tmp_path, capfd):
    (tmp_path / "prompts.jsonl").write_text('{"inputs": "How many eggs?"}\n')
    task = str(tmp_path / "prompts.jsonl")
    prompts = dataclasses.replace(DATA, task=task, vocabulary="arithmetic")
    evaluation = dataclasses.replace(EVALUATION, split="train")
    evaluate(models, tmp_path / "out", data=prompts, evaluation=evaluation)
    printed, messages = capfd.readouterr()
    assert json.loads(printed) == {"prompts.jsonl": {}}
    assert "WARNING: prompts.jsonl has no metric, because no row of the split 'train'" in messages
    evaluate(models, tmp_path / "scored")
    assert "no metric" not in capfd.readouterr().err


def test_other_chats_or_ends_of_texts_are_something_else(tmp_path):
    """A warning tells to add an id to eos_token_id; the lines before it would stay as they are."""
    tokenizer = small_tokenizers.train("qwen")
    write_decoder(tmp_path / "0", tokenizer, tokenizer.get_vocab_size(), 0)
    (tmp_path / "task.jsonl").write_text('{"messages": [{"role": "user", "content": "7?"}]}\n')
    data = dataclasses.replace(DATA, task=str(tmp_path / "task.jsonl"))
    evaluation = EvalConfig(split="train", target_length=2)
    output = tmp_path / "out.jsonl"
    run(tmp_path, output, data=data, evaluation=evaluation)
    run(tmp_path, output, data=data, evaluation=evaluation, dry_run=True)
    for name, old, new, message in (
        ("generation_config.json", '"eos_token_id": [', '"eos_token_id": [5, ', r"end_ids \["),
        (
            "tokenizer_config.json",
            "<|im_start|>assistant",
            "<|im_start|>a",
            "chat_template [0-9a-f]",
        ),
    ):
        file = tmp_path / "0" / name
        before = file.read_text()
        assert old in before
        file.write_text(before.replace(old, new))
        with pytest.raises(ValueError, match=f"was made by something else: {message}"):
            run(tmp_path, output, data=data, evaluation=evaluation, dry_run=True)
        file.write_text(before)


def test_an_output_that_cannot_be_made_is_said_before_a_model_is_read(models, tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, said in {
        tmp_path / "file" / "x": "must be a folder, and '.*file' is a file",
        tmp_path / "link" / "x": "must be a folder, and '.*link' is a link that leads nowhere",
        "gs://bucket/x": "must be local, got 'gs:/",
    }.items():
        with pytest.raises(ValueError, match=said):
            evaluate(models, place, dry_run=True)
        with pytest.raises(ValueError, match=said):
            run(models, f"{place}/out.jsonl", dry_run=True)


def test_a_mixture_is_refused_before_a_model_is_read(models, tmp_path):
    if "two_arithmetics" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("two_arithmetics", ["arithmetic"], default_rate=1.0)
    mixed = dataclasses.replace(DATA, task="two_arithmetics")
    model = pretrained.ModelConfig(checkpoint=str(models / "0"))
    message = "'two_arithmetics' is a mixture, .*: name one of its tasks, arithmetic$"
    with pytest.raises(ValueError, match=message):
        run(models, tmp_path / "out.jsonl", data=mixed)
    with pytest.raises(ValueError, match=message):
        evaluate(models, tmp_path / "out", data=mixed)
    with pytest.raises(ValueError, match=message):
        score.run(model=model, data=mixed, output=str(tmp_path / "scores"))


def test_no_examples_are_no_success(models, tmp_path):
    none = dataclasses.replace(EVALUATION, num_examples=0)
    with pytest.raises(ValueError, match="num_examples must be a positive integer or None, got 0"):
        run(models, tmp_path / "out.jsonl", evaluation=none)
    with pytest.raises(ValueError, match="num_examples must be a positive integer or None, got 0"):
        evaluate(models, tmp_path, evaluation=none)
    lines = tmp_path / "lines.txt"
    lines.write_text("Ada has 3.\nBen has 4.\nCleo has 5.\n")
    two = dataclasses.replace(EVALUATION, num_examples=2)
    run(models, tmp_path / "two.jsonl", evaluation=two, text_file=str(lines))
    texts = [
        json.loads(line)["inputs"] for line in (tmp_path / "two.jsonl").read_text().splitlines()
    ]
    assert texts == ["Ada has 3.", "Ben has 4."]


def test_the_task_of_a_training_run_s_evaluation_is_refused(models, tmp_path):
    other = dataclasses.replace(EVALUATION, task="arithmetic_backwards")
    for call in (run, evaluate):
        with pytest.raises(ValueError, match="must be None, got 'arithmetic_backwards'"):
            call(models, tmp_path / "out", evaluation=other, dry_run=True)


def test_another_text_file_of_the_same_name_is_something_else(models, tmp_path):
    lines, output = tmp_path / "lines.txt", tmp_path / "out.jsonl"
    lines.write_text("Ada has 3 apples.\nBen has 4 coins.\n")
    # The task is there for its vocabulary alone, and needs no split.
    task = tmp_path / "task.jsonl"
    task.write_text('{"inputs": "Ada", "targets": "7"}\n')
    data = dataclasses.replace(DATA, task=str(task), vocabulary="arithmetic")
    run(models, tmp_path / "other.jsonl", text_file=str(lines), data=data, dry_run=True)
    run(models, output, text_file=str(lines))
    assert record_of(output)["num_lines"] == 2
    lines.write_text("Ada has 3 apples.\nBen has 5 coins.\n")
    with pytest.raises(ValueError, match="text_content"):
        run(models, output, text_file=str(lines))


@pytest.mark.parametrize("moved", [False, True])
def test_another_task_file_of_the_same_name_is_something_else(moved, models, tmp_path):
    """Otherwise a run that goes on would append the answers to other prompts."""
    task, output = tmp_path / "task.jsonl", tmp_path / "out.jsonl"
    rows = [{"inputs": f"Ada has {n} apples.", "targets": str(n)} for n in range(3)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = dataclasses.replace(DATA, task=str(task), vocabulary="arithmetic")
    evaluation = EvalConfig(split="train", target_length=4)
    run(models, output, data=data, evaluation=evaluation)
    if moved:  # the same content under another name
        data = dataclasses.replace(data, task=str(task.rename(tmp_path / "moved.jsonl")))
        run(models, output, data=data, evaluation=evaluation, dry_run=True)
        return
    task.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(ValueError, match="task_content"):
        run(models, output, data=data, evaluation=evaluation, dry_run=True)
