import gzip
import importlib
import json
import pickle
import re
import runpy

import pytest
import seqio
import tensorflow as tf

from gkd_jax import calculator, text_metrics, vocabularies
from gkd_jax.tasks import (
    arithmetic,
    features,
    folder,
    gsm8k,
    jsonl,
    multi30k,
    scitldr,
    wmt,
    xsum,
)


LENGTHS = {"inputs": 64, "targets": 48}


@pytest.fixture
def data_dirs(shared, monkeypatch):
    """Points TFDS at the shared data; gives the folder of each folder-based task."""
    seqio.set_tfds_data_dir_override(str(shared / "tfds"))
    monkeypatch.setattr(folder, "_data_dir", None)
    yield {"multi30k_ende": shared / "data" / "multi30k", "scitldr": shared / "data" / "scitldr"}
    seqio.set_tfds_data_dir_override(None)


def with_vocabulary(name: str, vocabulary: seqio.Vocabulary) -> seqio.Task:
    return seqio.TaskRegistry.get(name).replace(
        name=f"{name}__other", output_features=features.output_features(vocabulary)
    )


def open_task(name, data_dirs, vocabulary=None) -> seqio.Task:
    if name in data_dirs:
        folder.set_data_dir(data_dirs[name])
    return with_vocabulary(name, vocabulary or seqio.ByteVocabulary())


def dataset(task, split, *, shuffle=False, lengths=None, seed=None, num_epochs: int | None = 1):
    return task.get_dataset(
        lengths,
        split=split,
        shuffle=shuffle,
        seed=seed,
        num_epochs=num_epochs,
        try_in_mem_cache=False,
    )


# Every task ---------------------------------------------------------------------------------------

COUNTS = {
    ("arithmetic", "train"): 50_000,
    ("arithmetic", "validation"): 512,
    ("arithmetic", "test"): 1024,
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("multi30k_ende", "train"): 29_000,
    ("multi30k_ende", "validation"): 1014,
    ("multi30k_ende", "test"): 1000,
    ("scitldr", "train"): 1992,
    ("scitldr", "validation"): 619,
    ("scitldr", "test"): 618,
    ("wmt_t2t_ende_v003", "validation"): 3000,
    ("wmt_t2t_ende_v003", "test"): 3003,
}
NAMES = ["arithmetic", "gsm8k", "multi30k_ende", "scitldr", "wmt_t2t_ende_v003", "xsum"]


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_number_of_examples(name, split, data_dirs):
    if name in data_dirs:
        folder.set_data_dir(data_dirs[name])
    source = seqio.TaskRegistry.get(name).source.get_dataset(split=split, shuffle=False)
    assert source.reduce(0, lambda count, _: count + 1).numpy() == COUNTS[name, split]


