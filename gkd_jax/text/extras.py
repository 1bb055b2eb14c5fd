"""`install_command`: what to type where an optional package is missing."""

import importlib.metadata
import re


def install_command(extra: str) -> str:
    """Returns the command that installs the packages of one of our extras.

    It names the packages themselves, and so it works for a wheel and for a checkout alike.

    Args:
        extra: such as "report", as in setup.py.
    """
    packages = []
    for requirement in importlib.metadata.requires("gkd_jax") or ():
        package, _, condition = requirement.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", condition):
            packages.append(f"'{package.strip()}'")
    return f"pip install {' '.join(packages)}" if packages else f"pip install 'gkd_jax[{extra}]'"
