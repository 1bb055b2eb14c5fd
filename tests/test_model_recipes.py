"""Tests that the recipes of gin/models build from sizes alone, on a mesh of 8 devices."""

import pathlib

import pytest

import gin
from gkd_jax.command_line import gin_files
from gkd_jax.models import lm
from gkd_jax.training import program, vocabulary_size


pytestmark = pytest.mark.usefixtures("fresh_gin")
ROOT = pathlib.Path(__file__).resolve().parent.parent
# The published numbers of parameters of the student and of the teacher. Gemma-3-12B has 64 more
# embedding rows, of 3,840 numbers each, than the 1B model, and no token has them.
PARAMETERS = {
    "qwen3_8b_to_0.6b": (596_049_920, 8_190_735_360),
    "llama3_8b_to_1b": (1_235_814_400, 8_030_261_248),
    "gemma3_12b_to_1b": (999_885_952, 11_766_034_176 - 64 * 3840),
}


def recipe_of(name):
    """Returns the recipe that `gkd-jax precompile` compiles."""
    from gkd_jax.command_line import commands
    from gkd_jax.training.recipe import Recipe

    path = str(ROOT / "gin" / "models" / f"{name}.gin")
    gin_files.parse([path], [], [str(ROOT)], stand_ins=commands.STAND_INS)
    return gin.get_configurable(Recipe)(evaluation=None)


def test_all_recipes_are_tested():
    files = {path.stem for path in (ROOT / "gin" / "models").glob("*_to_*.gin")}
    assert files == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_recipe_builds_from_sizes_alone(name):
    recipe = recipe_of(name)
    built = program.build(recipe, vocabulary_size.num_pieces_of(recipe))
    assert built.teacher is not None
    found = lm.num_params(built.state.params), lm.num_params(built.teacher)
    assert found == PARAMETERS[name]
    assert (recipe.data.batch_size, recipe.data.shapes()) == (64, [(1024, 1024)])
    assert dict(built.mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_command_line_needs_no_checkpoint_and_no_data(capfd):
    from gkd_jax import main

    gin_file = f"--gin_file={ROOT}/gin/models/qwen3_8b_to_0.6b.gin"
    main.main(["precompile", "--topology=cpu", gin_file, "--dry_run"])
    assert "all is well" in capfd.readouterr().err
    gin.clear_config()
    with pytest.raises(SystemExit) as error:
        main.main(["train", gin_file, "--dry_run"])
    assert error.value.code == 2
    message = capfd.readouterr().err.splitlines()[-1]
    for macro in ("MODEL_DIR", "MIXTURE_OR_TASK_NAME", "STUDENT_CHECKPOINT", "TEACHER_CHECKPOINT"):
        assert f"{macro} is required" in message
