"""`gkd-jax report`: the paper's tables and figures from runs, and a page for each run.

    from gkd_jax import report
    report.write(["/runs/study"], "/runs/report")

OUTPUT holds `report.html` (one file, to send), `report.md`, `figures/*.png` and `runs/*.html`.

| module | holds |
|---|---|
| `record` | what is known of a run, and what makes it another configuration |
| `reading`, `archive` | runs from folders, and from JSONL files that are kept |
| `study`, `answer` | seeds of one configuration as one group; which method is best |
| `paper` | the paper's numbers (`paper.json`), and which of them a run compares with |
| `figures`, `plots` | which runs make which figure; drawing it |
| `samples`, `pages` | decoded texts; HTML and Markdown (`templates/`) |
"""

from collections.abc import Sequence
import pathlib

from gkd_jax.text import files


try:
    from gkd_jax.report import figures, pages, reading
    from gkd_jax.report.study import Study
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"report needs {error.name}, which is not installed: pip install 'gkd_jax[report]'"
    ) from error


def write(run_dirs: Sequence[str], output: str) -> None:
    """Reads every run below `run_dirs`, or of archives among them, and writes the report.

    A run that is missing is an empty cell. A run that has not reached its last step, or repeats
    another's configuration and seed, has its page but is no part of a mean; the list of runs says
    so.

    Raises:
        FileNotFoundError: a run folder does not exist, or none holds a metrics.jsonl.
    """
    study = Study(reading.find(run_dirs))
    folder = pathlib.Path(output)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    drawn = figures.draw(study, folder / "figures")
    for run in study.runs:
        files.write_whole(folder / "runs" / f"{run.slug}.html", pages.run_page(run))
    whole, markdown = pages.report(study, drawn)
    files.write_whole(folder / "report.md", markdown)
    files.write_whole(folder / "report.html", whole)
