"""T5X and Hugging Face checkpoints: equal in every format, equal logits, exact round trips."""

import dataclasses
import gzip
import json
import pathlib
import shutil

from conftest import GOLDEN, golden
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import ml_dtypes
import msgpack
import numpy as np
import pytest
from random_models import assert_same, random_params
import tensorstore as ts

from gkd_jax import convert, sampling
from gkd_jax.batch import Batch
from gkd_jax.convert import hf_folder, stored, t5x_write
from gkd_jax.convert.layout import to_ours, unflatten
from gkd_jax.convert.t5x import t5x_layout
from gkd_jax.models import lm, t5
from gkd_jax.models.parameters import flatten
from gkd_jax.storage import conversion
from gkd_jax.training import optimizers


NETWORKS = ("t5", "scalable_t5")
LEARNING_RATE = 3e-3  # of the T5X run that wrote the checkpoints


def batch_of(arrays, name):
    return Batch(
        jnp.asarray(arrays[f"{name}/encoder_input_tokens"]),
        jnp.asarray(arrays[f"{name}/decoder_target_tokens"]),
        jnp.asarray(arrays[f"{name}/decoder_loss_weights"], jnp.float32),
    )


PLAIN = t5.T5Config(
    vocab_size=48,
    d_model=24,
    num_heads=3,
    head_dim=4,
    d_ff=20,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
TIED = dataclasses.replace(PLAIN, mlp_activations=("relu",), tie_embeddings=True, scale_logits=True)
PER_LAYER = dataclasses.replace(PLAIN, per_layer_relpos=True)


def wide(config):
    return dataclasses.replace(config, d_model=128, d_ff=160, head_dim=43, vocab_size=130)


PLAIN_WIDE, PER_LAYER_WIDE = wide(PLAIN), wide(PER_LAYER)


# T5X's checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_formats_are_detected(t5x_checkpoint, network):
    for kind in ("native_f32", "orbax_ocdbt"):
        assert convert.detect(t5x_checkpoint(network, kind)) == "t5x"


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kind", ["native_f32", "native_bf16", "orbax_ocdbt"])
def test_sizes_are_inferred(t5x_checkpoint, network, kind):
    sizes = json.loads((GOLDEN / f"{network}_config.json").read_text())
    config = convert.read_config(t5x_checkpoint(network, kind))
    assert config == t5.T5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["emb_dim"],
        num_heads=sizes["num_heads"],
        head_dim=sizes["head_dim"],
        d_ff=sizes["mlp_dim"],
        num_encoder_layers=sizes["num_encoder_layers"],
        num_decoder_layers=sizes["num_decoder_layers"],
        mlp_activations=tuple(sizes["mlp_activations"]),
        tie_embeddings=sizes["logits_via_embedding"],
        per_layer_relpos=sizes["scan_layers"],
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_all_formats_hold_the_same_parameters(t5x_checkpoint, network):
    native = t5x_checkpoint(network, "native_f32")
    config = convert.read_config(native)
    expected = convert.read_params(native, config)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), expected) == jax.tree.map(
        lambda x: (x.shape, x.dtype), lm.abstract_params(config)
    )
    ocdbt = convert.read_params(t5x_checkpoint(network, "orbax_ocdbt"), config)
    assert_same(ocdbt, expected)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
    bf16 = t5x_checkpoint(network, "native_bf16")
    assert convert.stored_dtype(bf16) == "bfloat16"
    assert_same(convert.read_params(bf16, config, dtype="bfloat16"), rounded)
    assert_same(convert.read_params(native, config, dtype="bfloat16"), rounded)
    assert_same(convert.read_params(native, config, dtype=np.dtype(ml_dtypes.bfloat16)), rounded)


@pytest.mark.parametrize("network", NETWORKS)
def test_logits_and_greedy_tokens_equal_t5x(t5x_checkpoint, network):
    path = t5x_checkpoint(network, "native_f32")
    config = convert.read_config(path)
    params = convert.read_params(path, config)
    arrays = golden(network)
    batch = batch_of(arrays, "batch")
    logits = t5.logits(config, params, batch)
    real = np.asarray(batch.weights) > 0
    np.testing.assert_allclose(np.asarray(logits)[real], arrays["logits"][real], atol=1e-4)
    tokens = arrays["greedy/tokens"]
    drawn = sampling.sample(
        config,
        params,
        batch.inputs,
        max_length=tokens.shape[1],
        sampling=sampling.SamplingConfig(temperature=0.0, banned_ids=()),
    )
    np.testing.assert_array_equal(drawn.tokens, tokens)


