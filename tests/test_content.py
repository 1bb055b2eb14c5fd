"""Checkpoints are identified by content, and parameters that are not finite are refused."""

import dataclasses
import grp
import json
import pwd
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params
from safetensors.numpy import load_file, save_file

from gkd_jax import convert, load_model
from gkd_jax.models import decoder, decoder_config, lm, t5
from gkd_jax.models.execution import ExecutionSettings
from gkd_jax.storage import conversion, saved_model
from gkd_jax.storage.content import content_id
from gkd_jax.storage.loading import check_finite


CONFIG = t5.t5_1_1("32x2", vocab_size=32)
DECODER = decoder.DecoderConfig(
    vocab_size=32, d_model=8, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=8, num_layers=2
)
FORMATS = ("gkd", "hf", "t5x")
# Another value of each field of the models' configs. Whoever adds a field writes it here, and so
# says whether it is a setting of execution or a part of the architecture.
EXECUTION = {
    "dropout_rate": 0.1,
    "dtype": "bfloat16",
    "remat": True,
    "attention_by_row": True,
    "layers_on_host": True,
    "scan_unroll": 2,
    "unroll_decoding": True,
    "cache_segment": 128,
}
ARCHITECTURE = {
    CONFIG: {
        **dict.fromkeys(("vocab_size", "d_model", "num_heads", "head_dim", "d_ff"), 48),
        **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 3),
        **dict.fromkeys(("tie_embeddings", "scale_logits", "per_layer_relpos"), True),
        **dict.fromkeys(("relpos_buckets", "relpos_max_distance"), 48),
        "mlp_activations": ("relu",),
        "layer_norm_epsilon": 1e-5,
    },
    DECODER: {
        **dict.fromkeys(("vocab_size", "d_model", "num_heads", "head_dim", "d_ff"), 48),
        **dict.fromkeys(("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "unit_offset"), True),
        **dict.fromkeys(("post_norms", "scale_embedding", "tie_embeddings"), True),
        **dict.fromkeys(("attention_scale", "attention_softcap", "final_softcap"), 0.5),
        "num_kv_heads": 1,
        "num_layers": 3,
        "activation": "gelu",
        "windows": (0, 5),
        "ropes": (decoder_config.Rope(theta=1e6),),
        "rope_of_layer": (0, 0),
        "layer_norm_epsilon": 1e-5,
        "max_length": 64,
    },
}


def write(folder, form, params):
    if form == "hf":
        convert.write_hf(folder, CONFIG, params)
        return folder
    if form == "t5x":
        return convert.write_t5x(folder, CONFIG, params, step=7)
    saved_model.write_params(folder, CONFIG, params, "")
    return folder


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def changed(params, where, value):
    """The parameters with one number replaced in the array at a path."""
    *folders, name = where.split("/")
    params = jax.tree.map(lambda x: x, params)  # new dicts
    node = params
    for folder in folders:
        node = node[folder]
    flat = np.array(node[name]).reshape(-1)
    flat[-1] = value
    node[name] = jnp.asarray(flat.reshape(node[name].shape))
    return params


@pytest.mark.parametrize("form", FORMATS)
def test_an_id_is_that_of_the_content_wherever_it_lies(form, params, tmp_path):
    first = write(str(tmp_path / "one"), form, params)
    second = write(str(tmp_path / "two"), form, params)
    moved = str(shutil.copytree(first, tmp_path / "moved" / "checkpoint_7"))
    assert content_id(first) == content_id(second) == content_id(moved)
    nudged = changed(params, "decoder/layers/mlp/wo/kernel", 0.5)
    other = write(str(tmp_path / "other"), form, nudged)
    assert content_id(other) != content_id(first)
    with pytest.raises(FileNotFoundError):
        content_id(str(tmp_path / "absent"))


@pytest.mark.parametrize("form", FORMATS)
def test_files_whose_owner_has_no_name_are_read(form, params, tmp_path, monkeypatch):
    """A container does not know the users of its host, whose files are mounted into it."""
    path = write(str(tmp_path / "model"), form, params)
    before = content_id(path)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setattr(grp, "getgrgid", {}.__getitem__)
    assert content_id(path) == before
    load_model(path)


@pytest.mark.parametrize("config", ARCHITECTURE, ids=["t5", "decoder"])
def test_an_id_knows_the_architecture_and_no_execution_setting(config, tmp_path):
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields == {*EXECUTION, *ARCHITECTURE[config]}
    assert {field.name for field in dataclasses.fields(ExecutionSettings)} == {*EXECUTION}
    folder = str(tmp_path / "model")
    saved_model.write_params(folder, config, lm.init(config, jax.random.key(0)), "")
    stored = tmp_path / "model" / "model" / "metadata"
    about = json.loads(stored.read_text())
    before = content_id(folder)
    for name, value in (EXECUTION | ARCHITECTURE[config]).items():
        changed_config = dataclasses.asdict(dataclasses.replace(config, **{name: value}))
        stored.write_text(json.dumps({**about, "config": changed_config}))
        assert (content_id(folder) == before) == (name in EXECUTION), name


def test_a_field_that_an_earlier_version_did_not_have_leaves_the_id(params, tmp_path):
    folder = write(str(tmp_path / "model"), "gkd", params)
    before = content_id(folder)
    stored = tmp_path / "model" / "model" / "metadata"
    about = json.loads(stored.read_text())
    for name in ("cache_segment", "per_layer_relpos"):
        del about["config"][name]
    stored.write_text(json.dumps(about))
    assert content_id(folder) == before


def test_a_model_dir_means_its_newest_step(params, tmp_path):
    for step, value in ((1, 0.1), (12, 0.2), (3, 0.3)):
        folder = str(tmp_path / "run" / "checkpoints" / str(step))
        write(folder, "gkd", changed(params, "token_embedder/embedding", value))
    newest = content_id(str(tmp_path / "run" / "checkpoints" / "12"))
    assert content_id(str(tmp_path / "run")) == newest
    assert content_id(str(tmp_path / "run" / "checkpoints" / "3")) != newest


def test_of_a_hugging_face_folder_only_weights_and_sizes_count(params, tmp_path):
    folder = tmp_path / "hf"
    before = content_id(write(str(folder), "hf", params))
    (folder / "README.md").write_text("a card")
    (folder / "tokenizer.json").write_text("{}")
    assert content_id(str(folder)) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-5}))
    assert content_id(str(folder)) != before


