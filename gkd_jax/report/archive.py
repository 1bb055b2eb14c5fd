"""Archives: what a report needs of its runs, small enough for version control.

An archive is a JSONL file with one run per line: {"name", "run": run.json, "metrics": [lines of
metrics.jsonl], "evaluations": [each metrics.json of `gkd-jax eval`]}.
"""

from collections.abc import Mapping, Sequence
import json
import pathlib
import re
from typing import Any

from gkd_jax.report import reading
from gkd_jax.report.record import real_path
from gkd_jax.text import files, task_names


_KEPT = 20  # lines of training kept of a run
# The path in the name of a field that ends in the name of a task, such as data.task./data/x.jsonl.
_PATH = re.compile(r"(?:^|(?<=\w\.))/.*")


def write(run_dirs: Sequence[str], output: str) -> None:
    """Writes the finished runs below `run_dirs` to the archive `output`.

    `report.write` makes the same tables and figures from the archive. Of metrics.jsonl the archive
    keeps evaluations, the first step and about twenty more, with numbers to 6 digits; of run.json
    everything except the macros. Absolute paths are shortened: the folder of a run, or a link to
    it, becomes the name of the run, other paths below a run directory the part after it, and all
    others their last part.

    Raises:
        ValueError: if `output` does not end in .jsonl, is in a folder that cannot be made, or is a
            file that is no archive.
        FileNotFoundError: as for `report.write`.
    """
    check_output(output)
    runs = reading.find(run_dirs)
    named = {pathlib.Path(run_dir).resolve(): "" for run_dir in run_dirs}
    named |= {run.folder: run.name for run in runs}
    text = ""
    for run in (one for one in runs if one.finished):
        content = {
            "name": run.name,
            "run": {name: value for name, value in run.about.items() if name != "macros"},
            "metrics": [line for line in run.lines if _is_kept(line, run.last_step)],
            "evaluations": run.decoded,
        }
        text += json.dumps(_small(content, named), ensure_ascii=False) + "\n"
    pathlib.Path(output).parent.mkdir(parents=True, exist_ok=True)
    files.write_whole(pathlib.Path(output), text)


def check_output(output: str) -> None:
    """Checks that an archive can be written, over an earlier archive at most; see `write`."""
    path = pathlib.Path(output)
    if path.suffix != ".jsonl":
        raise ValueError(f"the archive must be a file that ends in .jsonl, got {output!r}")
    files.check_can_be_folder(path.parent, "the folder of the archive")
    lines, damaged = files.read_records(path) if path.exists() else ([], 0)
    if damaged or not all(map(reading.is_archived, lines)):
        raise ValueError(f"{output} exists and is no archive of runs: give another file")


def _is_kept(line: dict[str, Any], last: int) -> bool:
    is_one_of_few = line["step"] % max(1, last // _KEPT) == 0 or line["step"] in (1, last)
    return is_one_of_few or bool(task_names.evaluation_in(line))


def _small(value: Any, named: Mapping[pathlib.Path, str]) -> Any:
    """Returns a value with shorter numbers and paths; `named` has the names of some folders."""
    if isinstance(value, dict):
        names = {name: _PATH.sub(lambda path: _small(path[0], named), name) for name in value}
        return {names[name]: _small(inner, named) for name, inner in value.items()}
    if isinstance(value, list):
        return [_small(inner, named) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, str) and value.startswith("/"):
        path = pathlib.Path(value)
        real = real_path(path)  # a link to the folder of a run is named as the run is
        if any(named.get(folder) for folder in (real, *real.parents)):
            path = real
        around = next((folder for folder in (path, *path.parents) if folder in named), None)
        if around is None:
            return path.name
        return (pathlib.PurePath(named[around]) / path.relative_to(around)).as_posix()
    return value
