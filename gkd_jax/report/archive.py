"""What a report needs of its runs, small enough to be kept beside it under version control."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from gkd_jax.report import runs
from gkd_jax.text import files


_EVERY = 50  # steps between kept lines of training


def write(run_dirs: Sequence[str], output: str) -> None:
    """Copies finished runs into OUTPUT/<slug>: `report.write` makes the same tables and figures.

    Of metrics.jsonl stay evaluations, every 50th step and the last, numbers to 6 digits; of
    run.json all but the macros; of `gkd-jax eval`'s results, in the run or elsewhere below
    `run_dirs`, metrics.json in the copy's `evals/`. Paths are cut to their last part.

    Raises:
        FileNotFoundError: as `report.write`.
    """
    for run in runs.find(run_dirs):
        if not run.finished:
            continue
        folder = pathlib.Path(output) / run.slug
        folder.mkdir(parents=True, exist_ok=True)
        kept = [
            line
            for line in run.lines
            if line is run.lines[-1]
            or line["step"] % _EVERY == 0
            or any(name.startswith("eval/") for name in line)
        ]
        text = "".join(json.dumps(_rounded(line)) + "\n" for line in kept)
        files.write_whole(folder / "metrics.jsonl", text)
        copies = {folder / "run.json": run.folder / "run.json"}
        for path in run.decoded:
            name, number = path.parent.name, 2
            while (copy := folder / "evals" / name / path.name) in copies:
                name, number = f"{path.parent.name}_{number}", number + 1
            copies[copy] = path
        for copy, path in copies.items():
            content = runs.read_object(path)
            if content is not None:
                content.pop("macros", None)
                copy.parent.mkdir(parents=True, exist_ok=True)
                files.write_whole(copy, json.dumps(_without_paths(content), indent=1) + "\n")


def _rounded(line: dict[str, Any]) -> dict[str, Any]:
    return {
        _without_path(name): float(f"{value:.6g}") if isinstance(value, float) else value
        for name, value in line.items()
    }


def _without_path(name: str) -> str:
    """A metric of a task that is a file: eval//data/x.jsonl/bleu is eval/x.jsonl/bleu."""
    first, _, rest = name.partition("/")
    return "/".join([first, *rest.split("/")[-2:]]) if rest.startswith("/") else name


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {_without_paths(name): _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, str) and value.startswith("/"):
        return pathlib.PurePath(value).name
    return value
