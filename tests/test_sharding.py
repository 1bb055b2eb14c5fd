"""The mesh, and the table from logical axes to mesh axes."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from gkd_jax import sharding
from gkd_jax.models import lm, t5
from gkd_jax.sharding import MeshConfig


AXES = ("data", "fsdp", "tensor")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize(
    ("config", "devices", "expected"),
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(), 1, (1, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), 8, (1, 4, 2)),
        (MeshConfig(data=4, tensor=-1), 64, (4, 1, 16)),
    ],
)
def test_mesh_sizes(config, devices, expected):
    assert config.sizes(devices) == expected


@pytest.mark.parametrize(
    ("sizes", "devices"), [((3, 1, 1), 8), ((-1, 3, 1), 8), ((2, 2, 2), 4), ((-1, 16, 1), 8)]
)
def test_a_mesh_must_fit_the_devices(sizes, devices):
    data, fsdp, tensor = sizes
    config = MeshConfig(data=data, fsdp=fsdp, tensor=tensor)
    message = f"data={data} x fsdp={fsdp} x tensor={tensor} does not fit {devices} devices"
    with pytest.raises(ValueError, match=message):
        config.sizes(devices)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1), (-1, -1, 1)])
def test_bad_mesh_axes(sizes):
    data, fsdp, tensor = sizes
    with pytest.raises(ValueError, match=f"got data={data}, fsdp={fsdp}, tensor={tensor}"):
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor)


def test_make_mesh_takes_all_devices_or_those_given():
    assert dict(sharding.make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    few = sharding.make_mesh(MeshConfig(tensor=2), jax.devices()[:4])
    assert dict(few.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert set(few.devices.flat) == set(jax.devices()[:4])


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device that placing it on a mesh needs."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    slice_index: int = 0
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def torus(kind, *shape, num_slices=1):
    places = [(slice, *xyz) for slice in range(num_slices) for xyz in np.ndindex(*shape)]
    return [
        Chip(number, (*xyz, 0)[:3], kind, slice_index)
        for number, (slice_index, *xyz) in enumerate(places)
    ]


V6E, V5P = "TPU v6 lite", "TPU v5"


@pytest.mark.parametrize(
    ("devices", "whole_axes"),
    [
        (torus(V6E, 4, 4), {(16, 1, 1), (4, 4, 1), (1, 4, 4)}),
        (torus(V6E, 4, 8), {(8, 4, 1), (1, 1, 32)}),
        (torus(V5P, 4, 4, 4), {(4, 4, 4), (16, 4, 1), (1, 64, 1)}),
        (torus(V5P, 2, 2, 4), {(4, 4, 1), (2, 4, 2), (1, 1, 16)}),
    ],
    ids=["v6e:4x4", "v6e:4x8", "v5p:4x4x4", "v5p:2x2x4"],
)
def test_every_mesh_that_fits_is_made(devices, whole_axes, capsys):
    number = len(devices)
    powers = [2**i for i in range(number.bit_length())]
    for data, fsdp in itertools.product(powers, powers):
        if number % (data * fsdp):
            continue
        sizes = (data, fsdp, number // data // fsdp)
        made = sharding.make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))), devices)
        assert tuple(made.shape.values()) == sizes
        assert {chip.id for chip in made.devices.flat} == set(range(number))
        warning = capsys.readouterr().err
        if sizes in whole_axes:
            assert not warning
        elif warning:
            name = f"data={data} x fsdp={fsdp} x tensor={sizes[2]}"
            assert f"WARNING: the mesh {name} splits axes" in warning


def test_a_tensor_axis_of_two_is_made_with_a_warning(capsys):
    """JAX's own `make_mesh` refuses this mesh and advises an option that it does not have."""
    made = sharding.make_mesh(MeshConfig(data=4, fsdp=2, tensor=2), torus(V6E, 4, 4))
    assert "data=4 x fsdp=2 x tensor=2 splits axes" in capsys.readouterr().err
    for left, right in made.devices.reshape(-1, 2):  # what talks most lies side by side
        assert np.abs(np.subtract(left.coords, right.coords)).sum() == 1


def test_slices_are_crossed_by_the_data_axis_alone(capsys):
    devices = torus(V6E, 4, 4, num_slices=2)
    made = sharding.make_mesh(MeshConfig(data=8, fsdp=2, tensor=2), devices)
    assert "data=4 x fsdp=2 x tensor=2 splits axes" in capsys.readouterr().err
    for row in made.devices:
        assert len({chip.slice_index for chip in row.flat}) == 1
    with pytest.raises(ValueError, match="data=1 does not divide over 2 slices"):
        sharding.make_mesh(MeshConfig(data=1, fsdp=-1), devices)


