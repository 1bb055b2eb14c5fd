"""Every recipe of gin/paper builds from the public checkpoints' shapes, without their files."""

import pathlib
import re

import pytest

import gin
from gkd_jax import main


ROOT = pathlib.Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "gin" / "paper").rglob("*.gin"))
NAMES = [path.relative_to(ROOT).as_posix() for path in RECIPES]
CHECKPOINTS = ("STUDENT_CHECKPOINT", "TEACHER_CHECKPOINT", "NLI_CHECKPOINT")
# Of T5 1.1 with 32,128 ids, as published: base 248 M, large 783 M, XL 2.85 B.
PARAMETERS = {"base": "247,577,856", "large": "783,150,080", "xl": "2,849,757,184"}


@pytest.fixture(autouse=True)
def _fresh_gin():
    gin.clear_config()
    yield
    gin.clear_config()


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


def test_main_rows_have_the_paper_s_hyperparameters(tmp_path):
    """Tables A.1 to A.4, column by column."""
    table = {
        "xsum": (40_000, 32, 3e-4, 2_000, 10_000, 1024, 64, 0.0, 1.0),
        "wmt": (100_000, 32, 3e-4, 5_000, 0, 80, 80, 0.0, 1.0),
        "gsm8k": (40_000, 32, 3e-4, 2_000, 10_000, 512, 320, 0.05, 0.1),
        "flan": (50_000, 128, 1e-4, 0, 0, 2048, 256, 0.0, 1.0),
    }
    for task, expected in table.items():
        gin.clear_config()
        dry_run(f"gin/paper/{task}/gkd.gin", tmp_path)
        names = ["TRAIN_STEPS", "BATCH_SIZE", "LEARNING_RATE", "WARMUP_STEPS", "COOLDOWN_STEPS"]
        lengths = gin.query_parameter("%TASK_FEATURE_LENGTHS")
        found = [gin.query_parameter(f"%{name}") for name in names]
        found += [lengths["inputs"], lengths["targets"]]
        found += [gin.query_parameter(f"%{x}") for x in ("DROPOUT_RATE", "TEACHER_TEMPERATURE")]
        assert tuple(found) == expected, task
