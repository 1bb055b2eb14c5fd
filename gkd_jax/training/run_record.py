"""`run.json`: the record of a run, which identifies it and lets it be repeated.

`describe_run` makes the record and says what is in it. `changes` compares it with the record that a
MODEL_DIR holds and refuses to mix two runs.
"""

from collections.abc import Iterator, Mapping, Sequence
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from typing import Any

import jax
import numpy as np

from gkd_jax import gkd
from gkd_jax.batch import Batch
from gkd_jax.evaluation import made_by
from gkd_jax.input import data, named_tasks, teacher_cache
from gkd_jax.models import lm
from gkd_jax.storage import checkpoints, content, saved_model
from gkd_jax.text import files, task_names, vocabularies
from gkd_jax.training.program import Program
from gkd_jax.training.recipe import MAY_CHANGE, Recipe, describe, differences, is_below, is_path
from gkd_jax.training.source import Source


def describe_run(
    program: Program,
    source: Source,
    *,
    name: str,
    macros: Mapping[str, str] = {},
    commits: Mapping[str, str] = {},
) -> dict[str, Any]:
    """Returns the contents of run.json, which tell the run from others and let it be repeated.

    Returns:
        All keys of run.json. `recipe`, `contents` and `process_shards` identify the run: `changes`
        compares them. What `RunFolder` learns as the run begins is empty here:

        | key | value |
        |---|---|
        | `name` | the name of the run within a study, or of its folder |
        | `recipe` | the description of the recipe (`recipe.describe`) |
        | `contents` | hashes of the vocabulary, checkpoints and files, by the recipe's fields |
        | `parameters` | the number of parameters of the student and of the teacher |
        | `targets_made_by` | the records that `infer` wrote beside the training files, if any |
        | `process_shards` | the number of parts of the data that processes read |
        | `macros` | the gin macros as they are written |
        | `versions` | the versions of packages |
        | `commit` | the commit of this package's checkout |
        | `devices` | the number and the kind of the devices |
        | `hub` | the commits of what was downloaded from the Hugging Face hub, by name |
        | `changes` | of every start that changed the recipe: the step, the field, both values |
        | `first_batch` | the hash of the first batch (`batch_hash`) |
    """
    recipe = program.recipe
    paths = (named_tasks.file_of(task, recipe.data.split) for task in recipe.data.task_rows)
    made = [
        found for path in dict.fromkeys(paths) if path and (found := made_by.read_made_by(path))
    ]
    teacher = gkd.teacher_now(program.learner, program.state, program.teacher)
    return {
        "name": name,
        "recipe": describe(recipe),
        "contents": _contents(recipe, source),
        "parameters": {
            "student": lm.num_params(program.state.params),
            "teacher": lm.num_params(teacher) if teacher else None,
        },
        "targets_made_by": made[0] if len(made) == 1 else made or None,
        "process_shards": data.process_shard(recipe.data, program.mesh).num_shards,
        "macros": dict(macros),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("gkd_jax", "jax", "flax", "optax", "orbax-checkpoint", "seqio")
        },
        "commit": _commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "hub": dict(commits),
        "changes": [],
        "first_batch": None,
    }


def _contents(recipe: Recipe, source: Source) -> dict[str, str]:
    """Returns the hash of the content behind the path in each field, by the field's name."""
    found = {"data.vocabulary": vocabularies.content_hash(source.vocabulary)}
    for name, model in recipe.models.items():
        if model.checkpoint is not None:
            found[f"{name}.checkpoint"] = content.content_id(model.checkpoint)
    has_one_task = isinstance(recipe.data.task, str)
    for task in recipe.data.task_rows:
        hashed = named_tasks.content_of(task, recipe.data.split)
        if hashed is not None:
            found["data.task" if has_one_task else f"data.task.{task}"] = hashed
    if recipe.data.teacher_cache is not None:
        about = json.dumps(teacher_cache.read_about(recipe.data.teacher_cache), sort_keys=True)
        found["data.teacher_cache"] = hashlib.sha256(about.encode()).hexdigest()
    return found


def batch_hash(batch: Batch) -> str:
    """Returns the SHA-256 of a batch's ids and weights, by which streams are compared."""
    digest = hashlib.sha256()
    for array in (batch.inputs, batch.targets, batch.weights, batch.teacher_inputs):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def read(folder: files.AnyPath) -> dict[str, Any] | None:
    """Reads the run.json of a MODEL_DIR that holds a checkpoint; None if there is no checkpoint.

    A MODEL_DIR without a checkpoint is free to use, so a start that failed before its first
    checkpoint does not block the folder.

    Raises:
        ValueError: if all checkpoints of the run are damaged, or its run.json cannot be read.
    """
    path = folder / "run.json"
    if not saved_model.saved_steps(folder):
        aside = folder / checkpoints.DAMAGED
        if aside.is_dir() and any(aside.iterdir()):
            raise ValueError(
                f"MODEL_DIR {str(folder)!r} has damaged checkpoints in {checkpoints.DAMAGED}/ and "
                "no other: delete the folder to begin again, or take another MODEL_DIR"
            )
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"MODEL_DIR {str(folder)!r} holds checkpoints of a run whose run.json cannot be read "
            f"({error}): take another MODEL_DIR"
        ) from None


