"""What a run will need and cost on a machine that is not there: memory, FLOPs, traffic, time.

    gkd-jax precompile --topology=v5e:8x8 --gin_file=gin/gkd.gin --gin.MODEL_DIR=...

The very functions that `train` jits are lowered from abstract shapes for the devices of a TPU
topology, which libtpu describes and compiles for without any TPU, for GPUs in the same way through
the cuda plugin, or for this machine's CPU devices (`cpu`). Times are rooflines, lower bounds: what
the chip's peak rates allow, everything overlapped within a loop. Decode loops count as if every row
ran to its last token.
"""

from collections.abc import Callable, Mapping
import dataclasses
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
from gkd_jax.planning import hlo
from gkd_jax.planning.topologies import GIB, Chip, describe_topology, platform_of
from gkd_jax.storage import pretrained
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import files
from gkd_jax.training import program, sizes
from gkd_jax.training.recipe import Recipe


RESOURCES = ("compute", "hbm", "interconnect")


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
    """Compiles the phases of a step for a topology and prints what they need.

    Args:
        recipe: of the run; of several shapes of batch, the largest counts.
        topology: "cpu", a generation and a shape of chips such as "v5e:8x8", or GPUs such as
            "h100:1x1x8": slices x hosts x GPUs a host.
        num_slices: slices of this shape, joined by the data-centre network.
        full: compile for a TPU with all of XLA's effort: minutes, and the memory that a real run
            has.
        as_json: one line of JSON instead of the table.
        dry_run: check everything, compile nothing.

    Raises:
        DoesNotFitError: naming the largest arrays, once everything is printed.
        ValueError: for an unknown topology, or what `program.build` refuses.
    """
    chip, devices = describe_topology(topology, num_slices)
    if topology != "cpu":  # as there: `ModelConfig` asks the backend, here the CPU's
        teacher = None if recipe.teacher is None else _as_on_tpu(recipe.teacher)
        recipe = dataclasses.replace(recipe, student=_as_on_tpu(recipe.student), teacher=teacher)
    built = program.build(
        recipe,
        sizes.num_pieces_of(recipe),
        pending=_absent_checkpoints(recipe.student, recipe.teacher),
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


def _as_on_tpu(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        model,
        scan_unroll=model.scan_unroll or 1,
        attention_by_row=bool(model.attention_by_row),
    )


def _absent_checkpoints(*models: ModelConfig | None) -> frozenset[str]:
    """Those that are remote, or not there yet but of known size: only shapes matter here."""
    known = {model.checkpoint for model in models if model is not None and model.size is not None}
    absent = {path for path in known if path is not None and not pathlib.Path(path).exists()}
    return pretrained.remote_checkpoints(*models) | absent


# What would run -----------------------------------------------------------------------------------


def _resident_bytes(built: program.Program, phase: str) -> int:
    """What else a device holds while a phase runs: the teacher and the optimizer's state."""
    if phase != "sample":
        return 0
    held = jax.tree.leaves((built.state.opt_state, built.teacher))
    on_device = (array for array in held if array.sharding.memory_kind != "pinned_host")
    return sum(sharding.bytes_per_device(array, array.sharding) for array in on_device)


def analyse(
    function: Any, arguments: tuple[Any, ...], topology: str = "cpu", *, full: bool = False
) -> dict[str, Any]:
    """Compiles one phase and reads off what it needs; per device, bytes; from the cache if known.

    Where the compiler finds that it does not fit, only `peak_bytes` and `largest` are known.
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
        options = {"xla_gpu_autotune_level": 0}  # which would try kernels out, on a GPU
    elif platform == "tpu" and not full:
        options = {"exec_time_optimization_effort": -1.0}
    # An executable for a device that is not there could be stored but never loaded again.
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
    memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    used += memory.temp_size_in_bytes  # the CPU's own peak leaves temporaries out
    on_host = memory.host_argument_size_in_bytes  # which a TPU's peak counts too
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
    """Where the analysis of a program is kept, by its text and all that reads it."""
    folder = os.environ.get("GKD_JAX_COMPILATION_CACHE")
    if folder == "":
        return None
    root = pathlib.Path(folder) if folder else pathlib.Path.home() / ".cache" / "gkd_jax"
    compilers = {"cpu": [], "gpu": ["jax_cuda12_plugin"], "tpu": ["libtpu"]}
    names = ["jaxlib", *compilers[platform_of(topology)]]
    versions = map(importlib.metadata.version, names)
    sources = [pathlib.Path(path).read_text(encoding="utf-8") for path in (__file__, hlo.__file__)]
    parts = "\n".join([text, topology, str(full), *versions, *sources])
    return root / "precompile" / f"{hashlib.sha256(parts.encode()).hexdigest()}.json"


def largest_arrays(module: hlo.Module, count: int = 8) -> list[tuple[str, int]]:
    """(where it comes from, bytes) of the largest arrays of a program, arguments included."""
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
    return sorted(sizes.items(), key=lambda item: -item[1])[:count]


def largest_values(jaxpr: Any, count: int = 8) -> list[tuple[str, int]]:
    """(what makes it, bytes over all devices) of the largest values of a program not compiled.

    The compiler keeps some of them in pieces, or never makes them.
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
    return sorted(sizes.items(), key=lambda item: -item[1])[:count]


# What it costs ------------------------------------------------------------------------------------


def roofline(phase: Mapping[str, Any], chip: Chip) -> dict[str, Any] | None:
    """Seconds of a phase at the chip's peak rates, and what most of them wait for.

    Within a loop everything overlaps, so that the slowest of the three counts; loops follow each
    other. None where the chip's rates are not known or the phase was not compiled.
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
    """The share of a run's steps that sample."""
    fraction = method.on_policy_fraction
    if method.mixing == "example":
        return float(fraction != 0)
    if not callable(fraction):
        return float(fraction)
    steps = np.linspace(0, train_steps - 1, min(train_steps, 1000)).round()
    return float(np.mean([float(fraction(step)) for step in steps]))


def _cost_of_run(phases: Mapping[str, Any], recipe: Recipe, num_chips: float) -> dict[str, Any]:
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
    """The phases that need more than a device has; "score" is no program of a run."""
    return [
        name
        for name, phase in phases.items()
        if name != "score" and phase["peak_bytes"] + phase["resident_bytes"] > chip.hbm_bytes
    ]


def _largest(phases: Mapping[str, Any], chip: Chip) -> str:
    parts = []
    for name in too_large(phases, chip):
        phase = phases[name]
        needed = (phase["peak_bytes"] + phase["resident_bytes"]) / GIB
        arrays = ", ".join(f"{label} {size / GIB:.2f} GiB" for label, size in phase["largest"])
        where = "each" if "loops" in phase else "over all devices"
        parts.append(f"{name} needs {needed:.2f} GiB; its largest arrays, {where}: {arrays}")
    return f"a device has {chip.hbm_bytes / GIB:.2f} GiB; {'; '.join(parts)}"


# On paper -----------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """A report as text, one column a phase."""
    phases = report["phases"]

    def row(label: str, value: Callable[[Mapping[str, Any]], Any]) -> str:
        cells = []
        for phase in phases.values():
            try:
                found = value(phase)
            except (KeyError, TypeError):  # not compiled, or no rates known
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
    if report["chip_hours"] is not None:
        lines.append(
            f"a step takes at least {report['step_seconds'] * 1e3:.1f} ms (samples in "
            f"{report['sampled_share']:.0%} of steps); {report['train_steps']} steps on "
            f"{report['num_chips']:g} chips: {report['chip_hours']:.1f} chip-hours"
        )
    return "\n".join(lines)
