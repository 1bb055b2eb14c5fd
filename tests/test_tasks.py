import csv
import gzip
import json
import pkgutil
import re
import runpy

import numpy as np
import pytest
import seqio
import tensorflow as tf

from gkd_jax import tasks
from gkd_jax.input import fit
from gkd_jax.input.split import Split
from gkd_jax.tasks import (
    arithmetic,
    bbh,
    features,
    few_shot,
    flan,
    folder,
    gsm8k,
    mmlu,
    multi30k,
    rte,
)
from gkd_jax.text import calculator, text_metrics, vocabularies


tasks.register()
LENGTHS = {"inputs": 64, "targets": 48}


@pytest.fixture
def data_dirs(shared, monkeypatch):
    """Points TFDS at the shared data; returns the folder of each task that is made from files."""
    seqio.set_tfds_data_dir_override(str(shared / "tfds"))
    monkeypatch.setattr(folder, "_data_dir", None)
    data = shared / "data"
    yield {
        "multi30k_ende": data / "multi30k",
        "scitldr": data / "scitldr",
        "mmlu": data / "mmlu",
        "bbh_direct": data / "bbh",
        "bbh_cot": data,
        "flan": data,
        "flan_all": data / "flan",
    }
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
    ("bbh_cot", "test"): 6511,
    ("bbh_direct", "test"): 6511,
    ("flan", "train"): 2728 + 6915 + 7112 + 1084 + 6070 + 2061,  # no file has 30,000
    ("flan_all", "train"): 2728 + 6915 + 7112 + 1084 + 6070 + 2061,
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("gsm8k_cot", "test"): 1319,
    ("mmlu", "validation"): 1531,
    ("mmlu", "test"): 14_042,
    ("multi30k_ende", "train"): 29_000,
    ("multi30k_ende", "validation"): 1014,
    ("multi30k_ende", "test"): 1000,
    ("scitldr", "train"): 1992,
    ("scitldr", "validation"): 619,
    ("scitldr", "test"): 618,
    ("wmt_t2t_ende_v003", "validation"): 3000,
    ("wmt_t2t_ende_v003", "test"): 3003,
}
# Of each task, the split whose examples are looked at. Of xsum, only a part is at hand.
SPLITS = {**dict([*COUNTS]), "xsum": "test"}
NAMES = list(SPLITS)
# The tasks that have another vocabulary than T5's.
VOCABULARIES = {"arithmetic": vocabularies.arithmetic()}


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_number_of_examples(name, split, data_dirs):
    if name in data_dirs:
        folder.set_data_dir(data_dirs[name])
    source = seqio.TaskRegistry.get(name).source
    examples = source.get_dataset(split=split, shuffle=False)
    # A table in memory knows its size; files are read.
    in_memory = isinstance(source, seqio.FunctionDataSource)
    count = examples.cardinality() if in_memory else examples.reduce(0, lambda n, _: n + 1)
    assert count.numpy() == COUNTS[name, split]


@pytest.mark.parametrize("name", NAMES)
def test_examples_end_in_eos_and_keep_their_texts(name, data_dirs):
    task = open_task(name, data_dirs)
    examples = dataset(task, SPLITS[name], lengths=LENGTHS)
    for example in examples.take(5).as_numpy_iterator():
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
        examples = dataset(
            task, SPLITS[name], shuffle=True, seed=3, lengths=LENGTHS, num_epochs=None
        )
        return iter(examples.map(lambda x: x["inputs_pretokenized"]))

    original = stream()
    for _ in range(7):
        next(original)
    path = tf.train.Checkpoint(iterator=original).write(str(tmp_path / "stream"))
    expected = [next(original).numpy() for _ in range(5)]
    resumed = stream()
    tf.train.Checkpoint(iterator=resumed).read(path).assert_consumed()
    assert [next(resumed).numpy() for _ in range(5)] == expected


def test_modules_of_tasks_can_be_imported_again():
    before = {name: seqio.TaskRegistry.get(name) for name in seqio.TaskRegistry.names()}
    for module in pkgutil.iter_modules(tasks.__path__):
        runpy.run_path(f"{tasks.__path__[0]}/{module.name}.py")
    assert len(seqio.TaskRegistry.names()) == len(before)
    assert all(seqio.TaskRegistry.get(name) is task for name, task in before.items())


@pytest.mark.parametrize("name", NAMES)
def test_tasks_have_their_vocabulary(name):
    found = seqio.TaskRegistry.get(name).output_features["targets"].vocabulary
    assert found == VOCABULARIES.get(name, vocabularies.t5_default())


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


def test_arithmetic_with_hints_has_every_problem_with_and_without_its_solution():
    task = seqio.TaskRegistry.get("arithmetic_hints")
    rows = list(task.source.get_dataset("test", shuffle=False).take(6).as_numpy_iterator())
    assert task.source.num_input_examples("test") == 2 * 1024
    for index, (question, chain) in enumerate(arithmetic.problems()["test"][:3]):
        plain, solved = ({k: v.decode() for k, v in row.items()} for row in rows[2 * index :][:2])
        assert plain == {"inputs": question, "targets": chain}
        assert solved == {"inputs": f"{question} {chain}", "targets": chain}


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