def changes(
    folder: files.AnyPath,
    before: dict[str, Any],
    about: dict[str, Any],
    allowed: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Returns the changes that this start makes to the run in a MODEL_DIR.

    `before` is the run.json there and `about` the one that this start would write. The recipe's
    fields in `allowed` may change, besides those of `recipe.MAY_CHANGE`.

    Returns:
        `{"field", "old", "new"}` for each field that differs and may.

    Raises:
        ValueError: if other fields differ; the message lists them all with old and new values.
    """
    found, refused = [], []
    for name, old, new in _all_differences(before, about):
        if is_below(name, MAY_CHANGE) or is_below(name, tuple(allowed)):
            found.append({"field": name, "old": old, "new": new})
        else:
            refused.append((name, old, new))
    if refused:
        listed = "; ".join(f"{name} {old!r} -> {new!r}" for name, old, new in refused)
        advice = "Take another MODEL_DIR, or delete it"
        names = [name for name, _, _ in refused]
        if "process_shards" in names:
            advice += "; with shard_by_process, start as many processes as before"
        else:
            fields = ", ".join(map(repr, names))
            advice += f'. To change it on purpose: --gin.ALLOW_CHANGES="({fields},)"'
        raise ValueError(
            f"MODEL_DIR {str(folder)!r} holds another configuration's run: {listed}. {advice}"
        )
    return found


def _all_differences(
    before: dict[str, Any], about: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    before = _with_places_of(before, about)
    was, now = before.get("contents", {}), about["contents"]
    for name, old, new in differences(before.get("recipe"), about["recipe"]):
        # Contents are compared below. Those of the vocabulary are known even without a path, and
        # they include its extra ids.
        known = "data.vocabulary" if name == "data.extra_ids" else name
        if is_path(known) and known in was and known in now:
            continue
        # Where both runs have a path, the contents behind the paths are compared below. A task that
        # is no file has a name in place of a path.
        has_name = name == "data.task" and not (name in was and name in now)
        if not is_path(name) or old is None or new is None or has_name:
            yield name, old, new
    values = {name: value for name, _, value in _fields(about["recipe"])}
    for name in sorted(was.keys() & now.keys()):
        if was[name] != now[name]:
            value = values.get(name)
            # The value of a field such as "data.task.arithmetic" is a number of rows, no path.
            where = value if isinstance(value, str) else name
            yield name, f"content {was[name][:12]}", f"{where} (content {now[name][:12]})"
    if before.get("process_shards", 1) != about["process_shards"]:
        yield "process_shards", before.get("process_shards", 1), about["process_shards"]


def _with_places_of(before: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Returns the record `before` with the paths of `about` where files of several tasks moved.

    The paths of several tasks are keys, of their rows and of their teachers. The tasks are matched
    in their order, which is that of their rows in a batch.
    """
    was, now = ((one.get("recipe") or {}).get("data", {}).get("task") for one in (before, about))
    if not isinstance(was, dict) or not isinstance(now, dict) or len(was) != len(now):
        return before
    contents, moved = before.get("contents", {}), {}
    for old, new in zip(was, now, strict=True):
        are_files = f"data.task.{old}" in contents and f"data.task.{new}" in about["contents"]
        if are_files and task_names.split(old)[1] == task_names.split(new)[1]:
            for key in ("{}", "data.task.{}", "teacher.models.{}.checkpoint"):
                moved[key.format(old)] = key.format(new)

    def renamed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {moved.get(key, key): renamed(item) for key, item in value.items()}

    return {**before, "recipe": renamed(before["recipe"]), "contents": renamed(contents)}


def fields_named(about: dict[str, Any], name: str) -> list[str]:
    """Returns the recipe fields that a name of ALLOW_CHANGES stands for.

    Args:
        name: a dotted field, or gin's "[scope/]Type.field". "Linear.learning_rate" stands for
            `schedule.learning_rate`, "student/ModelConfig.checkpoint" for `student.checkpoint`.

    Raises:
        ValueError: if the recipe has no such field.
    """
    scope, _, selector = name.rpartition("/")
    found = [
        path
        for path, kind, _ in _fields(about["recipe"])
        if name == path
        or (
            f"{kind}.{path.rpartition('.')[2]}".lower() == selector.lower()
            and (scope not in ("student", "teacher") or path.startswith(f"{scope}."))
        )
    ]
    if not found:
        raise ValueError(
            f"ALLOW_CHANGES names a macro or a field of the recipe, such as "
            f"'schedule.learning_rate', got {name!r}"
        )
    return found


def _fields(description: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yields (dotted name, type of the dataclass that holds it, value) for every field."""
    for key, value in description.items():
        if key == "type":
            continue
        yield f"{prefix}{key}", str(description.get("type")), value
        if isinstance(value, dict):
            yield from _fields(value, f"{prefix}{key}.")


def _commit() -> str | None:
    """Returns the commit of this package's checkout; None if the package is installed."""
    folder = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
