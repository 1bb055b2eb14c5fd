"""Every recipe of gin/paper builds from the shapes of public checkpoints, without their files."""

import ast
import copy
import pathlib
import re

import jax
import pytest

import gin
from gkd_jax import main
from gkd_jax.training import per_size


pytestmark = pytest.mark.usefixtures("fresh_gin")
ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "gin" / "paper").rglob("*.gin"))
NAMES = [path.relative_to(ROOT).as_posix() for path in RECIPES]
CHECKPOINTS = ("STUDENT_CHECKPOINT", "TEACHER_CHECKPOINT", "NLI_CHECKPOINT")
# Of T5 1.1 with 32,128 ids, as published: base 248 M, large 783 M, XL 2.85 B.
PARAMETERS = {"base": "247,577,856", "large": "783,150,080", "xl": "2,849,757,184"}


def dry_run(name, tmp_path, *more):
    text = (ROOT / name).read_text()
    needed = re.findall(r"^(\w+) = %gin.REQUIRED", text, re.MULTILINE)
    flags = [f"--gin.MODEL_DIR='{tmp_path}/run'"]
    flags += [f"--gin.{macro}='gs://bucket/{macro}'" for macro in needed if macro in CHECKPOINTS]
    if "MIXTURE_OR_TASK_NAME" in needed:
        outputs = tmp_path / "teacher.jsonl"
        outputs.write_text('{"inputs": "a", "targets": "b"}\n')
        flags.append(f"--gin.MIXTURE_OR_TASK_NAME='{outputs}'")
    if "flan" in name:
        flags.append(f"--gin.DATA_DIR='{tmp_path}'")
    main.main(["train", f"--gin_file={name}", *flags, "--dry_run", *more])


@pytest.mark.parametrize(
    "path", sorted((ROOT / "gin" / "bench").glob("*.gin")), ids=lambda path: path.stem
)
def test_every_benchmark_builds(path, capsys):
    assert main.main(["bench", f"--gin_file={path}", "--dry_run"]) in (0, None)
    assert "all is well" in capsys.readouterr().err


