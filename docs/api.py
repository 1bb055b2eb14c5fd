"""Renders the API of gkd_jax as web pages with pdoc, and stops at the first warning.

It writes build/api/index.html and one page a module. The extra `docs` installs pdoc:

    pip install -c constraints.txt -e '.[docs]'
    python docs/api.py
"""

import inspect
import os
from pathlib import Path
import pkgutil
import re
import warnings

import pdoc
import pdoc.doc_ast
import pdoc.render

import gkd_jax


# The command line has its own help, the tasks are registered and not called, and the integrations
# need packages that gkd_jax does not install.
LEFT_OUT = r"!gkd_jax\.(__main__|main|command_line|tasks|integrations)"
FIELD = re.compile(r"^    (\w+): .+?  # (.+)$", re.MULTILINE)  # of a class, with its comment
OUTPUT = Path(__file__).resolve().parent.parent / "build" / "api"


def show_comments_of_fields() -> None:
    """Lets pdoc take the comment behind a field as the field's docstring, where it has none."""
    walk = pdoc.doc_ast.walk_tree

    def walk_tree(obj):
        found = walk(obj)
        if inspect.isclass(obj) and obj.__module__.startswith("gkd_jax"):
            for name, comment in FIELD.findall(pdoc.doc_ast.get_source(obj)):
                found.var_docstrings.setdefault(name, comment)
        return found

    pdoc.doc_ast.walk_tree = walk_tree


def main() -> None:
    """Writes the pages to build/api."""
    os.environ["PDOC_ALLOW_EXEC"] = "1"  # a dependency calls `uname` when it is imported
    warnings.filterwarnings("error", module="pdoc")
    # pdoc reads __dict__, in which the names that gkd_jax imports at their first use are missing.
    for name in gkd_jax.__all__:
        setattr(gkd_jax, name, getattr(gkd_jax, name))
    modules = [f"gkd_jax.{module.name}" for module in pkgutil.iter_modules(gkd_jax.__path__)]
    show_comments_of_fields()
    pdoc.render.configure(docformat="google")
    pdoc.pdoc("gkd_jax", *modules, LEFT_OUT, output_directory=OUTPUT)
    print(f"wrote {OUTPUT / 'index.html'}")


if __name__ == "__main__":
    main()
