"""Compiles one phase of a step and tells what it needs on one device; the results are cached.

The devices need not exist here.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
from typing import Any

import jax

from gkd_jax.planning import hlo, hlo_text
from gkd_jax.planning.topologies import CUDA_PLUGINS, platform_of
from gkd_jax.text import files


_MOST_ARRAYS = 8  # The number of arrays that a message about memory names.


def analyse(
    function: Any, arguments: tuple[Any, ...], topology: str = "cpu", *, full: bool = False
) -> dict[str, Any]:
    """Compiles one phase and returns what it needs on one device: bytes, and `hlo.summary`.

    The result of an earlier call for the same program is read from the cache. Where the compiler
    refuses a program that does not fit, the result has only `peak_bytes` and `largest`.
    """
    traced = function.trace(*arguments)
    lowered, platform = traced.lower(), platform_of(topology)
    path = _cache_path(lowered.as_text(), topology, full)
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        found = _needs(_compile(lowered, platform, full), platform)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        peak = int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))
        return {"peak_bytes": peak, "largest": largest_values(traced.jaxpr.jaxpr)}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(found))
    return found


def _compile(lowered: Any, platform: str, full: bool) -> Any:
    threshold = "jax_persistent_cache_min_compile_time_secs"
    seconds = jax.config.values[threshold]
    options: dict[str, Any] = {}
    if platform == "gpu":
        options = {"xla_gpu_autotune_level": 0}  # autotuning would run kernels on a GPU
    elif platform == "tpu" and not full:
        options = {"exec_time_optimization_effort": -1.0}
    # JAX's persistent cache is off for devices that do not exist: an executable could be stored,
    # but never loaded again.
    jax.config.update(threshold, seconds if platform == "cpu" else math.inf)
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update(threshold, seconds)


def _needs(compiled: Any, platform: str) -> dict[str, Any]:
    """Returns the bytes and the counts of a compiled program, for one device."""
    memory, module = compiled.memory_analysis(), hlo_text.parse(compiled.as_text())
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.temp_size_in_bytes  # XLA's peak on CPU leaves out temporaries
    on_host = memory.host_argument_size_in_bytes  # XLA's peak on TPUs includes host memory
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "host_bytes": on_host,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes - on_host if platform == "tpu" else used,
        **hlo.summary(module),
        "largest": largest_arrays(module),
    }


def _cache_path(text: str, topology: str, full: bool) -> pathlib.Path | None:
    """Returns the cache file of a program's analysis, or None where the cache is turned off.

    Its name is a hash of the program's text and of everything that changes the analysis: topology,
    effort, versions of the compilers, and the source of this folder, whose modules describe the
    devices and count.
    """
    folder = os.environ.get("GKD_JAX_COMPILATION_CACHE")
    if folder == "":
        return None
    root = pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "gkd_jax"
    compilers = {"cpu": (), "gpu": CUDA_PLUGINS, "tpu": ("libtpu",)}
    found = filter(importlib.util.find_spec, compilers[platform_of(topology)])
    names = ["jaxlib", *found]
    versions = map(importlib.metadata.version, names)
    modules = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    sources = [module.read_text(encoding="utf-8") for module in modules]
    parts = "\n".join([text, topology, str(full), *versions, *sources])
    return root / "precompile" / f"{hashlib.sha256(parts.encode()).hexdigest()}.json"


def largest_arrays(module: hlo_text.Module) -> list[tuple[str, int]]:
    """Returns (origin and shape, bytes) of the largest arrays of a program and its arguments."""
    sizes: dict[str, int] = {}
    fused = {
        instruction.called("calls")
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode == "fusion"
    }
    for name, computation in module.computations.items():
        for instruction in () if name in fused else computation.values():
            is_argument = instruction.opcode == "parameter" and name == module.entry
            if hlo.NO_TRAFFIC.fullmatch(instruction.opcode) and not is_argument:
                continue
            for shape in instruction.shapes:
                dims = ",".join(map(str, shape.dims))
                label = f"{instruction.op_name} {shape.dtype}[{dims}]"
                sizes[label] = max(sizes.get(label, 0), shape.nbytes)
    return sorted(sizes.items(), key=lambda item: -item[1])[:_MOST_ARRAYS]


def largest_values(jaxpr: Any) -> list[tuple[str, int]]:
    """Returns (operation and shape, bytes over all devices) of a traced program's largest values.

    It stands in for `largest_arrays` where a program could not be compiled. Some of the values
    might never exist as whole arrays, because the compiler fuses or shards them.
    """
    sizes: dict[str, int] = {}

    def visit(inner):
        for equation in inner.eqns:
            for value in equation.outvars:
                shape = getattr(value.aval, "shape", ())
                label = f"{equation.source_info.name_stack}/{equation.primitive.name}"
                label = f"{label.lstrip('/')} {value.aval.str_short()}"
                size = math.prod(shape) * getattr(value.aval.dtype, "itemsize", 4)
                sizes[label] = max(sizes.get(label, 0), size)
            for parameter in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if hasattr(parameter, "eqns"):
                    visit(getattr(parameter, "jaxpr", parameter))

    visit(jaxpr)
    return sorted(sizes.items(), key=lambda item: -item[1])[:_MOST_ARRAYS]