# Few-shot prompts ---------------------------------------------------------------------------------


def examples_of(name, data_dir, *, split="test", vocabulary=None, length=None) -> list[dict]:
    folder.set_data_dir(data_dir)
    task = with_vocabulary(name, vocabulary or seqio.ByteVocabulary())
    lengths = None if length is None else {"inputs": length, "targets": 48}
    return list(dataset(task, split, lengths=lengths).as_numpy_iterator())


def prompts_of(name, data_dir, **settings) -> list[str]:
    return [row["inputs_pretokenized"].decode() for row in examples_of(name, data_dir, **settings)]


def score(task: seqio.Task, rows) -> dict[str, float]:
    """The task's metrics of (example, prediction) pairs, computed as seqio does."""
    targets = [
        task.postprocess_fn(row["targets_pretokenized"].decode(), example=row, is_target=True)
        for row, _ in rows
    ]
    guesses = [task.postprocess_fn(guess, example=row, is_target=False) for row, guess in rows]
    values: dict[str, float] = {}
    for metric_fn in task.metric_fns:
        values |= metric_fn(targets, guesses)
    return values


@pytest.fixture
def no_data_dir(monkeypatch):
    monkeypatch.setattr(folder, "_data_dir", None)


def test_prompt_files_may_have_several_lines_a_part():
    lines = ["Solve.", "", "Q: One", " two?", "A: Yes.", "So yes.", "", "Q:Three?", "A: No."]
    header, shots = few_shot.parse_shots(lines, "p.txt")
    assert header == "Solve."
    assert shots == [("One two?", "Yes. So yes.", 3), ("Three?", "No.", 8)]
    assert shots[0].text() == "Q: One two? A: Yes. So yes."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["Q: a", "A: b", "Q: c", "Q: d", "A: e"], r"p\.txt, line 3: .*'A:'.* found 0"),
        (["Q: a", "A: b", "A: c"], r"p\.txt, line 1: .*'A:'.* found 2"),
        (["A: b"], r"p\.txt: expected lines that begin with 'Q:', found none"),
    ],
)
def test_bad_prompt_files_name_the_line(lines, message):
    with pytest.raises(ValueError, match=message):
        few_shot.parse_shots(lines, "p.txt")


@pytest.mark.parametrize("kept", range(4))
@pytest.mark.parametrize("spare", [0, 1])
def test_the_first_shots_are_kept_as_many_as_fit(kept, spare):
    shots = ["one", "three", "five5"]
    texts = {
        key: [value] for key, value in {"header": "H", "shots": shots, "question": "Q"}.items()
    }
    prompt = " ".join(["H", *shots[:kept], "Q"])
    output_features = features.output_features(seqio.ByteVocabulary())
    joined = few_shot.join_prompt(
        tf.data.Dataset.from_tensor_slices(texts),
        output_features,
        {"inputs": len(prompt) + 1 + spare, "targets": 4},  # bytes and EOS
    )
    (row,) = joined.as_numpy_iterator()
    assert row == {
        "question": b"Q",
        "inputs": prompt.encode(),
        "kept_shots": kept,
        "all_shots": 3,
    }


# MMLU ---------------------------------------------------------------------------------------------


@pytest.fixture
def mmlu_folder(tmp_path, no_data_dir):
    """A folder with all subjects: anatomy has three test questions, the others one."""
    for part in ("dev", "val", "test"):
        (tmp_path / part).mkdir()
        for subject in mmlu.SUBJECTS:
            count = 6 if part == "dev" else 3 if subject == "anatomy" else 1
            rows = [f"{part} {i}?,w{i},x,y,z,{'ABCD'[i % 4]}\n" for i in range(count)]
            (tmp_path / part / f"{subject}_{part}.csv").write_text("".join(rows))
    return tmp_path


def test_mmlu_prompt_is_that_of_hendrycks(mmlu_folder):
    quoted = '"Which, of\nthese "" is it?",1.5,"a, b",c  d,None,D\n'
    (mmlu_folder / "test" / "high_school_physics_test.csv").write_text(quoted)
    (row,) = examples_of("mmlu_high_school_physics", mmlu_folder)
    assert row["inputs_pretokenized"].decode() == (
        "The following are multiple choice questions (with answers) about high school physics. "
        "dev 0? A. w0 B. x C. y D. z Answer: A dev 1? A. w1 B. x C. y D. z Answer: B "
        "dev 2? A. w2 B. x C. y D. z Answer: C dev 3? A. w3 B. x C. y D. z Answer: D "
        "dev 4? A. w4 B. x C. y D. z Answer: A "
        'Which, of these " is it? A. 1.5 B. a, b C. c d D. None Answer:'
    )
    assert row["targets_pretokenized"] == b"D"