def adafactor(config):
    settings = optimizers.Adafactor(
        stacked_min_dim_size_to_factor=0 if config.per_layer_relpos else 128
    )
    return settings(lambda count: LEARNING_RATE)


def adafactor_state(path, config):
    """T5X's Adafactor state in our layout: layers first, v_row a mean over the last dimension.

    T5X's scanned network stores as `v_row` the mean that runs along the model dimension. That is
    `v_col` here where the model dimension comes last.
    """
    arrays = {name: array for name, (array, _) in read_native(path).items()}
    moments = {"v_row": {}, "v_col": {}, "v": {}}

    def from_part(key, part, field):
        array = arrays[f"state.param_states.{part.name}.{field}"]
        lead = part.shape[1:2] if config.per_layer_relpos and "/layers/" in key else ()
        if arrays[f"state.param_states.{part.name}.v"].shape == part.shape:
            return to_ours(array, part.axes) if field == "v" else np.zeros((*lead, 1))
        if field == "v":
            return np.zeros((*lead, 1))
        if key.split("/")[-2] in ("out", "wo"):
            other = "v_col" if field == "v_row" else "v_row"
            array = arrays[f"state.param_states.{part.name}.{other}"]
        return np.moveaxis(array, 1 if field == "v_row" else 0, 0).reshape(*lead, -1)

    for key, entry in t5x_layout(config, scanned=config.per_layer_relpos).items():
        for field, leaves in moments.items():
            parts = [from_part(key, part, field) for part in entry.parts]
            leaves[key] = jnp.asarray(np.stack(parts) if entry.by_layer else parts[0], jnp.float32)
    count = jnp.asarray(arrays["state.step"], jnp.int32)
    return optimizers.AdafactorState(count, *map(unflatten, moments.values()))


