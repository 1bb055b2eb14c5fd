"""Turns the rows of a TOML file, or one gin file and a grid, into the commands of a sweep."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import itertools
import os
import pathlib
import re
import tomllib
from typing import Any


# For each command, the macro that says where it writes, and the path below the run's folder.
OUTPUT_MACROS = {
    "train": ("MODEL_DIR", ""),
    "eval": ("OUTPUT_DIR", ""),
    "infer": ("OUTPUT", "outputs.jsonl"),
}
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][\w.-]*)\}")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_DIVERGENCE = re.compile(r"(forward_kl|reverse_kl|total_variation)|jsd_(0?\.\d+)")


@dataclasses.dataclass(frozen=True)
class Point:
    """One value of an axis: its name in the names of folders, and the macros that it sets."""

    label: str
    macros: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a sweep: a configuration, with a run for each combination of its axes."""

    name: str
    command: str
    gin_files: tuple[str, ...]
    macros: Mapping[str, str]
    axes: Mapping[str, tuple[Point, ...]]

    def needs(self) -> list[str]:
        """Returns the names of the other rows whose folders the macros of this row name."""
        points = itertools.chain.from_iterable(self.axes.values())
        values = [*self.macros.values(), *(v for point in points for v in point.macros.values())]
        names = [name for value in values for name in _PLACEHOLDER.findall(value)]
        return [name for name in dict.fromkeys(names) if name != self.name]


@dataclasses.dataclass(frozen=True)
class Run:
    """One command; `{name}` in its arguments stands for the folder of the run `name`."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]

    def command(self, root: str) -> list[str]:
        """Returns the arguments with the folders of runs below `root`."""
        arguments = list(self.arguments)
        for name in (self.name, *self.needs):
            folder = os.path.join(root, name)
            arguments = [text.replace(f"{{{name}}}", folder) for text in arguments]
        return arguments


#### Reading what is to be run #####################################################################


def read_sweep_file(path: str) -> dict[str, Row]:
    """Returns the rows of a TOML file by name, in the order of the file.

    Raises:
        ValueError: if something is wrong with the file; the message names the row.
    """
    try:
        content = tomllib.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--sweep_file: cannot read {path!r}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    _check_keys(content, ("gin_file", "axes", "rows"), path)
    shared = _axes(content.get("axes", {}), path)
    rows = content.get("rows", {})
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{path}: expected [rows.NAME] tables, got none")
    return {
        name: _row(name, row, content.get("gin_file", ()), shared, path)
        for name, row in rows.items()
    }


def _row(name: str, row: Any, gin_file: Any, shared: Mapping, path: str) -> Row:
    where = f"{path}: row {name!r}"
    if not _NAME.fullmatch(name):
        raise ValueError(f"{where}: expected a name of letters, digits, '_' and '.'")
    _check_keys(row, ("command", "gin_file", "macros", "axes"), where)
    command = row.get("command", "train")
    if command not in OUTPUT_MACROS:
        raise ValueError(
            f"{where}: command must be one of {', '.join(OUTPUT_MACROS)}, got {command!r}"
        )
    files = row.get("gin_file", gin_file)
    files = [files] if isinstance(files, str) else list(files)
    if not files or not all(isinstance(file, str) for file in files):
        raise ValueError(f"{where}: gin_file must be a file or a list of files, got {files!r}")
    own = _axes(row.get("axes", {}), where)
    axes = {**own, **{axis: points for axis, points in shared.items() if axis not in own}}
    if command != "train" and "divergence" in axes:  # a command that decodes takes no DIVERGENCE
        axes["divergence"] = _with_macros(axes["divergence"], ())
    return Row(
        name=name,
        command=command,
        gin_files=tuple(files),
        macros=_macros(row.get("macros", {}), where),
        axes={axis: points for axis, points in axes.items() if points},
    )


def _check_keys(table: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: expected a table, got {table!r}")
    for key in table:
        if key not in known:
            raise ValueError(f"{where}: unknown key {key!r}, expected one of {', '.join(known)}")


def _macros(table: Any, where: str) -> dict[str, str]:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: macros must be a table, got {table!r}")
    return {name: _gin_value(value, f"{where}: {name}") for name, value in table.items()}


def _gin_value(value: Any, where: str) -> str:
    """Returns a TOML value as gin text; a string is gin text already."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | dict):
        return repr(value)
    raise ValueError(f"{where}: expected a string, a number, a list or a table, got {value!r}")


