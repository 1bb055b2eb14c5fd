"""Reports the memory, FLOPs, traffic and time of a run on accelerators that need not exist here.

    gkd-jax precompile --topology=v5e:8x8 --gin_file=gin/gkd.gin

The functions that `train` jits are compiled from abstract shapes for the devices of a topology. For
TPUs, libtpu describes the devices and compiles, for GPUs the cuda plugin; neither needs such a
device. The topology `cpu` is this machine's CPU devices.

Times are roofline estimates, which are lower bounds: every chip works at its peak rates, and within
a loop computation, HBM and interconnect overlap. Decode loops count as if every row ran to its last
token.
"""

from collections.abc import Callable, Mapping
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import re
import sys
from typing import Any

import jax
import numpy as np

from gkd_jax import gkd, sharding
from gkd_jax.planning import hlo, hlo_text, kernels
from gkd_jax.planning.topologies import CUDA_PLUGINS, Chip, describe_topology, platform_of
from gkd_jax.storage import pretrained
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import files
from gkd_jax.training import program, vocabulary_size
from gkd_jax.training.recipe import Recipe
from gkd_jax.training.throughput import GIB


RESOURCES = ("compute", "hbm", "interconnect")
_MOST_ARRAYS = 8  # The number of arrays that a message about memory names.


class DoesNotFitError(Exception):
    """A phase needs more memory than a device has."""


def precompile(
    recipe: Recipe,
    topology: str,
    *,
    num_slices: int = 1,
    full: bool = False,
    as_json: bool = False,
    dry_run: bool = False,
) -> None:
    """Compiles the phases of a step for a topology and prints a report of what they need.

    Args:
        recipe: the recipe of the run. If it has several batch shapes, the largest is compiled.
        topology: "cpu", a generation and a shape of TPUs such as "v5e:8x8", or "h100:" and slices x
            hosts x GPUs a host, such as "h100:1x1x8".
        num_slices: the number of TPU slices of this shape, joined by the data-centre network.
        full: compile for a TPU with all of XLA's effort. This takes minutes and gives the memory of
            a real run.
        as_json: print one line of JSON instead of the table.
        dry_run: check everything, but compile nothing.

    Raises:
        DoesNotFitError: after the report is printed, if a phase needs more memory than a device
            has; names the largest arrays.
        ValueError: for an unknown topology, or a recipe that `program.build` refuses.
    """
    chip, devices = describe_topology(topology, num_slices)
    if topology != "cpu":
        platform = platform_of(topology)
        models = {name: model.on(platform) for name, model in recipe.models.items()}
        recipe = recipe.with_models(models)
    built = program.build(
        recipe,
        vocabulary_size.num_pieces_of(recipe),
        pending=_absent_checkpoints(*recipe.models.values()),
        devices=devices,
    )
    if dry_run:
        print("dry run: all is well", file=sys.stderr)
        return
    phases = {}
    for name, (function, arguments) in program.phases(built).items():
        print(f"compiling {name} ...", file=sys.stderr)
        analysed = analyse(function, arguments, topology, full=full)
        analysed["resident_bytes"] = _resident_bytes(built, name)
        analysed["seconds"] = roofline(analysed, chip)
        phases[name] = analysed
    report = {
        "topology": topology,
        "num_slices": num_slices,
        "num_devices": len(devices),
        "device_kind": devices[0].device_kind,
        "mesh": dict(built.mesh.shape),
        "effort": "-1" if platform_of(topology) == "tpu" and not full else "full",
        "hbm_bytes": chip.hbm_bytes,
        "fits": not too_large(phases, chip),
        "phases": phases,
        **_cost_of_run(phases, recipe, len(devices) / chip.per_chip),
    }
    print(json.dumps(report) if as_json else table(report), flush=True)
    if not report["fits"]:
        raise DoesNotFitError(_largest(phases, chip))


def _absent_checkpoints(*models: ModelConfig) -> frozenset[str]:
    """Returns the checkpoints that need not be opened, because the size of their model is known.

    They are remote, or do not exist yet. Compiling needs only the shapes of their arrays.
    """
    known = {model.checkpoint for model in models if model.size is not None}
    absent = {path for path in known if path is not None and not pathlib.Path(path).exists()}
    return pretrained.remote_checkpoints(*models) | absent


# Compilation --------------------------------------------------------------------------------------


