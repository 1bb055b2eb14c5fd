"""Every damage to a checkpoint gives a clear error that names the file or array."""

import dataclasses
import json
import pathlib
import shutil

from flax import serialization
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
from random_models import random_params
from safetensors.numpy import load_file, save_file

from gkd_jax import convert
from gkd_jax.convert import msgpack_tree
from gkd_jax.models import t5


CONFIG = t5.T5Config(
    vocab_size=40,
    d_model=16,
    num_heads=2,
    head_dim=4,
    d_ff=24,
    num_encoder_layers=2,
    num_decoder_layers=2,
)
KERNEL = "target.encoder.layers_1.mlp.wi_0.kernel"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    params = random_params(CONFIG)
    convert.write_t5x(str(folder), CONFIG, params, step=5)
    convert.write_hf(str(folder / "hf"), CONFIG, params)
    return folder


@pytest.fixture
def native(pristine, tmp_path):
    return shutil.copytree(pristine / "checkpoint_5", tmp_path / "checkpoint_5")


@pytest.fixture
def hf(pristine, tmp_path):
    return shutil.copytree(pristine / "hf", tmp_path / "hf")


def edit_index(folder, change):
    index = msgpack.unpackb((folder / "checkpoint").read_bytes())
    change(index)
    (folder / "checkpoint").write_bytes(msgpack.packb(index))


def spec_of(index):
    return index["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]["wi_0"]["kernel"]


def edit_zarray(folder, **fields):
    file = folder / KERNEL / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def drop(index):
    del index["optimizer"]["target"]["encoder"]["layers_1"]["mlp"]["wi_0"]


def read(folder):
    path = str(folder)
    return convert.read_params(path, convert.read_config(path))


# T5X ----------------------------------------------------------------------------------------------


def test_the_pristine_checkpoints_are_read(native, hf):
    assert jax.tree.structure(read(native)) == jax.tree.structure(read(hf))


NATIVE_DAMAGES = {
    "array not in the index": (
        lambda folder: edit_index(folder, drop),
        ValueError,
        r"encoder\.layers_1\.mlp\.wi_0\.kernel .*expected \(16, 24\), missing",
    ),
    "array's folder is missing": (
        lambda folder: shutil.rmtree(folder / KERNEL),
        FileNotFoundError,
        KERNEL,
    ),
    "metadata is missing": (
        lambda folder: (folder / KERNEL / ".zarray").unlink(),
        FileNotFoundError,
        KERNEL,
    ),
    "metadata is no JSON": (
        lambda folder: (folder / KERNEL / ".zarray").write_text("{"),
        ValueError,
        KERNEL,
    ),
    "chunk is missing": (
        lambda folder: (folder / KERNEL / "0.0").unlink(),
        FileNotFoundError,
        KERNEL,
    ),
    "another shape": (
        lambda folder: edit_zarray(folder, shape=[16, 12], chunks=[16, 12]),
        ValueError,
        r"expected \(16, 24\), found \(16, 12\)",
    ),
    "whole numbers": (
        lambda folder: edit_zarray(folder, dtype="<i4"),
        ValueError,
        "expected float32, float16 or bfloat16, found int32",
    ),
    "version 2's bfloat16": (
        lambda folder: edit_zarray(folder, dtype="<u2"),
        ValueError,
        "expected float32, float16 or bfloat16, found uint16",
    ),
    "another number of bytes": (
        lambda folder: edit_zarray(folder, dtype="bfloat16"),
        ValueError,
        KERNEL,
    ),
    "unknown compressor": (
        lambda folder: edit_zarray(folder, compressor={"id": "rot13"}),
        ValueError,
        KERNEL,
    ),
    "old version": (
        lambda folder: edit_index(folder, lambda index: index.update(version=2)),
        ValueError,
        "version 3, got 2",
    ),
    "a path that leads out": (
        lambda folder: edit_index(
            folder, lambda index: spec_of(index)["kvstore"].update(path="../..")
        ),
        ValueError,
        r"folder of the checkpoint, got '\.\.'",
    ),
    "a path with a backslash": (
        lambda folder: edit_index(
            folder, lambda index: spec_of(index)["kvstore"].update(path="..\\x")
        ),
        ValueError,
        "folder of the checkpoint",
    ),
    "a path that is a number": (
        lambda folder: edit_index(folder, lambda index: spec_of(index)["kvstore"].update(path=3)),
        ValueError,
        "folder of the checkpoint, got 3",
    ),
    "no arrays": (
        lambda folder: edit_index(folder, lambda index: index["optimizer"].pop("target")),
        ValueError,
        r"no array whose name starts with 'target\.'",
    ),
    "an index that is a list": (
        lambda folder: (folder / "checkpoint").write_bytes(msgpack.packb([1, 2])),
        ValueError,
        "expected a map",
    ),
    "an index of TensorFlow": (
        lambda folder: (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-0"'),
        ValueError,
        "TensorFlow",
    ),
    "an empty index": (
        lambda folder: (folder / "checkpoint").write_bytes(b""),
        ValueError,
        "damaged",
    ),
    "an unexpected array": (
        lambda folder: edit_index(
            folder,
            lambda index: index["optimizer"]["target"].update(
                extra=index["optimizer"]["state"]["step"]
            ),
        ),
        ValueError,
        "extra: unexpected",
    ),
}


@pytest.mark.parametrize("damage", NATIVE_DAMAGES)
def test_damaged_t5x_checkpoints_are_refused(native, damage):
    change, error, message = NATIVE_DAMAGES[damage]
    change(native)
    with pytest.raises(error, match=message):
        read(native)


def test_a_link_out_of_the_checkpoint_is_refused(native, tmp_path):
    shutil.move(native / KERNEL, tmp_path / "elsewhere")
    (native / KERNEL).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of the checkpoint"):
        read(native)


@pytest.mark.parametrize("part", ["head", "trailer", "all"])
def test_a_cut_chunk_is_refused(native, part):
    file = native / KERNEL / "0.0"
    data = file.read_bytes()
    file.write_bytes({"head": data[: len(data) // 2], "trailer": data[:-3], "all": b""}[part])
    with pytest.raises(ValueError, match=KERNEL):
        read(native)


def test_a_flipped_bit_in_a_chunk_is_never_read(native):
    file = native / KERNEL / "0.0"
    config = convert.read_config(str(native))
    expected = convert.read_params(str(native), config)["encoder"]["layers"]["mlp"]["wi_0"]
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    messages = []
    for _ in range(15):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(damaged))
        try:
            found = convert.read_params(str(native), config)["encoder"]["layers"]["mlp"]["wi_0"]
        except ValueError as error:
            messages.append(str(error))
        else:  # gzip's header has a few bits that do not matter
            np.testing.assert_array_equal(found["kernel"], expected["kernel"])
    assert len(messages) > 10
    assert all(KERNEL in message for message in messages)


def test_absurd_sizes_are_refused(tmp_path):
    """In a tied model no other array would show that the size is wrong."""
    config = dataclasses.replace(CONFIG, tie_embeddings=True, scale_logits=True)
    folder = convert.write_t5x(str(tmp_path), config, random_params(config), step=1)
    file = tmp_path / "checkpoint_1" / "target.token_embedder.embedding" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), "shape": [2**50, 16]}))
    with pytest.raises(ValueError, match="token_embedder/embedding: no memory"):
        read(folder)