def _axes(table: Any, where: str) -> dict[str, tuple[Point, ...]]:
    if not isinstance(table, dict):
        raise ValueError(f"{where}: axes must be a table, got {table!r}")
    return {
        axis: _points(axis, values, f"{where}: axis {axis!r}") for axis, values in table.items()
    }


def macros_of(points: Iterable[Point]) -> set[str]:
    """Returns the macros that some of the points set."""
    return {macro for point in points for macro in point.macros}


def _with_macros(points: Sequence[Point], known: Collection[str]) -> tuple[Point, ...]:
    """Returns the points with only those macros that are `known`."""
    return tuple(
        Point(point.label, {name: x for name, x in point.macros.items() if name in known})
        for point in points
    )


def divergence_point(name: str, where: str) -> Point:
    """Returns a value of the axis `divergence`, such as `jsd_0.1`, the JSD with its beta."""
    match = _DIVERGENCE.fullmatch(name)
    if match is None:
        raise ValueError(
            f"{where}: expected forward_kl, reverse_kl, total_variation or jsd_BETA, got {name!r}"
        )
    if match[1]:
        return Point(name, {"DIVERGENCE": f"@divergences.{name}"})
    return Point(name, {"DIVERGENCE": "@divergences.jsd", "BETA": match[2]})


def _points(axis: str, values: Any, where: str) -> tuple[Point, ...]:
    if not isinstance(values, list):
        raise ValueError(f"{where}: expected a list of values, got {values!r}")
    if not _NAME.fullmatch(axis):
        raise ValueError(f"{where}: expected a name of letters, digits, '_' and '.'")
    points = []
    for value in values:
        if isinstance(value, dict):
            table = dict(value)
            label = table.pop("name", None)
            if not isinstance(label, str) or _label(label) != label:
                raise ValueError(f"{where}: a table needs a name fit for a folder, got {label!r}")
            points.append(Point(label, _macros(table, where)))
        elif axis == "divergence":
            points.append(divergence_point(_gin_value(value, where), where))
        else:
            text = _gin_value(value, where)
            points.append(Point(_label(text), {axis: text}))
    labels = [point.label for point in points]
    if len(set(labels)) < len(labels) or "" in labels:
        raise ValueError(f"{where}: values need different names in folders, got {labels}")
    return tuple(points)


def _label(value: str) -> str:
    """Returns a value as part of a folder's name: `@divergences.jsd` is jsd, `'xsum'` is xsum."""
    if value.startswith("@"):
        value = value.removesuffix("()").rpartition(".")[2]
    return re.sub(r"[^\w.+-]+", "_", value).strip("_")


def parse_grid(text: str) -> tuple[str, tuple[Point, ...]]:
    """Returns the axis of `MACRO=A,B`; commas in quotes and brackets do not separate values."""
    axis, separator, values = text.partition("=")
    where = f"--grid {text!r}"
    if not separator or not axis.strip():
        raise ValueError(f"{where}: expected MACRO=VALUE,VALUE")
    parts, depth, quote = [""], 0, ""
    for character in values:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    stripped = [part.strip() for part in parts]
    if quote or depth or not all(stripped):
        raise ValueError(
            f"{where}: expected values between commas, with quotes and brackets closed"
        )
    return axis.strip(), _points(axis.strip(), stripped, where)


#### From rows to runs #############################################################################


def override(
    rows: Mapping[str, Row], macros: Mapping[str, str], axes: Mapping[str, tuple[Point, ...]]
) -> dict[str, Row]:
    """Returns rows with the macros and axes of the command line.

    Args:
        macros: macros for the rows of `train`, and for other rows that set the macro themselves.
        axes: axes that replace the axes of these names. A row of another command than `train` takes
            only the macros that it set before.
    """
    for axis in axes:
        if not any(axis in row.axes for row in rows.values()):
            known = sorted({name for row in rows.values() for name in row.axes})
            raise ValueError(f"--grid {axis}: no row has this axis, expected one of {known}")
    return {name: _overridden(row, macros, axes) for name, row in rows.items()}


def _overridden(row: Row, macros: Mapping[str, str], axes: Mapping[str, tuple[Point, ...]]) -> Row:
    trains = row.command == "train"
    own_macros = {name: x for name, x in macros.items() if trains or name in row.macros}
    own_axes = {
        axis: axes[axis] if trains else _with_macros(axes[axis], macros_of(points))
        for axis, points in row.axes.items()
        if axis in axes
    }
    return dataclasses.replace(
        row, macros={**row.macros, **own_macros}, axes={**row.axes, **own_axes}
    )


