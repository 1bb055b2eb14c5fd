"""Reads gin files and the bindings of the command line, and answers questions about macros.

No package outside `command_line/` imports gin.
"""

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
import contextlib
import inspect
import logging
import os
import pathlib
import re
import sys
import tokenize
from typing import Any

from gin.config import parse_value
from gin.config_parser import BindingStatement, ConfigParser, IncludeStatement, ParserDelegate

import gin
from gkd_jax.command_line import recipes
from gkd_jax.command_line.flags import UsageError, suggestion


REQUIRED = "%gin.REQUIRED"
# A path or a few words. Gin rejects them without quotes, and they can only be meant as a string.
_BARE = re.compile(r"[\w./~:$+ -]*[A-Za-z/~][\w./~:$+ -]*")
# The beginning of a path, with which no value of gin begins: what follows may be any character.
_PATH = re.compile(r"\.{0,2}/|~|\w+://|\.{1,2}$")


def parse(
    files: Iterable[str],
    bindings: Iterable[tuple[str, str]],
    search_paths: Iterable[str],
    *,
    stand_ins: Mapping[str, str] = {},
) -> None:
    """Reads gin files, then bindings, which may name everything that the files import.

    A later file overrides an earlier one. The bindings are names and values as they were typed.

    Args:
        stand_ins: gin values for macros that the files require and the command does not need.

    Raises:
        UsageError: if gin rejects a file or a binding, if no file defines a macro, or if macros
            have no value (the message lists them all).
    """
    search_paths, bindings = list(search_paths), list(bindings)
    for path in [*search_paths, str(recipes.folder().parent)]:
        gin.add_config_file_search_path(path)
    for name in files:
        try:
            with _quiet():
                gin.parse_config_file(recipes.find(name, ".gin", search_paths))
        except OSError as error:
            raise UsageError(
                f"--gin_file: cannot read {name!r}: {error} `gkd-jax recipes` lists the files of "
                "the installation"
            ) from None
        except Exception as error:
            raise UsageError(f"{name}: {_rejected(error)}") from error
    header, defined = _imports(), macros()
    for name, value in bindings:
        _check_defined(name, defined)
        try:
            gin.parse_config(f"{header}{name} = {_as_gin(value)}")
        except (SyntaxError, tokenize.TokenError) as error:
            quoted = "{'KEY': ...}" if re.fullmatch(r"\{.*\}", value) else "'...'"
            raise UsageError(
                f"--gin.{name}={value}: this is no value of gin; a text with such signs needs "
                f'quotes within quotes: --gin.{name}="{quoted}"'
            ) from error
        except Exception as error:
            raise UsageError(f"--gin.{name}={value}: {_rejected(error)}") from error
    lines = _lines()  # once, because gin takes milliseconds to write the bindings out
    _check_references(lines, defined)
    _warn_of_scopes([name for name, _ in bindings], lines)
    _expand_paths(defined)
    missing = [name for name, value in lines if name in defined and value == REQUIRED]
    for name in stand_ins.keys() & missing:
        gin.parse_config(f"{name} = {stand_ins[name]}")
        missing.remove(name)
    if missing:
        raise UsageError("; ".join(f"{name} is required: --gin.{name}=VALUE" for name in missing))


def check_macros(files: Iterable[str], names: Iterable[str]) -> None:
    """Raises UsageError for a macro that gin files do not define; they are not executed.

    Nothing is checked if one of the files, or of those that they include, is not here or is no gin:
    the program that reads them may find other files, and it says what is wrong.
    """
    try:
        defined = _defined_by(files)
    except (OSError, SyntaxError):
        return
    for name in names:
        _check_defined(name, defined)


def _check_defined(name: str, defined: Collection[str]) -> None:
    if "." not in name and name not in defined:  # gin itself would accept it
        raise UsageError(
            f"--gin.{name}: no such macro in the gin files{suggestion(name, defined)}; "
            f"they define {', '.join(sorted(defined))}"
        )


