"""Reads runs from their folders and from archives (see `archive`).

No content of a file raises an error, because a run that crashed still belongs in the report.
Unreadable parts are left out and listed in `Run.problems`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

from gkd_jax.report.record import Run, as_object, as_objects, real_path, whole
from gkd_jax.text import files


# These folders hold many files and no runs, or were put aside by `gkd-jax sweep --redo_changed`.
# An evaluation in the latter names the folder of the run that has taken the place of its own.
_NOT_SEARCHED = re.compile(r"checkpoints|damaged|tensorboard|eval|.*\.replaced_\d+")


def find(run_dirs: Sequence[str]) -> list[Run]:
    """Reads every run below the folders or in the archives of `run_dirs`, ordered by path.

    Raises:
        FileNotFoundError: if one is neither a folder nor a .jsonl file, or none holds a run.
        ValueError: if a .jsonl file is no archive.
    """
    found: dict[pathlib.Path, Run] = {}  # by folder
    evaluations: dict[pathlib.Path, None] = {}
    for run_dir in run_dirs:
        root = pathlib.Path(run_dir).resolve()
        if root.is_file() and root.suffix == ".jsonl":
            lines, damaged = files.read_records(root)
            if not any(map(is_archived, lines)):
                raise ValueError(f"{run_dir} is no archive of runs, which --archive writes")
            for line in filter(is_archived, lines):
                run = _run(root, root / line["name"], line["name"], line)
                run.problems.extend(_damaged(root.name, damaged))
                found.setdefault(run.folder, run)
            continue
        if not root.is_dir():
            raise FileNotFoundError(f"RUN_DIR {run_dir!r} is neither a folder nor a .jsonl file")
        for path, inside, names in os.walk(root):
            # os.walk enters only these.
            inside[:] = sorted(name for name in inside if not _NOT_SEARCHED.fullmatch(name))
            folder = pathlib.Path(path)
            if "metrics.jsonl" in names and folder not in found:
                found[folder] = _from_folder(root, folder)
            elif "metrics.json" in names:
                evaluations[folder / "metrics.json"] = None
    if not found:
        raise FileNotFoundError(f"no metrics.jsonl below {', '.join(map(str, run_dirs))}")
    _add_evaluations(found, evaluations)
    for run in found.values():
        run.problems.extend(_contradictions(run))
    return _named(list(found.values()))


def is_archived(line: dict[str, Any]) -> bool:
    """Returns whether the object in a line of a file is that of an archived run."""
    return isinstance(line.get("metrics"), list) and isinstance(line.get("name"), str)


def _damaged(name: str, count: int) -> list[str]:
    return [f"{name}: {count} damaged line{'s' * (count > 1)} left out"] if count else []


def _run(root: pathlib.Path, folder: pathlib.Path, name: str, read: Mapping[str, Any]) -> Run:
    """A run, from its content in the form of an archive's line."""
    lines = [one for one in as_objects(read["metrics"]) if whole(one.get("step")) is not None]
    return Run(
        name=name,
        root=root,
        folder=folder,
        about=as_object(read.get("run")),
        lines=sorted(lines, key=lambda line: line["step"]),
        decoded=as_objects(read.get("evaluations")),
    )


def _from_folder(root: pathlib.Path, folder: pathlib.Path) -> Run:
    """A run with its files of samples and its problems."""
    name = root.name if folder == root else folder.relative_to(root).as_posix()
    lines, damaged = files.read_records(folder / "metrics.jsonl")
    about = files.read_record(folder / "run.json")
    run = _run(root, folder, name, {"run": about, "metrics": lines})
    run.problems.extend(_damaged("metrics.jsonl", damaged + len(lines) - len(run.lines)))
    if about is None:
        exists = (folder / "run.json").exists()
        run.problems.append("run.json cannot be read" if exists else "no run.json")
    decoded = [path for path in (folder / "eval").rglob("*.jsonl") if path.stem.isdecimal()]
    for path in sorted(decoded, key=lambda path: (path.parent, int(path.stem))):
        task = path.parent.relative_to(folder / "eval").as_posix()
        run.samples.setdefault(task, []).append((int(path.stem), path))
    return run


def _add_evaluations(found: Mapping[pathlib.Path, Run], paths: Iterable[pathlib.Path]) -> None:
    """Adds each evaluation to the run in whose folder it lies, or whose checkpoint it names."""
    for path in paths:
        content = files.read_record(path)
        checkpoint = as_object(as_object(content).get("evaluation")).get("checkpoint")
        made = real_path(pathlib.Path(checkpoint)) if isinstance(checkpoint, str) else path
        around = [folder for folder in found if path.is_relative_to(folder)]
        for folder in around or [folder for folder in found if made.is_relative_to(folder)]:
            if content is None:
                found[folder].problems.append(f"{path.relative_to(folder)} cannot be read")
            else:
                found[folder].decoded.append(content)


def _contradictions(run: Run) -> Iterator[str]:
    """Says which numbers do not count because another evaluation, decoded alike, has the same."""
    found: dict[Any, float] = {}
    for task, setting, step, values in run.evaluations:
        for metric, value in values.items():
            first = found.setdefault((task, setting, step, metric), value)
            if step is not None and not math.isclose(first, value, rel_tol=1e-4):
                yield (
                    f"two evaluations of {task} at step {step:,} ({setting}) differ in {metric}: "
                    f"{first:g} counts, {value:g} does not"
                )


def _named(runs: Sequence[Run]) -> list[Run]:
    """Makes the names unique, and sets the slugs.

    A name that several RUN_DIRs share is extended by the folders above it.
    """
    names = [run.name for run in runs]
    while len(set(names)) < len(names):
        names = [
            name if names.count(name) == 1 else "/".join(run.folder.parts[-name.count("/") - 2 :])
            for run, name in zip(runs, names, strict=True)
        ]
    named: list[Run] = []
    for run, name in zip(runs, names, strict=True):
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._")[-80:] or "run"
        while slug.lower() in [one.slug.lower() for one in named]:
            slug += "_"
        named.append(dataclasses.replace(run, name=name, slug=slug))
    return named
