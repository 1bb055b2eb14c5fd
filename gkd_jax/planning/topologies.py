"""Devices of machines to compile for that need not exist here, with their memory and peak rates.

`describe_topology` returns the devices of a TPU or GPU topology as XLA's compilers describe them,
and a `Chip` with the rates from the vendors' data sheets.
"""

from collections.abc import Mapping, Sequence
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gkd_jax.text.extras import install_command
from gkd_jax.training.throughput import GIB, PEAK_FLOPS


CUDA_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")  # of the extras gpu and gpu-cuda12


class Chip(NamedTuple):
    """The memory and peak rates of one device; a rate that is not known is infinite.

    Attributes:
        hbm_gib: the HBM that the compiler lets a program use, in GiB.
        flops: the rate of bfloat16 matrix products, in FLOP/s.
        hbm: the bandwidth of HBM, in bytes/s.
        interconnect: the bytes/s that a device sends: on TPUs along one axis of the torus, in both
            directions together, and on GPUs over NVLink.
        per_chip: the devices of one chip.
        options: the options of XLA's description of the topology.
    """

    hbm_gib: float
    flops: float = math.inf
    hbm: float = math.inf
    interconnect: float = math.inf
    per_chip: int = 1
    options: Mapping[str, Any] = {}

    @property
    def hbm_bytes(self) -> int:
        return int(self.hbm_gib * GIB)


# The rates are from the system architecture pages of cloud.google.com/tpu/docs. The interconnect
# there is that of all links of a chip, 4 (v5e, v6e) or 6, in both directions. The size of HBM is
# the limit that the compiler names in its errors.
CHIPS = {
    "v4": Chip(
        30.75, PEAK_FLOPS["TPU v4"], 1228e9, 100e9, options={"chip_config_name": "megacore"}
    ),
    "v5e": Chip(15.75, PEAK_FLOPS["TPU v5 lite"], 819e9, 100e9),
    "v5p": Chip(95.74, PEAK_FLOPS["TPU v5"], 2765e9, 200e9),
    "v6e": Chip(31.25, PEAK_FLOPS["TPU v6 lite"], 1638e9, 200e9),
    "tpu7x": Chip(94.75, PEAK_FLOPS["TPU7x"], 7380e9 / 2, 200e9 / 2, per_chip=2),
}
# The rates are from NVIDIA's H100 SXM data sheet: dense bfloat16, HBM3, and half of NVLink's
# two-way rate. The other numbers that the compiler needs are from NVIDIA's CUDA programming guide,
# compute capability 9.0.
GPUS = {"h100": Chip(79.1, PEAK_FLOPS["NVIDIA H100 80GB HBM3"], 3352e9, 450e9)}
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  driver_version: "12.8.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "H100"
"""
# Without these variables, libtpu asks a metadata server which TPU it runs on, and takes a lock.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def platform_of(topology: str) -> str:
    """Returns the platform of a topology of `describe_topology`: "cpu", "gpu" or "tpu"."""
    kind = topology.partition(":")[0]
    return "cpu" if kind == "cpu" else "gpu" if kind in GPUS else "tpu"


def describe_topology(topology: str, num_slices: int = 1) -> tuple[Chip, Sequence[Any]]:
    """Returns the kind of chip of a topology, and its devices, which need not exist.

    For TPUs and GPUs, this function switches JAX to its CPU backend.

    Args:
        topology: "cpu", a generation and a shape of TPUs such as "v5e:8x8", or "h100:" and slices x
            hosts x GPUs a host, such as "h100:1x1x8".
        num_slices: the number of TPU slices of this shape, joined by the data-centre network.

    Raises:
        ValueError: for an unknown name or shape.
        ModuleNotFoundError: if libtpu or, for GPUs, the cuda plugin is not installed.
    """
    if topology == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip(memory / jax.device_count() / GIB), jax.devices()
    kind, _, shape = topology.partition(":")
    if kind in GPUS:
        return GPUS[kind], _gpus(topology, shape, num_slices)
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape) or num_slices < 1:
        raise ValueError(
            f"--topology must be cpu or a shape of {', '.join([*CHIPS, *GPUS])} such as v5e:8x8, "
            f"v5p:4x4x4 or h100:1x1x8, in at least one slice, got {topology!r} x {num_slices}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(f"TPU topologies need libtpu: {install_command('tpu')}")
    for name, value in _LIBTPU.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    options = dict(CHIPS[kind].options)
    if not set(shape) - set("1x"):  # a single chip; a host has more by default
        options["chips_per_host_bounds"] = (1, 1, 1)
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except Exception as error:
        raise ValueError(f"libtpu knows no topology {topology!r}: {error}") from None
    return CHIPS[kind], found.devices


def _gpus(topology: str, shape: str, num_slices: int) -> Sequence[Any]:
    if not re.fullmatch(r"\d+x\d+x\d+", shape) or num_slices != 1:
        raise ValueError(
            "--topology of GPUs must be slices x hosts x GPUs a host, such as h100:1x1x8, without "
            f"--num_slices, got {topology!r} x {num_slices}"
        )
    if not any(importlib.util.find_spec(plugin) for plugin in CUDA_PLUGINS):
        raise ModuleNotFoundError(
            f"GPU topologies need JAX's plugin for CUDA: {install_command('gpu')}"
        )
    jax.config.update("jax_platforms", "cpu")
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=_H100, topology=shape
    )
    return found.devices