class _References(ParserDelegate):
    """Reads the references in a gin file as their names, without looking for what they name."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> str:
        return scoped_configurable_name

    def macro(self, macro_name: str) -> str:
        return macro_name


def _defined_by(files: Iterable[str]) -> set[str]:
    """Returns the macros that gin files define, with those of the files that they include."""
    found: set[str] = set()
    for name in files:
        text = pathlib.Path(recipes.find(name, ".gin")).read_text(encoding="utf-8")
        for statement in ConfigParser(text, _References()):
            if isinstance(statement, IncludeStatement):
                found |= _defined_by([statement.filename])
            elif isinstance(statement, BindingStatement) and not statement.arg_name:
                found.add(statement.selector)
    return found


def _rejected(error: Exception) -> str:
    """Returns why gin rejects a file or a binding; for an unknown name, the nearest known one."""
    message = one_message(error)
    unknown = re.match(r"No module named '[\w.]+'", message)
    if unknown:
        return f"{unknown[0]}; Python finds a module of your own in the folders of PYTHONPATH"
    unknown = re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message)
    if unknown:
        owner, name = unknown.groups()
        known = inspect.signature(parse_value(f"@{owner}").configurable.wrapped).parameters
        return (
            f"{owner} has no parameter {name!r}{suggestion(name, known)}; "
            f"its parameters are {', '.join(known)}"
        )
    unknown = re.search(r"<module '([\w.]+)'.*> has no attribute (\w+)", message)
    if unknown:
        module, name = unknown.groups()
        offered = vars(sys.modules[module]).items()
        known = [key for key, value in offered if callable(value) and not key.startswith("_")]
        return f"{module} has no function or class {name!r}{suggestion(name, known)}"
    unknown = re.search(r"'(\w+)' was not provided by an import statement", message)
    if unknown:
        known = [line.split()[-1].rpartition(".")[2] for line in _imports().splitlines()[1:]]
        return (
            f"the gin files import no module {unknown[1]!r}{suggestion(unknown[1], known)}; "
            f"they import {', '.join(known)}"
        )
    return message


@contextlib.contextmanager
def _quiet():
    """Silences gin's log while the context lasts.

    Gin logs an error for each search path that lacks a file, even if another path has the file.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _imports() -> str:
    """Returns the import statements of all files that were read, as gin text."""
    lines = (
        line for line in gin.config_str().splitlines() if line.startswith(("import ", "from "))
    )
    first = "from __gin__ import dynamic_registration"
    return "\n".join(dict.fromkeys([first, *lines])) + "\n"


def _as_gin(value: str) -> str:
    """Returns a value in gin's syntax; a path or a word without quotes is quoted."""
    if _PATH.match(value):
        return repr(value)
    if value in ("None", "True", "False") or not _BARE.fullmatch(value):
        return value
    try:
        float(value)
    except ValueError:
        return repr(value)
    return value


def _check_references(lines: Iterable[tuple[str, str]], defined: Container[str]) -> None:
    """Raises UsageError if the value of a binding refers to a macro that no file defines."""
    for name, value in lines:
        without_texts = re.sub(r"'[^']*'|\"[^\"]*\"", "", value)
        for other in re.findall(r"%([\w.]+)", without_texts):
            if other not in defined and f"%{other}" != REQUIRED:
                raise UsageError(f"{name}={value}: no macro is called {other!r}")


def _warn_of_scopes(flags: Sequence[str], lines: Iterable[tuple[str, str]]) -> None:
    """Warns of each flag whose parameter the gin files bind in a scope.

    In that scope the binding of the files holds, and the flag has no effect.
    """

    def split(name: str) -> tuple[str, list[str]]:
        scope, _, selector = name.rpartition("/")
        return scope, selector.split(".")[-2:]

    given = [split(name) for name in flags]
    bound = [(split(left), f"{left} = {right}") for left, right in lines]
    for name, (scope, parameter) in zip(flags, given, strict=True):
        within = f"{scope}/" if scope else ""
        others = [
            text
            for (other, what), text in bound
            if what == parameter and other != scope and other.startswith(within)
            if (other, what) not in given
        ]
        if others:
            print(
                f"WARNING: --gin.{name} does not hold where the gin files bind the parameter in a "
                f"scope: {'; '.join(others)}",
                file=sys.stderr,
            )


