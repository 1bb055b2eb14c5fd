"""Implements `python -m gkd_jax.conformance [module:attribute]`.

The exit status is 0 if the implementation falls into no trap, 1 if it falls into a trap, and 2 if
there is nothing to check.
"""

import argparse
from collections.abc import Sequence
import importlib
import sys

from gkd_jax import conformance


def main(argv: Sequence[str] | None = None) -> int:
    """Checks the implementation that the command line names, and prints the verdicts.

    Returns:
        The exit status: 1 if the implementation falls into a trap, else 0.

    Raises:
        SystemExit: with status 2 if there is no such implementation, or nothing to check.
    """
    parser = argparse.ArgumentParser(
        prog="python -m gkd_jax.conformance",
        description="Says which known traps of on-policy distillation an implementation falls into",
    )
    parser.add_argument(
        "implementation",
        nargs="?",
        default="gkd_jax.conformance.ours:GKDJax",
        help="module:attribute, an object with some of the functions of docs/conformance.md; "
        "a class is called without arguments. Default: this package",
    )
    address = parser.parse_args(argv).implementation
    module, _, attribute = address.partition(":")
    try:
        implementation = importlib.import_module(module)
        if attribute:
            implementation = getattr(implementation, attribute)
    except (ImportError, AttributeError) as error:
        parser.error(f"no implementation at {address!r}: {error}")
    if isinstance(implementation, type):
        implementation = implementation()
    verdicts = conformance.run(implementation)
    print(conformance.render(verdicts))
    if all(verdict.status == "not checked" for verdict in verdicts):
        parser.error(f"{address!r} has none of the functions of docs/conformance.md")
    return int(any(verdict.status == "falls into it" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