@pytest.mark.parametrize("network", NETWORKS)
def test_training_continues_as_in_t5x(t5x_checkpoint, network):
    path = t5x_checkpoint(network, "native_f32")
    config = convert.read_config(path)
    params = convert.read_params(path, config)
    optimizer = adafactor(config)
    state = adafactor_state(path, config)
    assert int(state.count) == 3
    shapes = jax.tree.map(lambda x: x.shape, optimizer.init(params))
    assert jax.tree.map(lambda x: x.shape, state) == shapes
    arrays = golden(network)

    def loss(params, batch):
        log_probs = jax.nn.log_softmax(t5.logits(config, params, batch))
        picked = jnp.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * batch.weights)

    @jax.jit
    def train_step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state, value

    losses = []
    for name in ("train3", "train4"):
        params, state, value = train_step(params, state, batch_of(arrays, name))
        losses.append(float(value))
    np.testing.assert_allclose(losses, arrays["continued_loss_sum"], rtol=1e-5)
    batch = batch_of(arrays, "batch")
    real = np.asarray(batch.weights) > 0
    logits = np.asarray(t5.logits(config, params, batch))
    np.testing.assert_allclose(logits[real], arrays["continued_logits"][real], atol=2e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_shards_are_read_straight_into_their_devices(t5x_checkpoint, network):
    path = t5x_checkpoint(network, "native_f32")
    config = convert.read_config(path)
    expected = convert.read_params(path, config)
    # 8 shards of the joined heads cut both heads of 48 into pieces.
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        largest = max(range(leaf.ndim), key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, P(*["x" if a == largest else None for a in range(leaf.ndim)]))

    shardings = jax.tree.map(place, lm.abstract_params(config))
    placed = convert.read_params(path, config, shardings=shardings)
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    assert_same(placed, expected)


def test_a_shard_reads_only_its_own_bytes():
    asked = []
    array = np.arange(32.0, dtype=np.float32).reshape(8, 4)

    def read(index):
        asked.append(array[index].size)
        return array[index]

    kept = stored.Stored(name="x", shape=(8, 4), dtype=array.dtype, read=read)
    part = stored.Part("x", (8, 4), ((0,), (1,)))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layout = {"x": stored.Entry((8, 4), (part,))}
    placed = stored.read_tree(layout, {"x": kept}, array.dtype, {"x": NamedSharding(mesh, P("x"))})
    np.testing.assert_array_equal(placed["x"], array)
    assert asked == [8, 8, 8, 8]  # four shards; the replicas along y cost nothing


@pytest.mark.parametrize("config", [PLAIN_WIDE, PER_LAYER_WIDE], ids=["plain", "scanned"])
def test_chunks_are_fetched_once_for_all_shards(tmp_path, config):
    folder = convert.write_t5x(str(tmp_path), config, random_params(config), step=1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(leaf):
        divisible = [axis for axis in range(leaf.ndim) if leaf.shape[axis] % 8 == 0]
        cut = divisible[-1] if divisible else None
        return NamedSharding(mesh, P(*["x" if a == cut else None for a in range(leaf.ndim)]))

    def bytes_read():
        metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
        return sum(value["value"] for metric in metrics for value in metric["values"])

    on_disk = sum(file.stat().st_size for file in (tmp_path / "checkpoint_1").glob("target*/*"))
    before = bytes_read()
    convert.read_params(folder, config, shardings=jax.tree.map(place, lm.abstract_params(config)))
    assert 0.9 * on_disk < bytes_read() - before < 1.5 * on_disk


def rewrite_specs(folder, change):
    file = folder / "checkpoint"
    index = msgpack.unpackb(file.read_bytes())

    def visit(node):
        if isinstance(node, dict):
            if "driver" in node:
                return change(node)
            return {key: visit(child) for key, child in node.items()}
        return node

    file.write_bytes(msgpack.packb(visit(index)))


FOREIGN_SPECS = {
    "absolute": lambda path: {
        "kvstore": {"driver": "gfile", "path": f"/cns/x/checkpoint_9/{path}"}
    },
    "bucket": lambda path: {
        "kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": f"a/b/{path}"}
    },
    "before tensorstore 0.1.14": lambda path: {
        "kvstore": {"driver": "gfile"},
        "path": f"/cns/x/{path}",
    },
}


@pytest.mark.parametrize("kind", FOREIGN_SPECS)
def test_arrays_are_found_wherever_they_were_written(tmp_path, kind):
    params = random_params(TIED)
    folder = convert.write_t5x(str(tmp_path), TIED, params, step=9)
    rewrite_specs(
        tmp_path / "checkpoint_9",
        lambda spec: {**spec, **FOREIGN_SPECS[kind](spec["kvstore"]["path"])},
    )
    assert_same(convert.read_params(folder, TIED), params)


def test_uneven_chunks_and_arrays_in_the_index(tmp_path):
    """Chunks at the edge are stored in full, and small arrays may be in the msgpack file itself."""
    params = random_params(TIED)
    folder = tmp_path / "checkpoint_9"
    convert.write_t5x(str(tmp_path), TIED, params, step=9)
    embedding = np.asarray(params["token_embedder"]["embedding"])
    place = folder / "target.token_embedder.embedding"
    metadata = json.loads((place / ".zarray").read_text())
    (place / ".zarray").write_text(json.dumps({**metadata, "chunks": [20, 7]}))
    (place / "0.0").unlink()
    padded = np.full((60, 28), np.nan, np.float32)
    padded[:48, :24] = embedding
    for row in range(3):
        for column in range(4):
            chunk = padded[20 * row : 20 * row + 20, 7 * column : 7 * column + 7]
            (place / f"{row}.{column}").write_bytes(gzip.compress(chunk.tobytes()))
    norm = np.asarray(params["decoder"]["decoder_norm"]["scale"])
    inline = msgpack.ExtType(1, msgpack.packb((norm.shape, norm.dtype.name, norm.tobytes())))
    rewrite_specs(
        folder,
        lambda spec: inline if "decoder_norm" in spec["kvstore"]["path"] else spec,
    )
    shutil.rmtree(folder / "target.decoder.decoder_norm.scale")
    assert_same(convert.read_params(str(folder), TIED), params)


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PLAIN, TIED, PER_LAYER], ids=["plain", "tied", "per_layer"])
def test_hugging_face_and_t5x_and_back_are_exact(tmp_path, config):
    params = random_params(config)
    hf = str(tmp_path / "hf")
    convert.write_hf(hf, config, params)
    assert convert.detect(hf) == "hf"
    assert convert.read_config(hf) == config
    from_hf = convert.read_params(hf, config)
    assert_same(from_hf, params)
    folder = convert.write_t5x(str(tmp_path), config, from_hf, step=7)
    assert folder == str(tmp_path / "checkpoint_7")
    assert convert.read_config(folder) == config
    assert_same(convert.read_params(folder, config), params)
    assert not list(tmp_path.glob("*tmp*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-06, got 1e-05"),
        ({"relpos_max_distance": 64}, "relpos_max_distance=128, got 64"),
        ({"scale_logits": True}, "scale_logits=False, got True"),
        ({"tie_embeddings": True}, "scale_logits=True, got False"),
        ({"mlp_activations": ("relu", "linear")}, r"mlp_activations=\('gelu', 'linear'\), got"),
        ({"mlp_activations": ("gelu",)}, r"mlp_activations=\('relu',\), got \('gelu',\)"),
    ],
)
def test_what_t5x_would_compute_otherwise_is_refused(tmp_path, changes, message):
    config = dataclasses.replace(PLAIN, **changes)
    with pytest.raises(ValueError, match=message):
        convert.write_t5x(str(tmp_path), config, random_params(config), step=1)
    convert.write_hf(str(tmp_path / "hf"), config, random_params(config))
    with pytest.raises(ValueError, match=message):
        conversion.convert_checkpoint(
            str(tmp_path / "hf"), str(tmp_path / "out"), to="t5x", dry_run=True
        )