@pytest.fixture
def ocdbt(t5x_checkpoint, tmp_path):
    source = pathlib.Path(t5x_checkpoint("t5", "orbax_ocdbt"))
    target = tmp_path / "checkpoint_3"
    for file in source.rglob("*"):
        if file.is_file():  # the originals may be read-only
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return target


OCDBT_DAMAGES = {"cut": lambda f: cut(f, f.stat().st_size // 2), "missing": lambda f: f.unlink()}


@pytest.mark.parametrize("damage", OCDBT_DAMAGES)
def test_damaged_ocdbt_data_name_the_array(ocdbt, damage):
    data = max((ocdbt / "state").rglob("d/*"), key=lambda file: file.stat().st_size)
    OCDBT_DAMAGES[damage](data)
    with pytest.raises((ValueError, FileNotFoundError), match=r"target\.\w+"):
        read(ocdbt)


@pytest.mark.parametrize("position", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("name", ["manifest.ocdbt", "d"])
def test_a_flipped_bit_in_the_ocdbt_index_is_refused(ocdbt, name, position):
    place = ocdbt / "state" / name
    file = place if place.is_file() else next(place.iterdir())
    data = bytearray(file.read_bytes())
    data[int(position * len(data))] ^= 4
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"manifest\.ocdbt is damaged"):
        read(ocdbt)


def test_every_cut_of_the_index_is_refused(native):
    file = native / "checkpoint"
    data = file.read_bytes()
    for length in range(0, len(data), 97):
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match="checkpoint"):
            convert.read_config(str(native))


def test_random_bytes_in_the_index_are_read_equal_or_refused(native):
    file = native / "checkpoint"
    data = file.read_bytes()
    config = convert.read_config(str(native))
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[int(rng.integers(len(data)))] = int(rng.integers(256))
        file.write_bytes(bytes(damaged))
        try:
            found = convert.read_config(str(native))
        except (ValueError, FileNotFoundError):
            refused += 1
        else:
            # Sizes come from the arrays' own metadata; a changed name can only lose arrays.
            assert dataclasses.asdict(found).keys() == dataclasses.asdict(config).keys()
    assert refused > 0


def test_all_mismatches_are_reported_at_once(native):
    config = dataclasses.replace(CONFIG, vocab_size=44, num_encoder_layers=3)
    with pytest.raises(ValueError, match="does not fit") as error:
        convert.read_params(str(native), config)
    message = str(error.value)
    assert "token_embedder.embedding (token_embedder/embedding): expected (44, 16)" in message
    assert "found (40, 16)" in message
    assert "encoder.layers_2.attention.query.kernel" in message
    with pytest.raises(ValueError, match=r"decoder\.logits_dense\.kernel: unexpected"):
        convert.read_params(str(native), dataclasses.replace(CONFIG, tie_embeddings=True))


def test_odd_shardings_are_refused(native):
    with pytest.raises(ValueError, match="decoder/decoder_norm/scale"):
        convert.read_params(str(native), CONFIG, shardings={})
    with pytest.raises(ValueError, match="'int8'"):
        convert.read_params(str(native), CONFIG, dtype="int8")


# msgpack ------------------------------------------------------------------------------------------


def test_flax_arrays_and_split_arrays(monkeypatch):
    tree = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3),
        "b": np.float32(2.5),
        "c": jnp.arange(4, dtype=jnp.bfloat16),
        "d": 1 + 2j,
        "e": {"long": np.arange(1000, dtype=np.float32).reshape(10, 100)},
    }
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 256)
    found = msgpack_tree.parse(serialization.msgpack_serialize(tree), "file")
    for key in ("a", "b", "c"):
        assert np.asarray(tree[key]).dtype == found[key].dtype
        np.testing.assert_array_equal(np.asarray(tree[key]), found[key])
    assert found["d"] == tree["d"]
    np.testing.assert_array_equal(found["e"]["long"], tree["e"]["long"])