def in_order(rows: Mapping[str, Row], chosen: Iterable[str]) -> list[Row]:
    """Returns the chosen rows and the rows that they need, each after those that it needs.

    Raises:
        ValueError: if there is no row of a name, or if rows need each other in a circle.
    """
    found: dict[str, Row] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join([*path[path.index(name) :], name])
            raise ValueError(f"rows need each other in a circle: {circle}")
        if name not in rows:
            by = f"row {path[-1]!r} names {{{name}}}: " if path else ""
            raise ValueError(f"{by}no row {name!r}, expected one of {', '.join(rows)}")
        if name not in found:
            for need in rows[name].needs():
                visit(need, (*path, name))
            found[name] = rows[name]

    for name in chosen:
        visit(name, ())
    return list(found.values())


def expand(rows: Sequence[Row], extra: Sequence[str] = ()) -> list[Run]:
    """Returns the runs of rows that are `in_order`, with the flags `extra` in every command."""
    for row in rows:
        _check_macros(row)
    choices = {row.name: _choices(row) for row in rows}
    runs = {}
    for row in rows:
        for choice in choices[row.name]:
            run = _run(row, choice, choices, extra)
            if run.name in runs:
                raise ValueError(f"two runs would have the folder {run.name!r}: rename a row")
            runs[run.name] = run
    return list(runs.values())


def _check_macros(row: Row) -> None:
    """Raises ValueError if a run's command would hold another value than the row gives a macro."""
    output = OUTPUT_MACROS[row.command][0]
    set_by = {axis: macros_of(points) for axis, points in row.axes.items()}
    if output in row.macros or any(output in macros for macros in set_by.values()):
        raise ValueError(f"row {row.name!r} sets {output}, which the sweep sets itself")
    for (axis, macros), (other, others) in itertools.combinations(set_by.items(), 2):
        for macro in sorted(macros & others):
            raise ValueError(f"row {row.name!r}: the axes {axis!r} and {other!r} both set {macro}")


Choice = dict[str, Point]  # one point of each axis of a row, by the name of the axis


def _choices(row: Row) -> list[Choice]:
    combinations = itertools.product(*row.axes.values())
    return [dict(zip(row.axes, points, strict=True)) for points in combinations]


def _run_name(row: str, choice: Choice) -> str:
    return "-".join([row, *(f"{axis}={point.label}" for axis, point in choice.items())])


def _run(
    row: Row, choice: Choice, choices: Mapping[str, list[Choice]], extra: Sequence[str]
) -> Run:
    name = _run_name(row.name, choice)
    folders = {need: _needed(row, choice, need, choices[need]) for need in row.needs()}
    folders[row.name] = name
    macro, file = OUTPUT_MACROS[row.command]
    macros = {
        **row.macros,
        **{m: v for point in choice.values() for m, v in point.macros.items()},
        macro: f"'{os.path.join(f'{{{row.name}}}', file).rstrip('/')}'",
    }
    arguments = [
        row.command,
        *(f"--gin_file={file}" for file in row.gin_files),
        *(
            f"--gin.{m}=" + _PLACEHOLDER.sub(lambda match: f"{{{folders[match[1]]}}}", value)
            for m, value in macros.items()
        ),
        *extra,
    ]
    needs = tuple(folder for need, folder in folders.items() if need != row.name)
    return Run(name=name, arguments=tuple(arguments), needs=needs)


def _needed(row: Row, choice: Choice, need: str, candidates: list[Choice]) -> str:
    """Returns the name of the run of the row `need` that agrees on the axes that both rows have."""
    here = {axis: point.label for axis, point in choice.items()}
    for axis in candidates[0]:
        if axis not in here:
            raise ValueError(
                f"row {row.name!r} names {{{need}}}, which has a run for each {axis}: give "
                f"{row.name!r} this axis too, or take it from {need!r}"
            )
    for candidate in candidates:
        if all(here[axis] == point.label for axis, point in candidate.items()):
            return _run_name(need, candidate)
    wanted = ", ".join(f"{axis}={here[axis]}" for axis in candidates[0])
    raise ValueError(f"row {row.name!r} names {{{need}}}, which has no run with {wanted}")
