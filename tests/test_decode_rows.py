"""DECODE_ROWS changes the memory of `train`, `eval` and `infer`, and no number that they write."""

import json
import random

import pytest
from small_runs import step_lines, write_decoder
import small_tokenizers

import gin
from gkd_jax import main
from gkd_jax.training import metrics


LENGTHS = "{'inputs': 12, 'targets': 6}"
ROWS, DECODE_ROWS = 16, 8  # each of eight devices has a slot, which it refills


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a student, a teacher and a file of prompts of different lengths."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = small_tokenizers.train("qwen")
    for seed, name in enumerate(("student", "teacher")):
        write_decoder(folder / name, tokenizer, tokenizer.get_vocab_size() + 3, seed)
    words, rng = ("Ada", "has", "7", "eggs", "\u00fcber"), random.Random(0)
    lines = []
    for _ in range(22):  # the last batch is not full
        prompt, completion = (" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in "ab")
        lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    (folder / "data.jsonl").write_text("".join(lines))
    return folder


def run(command, folder, **settings):
    settings = {
        "MIXTURE_OR_TASK_NAME": folder / "data.jsonl",
        "TASK_FEATURE_LENGTHS": LENGTHS,
        "BATCH_SIZE": ROWS,
        **settings,
    }
    gin.clear_config()
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    main.main([command, f"--gin_file=gin/{'gkd' if command == 'train' else command}.gin", *flags])
    gin.clear_config()


def test_training_and_its_evaluation(folder, tmp_path):
    def trained(name, **more):
        run(
            "train",
            folder,
            MODEL_DIR=tmp_path / name,
            STUDENT_CHECKPOINT=folder / "student",
            TEACHER_CHECKPOINT=folder / "teacher",
            EVAL_FRACTION=0.3,
            EVAL_SPLIT="train",
            TRAIN_STEPS=2,
            **more,
        )
        lines = metrics.read(tmp_path / name / "metrics.jsonl")
        scores = [line["eval/data.jsonl/teacher_divergence"] for line in lines if len(line) == 3]
        return scores, [
            {name: value for name, value in line.items() if name.startswith("train/")}
            for line in step_lines(tmp_path / name)
        ]

    scores, steps = trained("whole")
    assert len(scores) == len(steps) == 2
    evaluation = {"evaluate.EvalConfig.decode_rows": DECODE_ROWS}
    assert trained("refilled", DECODE_ROWS=DECODE_ROWS, **evaluation) == (
        pytest.approx(scores, rel=1e-5),
        [pytest.approx(step, rel=1e-4) for step in steps],
    )


@pytest.mark.parametrize("decoding", ["greedy", "sample"])
def test_inference_and_scores(decoding, folder, tmp_path):
    def decoded(**more):
        common = {"CHECKPOINT": folder / "student", "SPLIT": "train", "DECODING": decoding, **more}
        if decoding == "sample":
            common |= {"evaluate.EvalConfig.num_samples": 2}
        where = tmp_path / str(len(more))
        run("infer", folder, OUTPUT=where / "out.jsonl", **common)
        run("eval", folder, OUTPUT_DIR=where, **common)
        values = json.loads((where / "metrics.json").read_text())["data.jsonl"]
        return values, *((where / f).read_text() for f in ("out.jsonl", "predictions.jsonl"))

    whole = decoded()
    assert decoded(DECODE_ROWS=DECODE_ROWS) == whole
    assert len(whole[1].splitlines()) == (44 if decoding == "sample" else 22)
    assert len(set(whole[1].splitlines())) > 10  # the model does say something
    # Most of its texts have no end within six tokens, and the file says so for those who train.
    assert any(json.loads(line).get("truncated") for line in whole[1].splitlines())