def test_mmlu_is_averaged_over_subjects(mmlu_folder):
    rows = examples_of("mmlu", mmlu_folder)
    assert len(rows) == 59
    # The subjects take turns.
    assert sorted(row["group"].decode() for row in rows[:57]) == sorted(mmlu.SUBJECTS)
    # Right: one of the three of anatomy and all of virology.
    guesses = [{"anatomy": "A", "virology": " A"}.get(row["group"].decode(), "a") for row in rows]
    task = seqio.TaskRegistry.get("mmlu")
    values = score(task, list(zip(rows, guesses, strict=True)))
    assert values == {"accuracy": pytest.approx(100 * (1 / 3 + 1) / 57)}


def test_mmlu_finds_its_folder_in_data_dir(mmlu_folder, tmp_path):
    outer = tmp_path / "outer"
    outer.mkdir()
    mmlu_folder.joinpath("dev").rename(outer / "x")
    (outer / "mmlu").mkdir()
    (outer / "x").rename(outer / "mmlu" / "dev")
    (mmlu_folder / "val").rename(outer / "mmlu" / "val")
    assert len(prompts_of("mmlu_virology", outer, split="validation")) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q,a,b,c,d,A\nq,a,b,c,B\n", r"line 2: expected a question, four options and A, B, C or D"),
        ("q,a,b,c,d,E\n", r"line 1: .* got \['q', 'a', 'b', 'c', 'd', 'E'\]"),
        ('"q"x,a,b,c,d,A\n', "line 1: "),
        ("", "empty file"),
    ],
)
def test_bad_mmlu_files_name_file_and_line(mmlu_folder, content, message):
    (mmlu_folder / "test" / "virology_test.csv").write_text(content)
    with pytest.raises(ValueError, match=r"virology_test\.csv.*" + message) as error:
        mmlu.read_subject(str(mmlu_folder), "virology", "test")
    assert "\n" not in str(error.value)


def test_missing_mmlu_files_and_shots(mmlu_folder):
    (mmlu_folder / "dev" / "virology_dev.csv").write_text("q,a,b,c,d,A\n")
    with pytest.raises(ValueError, match=r"virology_dev\.csv.* must have 5 questions.* got 1"):
        mmlu.read_subject(str(mmlu_folder), "virology", "test")
    (mmlu_folder / "val" / "anatomy_val.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"anatomy_val\.csv"):
        mmlu.read_subject(str(mmlu_folder), "anatomy", "validation")


def t5_vocabulary(shared):
    return vocabularies.load(str(shared / "data" / "t5_vocab" / "spiece.model"), extra_ids=100)


def hendrycks_prompts(folder_path, subject) -> list[list[str]]:
    """Each question's prompts with 0 to 5 shots, as `gen_prompt` of hendrycks/test writes them."""

    def blocks(part):
        with open(folder_path / part / f"{subject}_{part}.csv", newline="") as file:
            for question, *options, letter in csv.reader(file):
                lines = [question, *(f"{x}. {y}" for x, y in zip("ABCD", options, strict=True))]
                yield "\n".join(lines) + "\nAnswer:", f" {letter}\n\n"

    header = "The following are multiple choice questions (with answers) about "
    header += subject.replace("_", " ") + ".\n\n"
    shots = [question + letter for question, letter in blocks("dev")]
    return [
        [header + "".join(shots[:k]) + question for k in range(6)] for question, _ in blocks("test")
    ]


def test_mmlu_long_prompts_keep_the_first_shots_as_hendrycks_does(data_dirs, shared):
    vocabulary = t5_vocabulary(shared)
    subject = "high_school_european_history"
    prompts = prompts_of(f"mmlu_{subject}", data_dirs["mmlu"], vocabulary=vocabulary, length=1024)
    counts = set()
    for prompt, candidates in zip(
        prompts[:30], hendrycks_prompts(data_dirs["mmlu"], subject), strict=False
    ):
        # T5's vocabulary takes the authors' newlines for the spaces that are here.
        k = 5
        while len(vocabulary.encode(candidates[k])) >= 1024 and k > 0:
            k -= 1
        assert vocabulary.encode(prompt) == vocabulary.encode(candidates[k])
        counts.add(k)
    assert len(counts) > 1


def dropped_by_hand(groups, vocabulary, length) -> tuple[int, int]:
    """(prompts with fewer shots, those of them without any), from the parts' own token counts.

    No piece of T5's vocabulary spans a space, so token counts of parts add up.
    """

    def tokens(text):
        return len(vocabulary.encode(text))

    fewer = none = 0
    for group in groups:
        sizes = [tokens(shot) for shot in group.shots]
        header = tokens(group.header) + 1  # EOS
        for question, _ in group.questions:
            left = length - header - tokens(question)
            kept = max((k for k in range(len(sizes) + 1) if sum(sizes[:k]) <= left), default=0)
            fewer += kept < len(sizes)
            none += kept == 0
    return fewer, none


def fit_of(name, data_dir, vocabulary, lengths, *, take=-1) -> fit.Fit:
    folder.set_data_dir(data_dir)
    examples = dataset(with_vocabulary(name, vocabulary), "test", lengths=lengths).take(take)
    return fit.count(examples.as_numpy_iterator(), lengths)


@pytest.mark.parametrize(("length", "expected"), [(1024, (10, 0)), (128, (253, 195))])
def test_dropped_shots_of_bbh_are_counted(length, expected, data_dirs, shared):
    vocabulary = t5_vocabulary(shared)
    data_dir = data_dirs["bbh_direct"]
    groups = [bbh.read_file(str(data_dir), name, cot=False) for name in bbh.FILES]
    first = [group._replace(questions=group.questions[:10]) for group in groups]
    assert dropped_by_hand(first, vocabulary, length) == expected
    lengths = {"inputs": length, "targets": 64}
    found = fit_of("bbh_direct", data_dir, vocabulary, lengths, take=270)
    assert (found.examples, found.fewer_shots, found.no_shots) == (270, *expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "subjects", "examples", "fewer"),
    [
        ("mmlu_professional_law", ("professional_law",), 1_534, 35),
        ("mmlu", mmlu.SUBJECTS, 14_042, 404),
    ],
)
def test_dropped_shots_of_mmlu_are_counted(task, subjects, examples, fewer, data_dirs, shared):
    vocabulary = t5_vocabulary(shared)
    data_dir = data_dirs["mmlu"]
    groups = [mmlu.read_subject(str(data_dir), name, "test") for name in subjects]
    assert dropped_by_hand(groups, vocabulary, 2048) == (fewer, 0)
    found = fit_of(task, data_dir, vocabulary, {"inputs": 2048, "targets": 8})
    assert (found.examples, found.fewer_shots, found.no_shots) == (examples, fewer, 0)
    assert found.cut == {"inputs": 0, "targets": 0}


