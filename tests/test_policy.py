"""Rules of the code base that no linter checks, read from the syntax trees."""

import ast
from collections.abc import Iterator
import graphlib
import pathlib

import pytest


ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gkd_jax"

# A module imports from rows above its own only. A package is one entry: its submodules may
# import each other. `__init__` is `import gkd_jax` itself, the public names.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("batch", "losses", "text"),
    ("divergences", "rl", "sharding"),
    ("accumulation", "models", "tasks"),
    ("input", "sampling"),
    ("convert", "decoding", "gkd_config"),
    ("gkd",),
    ("storage",),
    ("evaluation",),
    ("training",),
    ("__init__",),
    ("planning", "conformance", "integrations", "report", "sweeps"),
    ("command_line",),
    ("main",),
    ("__main__",),
)
LAYER_OF = {module: layer for layer, row in enumerate(LAYERS) for module in row}

FORBIDDEN_NAMES = ("utils", "Base", "Manager", "Factory", "helper")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 450

PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
SOURCE_FILES = PACKAGE_FILES + sorted((ROOT / "tasks").rglob("*.py"))


def relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: pathlib.Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def entry(path: str) -> str:
    """The entry of LAYERS for a file: gkd_jax/models/t5.py -> models, gkd_jax/gkd.py -> gkd."""
    return pathlib.PurePosixPath(path).parts[1].removesuffix(".py")


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str, str]]:
    """(line, absolute module, name or "") of every import, also inside functions."""
    package = pathlib.PurePosixPath(path).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, module, alias.name


def imports_of(tree: ast.AST, path: str, package: str) -> list[str]:
    return [
        f"{path}:{line} imports {module}"
        for line, module, _ in imports(tree, path)
        if module.split(".")[0] == package
    ]


def gkd_jax_entry(module: str, name: str, modules: set[str]) -> str | None:
    """The entry of LAYERS that an import reaches, or None outside gkd_jax."""
    first, *rest = module.split(".")
    if first != "gkd_jax":
        return None
    if rest:
        return rest[0]
    return name if name in modules else "__init__"


def layer_violations(tree: ast.AST, path: str, modules: set[str]) -> list[str]:
    own = entry(path)
    found = []
    for line, module, name in imports(tree, path):
        target = gkd_jax_entry(module, name, modules)
        if target is None or (target == own and path.count("/") > 1):
            continue
        where = f"{path}:{line}: {own} imports {target}"
        if own not in LAYER_OF or target not in LAYER_OF:
            found.append(f"{where}, and one of them is not in LAYERS: add it")
        elif LAYER_OF[target] >= LAYER_OF[own]:
            found.append(f"{where}, layer {LAYER_OF[own]} from layer {LAYER_OF[target]}")
    return found


def defined_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def is_forbidden(name: str) -> bool:
    # "Base" with its capital: "base" is a size of T5.
    return any(word in (name.lower() if word.islower() else name) for word in FORBIDDEN_NAMES)


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The number of lines of a function without its docstring, which may have any length."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is None:
        return lines
    docstring = node.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def long_functions(tree: ast.AST, path: str) -> list[str]:
    return [
        f"{path}:{node.lineno}: {node.name} has {length} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := code_lines(node)) > MAX_FUNCTION_LINES
    ]


