"""The device mesh, and the shardings that follow from the logical axes of an array.

Every array has a tuple of logical axis names, such as `("layers", "embed", "mlp")`. `RULES` maps
each logical axis to the mesh axes over which it is sharded. The mesh axes are `data` (batch only),
`fsdp` (batch and parameters) and `tensor` (heads, mlp and vocabulary).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import contextvars
import dataclasses
import math
import sys
from typing import Any

import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int
import numpy as np

from gkd_jax.text import settings


MESH_AXES = ("data", "fsdp", "tensor")
Rules = Mapping[str, str | tuple[str, ...] | None]
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "embed_activations": None,
    "mlp": "tensor",
    "heads": "tensor",
    "joined_kv": "tensor",
    "kv": None,
    "relpos_buckets": None,
}
ACTIVATIONS = ("batch", "length", "embed_activations")  # logical axes of hidden states [B T D]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The sizes of the mesh axes; one size may be -1, which takes all remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        settings.check_types(self)
        sizes = dataclasses.astuple(self)
        if any(size != -1 and size < 1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(
                "mesh axes must be positive, at most one of them -1 (the rest), "
                f"got data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}"
            )

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Returns (data, fsdp, tensor) without -1 for a number of devices.

        Raises:
            ValueError: if the axes do not multiply to `num_devices`.
        """
        fixed = math.prod(size for size in dataclasses.astuple(self) if size != -1)
        data, fsdp, tensor = (
            num_devices // fixed if size == -1 else size for size in dataclasses.astuple(self)
        )
        if data * fsdp * tensor != num_devices:
            raise ValueError(
                f"a mesh of data={self.data} x fsdp={self.fsdp} x tensor={self.tensor} does not "
                f"fit {num_devices} devices"
            )
        return data, fsdp, tensor


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh of devices, which are placed to suit their interconnect.

    Over several TPU slices, only the axis `data` crosses from slice to slice. Without `devices` the
    mesh has all of them.

    Raises:
        ValueError: if the axes do not fit the number of devices or slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    # Auto axes let GSPMD propagate shardings from annotations; jax.make_mesh's default is Explicit.
    types = (AxisType.Auto,) * len(MESH_AXES)
    num_slices = _num_slices(devices)
    if num_slices == 1:
        return Mesh(_place(sizes, devices), MESH_AXES, axis_types=types)
    data, fsdp, tensor = sizes
    _check_slices(data, num_slices)
    # The network between slices is slow. Along the data axis only gradients are sent, once a step.
    grid = _place((data // num_slices, fsdp, tensor), devices, num_slices)
    return Mesh(grid, MESH_AXES, axis_types=types)


def with_sizes(mesh: Mesh, config: MeshConfig | None) -> Mesh:
    """Returns a mesh of the same devices, in the same order, with other sizes of its axes.

    One jitted function may use both meshes, because it needs only that the devices and their order
    are the same. A None for `config` returns the mesh itself.

    Raises:
        ValueError: if the axes do not fit the number of devices or slices.
    """
    if config is None:
        return mesh
    sizes = config.sizes(mesh.size)
    _check_slices(sizes[0], _num_slices(list(mesh.devices.flat)))
    return Mesh(mesh.devices.reshape(sizes), MESH_AXES, axis_types=mesh.axis_types)


def _num_slices(devices: Sequence[Any]) -> int:
    return len({getattr(device, "slice_index", 0) for device in devices})


def _check_slices(data: int, num_slices: int) -> None:
    if data % num_slices:
        raise ValueError(
            f"data={data} does not divide over {num_slices} slices: only it crosses them"
        )


def _place(sizes: tuple[int, int, int], devices: Sequence[Any], num_slices: int = 1) -> np.ndarray:
    """Returns the devices in the shape of the mesh; neighbours in the mesh are close to each other.

    A mesh axis takes whole axes of a TPU's torus where that is possible. Otherwise (as for an axis
    of 2 on a torus of 4 x 4) axes of the torus are split, and a warning tells the cost.
    """

    def arrange(split: bool) -> np.ndarray:
        options = {"devices": devices, "allow_split_physical_axes": split}
        if num_slices > 1:
            return mesh_utils.create_hybrid_device_mesh(sizes, (num_slices, 1, 1), **options)
        return mesh_utils.create_device_mesh(sizes, **options)

    try:
        return arrange(split=False)
    except NotImplementedError:
        grid = arrange(split=True)
    shape = " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    print(
        f"WARNING: the mesh {shape} splits axes of the chips' interconnect: collectives over parts "
        "of one axis share its links, and may take up to twice as long as over whole axes (times "
        "of precompile leave that out)",
        file=sys.stderr,
    )
    return grid


def spec(axes: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Returns the mesh axes over which an array with these logical axes is sharded.

    Raises:
        ValueError: for an unknown logical axis, or for two axes that claim the same mesh axis.
    """
    entries, used = [], []
    for axis in axes:
        if axis is not None and axis not in rules:
            raise ValueError(f"unknown logical axis {axis!r}, expected one of {sorted(rules)}")
        entry = None if axis is None else rules[axis]
        used.extend(_as_tuple(entry))
        entries.append(entry)
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} claim a mesh axis twice: {entries}")
    return PartitionSpec(*entries)


def tree_shardings(shapes: Any, axes: Any, mesh: Mesh) -> Any:
    """Returns the `NamedSharding` of each array, or `ShapeDtypeStruct`, in a tree.

    The tree `axes` has a tuple of logical axes at each leaf.

    Raises:
        ValueError: if the mesh does not divide the dimensions of some arrays; names all of these.
    """
    errors = []

    def sharding(path, shape, names):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        partition = spec(names)
        for size, entry, axis in zip(shape.shape, partition, names, strict=True):
            parts = _num_parts(mesh, entry)
            if size % parts:
                errors.append(
                    f"{name} {shape.shape}: {axis}={size} does not divide over {entry} ({parts})"
                )
        return NamedSharding(mesh, partition)

    shardings = jax.tree_util.tree_map_with_path(
        sharding, shapes, axes, is_leaf=lambda leaf: hasattr(leaf, "shape")
    )
    if errors:
        raise ValueError("the mesh does not divide these arrays:\n  " + "\n  ".join(errors))
    return shardings


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with which every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch's arrays: the rows are sharded, the other axes are not."""
    return NamedSharding(mesh, spec(("batch",)))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch's rows over a mesh."""
    return _num_parts(mesh, RULES["batch"])


def check_batch_size(batch_size: int, mesh: Mesh, name: str = "the batch size") -> None:
    """Checks that the mesh divides the rows of a batch evenly.

    Raises:
        ValueError: if it does not; the message calls the rows `name`.
    """
    parts = batch_shards(mesh)
    if batch_size % parts:
        raise ValueError(f"{name} must be divisible by data x fsdp = {parts}, got {batch_size}")


def _num_parts(mesh: Mesh, entry: str | tuple[str, ...] | None) -> int:
    """Returns the number of parts into which some mesh axes divide a dimension."""
    return math.prod(mesh.shape[axis] for axis in _as_tuple(entry))


def _as_tuple(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


_active: contextvars.ContextVar[tuple[Mesh, Rules] | None] = contextvars.ContextVar(
    "gkd_jax_sharding", default=None
)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
    """Sets the mesh and rules by which `constrain` shards the activations traced in this context.

    `num_shards`, `num_devices` and `platform` report the same mesh.
    """
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


@contextlib.contextmanager
def use_sizes(config: MeshConfig | None) -> Iterator[None]:
    """Gives the mesh of `use` other axis sizes (`with_sizes`) for what is traced in this context.

    Outside `use`, and for None, nothing changes.
    """
    active = _active.get()
    if active is None:
        yield
        return
    with use(with_sizes(active[0], config), active[1]):
        yield


def _mesh_and_rules() -> tuple[Mesh, Rules]:
    active = _active.get()
    assert active is not None, "there are no shards outside `use`"
    return active


def constrain(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """Constrains the sharding of an activation to that of its logical axes.

    Outside `use`, on one device, and where the mesh does not divide the dimensions, x is returned
    as it is.
    """
    active = _active.get()
    if active is None or active[0].size == 1:
        return x
    mesh, rules = active
    partition = spec(axes, rules)
    for size, entry in zip(x.shape, partition, strict=True):
        if size % _num_parts(mesh, entry):
            return x  # the compiler chooses for a dimension that cannot be split, such as one token
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, partition))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns the shapes and dtypes of a tree, as `ShapeDtypeStruct`s, with a tree of shardings."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )


def num_shards(axis: str) -> int:
    """Returns the number of shards of a logical axis over the mesh of `use`; 1 outside `use`."""
    active = _active.get()
    if active is None:
        return 1
    mesh, rules = active
    return _num_parts(mesh, rules[axis])


def row_shards(num_rows: int) -> int:
    """Returns the number of shards over which the rows of a batch are spread.

    It is 1 outside `use`, and where the mesh does not divide the rows.
    """
    shards = num_shards("batch")
    return shards if num_rows % shards == 0 else 1


def copy_to_shards(params: Any) -> Any:
    """Returns arrays with a new first axis, on which each shard of a batch has its own copy."""
    mesh, rules = _mesh_and_rules()
    shards = num_shards("batch")

    def copy(x: jax.Array) -> jax.Array:
        copies = jnp.broadcast_to(x[None], (shards, *x.shape))
        # What the arrays are sharded over besides, such as `tensor`, the compiler finds.
        rest = [PartitionSpec.UNCONSTRAINED] * x.ndim
        first = spec(("batch",), rules)[0]
        return jax.lax.with_sharding_constraint(
            copies, NamedSharding(mesh, PartitionSpec(first, *rest))
        )

    return jax.tree.map(copy, params)


def map_shards(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of arrays whose first axis is the shards of a batch.

    It maps `function` over this axis. Inside, a batch is the rows of one shard.
    """
    mesh, rules = _mesh_and_rules()

    def run(*arrays):
        with use(mesh, {**rules, "batch": None}):
            return jax.vmap(function, spmd_axis_name=_as_tuple(rules["batch"]))(*arrays)

    return run


def take_rows(x: jax.Array, rows: Int[Array, "shards n"], axis: int = 0) -> jax.Array:
    """Returns some rows of an array, each from its own shard of the batch.

    Args:
        x: an array whose `axis` holds the rows of all shards, one shard after the other.
        rows: the rows to take from each shard, numbered within the shard. So the compiler sees that
            no row leaves its device.
    """
    shards, count = rows.shape
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    index = rows.reshape((1,) * len(before) + rows.shape + (1,) * len(after))
    found = jnp.take_along_axis(
        x.reshape(*before, shards, -1, *after), index, axis=axis + 1, mode="promise_in_bounds"
    )
    return found.reshape(*before, shards * count, *after)


def put_rows(
    x: jax.Array, taken: jax.Array, rows: Int[Array, "shards n"], axis: int = 0
) -> jax.Array:
    """Returns the array with rows that `take_rows` took from `axis` written back.

    The rows of each shard are different ones.
    """

    def put(x, new, places):
        return x.at[places].set(new, unique_indices=True)

    put = jax.vmap(put)
    for _ in range(axis):
        put = jax.vmap(put, in_axes=(0, 0, None))
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    grouped, new = (y.reshape(*before, len(rows), -1, *after) for y in (x, taken))
    return put(grouped, new, rows).reshape(x.shape)


def num_devices() -> int:
    """Returns the number of devices in the mesh of `use`; 1 outside `use`."""
    active = _active.get()
    return 1 if active is None else active[0].size


def platform() -> str | None:
    """Returns the platform of the mesh of `use`, such as "tpu"; None outside `use`."""
    active = _active.get()
    return None if active is None else active[0].devices.flat[0].platform


def host_device() -> Any:
    """Returns the CPU, for `jax.default_device`; None (the default) where JAX may not use the CPU.

    A small computation there does not wait for the step that an accelerator still works on.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None


def on_each_device(
    function: Callable[..., jax.Array],
    inputs: Sequence[Sequence[str | None]],
    output: Sequence[str | None],
) -> Callable[..., jax.Array]:
    """Returns a function that every device of the mesh of `use` computes on its own part of arrays.

    The parts must need nothing from each other. Outside `use` and on one device it is the function
    itself. `inputs` has the logical axes of each argument, whose dimensions the mesh must divide,
    and `output` those of the result.
    """
    active = _active.get()
    if active is None or active[0].size == 1:
        return function
    mesh, rules = active
    specs = tuple(spec(axes, rules) for axes in inputs)
    # Kernels do not say over which mesh axes their results vary, so that JAX cannot check it.
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=spec(output, rules), check_vma=False
    )


def bytes_per_device(array: Any) -> int:
    """Returns the bytes that each device holds of an array, or of a `ShapeDtypeStruct`."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
