"""`install_command`: the command that installs a missing optional package."""

import importlib.metadata
import re


def install_command(extra: str) -> str:
    """Returns the command that installs the packages of one of our extras.

    The command names the packages themselves, so it is the same for a wheel and for a checkout.
    """
    packages = []
    for requirement in importlib.metadata.requires("gkd_jax") or ():
        package, _, condition = requirement.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", condition):
            packages.append(f"'{package.strip()}'")
    return f"pip install {' '.join(packages)}" if packages else f"pip install 'gkd_jax[{extra}]'"
