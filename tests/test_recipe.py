"""Every field of a recipe, also one that is added later, is part of what identifies a run."""

import copy
import dataclasses
import functools
import itertools
import json
import pathlib
import types
import typing

import optax
import pytest
from small_runs import LENGTHS, options

import gin
from gkd_jax import divergences, gkd, losses, rl
from gkd_jax.command_line import gin_files
from gkd_jax.evaluation import evaluate, rewards
from gkd_jax.input.data import DataConfig
from gkd_jax.sampling import SamplingConfig
from gkd_jax.storage import model_card, pretrained
from gkd_jax.text import settings
from gkd_jax.training import optimizers, run_record
from gkd_jax.training.recipe import MAY_CHANGE, Recipe, TaskTeachers, is_below, is_path


MODEL = pretrained.ModelConfig(size="tiny", checkpoint="somewhere")
SEVERAL = DataConfig(task={"one": 4, "two.jsonl": 2}, feature_lengths=LENGTHS, batch_size=6)


def recipe(**more):
    """A recipe with every optional configuration, so that every field can be visited."""
    method = gkd.GKDConfig(
        divergence=divergences.JSD(beta=0.1),
        rl=rl.RLConfig(reward=rewards.Brevity(), alpha=0.5),
        on_policy_fraction=optax.linear_schedule(0.0, 1.0, 10),
    )
    fields = {"method": method, "teacher": MODEL, "evaluation": evaluate.EvalConfig(), **more}
    return options("", steps=3, **fields)["recipe"]


def leaves(description, prefix=""):
    """(dotted name, value) of every field in a description that is not itself a dataclass."""
    for key, value in description.items():
        if isinstance(value, dict) and ("type" in value or key in ("models", "task")):
            yield from leaves(value, f"{prefix}{key}.")
        elif key != "type":
            yield f"{prefix}{key}", value


def changed(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "another" if value != "another" else "one more"


def replaced(description, name, value):
    result = copy.deepcopy(description)
    *parents, last = name.replace("two.jsonl", "two/jsonl").split(".")
    keys = [key.replace("two/jsonl", "two.jsonl") for key in (*parents, last)]
    functools.reduce(dict.__getitem__, keys[:-1], result)[keys[-1]] = value
    return result


# A recipe with each kind of teacher, so that the fields of all kinds are visited.
TEACHERS = (
    MODEL,
    gkd.LiveStudent(),
    gkd.MovingAverage(decay=0.5),
    TaskTeachers(models=dict.fromkeys(SEVERAL.task, MODEL)),
)
DESCRIPTIONS = [settings.describe(recipe(teacher=teacher)) for teacher in TEACHERS[:-1]]
DESCRIPTIONS.append(settings.describe(recipe(teacher=TEACHERS[-1], data=SEVERAL)))
DESCRIPTION = DESCRIPTIONS[0]
LEAVES = {name: value for one in reversed(DESCRIPTIONS) for name, value in leaves(one)}


def description_with(name):
    """The first description that has a field."""
    return next(one for one in DESCRIPTIONS if name in dict(leaves(one)))


def test_every_kind_of_teacher_is_walked():
    (field,) = (field for field in dataclasses.fields(Recipe) if field.name == "teacher")
    assert {type(teacher) for teacher in TEACHERS} == set(typing.get_args(field.type)) - {
        types.NoneType
    }
    for old, new in itertools.permutations(DESCRIPTIONS, 2):  # none can take another's place
        with pytest.raises(ValueError, match=r"another configuration's run: (.*; )?teacher "):
            run_record.changes(pathlib.Path(), about(old), about(new))


def about(description):
    return {"recipe": description, "contents": {}, "process_shards": 1}


def test_the_walk_reaches_every_configuration():
    assert {"data.task", "method.sampling.top_p", "method.divergence.beta", "mesh.fsdp"} <= set(
        LEAVES
    )
    assert len(LEAVES) > 80
    assert json.loads(json.dumps(DESCRIPTION)) == DESCRIPTION  # run.json gives back what it got


@pytest.mark.parametrize("name", LEAVES)
def test_every_field_is_refused_by_name_or_may_change(name, tmp_path):
    old, new = LEAVES[name], changed(LEAVES[name])
    description = description_with(name)
    before, now = about(description), about(replaced(description, name, new))
    if is_below(name, MAY_CHANGE):
        assert run_record.changes(tmp_path, before, now) == [
            {"field": name, "old": old, "new": new}
        ]
        return
    if is_path(name) and old is not None:  # of paths, what they lead to counts
        before["contents"][name] = now["contents"][name] = "a" * 64
        assert run_record.changes(tmp_path, before, now) == []
        now["contents"][name] = "b" * 64
    with pytest.raises(ValueError, match="another configuration") as error:
        run_record.changes(tmp_path, before, now)
    assert name in str(error.value)
    assert "ALLOW_CHANGES" in str(error.value)
    allowed = run_record.fields_named(now, name)
    assert allowed == [name]
    (change,) = run_record.changes(tmp_path, before, now, allowed)
    assert change["field"] == name


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Linear.learning_rate", ["schedule.learning_rate"]),
        ("student/ModelConfig.checkpoint", ["student.checkpoint"]),
        ("ModelConfig.dtype", ["student.dtype", "teacher.dtype"]),
        ("jsd.beta", ["method.divergence.beta"]),
        ("Recipe.optimizer", ["optimizer"]),
        ("Recipe.teacher", ["teacher"]),
    ],
)
def test_a_macro_stands_for_the_fields_that_it_sets(name, fields):
    assert run_record.fields_named(about(DESCRIPTION), name) == fields