def packed_array(shape, dtype, data, code=1):
    return msgpack.packb({"x": msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (packed_array((2,), "object", bytes(16)), "got 'object'"),
        (packed_array((2,), "float32", bytes(4)), "has 4 bytes"),
        (packed_array((2**62,), "float32", bytes(4)), "has 4 bytes"),
        (packed_array((-1,), "float32", bytes(4)), "list of sizes"),
        (packed_array((1,), "float32", bytes(4), code=9), "extension type 9"),
        (packed_array((1,), "float32", bytes(4), code=3), "scalar"),
        (msgpack.packb({"x": {"__msgpack_chunked_array__": True}}), "shape and chunks"),
        (b"\x81\xa1x" * 500 + b"\x01", "file"),
        (b"\xdf\xff\xff\xff\xff", "file"),
        (b"\xdd\xff\xff\xff\xff", "file"),
    ],
)
def test_hostile_msgpack_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        msgpack_tree.parse(data, "file")


# Hugging Face -------------------------------------------------------------------------------------


def edit_config(folder, **fields):
    file = folder / "config.json"
    merged = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


def edit_header(folder, change):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def edit_arrays(folder, change):
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def cut(file, count):
    file.write_bytes(file.read_bytes()[:-count])


def shard(folder, places):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


HF_DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), ValueError, "no config.json"),
    "config is cut": (lambda f: cut(f / "config.json", 5), ValueError, "config.json, .*not JSON"),
    "another model": (lambda f: edit_config(f, model_type="bert"), ValueError, "got 'bert'"),
    "erf gelu": (lambda f: edit_config(f, feed_forward_proj="gelu"), ValueError, "got 'gelu'"),
    "no sizes": (lambda f: edit_config(f, d_kv=None, d_ff=None), ValueError, "lacks d_kv, d_ff"),
    "a size that is text": (lambda f: edit_config(f, d_ff="24"), ValueError, "d_ff.*'24'"),
    "another size": (
        lambda f: edit_config(f, d_ff=32),
        ValueError,
        r"wi_0\.weight .*expected \(32, 16\), found \(24, 16\)",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ValueError, "no model.safetens"),
    "weights are cut": (lambda f: cut(f / "model.safetensors", 4), ValueError, "cut"),
    "only a length": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8),
        ValueError,
        r"model\.safetensors is cut, damaged or no safetensors file",
    ),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ValueError, "is cut, damaged"),
    "a missing array": (
        lambda f: edit_arrays(f, lambda a: a.pop("decoder.block.1.layer.2.layer_norm.weight")),
        ValueError,
        r"decoder\.block\.1\.layer\.2\.layer_norm\.weight .*missing",
    ),
    "an unexpected array": (
        lambda f: edit_arrays(f, lambda a: a.update(odd=a["shared.weight"])),
        ValueError,
        "odd: unexpected",
    ),
    "another dtype": (
        lambda f: edit_header(f, lambda h: h["shared.weight"].update(dtype="I32")),
        ValueError,
        r"shared\.weight .*found int32",
    ),
    "an encoder with its own embedding": (
        lambda f: edit_arrays(
            f, lambda a: a.update({"encoder.embed_tokens.weight": a["lm_head.weight"]})
        ),
        ValueError,
        r"encoder\.embed_tokens\.weight differs from shared\.weight",
    ),
    "an unknown dtype": (
        lambda f: edit_arrays(f, lambda a: a.update({"shared.weight": np.ones(2, np.uint16)})),
        ValueError,
        r"shared\.weight in .*dtype must be one of .*got 'U16'",
    ),
    "a dtype that no file has": (
        lambda f: edit_header(f, lambda h: h["shared.weight"].update(dtype="O")),
        ValueError,
        r"hf/model\.safetensors is cut, damaged",
    ),
    "offsets of another size": (
        lambda f: edit_header(f, lambda h: h["shared.weight"].update(shape=[40, 15])),
        ValueError,
        r"hf/model\.safetensors is cut, damaged .*invalid shape",
    ),
    "negative offsets": (
        lambda f: edit_header(f, lambda h: h["shared.weight"].update(data_offsets=[-4, 4])),
        ValueError,
        r"hf/model\.safetensors is cut, damaged",
    ),
    "arrays that overlap": (
        lambda f: edit_header(f, lambda h: h.update(odd=h["shared.weight"])),
        ValueError,
        r"hf/model\.safetensors is cut, damaged .*invalid offset",
    ),
    "a shard outside": (
        lambda f: shard(f, {"shared.weight": "../model.safetensors"}),
        ValueError,
        "file of the folder",
    ),
    "a missing shard": (
        lambda f: shard(f, {"shared.weight": "model-00001-of-00002.safetensors"}),
        FileNotFoundError,
        "model-00001-of-00002",
    ),
}


