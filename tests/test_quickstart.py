"""The README's first command gives its table. Run: pytest -m slow tests/test_quickstart.py."""

import os
import pathlib
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).resolve().parent.parent


def table(text):
    """The Markdown table at the end of a command's output: {row: {column: number or None}}."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0]][1:]
    rows = [[cell.strip() for cell in line] for line in lines[2:]]
    return {
        row[0]: {
            name: float(cell) if cell else None for name, cell in zip(columns, row[1:], strict=True)
        }
        for row in rows
    }


@pytest.mark.slow
def test_the_quickstart_ends_with_its_table_and_a_rerun_has_nothing_to_do(tmp_path):
    command = [sys.executable, "-m", "gkd_jax", "train", "--gin_file=gin/quickstart.gin"]
    command.append(f"--gin.MODEL_DIR={str(tmp_path)!r}")
    # Neither the eight devices nor the fast compilation of the other tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def run():
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600
        )

    first = run()
    assert first.returncode == 0, first.stderr[-3000:]
    rows = table(first.stdout)
    assert list(rows) == ["teacher", "student", "sft", "supervised_kd", "on_policy_gkd"]
    accuracy = {name: row["arithmetic/accuracy"] for name, row in rows.items()}
    divergence = {name: row["arithmetic/teacher_divergence"] for name, row in rows.items()}
    # Wide margins: rounding alone moves these by several points.
    assert accuracy["teacher"] > 85
    for method in ("sft", "supervised_kd", "on_policy_gkd"):
        assert accuracy["student"] < accuracy[method] < accuracy["teacher"]
    # The method at work.
    assert accuracy["on_policy_gkd"] > 20 + max(accuracy["sft"], accuracy["supervised_kd"])
    assert 0 < divergence["on_policy_gkd"] < divergence["supervised_kd"]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    again = run()
    assert again.returncode == 0, again.stderr[-3000:]
    assert table(again.stdout) == rows
    assert written == {path: path.stat().st_mtime_ns for path in written}