def test_the_paper_s_worked_problems_fit_the_paper_s_length(data_dirs, shared, tmp_path):
    text = (shared / "data" / "gsm8k" / "cot_prompts" / "gsm8k-cot.yaml").read_text()
    pairs = re.findall(r"- question: (.*?)\n *target: (.*?)(?=\n *- question|\Z)", text, re.DOTALL)
    lines = [f"Q: {' '.join(q.split())}\nA: {' '.join(a.split())}" for q, a in pairs[:4]]
    (tmp_path / "cot_prompt.txt").write_text("\n\n".join(lines))
    vocabulary = t5_vocabulary(shared)
    assert len(vocabulary.encode(" ".join(lines))) == 284
    found = fit_of("gsm8k_cot", tmp_path, vocabulary, {"inputs": 512, "targets": 320})
    assert found == fit.Fit(1319, {"inputs": 0, "targets": 0}, 0, 0)
    shorter = fit_of("gsm8k_cot", tmp_path, vocabulary, {"inputs": 320, "targets": 320})
    questions = dataset(with_vocabulary("gsm8k", vocabulary), "test").as_numpy_iterator()
    sizes = [
        len(vocabulary.encode(f"Q: {row['inputs_pretokenized'].decode()} A:")) for row in questions
    ]
    assert shorter.fewer_shots == sum(284 + size + 1 > 320 for size in sizes)


def test_what_does_not_fit_is_said_once(capsys, monkeypatch):
    monkeypatch.setattr(fit, "_warned", set())
    task = with_vocabulary("arithmetic", seqio.ByteVocabulary())
    lengths = {"inputs": 100, "targets": 500}
    longer = sum(
        len(question) + 1 > 100 for question, _ in arithmetic.problems()["validation"][:50]
    )
    for _ in range(2):
        fit.warn_once(Split(task, "validation", lengths, num_examples=50))
    said = capsys.readouterr().err
    assert said.count("WARNING") == 1
    assert f"{longer} of 50 examples ({2 * longer:.1f} %) have longer inputs than 100" in said
    fit.warn_once(Split(task, "validation", {"inputs": 500, "targets": 500}))
    assert not capsys.readouterr().err
    # A task that does not say what was there before: what fills its length counts.
    rows = [{"inputs": [1] * size, "targets": [1]} for size in (3, 4)]
    assert fit.count(rows, {"inputs": 4, "targets": 4}) == fit.Fit(
        2, {"inputs": 1, "targets": 0}, 0, 0
    )


# BIG-Bench Hard -----------------------------------------------------------------------------------