@pytest.mark.parametrize("config", [TIED, PER_LAYER], ids=["tied", "per_layer"])
def test_bfloat16_on_disk(tmp_path, config):
    params = random_params(config)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hf = str(tmp_path / "hf")
    convert.write_hf(hf, config, params, dtype="bfloat16")
    native = convert.write_t5x(str(tmp_path), config, params, step=0, dtype="bfloat16")
    for path in (hf, native):
        assert convert.stored_dtype(path) == "bfloat16"
        assert_same(convert.read_params(path, config, dtype="bfloat16"), rounded)


def test_without_an_optimizer_the_state_is_the_step_alone(tmp_path):
    """T5X's loader would take an empty map of states for an array and fail."""
    convert.write_t5x(str(tmp_path), TIED, random_params(TIED), step=4)
    index = msgpack.unpackb((tmp_path / "checkpoint_4" / "checkpoint").read_bytes())
    assert index["optimizer"]["state"].keys() == {"step"}


@pytest.mark.parametrize("network", NETWORKS)
def test_a_rewritten_checkpoint_has_t5x_own_files(t5x_checkpoint, tmp_path, network):
    path = t5x_checkpoint(network, "native_f32")
    config = convert.read_config(path)
    folder = convert.write_t5x(
        str(tmp_path),
        config,
        convert.read_params(path, config),
        step=3,
    )
    ours, theirs = read_native(folder), read_native(path)
    theirs = {name: kept for name, kept in theirs.items() if "param_states" not in name}
    assert ours.keys() == theirs.keys()
    for name, (array, place) in theirs.items():
        np.testing.assert_array_equal(ours[name][0], array, name)
        assert (ours[name][0].dtype, ours[name][1]) == (array.dtype, place), name


def read_native(folder):
    """An independent reader of T5X's format: every array, and whether it is a folder."""

    def extension(code, data):
        shape, dtype, buffer = msgpack.unpackb(data)
        return np.frombuffer(buffer, dtype).reshape(shape)

    with open(f"{folder}/checkpoint", "rb") as file:
        index = msgpack.unpackb(file.read(), ext_hook=extension)
    assert index["version"] == 3
    found = {}

    def visit(node, name):
        if not isinstance(node, dict):
            found[name] = (node, "msgpack")
        elif "driver" in node:
            assert node["kvstore"] == {"driver": "file", "path": f"{name}/"}
            found[name] = (read_zarr(f"{folder}/{name}", node), "zarr")
        else:
            for key, child in node.items():
                visit(child, f"{name}.{key}" if name else key)

    visit(index["optimizer"], "")
    return found


