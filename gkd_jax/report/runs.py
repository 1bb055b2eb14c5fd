"""Reading run folders: metrics.jsonl, run.json, decoded rows, and what `gkd-jax eval` left.

Nothing here raises for what a file holds. A run that crashed, or that an older version wrote, still
belongs in the report: what cannot be read is left out and named in `Run.problems`.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any

from gkd_jax.report.record import Evaluation, Method, Model, Run, Setting, finite


# Checkpoints hold many files and no runs.
_NOT_SEARCHED = frozenset({"checkpoints", "tensorboard", "eval", "evals"})
_NUMBERED = re.compile(r"(\D*)(\d*)")
_TEMPERATURE = re.compile(r"(?:^|[^a-z])(?:t|temp|temperature)[_=-]?(\d+(?:\.\d+)?)$")


def find(run_dirs: Sequence[str]) -> list[Run]:
    """Every run below `run_dirs`, each folder once, in the order of their paths.

    Raises:
        FileNotFoundError: one of them is no folder, or none of them holds a metrics.jsonl.
    """
    folders: dict[pathlib.Path, tuple[pathlib.Path, str]] = {}
    decoded: list[pathlib.Path] = []
    for run_dir in run_dirs:
        root = pathlib.Path(run_dir)
        if not root.is_dir():
            raise FileNotFoundError(f"RUN_DIR {run_dir!r} is not a folder")
        for folder, files in _folders(root):
            inside = folder.relative_to(root).as_posix()
            if "metrics.jsonl" in files:
                folders.setdefault(folder.resolve(), (root.resolve(), inside))
            elif "metrics.json" in files:
                decoded.append(folder / "metrics.json")
    if not folders:
        raise FileNotFoundError(f"no metrics.jsonl below {', '.join(map(str, run_dirs))}")
    runs = [_read_run(folder, name) for folder, name in _names(folders).items()]
    return _with_slugs(_with_evaluations(runs, decoded))


def _names(folders: dict[pathlib.Path, tuple[pathlib.Path, str]]) -> dict[pathlib.Path, str]:
    """Paths below the RUN_DIR, longer where two RUN_DIRs hold the same."""
    short = {
        folder: root.name if inside == "." else inside for folder, (root, inside) in folders.items()
    }
    counts = collections.Counter(short.values())
    longer = {
        folder: f"{folder.parent.name}/{folder.name}" if inside == "." else f"{root.name}/{inside}"
        for folder, (root, inside) in folders.items()
    }
    names = {f: short[f] if counts[short[f]] == 1 else longer[f] for f in folders}
    counts = collections.Counter(names.values())
    return {folder: name if counts[name] == 1 else str(folder) for folder, name in names.items()}


def _with_evaluations(runs: Sequence[Run], elsewhere: Sequence[pathlib.Path]) -> list[Run]:
    """Adds what `gkd-jax eval` left in a run's `evals/`, or elsewhere of one of its checkpoints."""
    found = {run.folder: list((run.folder / "evals").glob("*/metrics.json")) for run in runs}
    for path in dict.fromkeys(path.resolve() for path in elsewhere):
        content = read_object(path) or {}
        checkpoint = _text({**content, **_object(content.get("evaluation"))}.get("checkpoint"))
        for run in runs:
            if checkpoint and pathlib.Path(checkpoint).resolve().is_relative_to(run.folder):
                found[run.folder].append(path)
    return [_with_decoded(run, found[run.folder]) for run in runs]


def _with_decoded(run: Run, paths: Sequence[pathlib.Path]) -> Run:
    evaluations, problems = list(run.evaluations), list(run.problems)
    decoded = sorted(paths, key=lambda path: (path.parent.name, path))
    for path in decoded:
        content = read_object(path)
        if content is None:
            problems.append(f"evals/{path.parent.name}/metrics.json cannot be read")
        else:
            evaluations += _evaluations_of_file(content, path.parent.name)
    return dataclasses.replace(
        run, evaluations=tuple(evaluations), decoded=tuple(decoded), problems=tuple(problems)
    )


def _with_slugs(runs: Sequence[Run]) -> list[Run]:
    """Names that are unique, ignoring case, as file names."""
    slugs: set[str] = set()
    named = []
    for run in runs:
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", run.name).strip("._")[-80:] or "run"
        unique, number = slug, 2
        while unique.lower() in slugs:
            unique, number = f"{slug}_{number}", number + 1
        slugs.add(unique.lower())
        named.append(dataclasses.replace(run, slug=unique))
    return named


def samples(run: Run) -> dict[str, list[tuple[int, pathlib.Path]]]:
    """Task -> (step, file of decoded rows), by step."""
    found: dict[str, list[tuple[int, pathlib.Path]]] = {}
    root = run.folder / "eval"
    for path in sorted(root.rglob("*.jsonl")):
        if path.stem.isdigit() and path.is_file():
            task = path.parent.relative_to(root).as_posix()
            found.setdefault(task, []).append((int(path.stem), path))
    return {task: sorted(files) for task, files in found.items()}