BBH_PROMPT = """\
A note.
-----
Say whether it is true.

Q: 1 is 1
Options:
(A) yes
(B) no
A: Let's think step by step.
It is. So the answer is (A).

Q: 1 is 2
A: Let's think step by step. It isn't. So the answer is (B).

Q: 2 is 2
A: Let's think step by step.
As above. So the answer is (A).
"""
BBH_EXAMPLES = {"canary": "x", "examples": [{"input": "3 is\n4", "target": "(B)"}]}


@pytest.fixture
def bbh_folder(tmp_path, no_data_dir):
    (tmp_path / "cot-prompts").mkdir()
    (tmp_path / "bbh").mkdir()
    for name in bbh.FILES:
        (tmp_path / "cot-prompts" / f"{name}.txt").write_text(BBH_PROMPT)
        (tmp_path / "bbh" / f"{name}.json").write_text(json.dumps(BBH_EXAMPLES))
    return tmp_path


def test_bbh_prompts(bbh_folder):
    assert prompts_of("bbh_direct", bbh_folder)[26] == (
        "Say whether it is true. Q: 1 is 1 Options: (A) yes (B) no A: (A) Q: 1 is 2 A: (B) "
        "Q: 2 is 2 A: (A) Q: 3 is 4 A:"
    )
    assert prompts_of("bbh_cot_snarks", bbh_folder) == [
        "Say whether it is true. Q: 1 is 1 Options: (A) yes (B) no A: Let's think step by step. "
        "It is. So the answer is (A). Q: 1 is 2 A: Let's think step by step. It isn't. "
        "So the answer is (B). Q: 2 is 2 A: Let's think step by step. As above. "
        "So the answer is (A). Q: 3 is 4 A: Let's think step by step."
    ]


@pytest.mark.parametrize(
    ("name", "prediction", "right"),
    [
        ("bbh_direct_snarks", " (B)", True),
        ("bbh_direct_snarks", "(B) Q: 1 is 3 A: (A)", True),
        ("bbh_direct_snarks", "(B).", False),
        ("bbh_direct_snarks", "So the answer is (B).", False),
        ("bbh_direct_snarks", "", False),
        ("bbh_cot_snarks", "No. So the answer is (B).", True),
        ("bbh_cot_snarks", "The answer is (A)? No. so the answer is (B)", True),
        ("bbh_cot_snarks", "So the answer is (B). Q: 1 is 1 A: So the answer is (A).", True),
        ("bbh_cot_snarks", "So the answer is B.", False),
        ("bbh_cot_snarks", "(B)", False),
        ("bbh_cot_snarks", "", False),
    ],
)
def test_bbh_predictions_are_graded(bbh_folder, name, prediction, right):
    (row,) = examples_of(name, bbh_folder)
    values = score(seqio.TaskRegistry.get(name), [(row, prediction)])
    assert values == {"accuracy": 100.0 * right}


def test_bbh_is_averaged_over_files_and_over_tasks(bbh_folder):
    rows = examples_of("bbh_direct", bbh_folder)
    # Right: all of word_sorting and two thirds of tracking_shuffled_objects.
    right = {f"tracking_shuffled_objects_{n}_objects" for n in ("three", "five")} | {"word_sorting"}
    guesses = ["(B)" if row["group"].decode() in right else "" for row in rows]
    task = seqio.TaskRegistry.get("bbh_direct")
    values = score(task, list(zip(rows, guesses, strict=True)))
    assert values == {
        "accuracy": pytest.approx(100 * 3 / 27),
        "accuracy_23_tasks": pytest.approx(100 * (1 + 2 / 3) / 23),
    }


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("bbh/snarks.json", '{\n"examples": [}', r"snarks\.json, line 2: not JSON"),
        ("bbh/snarks.json", '{"examples": []}', r"snarks\.json: .*'examples'.* not empty"),
        ("bbh/snarks.json", "[]", r"snarks\.json: expected an object"),
        (
            "bbh/snarks.json",
            '{"examples": [{"input": "a", "target": "b"}, {"input": "a"}]}',
            r"snarks\.json, example 2: .*'input' and 'target', got \{'input': 'a'\}",
        ),
        (
            "cot-prompts/snarks.txt",
            BBH_PROMPT.replace("It isn't. So the answer is", "It isn't"),
            r"snarks\.txt, line 12: .*'So the answer is \.\.\.', got .*It isn't \(B\)",
        ),
        ("cot-prompts/snarks.txt", "Q: a\nA: So the answer is b.", r"snarks\.txt: .* 3 .* got 1"),
    ],
)
def test_bad_bbh_files_name_file_and_place(bbh_folder, file, content, message):
    (bbh_folder / file).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        bbh.read_file(str(bbh_folder), "snarks", cot=False)
    assert "\n" not in str(error.value)