def read_zarr(folder, spec):
    with open(f"{folder}/.zarray") as file:
        metadata = json.load(file)
    assert metadata["zarr_format"] == 2
    assert metadata["compressor"] == {"id": "gzip", "level": 1}
    for field in ("shape", "chunks", "compressor"):
        assert spec["metadata"][field] == metadata[field]
    dtype = np.dtype(ml_dtypes.bfloat16 if metadata["dtype"] == "bfloat16" else metadata["dtype"])
    assert dtype.name == spec["dtype"]
    shape, chunks = metadata["shape"], metadata["chunks"]
    out = np.zeros(shape, dtype)
    for position in np.ndindex(
        *[-(-size // step) for size, step in zip(shape, chunks, strict=True)]
    ):
        name = ".".join(map(str, position))
        with gzip.open(f"{folder}/{name}") as file:
            chunk = np.frombuffer(file.read(), dtype).reshape(chunks)
        where = tuple(slice(p * c, (p + 1) * c) for p, c in zip(position, chunks, strict=True))
        out[where] = chunk[tuple(slice(0, size) for size in out[where].shape)]
    return out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_independent_reader_reads_what_is_written(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(t5x_write, "_LARGEST_CHUNK", 600)  # several chunks an array
    params = random_params(TIED)
    folder = convert.write_t5x(str(tmp_path), TIED, params, step=2, dtype=dtype)
    found = read_native(folder)
    assert found.pop("state.step")[0] == 2
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32
    for path, leaf in flatten(params).items():
        rows = [leaf]
        names = [f"target.{path.replace('/', '.')}"]
        if "/layers/" in path:
            rows = list(leaf)
            names = [names[0].replace("layers", f"layers_{i}") for i in range(len(leaf))]
        for name, row in zip(names, rows, strict=True):
            np.testing.assert_array_equal(found.pop(name)[0], np.asarray(row).astype(kind), name)
    assert not found
    assert len(list((tmp_path / "checkpoint_2/target.token_embedder.embedding").iterdir())) > 3
    cast = jax.tree.map(lambda x: x.astype(kind).astype(jnp.float32), params)
    assert_same(convert.read_params(folder, TIED), cast)


def test_orbax_with_a_msgpack_index(t5x_checkpoint, tmp_path):
    """In the layout of 2023, T5X's arrays are under `state`, with placeholders for leaves."""
    path = t5x_checkpoint("t5", "native_f32")
    root = tmp_path / "checkpoint_3" / "state"
    root.mkdir(parents=True)
    tree = {}
    for source in pathlib.Path(path).iterdir():
        if source.is_dir():
            target = root / source.name
            target.mkdir()
            for file in source.iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            node = tree
            *parents, leaf = source.name.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = f"PLACEHOLDER://{source.name}"
    (root / "checkpoint").write_bytes(msgpack.packb(tree))
    found = str(tmp_path / "checkpoint_3")
    assert convert.detect(found) == "t5x"
    config = convert.read_config(path)
    assert convert.read_config(found) == config
    assert_same(convert.read_params(found, config), convert.read_params(path, config))


def test_writers_refuse_what_is_there(tmp_path):
    params = random_params(TIED)
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        convert.write_hf(str(tmp_path / "hf"), TIED, params)
    convert.write_t5x(str(tmp_path), TIED, params, step=1)
    with pytest.raises(ValueError, match="exists already"):
        convert.write_t5x(str(tmp_path), TIED, params, step=1)
    with pytest.raises(ValueError, match=r"output must be local, got 'gs:"):
        convert.write_hf("gs://bucket/hf", TIED, params)
    with pytest.raises(ValueError, match="float16"):
        convert.write_t5x(str(tmp_path), TIED, params, step=2, dtype="float16")


@pytest.mark.parametrize("largest", [20_000, 5_000])
def test_large_models_are_written_in_several_files(tmp_path, monkeypatch, largest):
    monkeypatch.setattr(hf_folder, "_LARGEST_FILE", largest)
    params = random_params(PLAIN)
    convert.write_hf(str(tmp_path / "hf"), PLAIN, params)
    files = sorted(tmp_path.glob("hf/model-*-of-*.safetensors"))
    assert len(files) > 2
    assert not (tmp_path / "hf" / "model.safetensors").exists()
    assert all(file.stat().st_size < largest + 5_000 for file in files)  # 5,000: a header
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == 4 * lm.num_params(params)
    assert_same(convert.read_params(str(tmp_path / "hf"), PLAIN), params)


def test_a_failed_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(hf_folder, "write_json", fail)
    with pytest.raises(OSError, match="no space"):
        convert.write_hf(str(tmp_path / "hf"), TIED, random_params(TIED))
    assert not list(tmp_path.iterdir())