def warn_of_unused(flags: Iterable[str]) -> None:
    """Warns of each macro of the command line that set nothing in the recipe that gin has made.

    BETA, for example, is the beta of `jsd`, and another divergence has none.
    """
    used = re.findall(r"^(\w+) = ", gin.operative_config_str(), re.MULTILINE)
    for name in flags:
        fields = fields_of(name)
        if "." not in name and name not in used and fields != [name]:
            print(
                f"WARNING: --gin.{name} has no effect: it sets {', '.join(fields)}, which this run "
                "does not have",
                file=sys.stderr,
            )


def _expand_paths(names: Iterable[str]) -> None:
    """Expands `~` and `$NAME` in those macros that are strings; UsageError if one is unknown."""
    for name in names:
        value = macro(name, None)
        if not isinstance(value, str) or not ("$" in value or value.startswith("~")):
            continue
        expanded = os.path.expanduser(os.path.expandvars(value))
        if re.search(r"\$\w|\$\{", expanded) or expanded.startswith("~"):
            raise UsageError(f"{name}={value!r} holds a variable or a user that is not known here")
        gin.parse_config(f"{name} = {expanded!r}")


def macros() -> dict[str, str]:
    """Returns every macro of the gin files and the command line, with its value as written."""
    return {name: value for name, value in _lines() if re.fullmatch(r"[A-Za-z_]\w*", name)}


def _lines() -> list[tuple[str, str]]:
    """Returns the (left, right) sides of every binding."""
    joined = re.sub(r"\\\n\s*", "", gin.config_str(max_line_length=10_000))
    pairs = (re.match(r"([\w./]+) = (.*)", line) for line in joined.splitlines())
    return [(pair[1], pair[2]) for pair in pairs if pair]


def macro(name: str, default: Any) -> Any:
    """Returns the value of a macro, or `default` if no file defines it."""
    try:
        return gin.query_parameter(f"%{name}")
    except ValueError:
        return default


def fields_of(name: str) -> list[str]:
    """Returns the parameters that a macro sets, as "[scope/]Type.field"; [name] if it sets none.

    A macro may be an argument of a function that makes a value, as TEACHER is one of
    `recipe.choose_teacher`. The parameters that it sets are then those that take this value.
    """
    return list(dict.fromkeys(_set_to(f"%{name}"))) or [name]


def _set_to(value: str) -> list[str]:
    """Returns the parameters whose value is written like this, as "[scope/]Type.field"."""
    found = []
    for left in (left for left, right in _lines() if right == value):
        if "." not in left:  # a macro
            found += _set_to(f"%{left}")
            continue
        scope, _, selector = left.rpartition("/")
        owner, field = selector.split(".")[-2:]
        made = _set_to(f"@{left.rpartition('.')[0]}()") if owner[0].islower() else []
        found += made or [f"{scope}/{owner}.{field}".removeprefix("/")]
    return found


def macros_that_set(field: str, scope: str | None) -> list[str]:
    """Returns the macros that set a parameter "Type.field" in a scope; None means any scope."""
    ends, found = f".{field}", set()
    for left, right in _lines():
        where, _, selector = left.rpartition("/")
        holds = scope is None or not where or f"{scope}/".startswith(f"{where}/")
        is_macro = re.fullmatch(r"%[A-Za-z_]\w*", right)
        if holds and is_macro and f".{selector}".endswith(ends):
            found.add(right.removeprefix("%"))
    return sorted(found)


def scope_of(error: BaseException) -> str | None:
    """Returns the gin scope of the call that raised an error; None if gin did not make the call."""
    calls = re.findall(r"In call to configurable .*", str(error))
    scopes = re.findall(r" in scope '(.*)'$", calls[0]) if calls else [None]
    return scopes[0] if scopes else ""


# What gin adds about the text of one binding: the text is the user's, and its lines are not.
_WHERE = re.compile(r"\n\s*In bindings string line")


def one_message(error: BaseException) -> str:
    """Returns an error's message on one line, without the lines that gin adds about its calls."""
    lines = [
        line
        for line in _WHERE.split(str(error))[0].splitlines()
        if line.strip() and not line.lstrip().startswith(("In call to configurable", "In file "))
    ]
    return " ".join(line.strip() for line in lines) or type(error).__name__
