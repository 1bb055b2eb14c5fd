"""Reports the memory, FLOPs, traffic and time of a run on accelerators that need not exist here.

    gkd-jax precompile --topology=v5e:8x8 --gin_file=gin/gkd.gin

The functions that `train` jits are compiled from abstract shapes for the devices of a topology. For
TPUs, libtpu describes the devices and compiles, for GPUs the cuda plugin; neither needs such a
device. The topology `cpu` is this machine's CPU devices.
"""

from collections.abc import Mapping
import json
import pathlib
import sys
from typing import Any

import jax

from gkd_jax import sharding
from gkd_jax.planning.analysis import analyse
from gkd_jax.planning.precompile_table import table
from gkd_jax.planning.roofline import cost_of_run, roofline
from gkd_jax.planning.topologies import Chip, describe_topology, platform_of
from gkd_jax.storage import pretrained
from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.training import program, vocabulary_size
from gkd_jax.training.recipe import Recipe
from gkd_jax.training.throughput import GIB


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
        topology, num_slices: see `topologies.describe_topology`.
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
        return
    phases = {}
    for name, (function, arguments) in program.step_functions(built).items():
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
        **cost_of_run(phases, recipe, len(devices) / chip.per_chip),
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


def _resident_bytes(built: program.Program, phase: str) -> int:
    """Returns the bytes that a device holds beside the arrays of a phase.

    While the student samples, these are the teacher and the optimizer's state.
    """
    if phase != "sample":
        return 0
    held = jax.tree.leaves((built.state.opt_state, built.state.average, built.teacher))
    on_device = (array for array in held if array.sharding.memory_kind != "pinned_host")
    return sum(map(sharding.bytes_per_device, on_device))


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