def _resident_bytes(built: program.Program, phase: str) -> int:
    """Returns the bytes that a device holds beside the arrays of a phase.

    While the student samples, these are the teacher and the optimizer's state.
    """
    if phase != "sample":
        return 0
    held = jax.tree.leaves((built.state.opt_state, built.state.average, built.teacher))
    on_device = (array for array in held if array.sharding.memory_kind != "pinned_host")
    return sum(sharding.bytes_per_device(array, array.sharding) for array in on_device)


def analyse(
    function: Any, arguments: tuple[Any, ...], topology: str = "cpu", *, full: bool = False
) -> dict[str, Any]:
    """Compiles one phase and returns what it needs on one device: bytes, and `hlo.summary`.

    The result of an earlier call for the same program is read from the cache. Where the compiler
    refuses a program that does not fit, the result has only `peak_bytes` and `largest`.
    """
    traced = function.trace(*arguments)
    lowered = traced.lower()
    path = _cache_path(lowered.as_text(), topology, full)
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    platform = platform_of(topology)
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
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needed = re.search(r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or needed is None:
            raise
        peak = int(float(needed[1]) * 1024 ** (1 + "KMGT".index(needed[2])))
        return {"peak_bytes": peak, "largest": largest_values(traced.jaxpr.jaxpr)}
    finally:
        jax.config.update(threshold, seconds)
    memory, module = compiled.memory_analysis(), hlo_text.parse(compiled.as_text())
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.temp_size_in_bytes  # XLA's peak on CPU leaves out temporaries
    on_host = memory.host_argument_size_in_bytes  # XLA's peak on TPUs includes host memory
    found = {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "host_bytes": on_host,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes - on_host if platform == "tpu" else used,
        **hlo.summary(module),
        "largest": largest_arrays(module),
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(found))
    return found


def _cache_path(text: str, topology: str, full: bool) -> pathlib.Path | None:
    """Returns the cache file of a program's analysis, or None where the cache is turned off.

    Its name is a hash of the program's text and of everything that changes the analysis: topology,
    effort, versions of the compilers, and the source of the modules that count.
    """
    folder = os.environ.get("GKD_JAX_COMPILATION_CACHE")
    if folder == "":
        return None
    root = pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "gkd_jax"
    compilers = {"cpu": (), "gpu": CUDA_PLUGINS, "tpu": ("libtpu",)}
    found = filter(importlib.util.find_spec, compilers[platform_of(topology)])
    names = ["jaxlib", *found]
    versions = map(importlib.metadata.version, names)
    counting = (__file__, hlo.__file__, hlo_text.__file__, kernels.__file__)
    sources = [pathlib.Path(str(path)).read_text(encoding="utf-8") for path in counting]
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


# Cost ---------------------------------------------------------------------------------------------


def roofline(phase: Mapping[str, Any], chip: Chip) -> dict[str, Any] | None:
    """Estimates the time of a phase at the chip's peak rates, which is a lower bound.

    Within a loop, computation, HBM and interconnect overlap, so that the slowest of the three
    counts. Loops run one after the other.

    Returns:
        The seconds of each resource alone, `roofline`, the seconds of the phase, and `bound_by`,
        the resource that most of the time waits for. None if the chip's rates are unknown or the
        phase was not compiled.
    """
    if "loops" not in phase or math.isinf(chip.flops):
        return None
    waits: dict[str, float] = dict.fromkeys(RESOURCES, 0.0)
    alone = dict(waits)
    for loop in phase["loops"].values():
        times = {
            "compute": loop["flops"] / chip.flops,
            "hbm": loop["traffic_bytes"] / chip.hbm,
            "interconnect": loop["wire_bytes"] / chip.interconnect,
        }
        for name, seconds in times.items():
            alone[name] += seconds
        slowest = max(times, key=lambda name: times[name])
        waits[slowest] += times[slowest]
    bound = max(waits, key=lambda name: waits[name])
    return {**alone, "roofline": sum(waits.values()), "bound_by": bound}


def sampled_share(method: gkd.GKDConfig, train_steps: int) -> float:
    """Returns the share of a run's steps in which the student samples."""
    fraction = method.on_policy_fraction
    if method.mixing == "example":  # a step samples for the on-policy rows of its batch
        return float(fraction != 0)
    if not callable(fraction):
        return float(fraction)
    steps = np.linspace(0, train_steps - 1, min(train_steps, 1000)).round()
    return float(np.mean([float(fraction(step)) for step in steps]))


def _cost_of_run(phases: Mapping[str, Any], recipe: Recipe, num_chips: float) -> dict[str, Any]:
    """Returns the mean time of a step and the chip-hours of a run, None where not known."""
    train_steps = recipe.train.train_steps
    share = sampled_share(recipe.method, train_steps)
    found = {"train_steps": train_steps, "sampled_share": share, "num_chips": num_chips}
    seconds = {name: phase["seconds"] for name, phase in phases.items() if name != "score"}
    if any(value is None for value in seconds.values()):
        return {**found, "step_seconds": None, "chip_hours": None}
    times = {name: value["roofline"] for name, value in seconds.items()}
    dataset = times.get("update_dataset", times["update"])
    step = share * (times.get("sample", 0.0) + times["update"]) + (1 - share) * dataset
    return {**found, "step_seconds": step, "chip_hours": train_steps * step * num_chips / 3600}


def too_large(phases: Mapping[str, Any], chip: Chip) -> list[str]:
    """Returns the phases that need more memory than a device has.

    "score" does not count, because a run does not execute it as a program of its own.
    """
    return [
        name
        for name, phase in phases.items()
        if name != "score" and phase["peak_bytes"] + phase["resident_bytes"] > chip.hbm_bytes
    ]


def _largest(phases: Mapping[str, Any], chip: Chip) -> str:
    """Returns the message of `DoesNotFitError`, with the largest arrays of each phase."""
    parts = []
    for name in too_large(phases, chip):
        phase = phases[name]
        needed = (phase["peak_bytes"] + phase["resident_bytes"]) / GIB
        arrays = ", ".join(f"{label} {size / GIB:.2f} GiB" for label, size in phase["largest"])
        where = "each" if "loops" in phase else "over all devices"
        parts.append(f"{name} needs {needed:.2f} GiB; its largest arrays, {where}: {arrays}")
    return f"a device has {chip.hbm_bytes / GIB:.2f} GiB; {'; '.join(parts)}"


# Printing -----------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Returns a report as text, with one column for each phase."""
    phases = report["phases"]

    def row(label: str, value: Callable[[Mapping[str, Any]], Any]) -> str:
        cells = []
        for phase in phases.values():
            try:
                found = value(phase)
            except (KeyError, TypeError):  # the phase was not compiled, or no rates are known
                found = "-"
            cells.append(found if isinstance(found, str) else f"{found:.4g}")
        return f"{label:<22}" + "".join(f"{cell:>15}" for cell in cells)

    mesh = " x ".join(f"{name}={size}" for name, size in report["mesh"].items())
    lines = [
        f"{report['topology']} x {report['num_slices']}: {report['num_devices']} devices "
        f"({report['device_kind']}), {mesh}, effort {report['effort']}",
        f"{'per device':<22}" + "".join(f"{name:>15}" for name in phases),
    ]
    for name in ("argument", "output", "temporary", "peak", "resident"):
        lines.append(row(f"{name} GiB", lambda phase, n=name: phase[f"{n}_bytes"] / GIB))
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines.append(f"{'a device has GiB':<22}{report['hbm_bytes'] / GIB:>15.4g}   {verdict}")
    lines.append(row("TFLOP", lambda phase: phase["flops"] / 1e12))
    lines.append(row("HBM traffic GB", lambda phase: phase["traffic_bytes"] / 1e9))
    lines.append(row("sent GB", lambda phase: phase["wire_bytes"] / 1e9))
    for name in (*RESOURCES, "roofline"):
        lines.append(row(f"{name} ms", lambda phase, n=name: phase["seconds"][n] * 1e3))
    lines.append(row("bound by", lambda phase: phase["seconds"]["bound_by"]))
    lines.append("collectives (loops: turns of the outer > of the inner):")
    for name, phase in phases.items():
        for found in phase.get("collectives", ()):
            lines.append(
                f"  {name:<15}{found['kind']:<20}x {found['count']:<8.0f}"
                f"over {found['group_size']:<6}{found['bytes'] / 1e6:>12.2f} MB   "
                f"{'loop ' + found['loop'] if found['loop'] else 'no loop'}"
            )
    for name, phase in phases.items():
        for kernel in phase.get("uncounted", ()):
            lines.append(f"WARNING: {name}'s numbers leave out this kernel: {kernel}")
    if report["chip_hours"] is not None:
        lines.append(
            f"a step takes at least {report['step_seconds'] * 1e3:.1f} ms (samples in "
            f"{report['sampled_share']:.0%} of steps); {report['train_steps']} steps on "
            f"{report['num_chips']:g} chips: {report['chip_hours']:.1f} chip-hours"
        )
    return "\n".join(lines)
