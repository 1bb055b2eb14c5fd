"""seqio tasks, one module a family: importing `gkd_jax.tasks.x` registers it.

A new task is one new module in this folder; `register` finds it.
"""

import functools
import importlib
import pkgutil


@functools.cache
def register() -> None:
    """Registers every task of this folder; those of other packages are imported by gin files."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