def test_an_unknown_field_cannot_be_allowed_to_change():
    with pytest.raises(ValueError, match=r"got 'schedule\.rate'"):
        run_record.fields_named(about(DESCRIPTION), "schedule.rate")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            functools.partial(divergences.jsd, beta=0.1),
            functools.partial(divergences.jsd, beta=0.9),
        ),
        (divergences.forward_kl, divergences.reverse_kl),
        (divergences.JSD(), divergences.JSD(scale="unit")),
        (optax.linear_schedule(0.0, 1.0, 10), optax.linear_schedule(0.0, 1.0, 20)),
        (
            optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.2)], [5]),
            optax.join_schedules([optax.constant_schedule(0.1), optax.constant_schedule(0.3)], [5]),
        ),
        (optimizers.Adafactor(), optimizers.Adafactor(decay_rate=0.9)),
        (optimizers.Adafactor(), optimizers.AdamW()),
        (rewards.Brevity(limit=3), rewards.Brevity(limit=4)),
        (losses.token_mean, losses.sequence_mean),
        (SamplingConfig(), SamplingConfig(top_p=0.9)),
    ],
)
def test_values_that_differ_are_described_otherwise(one, other):
    assert settings.describe(one) != settings.describe(other)
    assert settings.describe(one) == settings.describe(copy.copy(one))


def test_the_same_divergence_is_one_value_however_it_is_given():
    given = (
        divergences.jsd,
        functools.partial(divergences.jsd, beta=0.5),
        divergences.JSD(),
        divergences.JSD,
    )
    found = {json.dumps(settings.describe(gkd.GKDConfig(divergence=d).divergence)) for d in given}
    assert found == {'{"type": "JSD", "beta": 0.5, "scale": "paper"}'}


def test_a_model_card_names_a_divergence_with_its_values(tmp_path):
    def mine(student_logits, teacher_logits, *, k):
        return student_logits

    for divergence, said in (
        (divergences.JSD(beta=0.1), "JSD(beta=0.1, scale=paper)"),
        (functools.partial(mine, k=2), "mine(k=2)"),
    ):
        method = {"divergence": settings.describe(divergence), "on_policy_fraction": 1.0}
        (tmp_path / "run.json").write_text(json.dumps({"recipe": {"method": method}}))
        card = model_card.of_run(tmp_path)
        assert card is not None
        assert f"{said}, on-policy fraction 1.0" in card


def test_what_cannot_be_recorded_is_refused():
    class Opaque:
        def __call__(self, student_logits, teacher_logits):
            return (student_logits - teacher_logits).sum(-1)

    with pytest.raises(ValueError, match="whose settings can be recorded, got"):
        recipe(method=gkd.GKDConfig(divergence=Opaque()))


def test_an_optimizer_s_class_is_its_defaults_and_sft_has_no_teacher():
    sft = gkd.GKDConfig(on_policy_fraction=0.0, divergence=None)
    found = recipe(optimizer=optimizers.adamw, method=sft)
    assert found.optimizer == optimizers.AdamW()
    assert found.teacher is None


def test_no_examples_are_no_evaluation():
    assert recipe(evaluation=evaluate.EvalConfig(num_examples=0)).evaluation is None


def test_every_type_is_checked_where_it_is_declared():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        number: float = 1.0
        count: int | None = None
        words: tuple[str, ...] = ()
        on: bool = False

    settings.check_types(Settings(number=1, count=2, words=("a",)))
    for wrong, said in (
        ({"number": "3e-4"}, "number must be a number, got '3e-4'"),
        ({"number": 1e400}, "number must be a number, got inf"),
        ({"number": float("nan")}, "number must be a number, got nan"),
        ({"count": 2.5e3}, "count must be an integer or None, got 2500.0"),
        ({"count": True}, "count must be an integer or None, got True"),
        ({"words": "abc"}, "words must be a tuple, got 'abc'"),
        ({"on": "yes"}, "on must be True or False, got 'yes'"),
    ):
        with pytest.raises(settings.SettingError, match=said) as error:
            settings.check_types(Settings(**wrong))
        assert error.value.settings == (f"Settings.{next(iter(wrong))}",)


def test_a_macro_of_a_function_stands_for_what_the_function_makes():
    """TEACHER is an argument of a function, and a size chooses the learning rate of XSum."""
    gin.clear_config()
    needed = {"MODEL_DIR": "x", "STUDENT_CHECKPOINT": "a", "TEACHER_CHECKPOINT": "b"}
    gin_files.parse(["gin/paper/xsum/gkd.gin"], [*needed.items()], [])
    fields = {name: gin_files.fields_of(name) for name in ("TEACHER", "STUDENT_SIZE", "BETA")}
    gin.clear_config()
    assert fields == {
        "TEACHER": ["Recipe.teacher"],
        "STUDENT_SIZE": ["Linear.learning_rate", "student/ModelConfig.size"],
        "BETA": ["jsd.beta"],
    }


def test_the_name_of_a_task_without_a_file_counts(tmp_path):
    """In each direction, since a registered task has no content to compare."""
    named, file = (
        about(replaced(DESCRIPTION, "data.task", task)) for task in ("xsum", "./a.jsonl")
    )
    file["contents"]["data.task"] = "a" * 64
    other = about(replaced(DESCRIPTION, "data.task", "wmt_t2t_ende_v003"))
    for before, now in ((named, other), (named, file), (file, named)):
        with pytest.raises(ValueError, match=r"another configuration's run: data\.task '"):
            run_record.changes(tmp_path, before, now)
