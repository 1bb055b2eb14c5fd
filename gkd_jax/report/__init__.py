"""`gkd-jax report`: the paper's tables and figures from run folders, and a page for each run.

    from gkd_jax import report
    report.write(["/runs/study"], "/runs/report")

OUTPUT holds `report.html` (one file, to send), `report.md`, `figures/*.png` and `runs/*.html`.

| module | holds |
|---|---|
| `runs` | what a run folder holds, however damaged |
| `results` | seeds of one configuration as one group; means, errors, improvements |
| `paper` | the paper's numbers, by figure |
| `comparisons`, `curves` | which runs make which figure |
| `plots` | drawing with matplotlib |
| `archive` | small copies of runs, to keep |
| `tables`, `charts`, `samples`, `pages` | HTML and Markdown |
"""

from collections.abc import Sequence
import pathlib

from gkd_jax.report import figures, pages, runs
from gkd_jax.report.results import Study
from gkd_jax.text import files


def write(run_dirs: Sequence[str], output: str) -> None:
    """Reads every run below `run_dirs` and writes the report into the folder `output`.

    A run that is missing is an empty cell. A run that has not reached its last step, or repeats
    another's configuration and seed, has its page but is no part of a mean; the list of runs says
    so.

    Raises:
        FileNotFoundError: a run folder does not exist, or none holds a metrics.jsonl.
        ModuleNotFoundError: matplotlib is not installed.
    """
    study = Study(runs.find(run_dirs))
    folder = pathlib.Path(output)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    drawn = figures.draw(study, folder / "figures")
    for run in study.runs:
        files.write_whole(folder / "runs" / f"{run.slug}.html", pages.run_html(run))
    files.write_whole(folder / "report.md", pages.report_markdown(study, drawn))
    files.write_whole(folder / "report.html", pages.report_html(study, drawn, folder / "figures"))