@pytest.mark.parametrize("name", NAMES)
def test_examples_end_in_eos_and_keep_their_texts(name, data_dirs):
    task = open_task(name, data_dirs)
    for example in dataset(task, "test", lengths=LENGTHS).take(5).as_numpy_iterator():
        for feature, length in LENGTHS.items():
            ids = example[feature].tolist()
            text = example[f"{feature}_pretokenized"].decode()
            # ByT5: three special ids before the bytes.
            expected = [byte + 3 for byte in text.encode()][: length - 1]
            assert ids == [*expected, 1]
            assert text == text.strip()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_stream_goes_on_where_it_was(name, data_dirs, tmp_path):
    task = open_task(name, data_dirs)

    def stream():
        examples = dataset(task, "test", shuffle=True, seed=3, lengths=LENGTHS, num_epochs=None)
        return iter(examples.map(lambda x: x["inputs_pretokenized"]))

    original = stream()
    for _ in range(7):
        next(original)
    path = tf.train.Checkpoint(iterator=original).write(str(tmp_path / "stream"))
    expected = [next(original).numpy() for _ in range(5)]
    resumed = stream()
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    assert [next(resumed).numpy() for _ in range(5)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_tasks_can_be_replaced_and_imported_again(name):
    task = seqio.TaskRegistry.get(name)
    module = {"multi30k_ende": multi30k, "wmt_t2t_ende_v003": wmt}.get(name)
    importlib.reload(module or {m.__name__.split(".")[-1]: m for m in MODULES}[name])
    assert seqio.TaskRegistry.get(name) is task
    if name != "arithmetic":
        assert task.output_features["targets"].vocabulary == vocabularies.t5_default()


MODULES = (arithmetic, gsm8k, scitldr, xsum)


def test_t5_vocabulary_covers_the_gsm8k_targets(data_dirs, shared):
    path = str(shared / "data" / "t5_vocab" / "spiece.model")
    vocabulary = vocabularies.load(path, extra_ids=100)
    task = open_task("gsm8k", data_dirs, vocabulary)
    examples = list(dataset(task, "test").take(200).as_numpy_iterator())
    ids = [token for example in examples for token in example["targets"].tolist()]
    assert ids.count(2) / len(ids) < 0.001
    decoded = vocabulary.decode(examples[0]["targets"].tolist())
    assert decoded == examples[0]["targets_pretokenized"].decode()


# Arithmetic ---------------------------------------------------------------------------------------


def test_arithmetic_problems_are_the_same_each_time_and_differ_by_seed(monkeypatch):
    monkeypatch.setattr(arithmetic, "SIZES", {"train": 50, "test": 20})
    arithmetic.problems.cache_clear()
    first, other = arithmetic.problems(0), arithmetic.problems(1)
    arithmetic.problems.cache_clear()
    assert arithmetic.problems(0) == first
    assert other["train"] != first["train"]
    arithmetic.problems.cache_clear()


def test_arithmetic_splits_share_no_problem():
    splits = [{question for question, _ in rows} for rows in arithmetic.problems().values()]
    assert [len(split) for split in splits] == [50_000, 512, 1024]
    assert len(set.union(*splits)) == 51_536


def test_arithmetic_chains_are_right():
    verbs = {"doubles": ("*", 2), "triples": ("*", 3)}
    gains = {"gets", "finds", "buys", "wins"}
    for question, chain in arithmetic.problems()["test"]:
        # Solved here from the words alone.
        start, *sentences, last = re.findall(r"[^.?]+[.?]", question)
        value, steps = int(re.findall(r"\d+", start)[0]), []
        assert last.strip().startswith("How many")
        for sentence in sentences:
            verb = sentence.split()[1]
            sign, operand = verbs.get(verb) or (
                "+" if verb in gains else "-",
                int(*re.findall(r"\d+", sentence)),
            )
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
            steps.append(f"{value} {sign} {operand} = {result}.")
            value = result
        assert 2 <= len(steps) <= 3
        assert value >= 0
        assert chain == " ".join([*steps, f"The answer is {value}."])


def test_arithmetic_vocabulary_covers_every_problem():
    vocabulary = seqio.TaskRegistry.get("arithmetic").output_features["inputs"].vocabulary
    assert vocabulary == vocabularies.load("arithmetic")
    for rows in arithmetic.problems().values():
        for text in (text for pair in rows[:2000] for text in pair):
            assert vocabulary.decode(vocabulary.encode(text)) == text
    words = {
        word
        for rows in arithmetic.problems().values()
        for pair in rows
        for text in pair
        for word in re.findall(r"[\w*+=-]+|[.?]", text)
    }
    assert words <= set(vocabularies.pieces(vocabulary))


def test_arithmetic_lengths_are_the_documented_ones():
    pairs = [pair for rows in arithmetic.problems().values() for pair in rows]
    # Words and punctuation counted here, not by the vocabulary; one more for EOS.
    longest = [
        1 + max(len(re.findall(r"[^\s.?]+|[.?]", pair[column])) for pair in pairs)
        for column in (0, 1)
    ]
    assert longest == [34, 24]
    assert [int(n) for n in re.findall(r"(\d+)(?: tokens|, EOS)", arithmetic.__doc__)] == longest


# GSM8K --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
def test_gsm8k_targets_hold_the_short_answer_and_survive_the_calculator(split, data_dirs):
    task = open_task("gsm8k", data_dirs)
    raw = task.source.get_dataset(split=split, shuffle=False)
    pairs = tf.data.Dataset.zip((raw, gsm8k.question_to_answer(raw))).take(1000)
    right, with_equations = 0, 0
    for example, converted in pairs.as_numpy_iterator():
        target = converted["targets"].decode()
        wanted = calculator.number(example["answer"].decode().split("####")[1].strip().lstrip("-"))
        assert "<<" not in target
        assert "####" not in target
        assert text_metrics.answer(target) in (wanted, -(wanted or 0))
        right += text_metrics.answer(target) == text_metrics.answer(calculator.correct(target))
        with_equations += "=" in target
    # A right chain of thought must hardly ever be made wrong.
    assert right / 1000 > 0.98
    assert with_equations > 900


def test_gsm8k_rewrites_an_answer():
    example = {
        "question": ["Two lines.\nHow many? "],
        "answer": ["It is 48/2 = <<48/2=24>>24.\nThen 24+1=<<24+1=25>>25\n#### 1,025"],
    }
    converted = gsm8k.question_to_answer(tf.data.Dataset.from_tensor_slices(example))
    assert next(converted.as_numpy_iterator()) == {
        "inputs": b"Two lines. How many?",
        "targets": b"It is 48/2 = 24. Then 24+1=25 The answer is 1,025.",
    }


# Summaries and translations -----------------------------------------------------------------------


def test_prefixes(data_dirs):
    for name, prefix in [
        ("wmt_t2t_ende_v003", "translate English to German: "),
        ("xsum", "summarize: "),
        ("scitldr", "summarize: "),
    ]:
        task = open_task(name, data_dirs)
        example = next(dataset(task, "test").as_numpy_iterator())
        assert example["inputs_pretokenized"].decode().startswith(prefix)


def test_scitldr_is_scored_against_all_references(data_dirs):
    task = open_task("scitldr", data_dirs)
    example = next(dataset(task, "validation").as_numpy_iterator())
    target = example["targets_pretokenized"].decode()
    references = task.postprocess_fn(target, example=example, is_target=True)
    assert references[0] == target
    assert len(references) == 3  # so the file's first line has it
    guess = task.postprocess_fn(references[2], example=example, is_target=False)
    (metric,) = task.metric_fns
    assert metric([references], [guess])["rouge2"] == pytest.approx(100.0)
    assert metric([references[0]], [guess])["rouge2"] < 50


def test_multi30k_reads_plain_and_compressed_files_alike(data_dirs, tmp_path):
    source = data_dirs["multi30k_ende"]
    for code in ("en", "de"):
        content = gzip.decompress((source / f"val.{code}.gz").read_bytes())
        (tmp_path / f"val.{code}").write_bytes(content)
    english, german = multi30k.read_pairs(str(tmp_path), "validation")
    assert (english, german) == multi30k.read_pairs(str(source), "validation")
    assert german[0] == "Eine Gruppe von Männern lädt Baumwolle auf einen Lastwagen"


def test_multi30k_files_must_match(tmp_path):
    (tmp_path / "val.en").write_text("one\ntwo\n")
    with pytest.raises(FileNotFoundError, match=r"'val\.de'.*" + re.escape(str(tmp_path))):
        multi30k.read_pairs(str(tmp_path), "validation")
    (tmp_path / "val.de").write_text("eins\n")
    with pytest.raises(ValueError, match="got 2 and 1"):
        multi30k.read_pairs(str(tmp_path), "validation")


def test_data_dir_must_be_set_and_exist(monkeypatch, tmp_path):
    monkeypatch.setattr(folder, "_data_dir", None)
    source = seqio.TaskRegistry.get("multi30k_ende").source
    with pytest.raises(ValueError, match=r"'multi30k_ende'.*DATA_DIR.*not set"):
        source.get_dataset(split="train")
    with pytest.raises(NotADirectoryError, match="absent"):
        folder.set_data_dir(tmp_path / "absent")
    folder.set_data_dir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train\.en"):
        source.get_dataset(split="train")


def test_multi30k_vocabulary_command(tmp_path, monkeypatch, capsys):
    sentences = [f"word{i} thing{i % 7} runs{i % 11}" for i in range(300)]
    for code in ("en", "de"):
        (tmp_path / f"train.{code}").write_text("\n".join(sentences) + "\n")
    output = tmp_path / "joint.model"
    arguments = [f"--data_dir={tmp_path}", f"--output={output}", "--vocab_size=40"]
    monkeypatch.setattr("sys.argv", ["multi30k", *arguments])
    runpy.run_path(multi30k.__file__, run_name="__main__")
    assert vocabularies.load(str(output)).vocab_size == 40
    with pytest.raises(SystemExit) as stop:
        multi30k.main([f"--data_dir={tmp_path / 'absent'}", f"--output={output}"])
    assert stop.value.code == 2
    assert "absent" in capsys.readouterr().err


# JSONL --------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl_file(tmp_path):
    path = tmp_path / "teacher outputs.jsonl"
    rows = [{"inputs": f"in {i}\u2028", "targets": f"aus {i}", "reference": "x"} for i in range(4)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    yield path
    seqio.TaskRegistry.remove(jsonl.task_name(path))


def test_jsonl_task_is_registered_once_and_gives_the_rows_in_order(jsonl_file):
    task = jsonl.jsonl_task(jsonl_file)
    assert jsonl.jsonl_task(str(jsonl_file)) is task
    assert seqio.TaskRegistry.get(jsonl.task_name(jsonl_file)) is task
    other = with_vocabulary(task.name, seqio.ByteVocabulary())
    rows = list(dataset(other, "train").as_numpy_iterator())
    assert [row["targets_pretokenized"].decode() for row in rows] == [f"aus {i}" for i in range(4)]
    assert rows[0]["inputs"][-1] == 1
    source = pickle.loads(pickle.dumps(task.source))
    assert len(list(source.get_dataset(split="train"))) == 4


def test_jsonl_tasks_of_files_with_one_name_differ(tmp_path):
    assert jsonl.task_name(tmp_path / "a" / "x.jsonl") != jsonl.task_name(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"inputs": "a"}', r"line 2: key 'targets' is missing"),
        ("{inputs", "line 2: not JSON"),
        ("[1]", r"line 2: expected an object, got '\[1\]'"),
        ('{"inputs": "a", "targets": 3}', "line 2: 'targets' must be a string, got 3"),
        ("", "line 2: not JSON"),
    ],
)
def test_bad_jsonl_names_file_line_and_key(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"inputs": "a", "targets": "b"}\n' + line + "\n")
    with pytest.raises(ValueError, match=re.escape(str(path)) + ", " + message):
        jsonl.read_rows(path)


def test_missing_and_empty_jsonl_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        jsonl.read_rows(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="empty file"):
        jsonl.read_rows(tmp_path / "empty.jsonl")