def test_both_ends_of_a_large_file_count(params, tmp_path):
    folder = tmp_path / "hf"
    write(str(folder), "hf", params)
    found = set()
    for at in (0, 3 * 2**20 - 1):
        data = bytearray(3 * 2**20)
        data[at] = 1
        (folder / "model.safetensors").write_bytes(data)
        found.add(content_id(str(folder)))
    assert len(found) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("token_embedder/embedding", "in token_embedder/embedding$"),
        ("encoder/layers/mlp/wi_0/kernel", r"in encoder/layers/mlp/wi_0/kernel \(layer 1\)$"),
        ("decoder/decoder_norm/scale", "in decoder/decoder_norm/scale$"),
    ],
)
def test_numbers_that_are_not_finite_are_named(value, where, named, params):
    check_finite(params, "here")
    with pytest.raises(ValueError, match=f"checkpoint 'here' .*{named}"):
        check_finite(changed(params, where, value), "here")


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_is_loaded_with_a_nan(form, params, tmp_path):
    broken = changed(params, "decoder/layers/self_attention/query/kernel", np.nan)
    path = write(str(tmp_path / "model"), form, broken)
    with pytest.raises(ValueError, match=r"decoder/layers/self_attention/query/kernel \(layer 1"):
        load_model(path)
    with pytest.raises(ValueError, match="not finite"):
        conversion.convert_checkpoint(path, str(tmp_path / "out"), to="hf")
    assert not (tmp_path / "out").exists()


def test_a_half_precision_file_that_overflowed_is_refused(params, tmp_path):
    """Casting to float16 by hand makes T5's large weights infinite; such files exist."""
    write(str(tmp_path / "hf"), "hf", changed(params, "token_embedder/embedding", 1e6))
    file = tmp_path / "hf" / "model.safetensors"
    with np.errstate(over="ignore"):
        halves = {name: array.astype(np.float16) for name, array in load_file(file).items()}
    save_file(halves, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"infinity.*token_embedder/embedding"):
        load_model(str(tmp_path / "hf"))