def test_of_several_processes_one_says_that_all_is_well(monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    main.main(["bench", f"--gin_file={ROOT}/gin/bench/config1.gin", "--dry_run"])
    assert "all is well" not in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds(name, tmp_path, capfd):
    dry_run(name, tmp_path)
    plan = capfd.readouterr().err
    size = "large" if "self_distillation" in name else "base"
    assert f"student    {PARAMETERS[size]} parameters" in plan
    if not re.search(r"/(sft|seqkd)\.gin$", name):
        size = {"self_distillation": "large", "rl": "base" if "rlef" in name else "xl"}.get(
            pathlib.Path(name).parent.name, "xl"
        )
        assert f"teacher    {PARAMETERS[size]} parameters" in plan
    assert not (tmp_path / "run").exists()


def test_the_student_s_size_is_a_macro(tmp_path, capfd):
    dry_run("gin/paper/xsum/gkd.gin", tmp_path, "--gin.STUDENT_SIZE='large'")
    plan = capfd.readouterr().err
    assert f"student    {PARAMETERS['large']} parameters" in plan
    assert "not checked: gs://bucket/STUDENT_CHECKPOINT" in plan


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_says_how_to_run_it_and_what_to_expect(name):
    text = (ROOT / name).read_text()
    header = text.split("include ")[0]
    assert f"gkd-jax train --gin_file={name} " in header
    assert "Expected" in header
    assert "TPUv3" in header or "Hardware" in header


@pytest.mark.parametrize("name", [x for x in NAMES if "gkd-jax infer" in (ROOT / x).read_text()])
def test_headers_that_decode_name_the_task_s_lengths(name, tmp_path):
    text = (ROOT / name).read_text()
    lengths = re.search(r"TASK_FEATURE_LENGTHS=\"(\{.*?\})\"", text)
    assert lengths is not None
    dry_run(name, tmp_path)
    assert macro("TASK_FEATURE_LENGTHS") == ast.literal_eval(lengths[1])


def macro(name):
    """The value of a macro, computed if it is a reference such as `@per_size.by_size()`."""
    return copy.deepcopy(gin.query_parameter(f"%{name}"))


# Tables A.1 to A.4 by column: steps, batch, warm-up, cool-down, inputs, targets, dropout, teacher's
# temperature; then the learning rates of small, base and large (A.1: small 0.001).
TABLES = {
    "xsum": (40_000, 32, 2_000, 10_000, 1024, 64, 0.0, 1.0, (1e-3, 3e-4, 3e-4)),
    "wmt": (100_000, 32, 5_000, 0, 80, 80, 0.0, 1.0, (3e-4, 3e-4, 3e-4)),
    "gsm8k": (40_000, 32, 2_000, 10_000, 512, 320, 0.05, 0.1, (3e-4, 3e-4, 3e-4)),
    "flan": (50_000, 128, 0, 0, 2048, 256, 0.0, 1.0, (1e-4, 1e-4, 1e-4)),
}
STUDENTS = ("small", "base", "large")


@pytest.mark.parametrize("task", TABLES)
def test_main_rows_have_the_paper_s_hyperparameters_at_every_size(task, tmp_path):
    *expected, rates = TABLES[task]
    for size, rate in zip(STUDENTS, rates, strict=True):
        gin.clear_config()
        dry_run(f"gin/paper/{task}/gkd.gin", tmp_path, f"--gin.STUDENT_SIZE='{size}'")
        lengths = macro("TASK_FEATURE_LENGTHS")
        found = [macro(x) for x in ("TRAIN_STEPS", "BATCH_SIZE", "WARMUP_STEPS", "COOLDOWN_STEPS")]
        found += [lengths["inputs"], lengths["targets"]]
        found += [macro(x) for x in ("DROPOUT_RATE", "TEACHER_TEMPERATURE")]
        assert (found, macro("LEARNING_RATE")) == (expected, rate), size


@pytest.mark.parametrize("name", [name for name in NAMES if "/xsum/" in name])
def test_small_xsum_students_have_their_own_rate_except_with_the_reverse_kl(name, tmp_path):
    """Table A.1, and "we default to using 0.0003 for all models when using reverse KL"."""
    dry_run(name, tmp_path, "--gin.STUDENT_SIZE='small'")
    assert macro("LEARNING_RATE") == 1e-3
    gin.clear_config()
    dry_run(name, tmp_path, "--gin.STUDENT_SIZE='small'", "--gin.LEARNING_RATE=0.5")
    assert macro("LEARNING_RATE") == 0.5  # what is given wins
    if not name.endswith(("sft.gin", "seqkd.gin")):
        gin.clear_config()
        reverse = "--gin.DIVERGENCE=@divergences.reverse_kl"
        dry_run(name, tmp_path, "--gin.STUDENT_SIZE='small'", reverse)
        assert macro("LEARNING_RATE") == 3e-4


# App. A.3: steps of SFT for small, base, large and XL.
SFT_STEPS = {
    "xsum": (100_000, 50_000, 38_000, 8_000),
    "wmt": (250_000, 250_000, 110_000, 50_000),
    "gsm8k": (10_000, 10_000, 10_000, 10_000),
}


@pytest.mark.parametrize("task", SFT_STEPS)
def test_sft_has_the_paper_s_steps_at_every_size(task, tmp_path, capfd):
    for size, steps in zip((*STUDENTS, "xl"), SFT_STEPS[task], strict=True):
        gin.clear_config()
        dry_run(f"gin/paper/{task}/sft.gin", tmp_path, f"--gin.STUDENT_SIZE='{size}'")
        assert macro("TRAIN_STEPS") == steps
        assert f"steps      {steps}\n" in capfd.readouterr().err


@pytest.mark.parametrize("name", [name for name in NAMES if re.search(r"/(sft|seqkd)\.gin$", name)])
def test_cross_entropy_is_a_mean_over_tokens_and_divergences_over_sequences(name, tmp_path, capfd):
    dry_run(name, tmp_path)
    assert "loss       cross-entropy, token_mean," in capfd.readouterr().err
    gin.clear_config()
    dry_run(f"{name.rpartition('/')[0]}/gkd.gin", tmp_path)
    assert ", sequence_mean," in capfd.readouterr().err


def test_rlef_regularizes_with_the_reverse_kl_to_the_student_it_starts_from(tmp_path, capfd):
    dry_run("gin/paper/rl/rlef.gin", tmp_path)
    assert "loss       reverse_kl," in capfd.readouterr().err
    assert macro("TEACHER_CHECKPOINT") == macro("STUDENT_CHECKPOINT")
    assert macro("NLI_LABEL") == "1"


def test_a_size_without_a_setting_is_refused():
    with pytest.raises(ValueError, match=r"one of the sizes small, base, got 'huge'"):
        per_size.by_size("huge", {"small": 1, "base": 2})
