"""Estimates the time of a phase from a chip's peak rates, and from that the cost of a run.

Times are roofline estimates, which are lower bounds: every chip works at its peak rates. Within a
loop, computation, HBM and interconnect overlap, so that the slowest of the three counts. Loops run
one after the other, and decode loops count as if every row ran to its last token.
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from gkd_jax import gkd
from gkd_jax.planning.topologies import Chip
from gkd_jax.training.recipe import Recipe


RESOURCES = ("compute", "hbm", "interconnect")


def roofline(phase: Mapping[str, Any], chip: Chip) -> dict[str, Any] | None:
    """Estimates the time of a phase at the chip's peak rates, as the module's docstring says.

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


def cost_of_run(phases: Mapping[str, Any], recipe: Recipe, num_chips: float) -> dict[str, Any]:
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
