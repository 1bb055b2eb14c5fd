"""`gkd-jax report`: makes the paper's tables and figures from runs, and a page for each run.

    from gkd_jax import report
    report.write(["/runs/study"], "/runs/report")

OUTPUT receives `report.html` (a single file), `report.md`, `figures/*.png` and `runs/*.html`.

`reading` reads each run, from its folder or from an `archive`, as a `record.Run`. `groups` groups
runs that differ only in the seed, `labels` names the groups, and `study` makes tables of their
means. `answer` says which method is best, `paper` has the numbers to compare with, `figures`
chooses what `plots` draws, and `pages` writes the texts, with tables of decoded `samples`.
"""

from collections.abc import Sequence
import pathlib

from gkd_jax.text import files
from gkd_jax.text.extras import install_command


try:
    from gkd_jax.report import figures, pages, reading
    from gkd_jax.report.study import Study
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"report needs {error.name}, which is not installed: {install_command('report')}"
    ) from error


def write(run_dirs: Sequence[str], output: str, *, dry_run: bool = False) -> None:
    """Reads every run below `run_dirs` and writes the report to the folder `output`.

    The runs are in folders or in archives (`archive.write`). With `dry_run` nothing is written.
    A missing run leaves a cell empty. A run that has not reached its last step, or that repeats the
    configuration and the seed of another run, gets a page but is left out of all means; the list of
    runs says so.

    Raises:
        FileNotFoundError: if a run folder does not exist, or none holds a metrics.jsonl.
        ValueError: if `output` is no local folder, nor can become one.
    """
    files.check_can_be_folder(output, "the folder of the report")
    study = Study(reading.find(run_dirs))
    if dry_run:
        return
    folder = pathlib.Path(output)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "runs").mkdir(exist_ok=True)
    drawn = figures.draw(study, folder / "figures")
    for run in study.runs:
        files.write_whole(folder / "runs" / f"{run.slug}.html", pages.run_page(run))
    whole, markdown = pages.report(study, drawn)
    files.write_whole(folder / "report.md", markdown)
    files.write_whole(folder / "report.html", whole)
