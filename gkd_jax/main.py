"""The program `gkd-jax`: from the arguments of the command line to an exit status.

    gkd-jax train --gin_file=gin/gkd.gin --gin.MODEL_DIR=/tmp/run --gin.TRAIN_STEPS=100

Exit status: 0 if the command is done, 1 if the run failed, 2 for wrong usage or a wrong
configuration, 143 after SIGTERM, 130 after Ctrl-C. `train` saves a checkpoint at the first signal.
"""

from collections.abc import Sequence
import sys
import traceback

import gkd_jax
from gkd_jax.command_line import flags
from gkd_jax.command_line.flags import UsageError


_HELP = ("-h", "--help", "--helpfull", "help")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; an error becomes one line on standard error and an exit status.

    Args:
        argv: the arguments without the program's name; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _main(arguments)
    except SystemExit:
        raise
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        print(f"gkd-jax: error: {_message(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, _CONFIGURATION_ERRORS) else 1)


_CONFIGURATION_ERRORS = (
    UsageError,
    ValueError,
    TypeError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    ModuleNotFoundError,  # an optional package is missing
    RecursionError,
)


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in _HELP:
        print(flags.USAGE)
        return
    command, *rest = arguments
    if getattr(gkd_jax, "__file__", None) is None:
        found = next(iter(gkd_jax.__path__))
        raise UsageError(
            f"Python takes the folder {found!r} for the package gkd_jax: start it elsewhere "
            "than in the folder above, and leave that out of PYTHONPATH"
        )
    if command == "--version":
        print(gkd_jax.__version__)
        return
    if command not in flags.COMMANDS:
        raise UsageError(
            f"unknown command {command!r}{flags.suggestion(command, flags.COMMANDS)}, expected one "
            f"of {', '.join(flags.COMMANDS)}"
        )
    if any(argument in _HELP[:3] for argument in rest):
        print(flags.describe(command))
        return
    values, bindings, positional = flags.parse(command, rest)
    from gkd_jax.command_line import commands

    commands.run(command, values, bindings, positional)


def _message(error: BaseException) -> str:
    """Returns an error as one line, with the macro that set the wrong value if it is known."""
    if isinstance(error, RecursionError):
        return "a binding of the gin files or of the command line refers to itself"
    if "gkd_jax.command_line.gin_files" not in sys.modules:
        return str(error) or type(error).__name__
    from gkd_jax.command_line import gin_files

    message, scope = gin_files.one_message(error), gin_files.scope_of(error)
    settings = getattr(error, "settings", ())
    macros = [name for field in settings for name in gin_files.macros_that_set(field, scope)]
    return f"{message} (set by {', '.join(macros)})" if macros else message