def test_spec():
    assert sharding.spec(("layers", "embed", "mlp")) == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.spec(("batch", "length")) == PartitionSpec(("data", "fsdp"), None)
    assert sharding.spec((None, "vocab")) == PartitionSpec(None, "tensor")


@pytest.mark.parametrize("axes", [("heads", "mlp"), ("batch", "embed")])
def test_two_axes_cannot_claim_one_mesh_axis(axes):
    with pytest.raises(ValueError, match=f"{axes[0]}.*{axes[1]}.*claim a mesh axis twice"):
        sharding.spec(axes)


def test_an_unknown_logical_axis_is_named():
    with pytest.raises(ValueError, match=r"unknown logical axis 'embd', expected one of .*'embed'"):
        sharding.spec(("embd",))


def test_tree_shardings_place_each_array(mesh):
    shapes = {"w": jax.ShapeDtypeStruct((4, 6), "float32"), "b": jnp.zeros((4,))}
    axes = {"w": ("embed", "mlp"), "b": ("embed",)}
    placed = sharding.tree_shardings(shapes, axes, mesh)
    assert placed == {
        "w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "b": NamedSharding(mesh, PartitionSpec("fsdp")),
    }
    assert sharding.bytes_per_device(sharding.with_shardings(shapes, placed)["w"]) == 4 * 4 * 6 // 4
    parts = jax.device_put(jnp.ones((4, 6)), placed["w"]).addressable_shards
    assert {part.data.shape for part in parts} == {(2, 3)}


def test_every_array_that_does_not_divide_is_named(mesh):
    shapes = {
        "a": {"kernel": jax.ShapeDtypeStruct((4, 7), "float32")},
        "good": jax.ShapeDtypeStruct((4,), "float32"),
        "odd": jax.ShapeDtypeStruct((3,), "float32"),
    }
    axes = {"a": {"kernel": ("embed", "mlp")}, "good": ("embed",), "odd": ("embed",)}
    with pytest.raises(ValueError, match="does not divide") as error:
        sharding.tree_shardings(shapes, axes, mesh)
    message = str(error.value)
    assert "a/kernel (4, 7): mlp=7 does not divide over tensor (2)" in message
    assert "odd (3,): embed=3 does not divide over fsdp (2)" in message
    assert "good" not in message


def test_all_t5_sizes_divide_over_a_pod_slice():
    """tensor=2 and fsdp=4 divide every array of every size."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    for make in (t5.t5_1_0, t5.t5_1_1):
        for size in ("tiny", "small", "base", "large", "xl", "xxl"):
            shapes = lm.abstract_params(make(size))
            placed = sharding.tree_shardings(shapes, lm.logical_axes(shapes), mesh)
            whole = 4 * lm.num_params(shapes)
            placed_shapes = jax.tree.leaves(sharding.with_shardings(shapes, placed))
            held = sum(map(sharding.bytes_per_device, placed_shapes))
            assert held < whole / 7  # almost everything is split over all eight devices


def test_batch_sharding_splits_rows(mesh):
    x = jax.device_put(jnp.zeros((8, 3)), sharding.batch_sharding(mesh))
    assert {part.data.shape for part in x.addressable_shards} == {(2, 3)}
    whole = jax.device_put(jnp.zeros((8, 3)), sharding.replicated(mesh))
    assert {part.data.shape for part in whole.addressable_shards} == {(8, 3)}


def test_batch_size_check(mesh):
    sharding.check_batch_size(12, mesh)
    with pytest.raises(ValueError, match="divisible by data x fsdp = 4, got 6"):
        sharding.check_batch_size(6, mesh)


def test_constrain_acts_inside_use_alone(mesh):
    x = jnp.arange(32.0).reshape(8, 4)
    assert sharding.constrain(x, ("batch", "mlp")) is x

    def placed():
        return jax.jit(lambda y: sharding.constrain(y, ("batch", "mlp")))(x)

    with sharding.use(mesh):
        inside = placed()
        # A dimension that does not divide: left to the compiler.
        odd = jnp.ones((8, 3))
        assert sharding.constrain(odd, ("batch", "mlp")) is odd
        with sharding.use(mesh, {"batch": "tensor", "mlp": None}):
            assert placed().sharding.spec[0] == "tensor"
    assert inside.sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2
    )
    np.testing.assert_array_equal(inside, x)
    assert sharding.constrain(x, ("batch", "mlp")) is x
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with sharding.use(one):
        assert sharding.constrain(x, ("batch", "mlp")) is x