def test_bbh_direct_prompts_show_answers_that_the_file_has(data_dirs):
    free = {"dyck_languages", "multistep_arithmetic_two", "object_counting", "word_sorting"}
    for name in bbh.FILES:
        direct, cot = (
            bbh.read_file(str(data_dirs["bbh_direct"]), name, cot=cot) for cot in (False, True)
        )
        assert direct.header == cot.header
        assert "canary" not in direct.header
        assert [shot.split(" A: ")[0] for shot in direct.shots] == [
            shot.split(" A: ")[0] for shot in cot.shots
        ]
        answers = {shot.split(" A: ")[-1] for shot in direct.shots}
        assert name in free or answers <= {target for _, target in direct.questions}


# Instructions -------------------------------------------------------------------------------------


@pytest.fixture
def flan_folder(tmp_path, no_data_dir):
    where = tmp_path / "flan"
    (where / "cot").mkdir(parents=True)
    (where / "a.jsonl").write_text('{"inputs": "in", "targets": "out", "task": "x"}\n')
    (where / "notes.md").write_text("not read")
    (where / "cot" / "b.tsv").write_text("Is it?\\nOptions:\\n- yes\tyes\tIt is.\n")
    with gzip.open(where / "cot" / "c.tsv.gz", "wt") as file:
        file.write("".join(f"c{i}\td{i}\n" for i in range(8)))
    return tmp_path


def test_flan_reads_every_file_of_a_folder(flan_folder):
    rows = [
        (row["inputs_pretokenized"].decode(), row["targets_pretokenized"].decode())
        for row in examples_of("flan_all", flan_folder, split="train")
    ]
    assert sorted(rows) == sorted(
        [
            ("Is it? Options: - yes", "It is. So the answer is yes."),
            ("in", "out"),
            *((f"c{i}", f"d{i}") for i in range(8)),
        ]
    )


def test_flan_refuses_a_file_that_is_there_plain_and_compressed(flan_folder):
    (flan_folder / "flan" / "cot" / "b.tsv.gz").write_bytes(gzip.compress(b"other\ttext\n"))
    with pytest.raises(ValueError, match=r"both '.*b\.tsv' and '.*b\.tsv\.gz': remove one"):
        flan.find_files(str(flan_folder))


def test_a_mixture_of_another_folder_and_maximum(flan_folder):
    task = flan.mixture_task("small", folder=flan_folder, maximum=2)
    try:
        assert flan.mixture_task("small") is task
        other = with_vocabulary("small", seqio.ByteVocabulary())
        texts = [
            row["inputs_pretokenized"].decode()
            for row in dataset(other, "train", shuffle=True).as_numpy_iterator()
        ]
    finally:
        seqio.TaskRegistry.remove("small")
    # Four rounds: the eight of c.tsv once, the two single ones each time.
    assert sorted(texts) == sorted(
        ["in", "Is it? Options: - yes"] * 4 + [f"c{i}" for i in range(8)]
    )
    with pytest.raises(ValueError, match="maximum must be positive or None, got 0"):
        flan.mixture_task("smaller", maximum=0)


def test_flan_groups_by_task_name_across_files(tmp_path):
    """As in the published submixture, a file holds several tasks, and a task has several files."""
    for name, rows_of in [("1.jsonl", "aab"), ("2.jsonl", "ba")]:
        rows = [
            {"inputs": f"{name}{i}", "targets": "t", "task_name": task, "task_source": "Flan2021"}
            for i, task in enumerate(rows_of)
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "3.jsonl").write_text('{"inputs": "x", "targets": "t"}\n')
    groups = flan.group_by_task(flan.find_files(str(tmp_path)))
    assert [[row["inputs"] for row in group] for group in groups] == [
        ["1.jsonl0", "1.jsonl1", "2.jsonl1"],
        ["1.jsonl2", "2.jsonl0"],
        ["x"],
    ]
    assert flan.MAXIMUM == 30_000
    (tmp_path / "3.jsonl").write_text('{"inputs": "x", "targets": "t", "task_name": 3}\n')
    with pytest.raises(ValueError, match=r"3\.jsonl, line 1: 'task_name' must be a string, got 3"):
        flan.group_by_task(flan.find_files(str(tmp_path)))


def test_mixed_order_keeps_the_shares_in_every_round():
    sizes, maximum = [5, 70, 12], 12
    order = flan.mixed_order(sizes, maximum, 0)
    assert len(order) == 6 * (5 + 12 + 12)
    rounds = order.reshape(6, -1)
    for one in rounds:
        files = np.searchsorted([5, 75], one, side="right")
        assert np.bincount(files).tolist() == [5, 12, 12]
        assert len(set(one.tolist())) == len(one)
    assert set(order.tolist()) == set(range(87))
    assert not np.array_equal(rounds[0], rounds[1])
    assert np.array_equal(order, flan.mixed_order(sizes, maximum, 0))
    assert not np.array_equal(order, flan.mixed_order(sizes, maximum, 1))
    assert sorted(flan.mixed_order(sizes, None, 0).tolist()) == list(range(87))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tsv", "a\tb\nc\n", r"x\.tsv, line 2: expected 2 or 3 columns with text, got 'c'"),
        ("x.tsv", "a\t \n", r"x\.tsv, line 1: "),
        ("x.tsv", "", r"x\.tsv: .*empty file"),
        ("x.jsonl", '{"inputs": "a"}\n', r"x\.jsonl, line 1: key 'targets' is missing"),
        (
            "x.jsonl",
            '{"inputs": "a", "targets": "b", "truncated": false}\n'
            '{"inputs": "a", "targets": "b", "truncated": true}\n',
            r"x\.jsonl, line 2: the target was cut off",
        ),
    ],
)
def test_bad_instruction_files_name_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        flan.read_file(str(tmp_path / name))


