"""Prints the report of `precompile` as a table."""

from collections.abc import Callable, Mapping
from typing import Any

from gkd_jax.planning.roofline import RESOURCES
from gkd_jax.training.throughput import GIB


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
