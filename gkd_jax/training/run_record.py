"""`run.json`: what a run was, to tell it from others, to refuse to mix them, and to repeat it."""

from collections.abc import Callable, Mapping
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
from typing import Any

import jax
import numpy as np
import optax

from gkd_jax import gkd
from gkd_jax.batch import Batch
from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.input import data
from gkd_jax.models import t5
from gkd_jax.storage import checkpoints
from gkd_jax.storage.pretrained import Model
from gkd_jax.text import files, vocabularies
from gkd_jax.training.program import Program, Trainer, name_of, number_or_name


def describe(
    program: Program,
    *,
    name: str,
    student: Model,
    teacher: Model | None,
    data_config: data.DataConfig,
    optimizer: Callable[..., optax.GradientTransformation],
    trainer: Trainer,
    evaluation: EvalConfig,
    macros: Mapping[str, str],
) -> dict[str, Any]:
    """What a run was, for `run.json`: enough to tell it from others, and to run it again."""

    def model(chosen: Model | None, params) -> dict[str, Any] | None:
        if chosen is None or params is None:
            return None
        return {
            "parameters": t5.num_params(params),
            "size": chosen.size,
            "checkpoint": chosen.checkpoint,
            "dropout_rate": chosen.dropout_rate,
            "dtype": chosen.dtype,
        }

    return {
        "name": name,
        "method": {**_method(program.method, macros), "sample_ahead": trainer.sample_ahead},
        "optimizer": name_of(optimizer),
        "student": model(student, program.state.params),
        "teacher": model(teacher, program.teacher),
        "data": {
            "task": data_config.task,
            "num_examples": data_config.num_examples,
            "teacher_cache": data_config.teacher_cache,
            "batch_size": data_config.batch_size,
            "process_shards": data.process_shard(data_config, program.mesh).num_shards,
            "eval_task": evaluation.task or data_config.task,
            "eval_split": evaluation.split,
            "eval_decoding": evaluation.decoding,
            "eval_temperature": evaluation.temperature,
            "vocabulary": vocabularies.content_hash(program.vocabulary),
        },
        "train_steps": trainer.train_steps,
        "seed": trainer.seed,
        "macros": dict(macros),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("gkd_jax", "jax", "flax", "optax", "orbax-checkpoint", "seqio")
        },
        "commit": _commit(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _method(method: gkd.GKDConfig, macros: Mapping[str, str]) -> dict[str, Any]:
    return {
        "divergence": name_of(method.divergence),
        "beta": _beta(method.divergence, macros),
        "on_policy_fraction": number_or_name(method.on_policy_fraction),
        "mixing": method.mixing,
        "teacher_temperature": number_or_name(method.teacher_temperature),
        "student_temperature": method.student_temperature,
        "sampling_temperature": method.sampling.temperature,
        "num_samples": method.num_samples,
        "rl_alpha": method.rl.alpha if method.rl else None,
        "reward": name_of(method.rl.reward) if method.rl else None,
    }


def write(folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes run.json. What a run before a resume found out about its first batch stays."""
    path = folder / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        about = {**{key: before[key] for key in ("first_batch",) if key in before}, **about}
    files.write_whole(path, json.dumps(about, indent=1) + "\n")


def batch_hash(batch: Batch) -> str:
    """SHA-256 of the ids that a process reads: runs with the same see the same data in order."""
    digest = hashlib.sha256()
    for array in (batch.inputs, batch.targets, batch.weights):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_same(folder: pathlib.Path, about: dict[str, Any]) -> None:
    """Refuses a MODEL_DIR that another configuration has begun; lengths and meshes may differ.

    Raises:
        ValueError: naming every value that is not as it was.
    """
    path = folder / "run.json"
    if not path.exists() or not (folder / checkpoints.FOLDER).is_dir():
        return
    before = json.loads(path.read_text())
    before.get("data", {}).setdefault("process_shards", 1)  # of before there were any
    compared = ("method", "optimizer", "student", "teacher", "data", "seed")
    was, now = ({key: x.get(key) for key in compared} for x in (before, about))
    changed = [
        f"{name} {old!r} -> {new!r}"
        for name, old, new in _differences(was, now)
        if not name.startswith("data.eval_")
    ]
    if changed:
        advice = "Take another MODEL_DIR, or delete it"
        if any(text.startswith("data.process_shards") for text in changed):
            advice += "; with shard_by_process, start as many processes as before"
        raise ValueError(
            f"MODEL_DIR {str(folder)!r} holds another configuration's run: "
            f"{'; '.join(changed)}. {advice}"
        )


def _differences(was: Any, now: Any, name: str = ""):
    """(name, old, new) of leaves that both have and that are not equal."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in was.keys() & now.keys():
            yield from _differences(was[key], now[key], f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _beta(divergence: Any, macros: Mapping[str, str]) -> float | None:
    """Of jsd: given by `functools.partial`, or by the macro BETA."""
    if name_of(divergence) != "jsd":
        return None
    beta = getattr(divergence, "keywords", {}).get("beta", macros.get("BETA"))
    return None if beta is None else float(beta)


def _commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed one."""
    folder = pathlib.Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