def test_a_folder_without_instructions(tmp_path, no_data_dir):
    with pytest.raises(FileNotFoundError, match=re.escape(repr(str(tmp_path)))):
        flan.find_files(str(tmp_path))
    with pytest.raises(ValueError, match=r"'flan'.*DATA_DIR.*not set"):
        seqio.TaskRegistry.get("flan").source.get_dataset(split="train")


# GSM8K with worked problems -----------------------------------------------------------------------


def test_gsm8k_cot_prompt_of_our_own_is_right(no_data_dir):
    header, shots = gsm8k.cot_prompt()
    assert header == ""
    assert len(shots) == 4
    for shot in shots:
        # Every equation holds, and the last result is the answer.
        assert calculator.correct(shot.answer) == shot.answer
        results = re.findall(r"= (\d+)", shot.answer)
        assert len(results) >= 2
        assert shot.answer.endswith(f" The answer is {results[-1]}.")


def test_gsm8k_cot_puts_worked_problems_before_the_question(data_dirs, tmp_path):
    folder.set_data_dir(tmp_path)
    task = with_vocabulary("gsm8k_cot", seqio.ByteVocabulary())
    plain = with_vocabulary("gsm8k", seqio.ByteVocabulary())

    def first(some_task, lengths=None):
        return next(dataset(some_task, "test", lengths=lengths).as_numpy_iterator())

    question = first(plain)["inputs_pretokenized"].decode()
    built_in = first(task)["inputs_pretokenized"].decode()
    assert built_in.startswith("Q: A baker fills 6 trays")
    assert built_in.endswith(f" The answer is 10. Q: {question} A:")
    assert first(task)["targets_pretokenized"] == first(plain)["targets_pretokenized"]

    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "cot_prompt.txt").write_text(
        "Solve.\nQ: One?\nA: The answer is 1.\n\nQ: Two?\nA: 1 + 1 = 2.\nThe answer is 2.\n"
    )
    one, two = "Q: One? A: The answer is 1.", "Q: Two? A: 1 + 1 = 2. The answer is 2."
    whole = f"Solve. {one} {two} Q: {question} A:"
    assert first(task)["inputs_pretokenized"].decode() == whole
    lengths = {"inputs": len(whole.encode()), "targets": 48}  # too few by EOS
    assert first(task, lengths)["inputs_pretokenized"].decode() == f"Solve. {one} Q: {question} A:"


def test_gsm8k_cot_prompt_file_must_state_answers(tmp_path, no_data_dir):
    (tmp_path / "cot_prompt.txt").write_text("Q: One?\nA: The answer is 1.\nQ: Two?\nA: Two.\n")
    folder.set_data_dir(tmp_path)
    with pytest.raises(ValueError, match=r"cot_prompt\.txt, line 3: .* got 'Two\.'"):
        gsm8k.cot_prompt()


def test_gsm8k_cot_grades_the_first_answer_only():
    row = {"targets_pretokenized": b"1 + 1 = 2. The answer is 2."}
    guess = "1 + 1 = 2. The answer is 2. Q: And now? A: The answer is 3."
    for name, accuracy in [("gsm8k_cot", 100.0), ("gsm8k", 0.0)]:
        values = score(seqio.TaskRegistry.get(name), [(row, guess)])
        assert values == dict.fromkeys(["accuracy", "accuracy_with_calculator"], accuracy)