@pytest.mark.parametrize("damage", HF_DAMAGES)
def test_damaged_hugging_face_folders_are_refused(hf, damage):
    change, error, message = HF_DAMAGES[damage]
    change(hf)
    with pytest.raises(error, match=message):
        read(hf)


def test_pickles_are_refused_with_the_reason(hf):
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(ValueError, match="unpickling executes code"):
        convert.detect(str(hf))


@pytest.mark.parametrize("with_model", [False, True])
def test_a_lora_adapter_is_refused_also_beside_a_model(hf, with_model):
    """transformers would add the adapter to the model beside it."""
    (hf / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    if not with_model:
        (hf / "config.json").unlink()
        (hf / "model.safetensors").rename(hf / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"LoRA adapter .* merge it into its model"):
        convert.read_config(str(hf))


def test_other_folders(tmp_path, native):
    with pytest.raises(FileNotFoundError, match="absent"):
        convert.detect(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="checkpoint_5: give one of these"):
        convert.detect(str(native.parent))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"Looked for .*model\.safetensors.*manifest\.ocdbt"):
        convert.detect(str(tmp_path / "empty"))
    (tmp_path / "trainer" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(ValueError, match="checkpoint-500: give one of these"):
        convert.detect(str(tmp_path / "trainer"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises((ValueError, NotADirectoryError), match="GGUF is not read: give the"):
            convert.detect(str(name))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="no complete step"):
        convert.detect(str(tmp_path / "run"))
    for item in ("params", "model"):
        (tmp_path / "run" / "checkpoints" / "3" / item).mkdir(parents=True)
    for ours in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "3"):
        assert convert.detect(str(ours)) == "gkd"
        with pytest.raises(ValueError, match="load_model"):
            convert.read_config(str(ours))
