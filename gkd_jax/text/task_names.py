"""The names of tasks: a registered name, or the path of a JSONL file or of a folder of such files.

This module needs neither TensorFlow nor seqio, so that whatever reads a run's record has the same
names as the run.
"""

import os


ENDINGS = (".jsonl", ".jsonl.gz")


def is_path(name: str) -> bool:
    """Returns whether a task's name is the path of a JSONL file or of a folder."""
    return name.endswith(ENDINGS) or "/" in name


def display_name(name: str) -> str:
    """Returns the name of a task in metrics and reports: the last part of a path, or the name."""
    return os.path.basename(name.rstrip("/")) if is_path(name) else name