# Files in place of TFDS ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family", "theirs", "inputs"),
    [
        ("xsum", "xsum", "document", "summarize: in 0"),
        ("wmt_t2t_ende_v003", "wmt", "en", "translate English to German: in 0"),
        ("gsm8k", "gsm8k", "question", "in 0"),
    ],
)
def test_files_stand_in_for_a_tfds_split(name, family, theirs, inputs, data_dirs, tmp_path):
    targets = {"document": "summary", "en": "de", "question": "answer"}[theirs]
    (tmp_path / family).mkdir()
    own = [{"inputs": f"in {i}", "targets": f"The answer is {i}."} for i in range(3)]
    by_tfds_names = [{theirs: row["inputs"], targets: row["targets"]} for row in own]
    task = open_task(name, data_dirs)
    before = next(dataset(task, "test").as_numpy_iterator())["inputs_pretokenized"]
    folder.set_data_dir(tmp_path)
    for rows in (own, by_tfds_names):
        path = tmp_path / family / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        got = list(dataset(task, "train").as_numpy_iterator())
        assert [row["targets_pretokenized"].decode() for row in got] == [
            f"The answer is {i}." for i in range(3)
        ]
        assert got[0]["inputs_pretokenized"].decode() == inputs
        assert {"train", "test"} <= set(task.splits)
        # The splits without a file stay TFDS's.
        assert next(dataset(task, "test").as_numpy_iterator())["inputs_pretokenized"] == before
    with pytest.raises(ValueError, match=r"train\.jsonl is read whole: .* got 'train\[:1\]'"):
        task.source.get_dataset(split="train[:1]")
    path.write_text('{"inputs": "a", "targets": "b", "truncated": true}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: the target was cut off"):
        task.source.get_dataset(split="train")
    path.write_text('{"inputs": "a", "targets": "b"}\n{"inputs": "a"}\n')
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2: key 'targets' is missing"):
        task.source.get_dataset(split="train")


def test_chains_of_thought_of_a_file_train_with_the_prompt_of_the_evaluation(data_dirs, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    row = {"inputs": "What is 1 + 1?", "targets": "1 + 1 = 2. The answer is 2."}
    (tmp_path / "gsm8k" / "train.jsonl").write_text(json.dumps(row) + "\n")
    task = open_task("gsm8k_cot", data_dirs)
    folder.set_data_dir(tmp_path)
    (train,) = dataset(task, "train").as_numpy_iterator()
    test = next(dataset(task, "test").as_numpy_iterator())
    prompts = [row["inputs_pretokenized"].decode() for row in (train, test)]
    shots = prompts[1].rsplit("Q: ", maxsplit=1)[0]
    assert shots.count("The answer is") == 4
    assert prompts[0] == f"{shots}Q: What is 1 + 1? A:"
    assert train["targets_pretokenized"].decode() == row["targets"]


def test_a_data_set_that_tfds_lacks_says_what_to_do(tmp_path, no_data_dir, monkeypatch):
    source = seqio.TaskRegistry.get("xsum").source
    monkeypatch.setattr(source.tfds_dataset, "_data_dir_override", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="tfds build xsum --manual_dir") as error:
        source.get_dataset(split="validation")
    assert "put validation.jsonl (objects with 'inputs' and 'targets', or " in str(error.value)
    assert "\n" not in str(error.value)


def test_a_row_without_the_keys_is_answered_with_both_pairs_of_keys(tmp_path, no_data_dir):
    folder.set_data_dir(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"article": "a", "summary": "b"}\n')
    expected = "expected 'inputs' and 'targets', or 'document' and 'summary'"
    with pytest.raises(ValueError, match=f"line 1: key 'inputs' is missing: {expected}$"):
        seqio.TaskRegistry.get("xsum").source.get_dataset(split="train")


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


# RTE ----------------------------------------------------------------------------------------------


def test_rte_rows(tmp_path):
    header = "index\tsentence1\tsentence2\tlabel\n"
    path = tmp_path / "dev.tsv"
    path.write_text(header + "0\tA cat sat.\tA cat.\tentailment\n")
    assert rte.read_rows(str(tmp_path), "dev.tsv") == [
        ("premise: A cat sat. hypothesis: A cat.", "entailment")
    ]
    path.write_text(header + "0\tA cat sat.\tA cat.\tmaybe\n")
    with pytest.raises(ValueError, match=r"dev.tsv, line 2: expected index, two sentences and one"):
        rte.read_rows(str(tmp_path), "dev.tsv")
    path.write_text(header)
    with pytest.raises(ValueError, match="expected a header and rows, got none"):
        rte.read_rows(str(tmp_path), "dev.tsv")


@pytest.mark.parametrize(("split", "count"), [("train", 2490), ("validation", 277)])
def test_rte_has_glue_s_rows(split, count, shared):
    where = shared / "data" / "nli" / "rte"
    if not where.is_dir():
        pytest.skip("needs the RTE files")
    rows = rte.read_rows(str(where), rte.SPLITS[split])
    assert len(rows) == count
    assert {label for _, label in rows} == set(rte.LABELS)


def test_sentences_backwards_are_those_of_the_problem_in_reverse_order():
    task = seqio.TaskRegistry.get("arithmetic_backwards")
    rows = task.source.get_dataset("validation", shuffle=False).as_numpy_iterator()
    problems = seqio.TaskRegistry.get("arithmetic").source.get_dataset("validation", shuffle=False)
    count = 0
    for row, problem in zip(rows, problems.as_numpy_iterator(), strict=True):
        told, backwards = (row[name].decode() for name in ("inputs", "targets"))
        assert problem["inputs"].decode().startswith(f"{told} How many ")
        assert backwards.rstrip(".").split(". ") == told.rstrip(".").split(". ")[::-1]
        count += 1
    assert count == 512
