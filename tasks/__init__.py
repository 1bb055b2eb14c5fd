"""The seqio tasks of gkd_jax, with one module per family of tasks.

Importing a module registers its tasks. To add a task, add a module to this folder; `register` finds
the module.
"""

import functools
import importlib
import pkgutil


@functools.cache
def register() -> None:
    """Registers every task of this folder. Gin files import the tasks of other packages."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
