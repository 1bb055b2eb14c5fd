"""From two Hugging Face folders and a file of chats to a folder that transformers loads.

pytest -m slow tests/test_chat.py
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

from conftest import COMPILE_FAST
import jax
import numpy as np
import pytest
import small_tokenizers
import torch
import transformers

from gkd_jax import load_model
from gkd_jax.training import metrics


ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, SAVE_PERIOD, ANSWER = 20, 5, 12
SIZES = {
    "student": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "teacher": {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6},
}
WORDS = ("Ada", "has", "seven", "eggs", "gives", "three", "to", "Ben", "how", "many", "?")


def gkd_jax(*arguments, wait=True):
    """Starts a command on one device; its output once it has ended well."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gkd_jax", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": COMPILE_FAST},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if not wait:
        return process
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def write_model(folder, tokenizer_folder, num_rows, sizes):
    """A Qwen3 of random weights beside the tokenizer's files."""
    torch.manual_seed(len(sizes) + sizes["hidden_size"])
    config = transformers.Qwen3Config(
        vocab_size=num_rows,
        intermediate_size=2 * sizes["hidden_size"],
        num_key_value_heads=2,
        head_dim=8,
        # A tied head of random weights would repeat the last token; small weights would leave ties.
        tie_word_embeddings=False,
        initializer_range=0.2,
        **sizes,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for name in os.listdir(tokenizer_folder):
        shutil.copy(tokenizer_folder / name, folder / name)
    return folder


def write_chats(path, count=200):
    """Chats of one to three turns, the last of which is the user's in every second line."""
    rng = random.Random(0)

    def turn(role):
        return {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))}

    with path.open("w") as file:
        for index in range(count):
            roles = ["user", *(["assistant", "user"] * rng.randint(0, 1))]
            roles += ["assistant"] * (index % 2)
            file.write(json.dumps({"messages": [turn(role) for role in roles]}) + "\n")
    return path


@pytest.fixture(params=["small", "qwen3"])
def folders(request, tmp_path):
    """(student, teacher), with the project's own tokenizer or Qwen3's."""
    tokenizer_folder, num_rows = tmp_path / "tokenizer", 448
    if request.param == "small":
        small_tokenizers.write(tokenizer_folder, "qwen")
    else:
        tokenizer_folder = request.getfixturevalue("shared") / "tokenizers" / "qwen3"
        num_rows = 151_936
    return [
        write_model(tmp_path / name, tokenizer_folder, num_rows, sizes)
        for name, sizes in SIZES.items()
    ]


def train(folders, chats, model_dir, wait=True):
    student, teacher = folders
    settings = {
        "MODEL_DIR": model_dir,
        "MIXTURE_OR_TASK_NAME": chats,
        "STUDENT_CHECKPOINT": student,
        "TEACHER_CHECKPOINT": teacher,
        "TASK_FEATURE_LENGTHS": {"inputs": 48, "targets": ANSWER},
        "TRAIN_STEPS": STEPS,
        "BATCH_SIZE": 4,
        "LEARNING_RATE": 1e-3,
        "WARMUP_STEPS": 2,
        "SAVE_PERIOD": SAVE_PERIOD,
        "EVAL_PERIOD": None,
        "EVAL_NUM_EXAMPLES": 4,
        "DTYPE": "float32",
    }
    flags = [f"--gin.{name}={value}" for name, value in settings.items()]
    return gkd_jax("train", "--gin_file=gin/gkd_chat.gin", *flags, wait=wait)


def kill_after(process, path, lines):
    """SIGKILL once a file has so many lines."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and len(path.read_bytes().splitlines()) >= lines:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def losses(model_dir):
    return metrics.values_by_step(model_dir / "metrics.jsonl", "train/loss")


def their_answers(folder, prompts):
    """transformers' greedy answers to chats; the folder says which ids no token has."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for messages in prompts:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=ANSWER,
        )
        yield tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.slow
def test_chats_are_distilled_through_a_kill_and_taken_home(folders, tmp_path):
    chats, run = write_chats(tmp_path / "chats.jsonl"), tmp_path / "run"
    process = train(folders, chats, run, wait=False)
    kill_after(process, run / "metrics.jsonl", lines=2 * SAVE_PERIOD + 3)
    output = train(folders, chats, run)
    assert re.search(r"resumed from step (5|10)\b", output), output
    train(folders, chats, tmp_path / "uninterrupted")
    found, expected = (load_model(str(tmp_path / name))[1] for name in ("run", "uninterrupted"))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert losses(run) == losses(tmp_path / "uninterrupted")
    assert len(losses(run)) == STEPS

    gkd_jax("convert", f"--input={run}", f"--output={tmp_path / 'home'}", "--to=hf")
    ours = tmp_path / "ours.jsonl"
    gkd_jax(
        *("infer", "--gin_file=gin/infer.gin", f"--gin.CHECKPOINT={run}", f"--gin.OUTPUT={ours}"),
        *(f"--gin.MIXTURE_OR_TASK_NAME={chats}", "--gin.SPLIT=train", "--gin.BATCH_SIZE=8"),
        f"--gin.TASK_FEATURE_LENGTHS={{'inputs': 48, 'targets': {ANSWER}}}",
        "--gin.NUM_EXAMPLES=8",
    )
    rows = [json.loads(line) for line in ours.read_text().splitlines()]
    prompts, answers = zip(
        *((row["messages"][:-1], row["messages"][-1]["content"]) for row in rows), strict=True
    )
    assert len(set(answers)) > 4
    assert list(their_answers(tmp_path / "home", prompts)) == list(answers)

    gkd_jax("report", str(run), f"--output={tmp_path / 'report'}")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "chats.jsonl" in page
    assert "reverse KL" in page or "reverse_kl" in page