def read_jsonl(path: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
    """The objects of a JSONL file, and how many lines were damaged."""
    objects, damaged = [], 0
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [], 1
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            value = None
        if isinstance(value, dict):
            objects.append(value)
        else:
            damaged += 1
    return objects, damaged


def _folders(root: pathlib.Path) -> Iterator[tuple[pathlib.Path, list[str]]]:
    for folder, inside, files in os.walk(root):
        # run2 before run10.
        inside[:] = sorted(
            set(inside) - _NOT_SEARCHED,
            key=lambda name: [(text, int(number or 0)) for text, number in _NUMBERED.findall(name)],
        )
        yield pathlib.Path(folder), files


def _read_run(folder: pathlib.Path, inside: str) -> Run:
    problems = []
    lines, damaged = read_jsonl(folder / "metrics.jsonl")
    kept = [line for line in lines if _whole(line.get("step")) is not None]
    damaged += len(lines) - len(kept)
    kept.sort(key=lambda line: line["step"])
    if damaged:
        problems.append(f"metrics.jsonl: {damaged} damaged line{'s' * (damaged > 1)} left out")
    info = read_object(folder / "run.json")
    if info is None:
        problems.append(
            "run.json cannot be read" if (folder / "run.json").exists() else "no run.json"
        )
    fields = _described(info or {}, inside)
    setting = fields.get("setting", Setting())
    evaluations = [
        evaluation for line in kept for evaluation in _evaluations_of_line(line, setting)
    ]
    return Run(
        # Not run.json's name: the seeds of a method often share that.
        name=inside,
        slug="",
        folder=folder,
        lines=tuple(kept),
        evaluations=tuple(evaluations),
        problems=tuple(problems),
        **fields,
    )


def _described(info: dict[str, Any], name: str) -> dict[str, Any]:
    """run.json as fields of `Run`; whatever has an unexpected type is None."""
    if not info:
        return {}
    data = _object(info.get("data"))
    decoding = _text(data.get("eval_decoding"))
    return {
        "method": _method(
            info.get("method"), [name, _text(info.get("name")), _text(data.get("task"))]
        ),
        "student": _model(info.get("student")) or Model(),
        "teacher": _model(info.get("teacher")),
        "task": _text(data.get("task")),
        "num_examples": _whole(data.get("num_examples")),
        "batch_size": _whole(data.get("batch_size")),
        "eval_task": _text(data.get("eval_task")) or _text(data.get("task")),
        "setting": Setting(
            decoding=decoding,
            temperature=finite(data.get("eval_temperature")) if decoding == "sample" else None,
            split=_text(data.get("eval_split")),
        ),
        "seed": _whole(info.get("seed")),
        "train_steps": _whole(info.get("train_steps")),
        "commit": _text(info.get("commit")),
        "devices": _text(info.get("devices")),
    }


def _method(value: Any, names: Sequence[str | None]) -> Method | None:
    """A method whose run, task or label is named after SeqKD trains on a teacher's outputs."""
    if not isinstance(value, dict) or not value:
        return None
    kinds = {
        "label": (_text,),
        "divergence": (_text,),
        "beta": (finite,),
        "on_policy_fraction": (finite, _text),
        "teacher_temperature": (finite, _text),
        "student_temperature": (finite,),
        "sampling_temperature": (finite,),
        "mixing": (_text,),
        "num_samples": (_whole,),
        "sample_ahead": (_flag,),
        "rl_alpha": (finite,),
        "reward": (_text,),
    }
    known: dict[str, Any] = {}
    for name, readers in kinds.items():
        read = [found for reader in readers if (found := reader(value.get(name))) is not None]
        if read:
            known[name] = read[0]
    texts = " ".join(text.lower() for text in [known.get("label"), *names] if text)
    return Method(**known, on_teacher_outputs=re.search("seq_?-?kd", texts) is not None)


def _model(value: Any) -> Model | None:
    if not isinstance(value, dict):
        return None
    return Model(
        parameters=_whole(value.get("parameters")),
        size=_text(value.get("size")),
        checkpoint=_text(value.get("checkpoint")),
    )


def _evaluations_of_line(line: dict[str, Any], setting: Setting) -> Iterator[Evaluation]:
    tasks: dict[str, dict[str, float]] = {}
    for name, value in line.items():
        prefix, *middle = name.split("/")
        if prefix == "eval" and len(middle) >= 2 and finite(value) is not None:
            tasks.setdefault("/".join(middle[:-1]), {})[middle[-1]] = float(value)
    for task, values in tasks.items():
        yield Evaluation(task, setting, line["step"], values)


def _evaluations_of_file(content: dict[str, Any], folder: str) -> Iterator[Evaluation]:
    """`{task: {metric: value}}`; decoding, temperature and split beside or inside the task's.

    Without them the temperature is the end of the folder's name ("t0.5", "temperature_1").
    """
    for task, values in content.items():
        if not isinstance(values, dict) or task == "evaluation":
            continue
        about = {**content, **_object(content.get("evaluation")), **values}
        decoding, temperature = _text(about.get("decoding")), finite(about.get("temperature"))
        match = _TEMPERATURE.search(folder.lower())
        if decoding is None and temperature is None and match:
            decoding, temperature = "sample", float(match[1])
        if decoding is None and temperature is not None:
            decoding = "sample" if temperature > 0 else "greedy"
        setting = Setting(
            decoding, temperature if decoding == "sample" else None, _text(about.get("split"))
        )
        numbers = {
            name: float(value)
            for name, value in values.items()
            if finite(value) is not None and name != "temperature"
        }
        yield Evaluation(task, setting, _whole(about.get("step")), numbers)


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """A JSON object in a file; None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _whole(value: Any) -> int | None:
    number = finite(value)
    return int(number) if number is not None and number == int(number) else None