def executes_data(tree: ast.AST, path: str) -> list[str]:
    """Calls of eval and exec, and imports of pickle readers (unpickling runs code of the file)."""
    found = [
        f"{path}:{line} imports {module}"
        for line, module, _ in imports(tree, path)
        if module.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function.removeprefix("builtins.") in {"eval", "exec"}:
            found.append(f"{path}:{node.lineno} calls {function}")
        if any(keyword.arg == "allow_pickle" for keyword in node.keywords):
            found.append(f"{path}:{node.lineno} passes allow_pickle")
    return found


def package_modules() -> set[str]:
    return {entry(relative(path)) for path in PACKAGE_FILES} | set(LAYER_OF)


def test_there_is_source_to_check():
    assert {"gkd_jax/__init__.py", "gkd_jax/main.py"} <= {relative(path) for path in SOURCE_FILES}


def test_every_module_has_a_layer():
    unknown = sorted(package_modules() - set(LAYER_OF))
    assert not unknown, f"not in LAYERS of tests/test_policy.py: add {unknown} to their row"


def test_modules_import_from_lower_layers_only():
    modules = package_modules()
    found = [
        violation
        for path in PACKAGE_FILES
        for violation in layer_violations(parse(path), relative(path), modules)
    ]
    assert not found, "\n".join(dict.fromkeys(found))


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circle(sources: dict[str, ast.AST]) -> list[str] | None:
    """Modules of which each imports the next, and the last is the first; None if there are none."""
    modules = {module_name(path) for path in sources}
    graph = {}
    for path, tree in sources.items():
        reached = {(f"{module}.{name}", module) for _, module, name in imports(tree, path)}
        graph[module_name(path)] = {
            full if full in modules else module for full, module in reached
        } & modules
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return None


def test_no_modules_import_each_other_in_a_circle():
    found = circle({relative(path): parse(path) for path in SOURCE_FILES})
    assert found is None, " imports ".join(found)


def test_circle_rule_sees_a_planted_circle():
    first, second = "from p import b", "def f():\n    from p.a import x"
    planted = {"p/a.py": ast.parse(first), "p/b.py": ast.parse(second)}
    assert circle(planted) == ["p.a", "p.b", "p.a"]
    assert circle({**planted, "p/b.py": ast.parse("import math")}) is None


@pytest.mark.parametrize(
    ("package", "allowed"), [("gin", "gkd_jax/command_line/"), ("flax", "gkd_jax/models/")]
)
def test_gin_and_flax_stay_where_they_belong(package, allowed):
    found = [
        line
        for path in SOURCE_FILES
        if not relative(path).startswith(allowed)
        for line in imports_of(parse(path), relative(path), package)
    ]
    assert not found, "\n".join(found)


def hidden_functions(tree: ast.Module) -> set[str]:
    """The public functions and classes that `__all__` leaves out, and with it the API pages."""
    lists = [ast.literal_eval(node.value) for node in tree.body if _assigns_all(node)]
    kinds = ast.FunctionDef | ast.ClassDef
    public = {n.name for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")}
    return public.difference(*lists) if lists else set()


def _assigns_all(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"


def test_an_all_hides_no_function_from_the_api_pages():
    found = {relative(path): hidden_functions(parse(path)) for path in PACKAGE_FILES}
    assert not {path: names for path, names in found.items() if names}
    assert hidden_functions(ast.parse("__all__ = ['a']\ndef a(): ...\ndef b(): ...")) == {"b"}
    assert not hidden_functions(ast.parse("def a(): ..."))


def test_gin_folder_is_no_package():
    # With gin/__init__.py, `import gin` in the repository root finds the recipes.
    assert (ROOT / "gin").is_dir()
    assert not [relative(path) for path in (ROOT / "gin").rglob("__init__.py")]


def test_names_say_what_things_are():
    found = [relative(path) for path in SOURCE_FILES if is_forbidden(relative(path))]
    for path in SOURCE_FILES:
        names = defined_names(parse(path))
        found += [f"{relative(path)}:{line}: {name}" for line, name in names if is_forbidden(name)]
    assert not found, "\n".join(found)


def test_functions_and_files_are_short():
    found = [line for path in PACKAGE_FILES for line in long_functions(parse(path), relative(path))]
    for path in PACKAGE_FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{relative(path)} has {lines} lines, more than {MAX_FILE_LINES}")
    assert not found, "\n".join(found)


# These know models by `gkd_jax.models.lm` alone. Whoever reads a family's files is elsewhere.
KNOW_NO_FAMILY = (
    *("gkd.py", "gkd_config.py", "sampling.py", "decoding", "evaluation", "training"),
    *(f"storage/{name}.py" for name in ("checkpoints", "loading", "pretrained", "saved_model")),
    "planning",
)
FAMILIES = {
    *("t5", "t5_config", "t5_layers"),
    *("decoder", "decoder_config", "decoder_block", "decoder_sizes"),
}


def families_imported(tree: ast.AST, path: str) -> list[str]:
    return [
        f"{path}:{line} imports {name or module}"
        for line, module, name in imports(tree, path)
        if module.startswith("gkd_jax.models") and {name, module.split(".")[-1]} & FAMILIES
    ]


def test_what_trains_and_decodes_names_no_family():
    files = [PACKAGE / name for name in KNOW_NO_FAMILY]
    assert all(file.exists() for file in files)
    sources = [path for file in files for path in (file.rglob("*.py") if file.is_dir() else [file])]
    found = [line for path in sources for line in families_imported(parse(path), relative(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "names_one"),
    [
        ("from gkd_jax.models import lm, quantized", False),
        ("from gkd_jax.models import lm, t5", True),
        ("from gkd_jax.models.t5_config import T5Config", True),
        ("def f():\n    import gkd_jax.models.decoder", True),
    ],
)
def test_family_rule_sees_planted_imports(source, names_one):
    assert bool(families_imported(ast.parse(source), "gkd_jax/gkd.py")) == names_one


def test_no_data_is_executed():
    found = [line for path in SOURCE_FILES for line in executes_data(parse(path), relative(path))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "violates"),
    [
        ("gkd_jax/gkd.py", "from gkd_jax import losses", False),
        ("gkd_jax/gkd.py", "from gkd_jax.training.train import run", True),
        ("gkd_jax/gkd.py", "def f():\n    import gkd_jax.training.train", True),
        ("gkd_jax/gkd.py", "from . import program", True),
        ("gkd_jax/gkd.py", "from gkd_jax import Batch", True),
        ("gkd_jax/gkd.py", "from gkd_jax import nowhere_in_the_table", True),
        ("gkd_jax/models/t5.py", "from gkd_jax.models import t5_layers", False),
        ("gkd_jax/models/t5.py", "from ..gkd import update", True),
        ("gkd_jax/__main__.py", "from gkd_jax.main import main", False),
        ("gkd_jax/report.py", "from gkd_jax import main", True),
        ("gkd_jax/new.py", "from gkd_jax import losses", True),
    ],
)
def test_layer_rule_sees_planted_imports(path, source, violates):
    modules = {*LAYER_OF, "nowhere_in_the_table"}
    assert bool(layer_violations(ast.parse(source), path, modules)) == violates


@pytest.mark.parametrize(
    ("source", "executes"),
    [
        ("eval('1')", True),
        ("builtins.exec('1')", True),
        ("import pickle", True),
        ("from pickle import loads", True),
        ("np.load(f, allow_pickle=True)", True),
        ("model.eval()", False),
        ("evaluate.run()", False),
    ],
)
def test_execution_rule_sees_planted_calls(source, executes):
    assert bool(executes_data(ast.parse(source), "gkd_jax/x.py")) == executes


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("BaseModel", True),
        ("RunManager", True),
        ("data_utils", True),
        ("_helper", True),
        ("StepFactory", True),
        ("base", False),
        ("t5_1_1_base", False),
    ],
)
def test_name_rule_sees_planted_names(name, forbidden):
    assert is_forbidden(name) == forbidden


def test_length_rule_sees_a_planted_function():
    body = "\n".join(["    x = 1"] * MAX_FUNCTION_LINES)
    tree = ast.parse(f"def train():\n{body}\n")
    assert long_functions(tree, "gkd_jax/evaluation/infer.py")
