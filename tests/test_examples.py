"""The notebooks in examples/ run from start to end, and their last cells show what the text says.

pytest -m slow tests/test_examples.py       # two minutes of CPU time each
"""

import pathlib
import re

import nbclient
import nbformat
import pytest


EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


def run(name, folder):
    """Runs a notebook in `folder`; returns what each cell of code printed, and all its outputs."""
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "an output is committed"
    where = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(one.text for one in some if one.get("name") == "stdout") for some in outputs]
    return printed, [one for some in outputs for one in some]


@pytest.mark.slow
def test_the_student_of_your_own_jsonl_answers(tmp_path):
    printed, _ = run("distil_your_own_jsonl.ipynb", tmp_path)
    found = re.findall(r"'eval/guests.jsonl/teacher_divergence': ([\d.]+)", printed[-2])
    first, last = map(float, found)
    assert last < first / 20
    lines = [re.split(r" {2,}", line) for line in printed[-1].splitlines()]
    assert len(lines) == 8
    blame = ("cold", "bland", "stale", "burnt", "awful")
    right = 0
    for prompt, reply in lines:
        dish = next(word for word in re.findall(r"\w+", prompt) if word not in ("The", "My"))
        sorry = any(word in prompt for word in blame)
        right += reply == (f"Sorry about the {dish}!" if sorry else f"Glad you liked the {dish}!")
    assert right >= 6, printed[-1]
    assert not list(tmp_path.iterdir()), "the notebook writes where it was started"


@pytest.mark.slow
def test_the_student_differs_at_dishes_it_has_not_seen(tmp_path):
    printed, outputs = run("where_the_student_differs.ipynb", tmp_path)
    assert sum("image/png" in one.get("data", {}) for one in outputs) == 2
    before, after = printed[-2:]
    assert {"cake", "tea", "juice"} >= set(re.findall(r"The (\w+) was", before))
    means = [float(text.split()[0]) for text in (before, after)]
    assert means[1] < means[0] / 2
