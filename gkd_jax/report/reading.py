"""Reads runs from their folders and from archives (see `archive`).

No content of a file raises an error, because a run that crashed still belongs in the report.
Unreadable parts are left out and listed in `Run.problems`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import os
import pathlib
import re
from typing import Any

from gkd_jax.report.record import (
    Evaluation,
    Run,
    Setting,
    as_object,
    as_objects,
    finite,
    real_path,
    whole,
)
from gkd_jax.text import files, task_names


# These folders hold many files and no runs.
_NOT_SEARCHED = frozenset({"checkpoints", "damaged", "tensorboard", "eval"})
_Found = dict[pathlib.Path, dict[str, Any]]
"""What was read of each run, in the form of an archive's line, by the run's folder."""


def find(run_dirs: Sequence[str]) -> list[Run]:
    """Reads every run below the folders or in the archives of `run_dirs`, ordered by path.

    Raises:
        FileNotFoundError: if one is neither a folder nor a .jsonl file, or none holds a run.
        ValueError: if a .jsonl file is no archive.
    """
    found: _Found = {}
    evaluations: dict[pathlib.Path, None] = {}
    for run_dir in run_dirs:
        root = pathlib.Path(run_dir).resolve()
        if root.is_file() and root.suffix == ".jsonl":
            lines, damaged = files.read_records(root)
            if not any(map(is_archived, lines)):
                raise ValueError(f"{run_dir} is no archive of runs, which --archive writes")
            problems = _damaged(root.name, damaged)
            for line in filter(is_archived, lines):
                found.setdefault(
                    root / str(line.get("name")), {**line, "root": root, "problems": problems}
                )
            continue
        if not root.is_dir():
            raise FileNotFoundError(f"RUN_DIR {run_dir!r} is neither a folder nor a .jsonl file")
        for path, inside, names in os.walk(root):
            inside[:] = sorted(set(inside) - _NOT_SEARCHED)  # os.walk enters only these
            folder = pathlib.Path(path)
            if "metrics.jsonl" in names and folder not in found:
                name = root.name if folder == root else folder.relative_to(root).as_posix()
                found[folder] = {**_content(folder, name), "root": root}
            elif "metrics.json" in names:
                evaluations[folder / "metrics.json"] = None
    if not found:
        raise FileNotFoundError(f"no metrics.jsonl below {', '.join(map(str, run_dirs))}")
    _add_evaluations(found, evaluations)
    return [_run(*one) for one in _named(found)]


def is_archived(line: dict[str, Any]) -> bool:
    """Returns whether the object in a line of a file is that of an archived run."""
    return isinstance(line.get("metrics"), list) and isinstance(line.get("name"), str)


def _damaged(name: str, count: int) -> list[str]:
    return [f"{name}: {count} damaged line{'s' * (count > 1)} left out"] if count else []


def _content(folder: pathlib.Path, name: str) -> dict[str, Any]:
    """A run's folder in the form of an archive's line, with its files of samples and problems."""
    lines, damaged = files.read_records(folder / "metrics.jsonl")
    kept = [line for line in lines if whole(line.get("step")) is not None]
    problems = _damaged("metrics.jsonl", damaged + len(lines) - len(kept))
    about = files.read_record(folder / "run.json")
    if about is None:
        exists = (folder / "run.json").exists()
        problems.append("run.json cannot be read" if exists else "no run.json")
    samples: dict[str, list[tuple[int, pathlib.Path]]] = {}
    decoded = [path for path in (folder / "eval").rglob("*.jsonl") if path.stem.isdecimal()]
    for path in sorted(decoded, key=lambda path: (path.parent, int(path.stem))):
        task = path.parent.relative_to(folder / "eval").as_posix()
        samples.setdefault(task, []).append((int(path.stem), path))
    read = {"name": name, "run": about, "metrics": kept, "evaluations": []}
    return {**read, "samples": samples, "problems": problems}


def _add_evaluations(found: _Found, paths: Iterable[pathlib.Path]) -> None:
    """Adds each evaluation to the run in whose folder it lies, or whose checkpoint it names."""
    for path in paths:
        content = files.read_record(path)
        checkpoint = as_object(as_object(content).get("evaluation")).get("checkpoint")
        made = real_path(pathlib.Path(checkpoint)) if isinstance(checkpoint, str) else path
        around = [folder for folder in found if path.is_relative_to(folder)]
        for folder in around or [folder for folder in found if made.is_relative_to(folder)]:
            if content is None:
                found[folder]["problems"].append(f"{path.relative_to(folder)} cannot be read")
            else:
                found[folder]["evaluations"].append(content)


def _named(found: _Found) -> Iterator[tuple[str, str, pathlib.Path, dict[str, Any]]]:
    """Yields (name, file name, folder, content) of each run, with unique names.

    A name that several RUN_DIRs share is extended by the folders above it.
    """
    names = [str(read.get("name")) for read in found.values()]
    while len(set(names)) < len(names):
        names = [
            name if names.count(name) == 1 else "/".join(folder.parts[-name.count("/") - 2 :])
            for folder, name in zip(found, names, strict=True)
        ]
    slugs: list[str] = []
    for name, (folder, read) in zip(names, found.items(), strict=True):
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._")[-80:] or "run"
        while slug.lower() in slugs:
            slug += "_"
        slugs.append(slug.lower())
        yield name, slug, folder, read


def _run(name: str, slug: str, folder: pathlib.Path, read: dict[str, Any]) -> Run:
    about, decoded = as_object(read.get("run")), as_objects(read.get("evaluations"))
    lines = [one for one in as_objects(read.get("metrics")) if whole(one.get("step")) is not None]
    lines.sort(key=lambda line: line["step"])
    how = as_object(as_object(about.get("recipe")).get("evaluation"))
    evaluations = []
    for line in lines:
        evaluations += _evaluations({**how, "step": line["step"]}, task_names.evaluation_in(line))
    for content in decoded:
        how = as_object(content.get("evaluation"))
        tasks = {
            task: as_object(values) for task, values in content.items() if task != "evaluation"
        }
        numbers = {
            f"{task}/{key}": v for task, values in tasks.items() for key, v in values.items()
        }
        evaluations += _evaluations(how, numbers)
    return Run(
        name=name,
        slug=slug,
        root=read["root"],
        folder=folder,
        about=about,
        lines=lines,
        evaluations=evaluations,
        decoded=decoded,
        samples=read.get("samples", {}),
        problems=read["problems"],
    )


def _evaluations(how: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[Evaluation]:
    """One evaluation of each task, from how it decoded and the numbers by TASK/METRIC."""
    tasks: dict[str, dict[str, float]] = {}
    for name, value in numbers.items():
        task, _, metric = name.rpartition("/")
        if task and (number := finite(value)) is not None:
            tasks.setdefault(task, {})[metric] = number
    setting, step = Setting.of(how), whole(how.get("step"))
    return [Evaluation(task, setting, step, values) for task, values in tasks.items()]
