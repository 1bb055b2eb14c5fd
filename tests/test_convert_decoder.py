"""Hugging Face folders of decoder-only models are read, written and refused as documented."""

import dataclasses
import itertools
import json
import math

import decoder_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from gkd_jax import convert, sharding
from gkd_jax.batch import Batch
from gkd_jax.convert import decoder_families, decoder_fields
from gkd_jax.models import decoder, decoder_config, lm
from gkd_jax.models.decoder_config import DecoderConfig, Rope
from gkd_jax.text import special_ids


TENSORS = "model.safetensors"


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors.numpy.load_file(file)
    return found


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert value.tobytes() == other[name].tobytes(), name


def edit(folder, changes, remove=()):
    fields = json.loads((folder / "config.json").read_text())
    fields = {name: value for name, value in fields.items() if name not in remove}
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))


# Their defaults -----------------------------------------------------------------------------------

CLASSES = {kind: transformers.CONFIG_MAPPING[kind] for kind in decoder_families.FAMILIES}


@pytest.mark.parametrize("kind", CLASSES)
def test_absent_keys_have_the_defaults_of_their_class(kind):
    """An empty configuration file means what transformers writes for a default configuration."""
    spelled_out = json.loads(CLASSES[kind]().to_json_string(use_diff=False))
    assert spelled_out["hidden_size"] > 0
    assert decoder_fields.read({"model_type": kind}) == decoder_fields.read(spelled_out)


def test_public_files_of_the_older_generation():
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16",
        "eos_token_id": [128001, 128008, 128009],
    }
    config = decoder_fields.read(llama)
    rope = Rope(kind="llama3", theta=500000.0, factor=32.0, original_length=8192)
    assert config.ropes == (rope,)
    assert (config.head_dim, config.layer_norm_epsilon) == (16, 1e-5)
    gemma = {
        "model_type": "gemma3_text",
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 20000.0,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 512,
        "sliding_window_pattern": 3,
        "num_hidden_layers": 5,
    }
    config = decoder_fields.read(gemma)
    assert config.windows == (512, 512, 0, 512, 512)
    linear = Rope(kind="linear", theta=1e6, factor=8.0)
    assert [config.ropes[index] for index in config.rope_of_layer[1:3]] == [
        Rope(theta=20000.0),
        linear,
    ]
    qwen = {"model_type": "qwen2", "sliding_window": 131072, "use_sliding_window": False}
    assert decoder_fields.read({**qwen, "use_mrope": False}).windows == ()


# Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", decoder_models.MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_comes_back_byte_for_byte(tmp_path, name, dtype):
    theirs = decoder_models.theirs(name).to(getattr(torch, dtype))
    path = decoder_models.save(theirs, tmp_path / "theirs")
    config = convert.read_config(path)
    assert convert.stored_dtype(path) == dtype
    params = convert.read_params(path, config)
    convert.write_hf(str(tmp_path / "ours"), config, params, dtype=dtype)
    assert_same_tensors(tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours"))
    # The configuration says the same, to us and to transformers.
    assert convert.read_config(str(tmp_path / "ours")) == config
    config_class = type(theirs.config)
    again = config_class.from_pretrained(tmp_path / "ours")
    first = config_class.from_pretrained(path)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key in written.keys() & first.to_dict().keys() - {"torch_dtype", "eos_token_id"}:
        one, other = getattr(again, key), getattr(first, key)
        if key == "sliding_window" and one != other:  # of what has no sliding layer
            assert not config.windows
        elif key in ("max_window_layers", "rope_parameters"):
            continue
        else:
            assert one == other, key


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in ("llama", "qwen2_yarn", "qwen3_sliding", "gemma2", "gemma3")),
        *((name, {"layer_types": ["full_attention"] * 7}) for name in ("gemma2", "gemma3")),
    ],
)
def test_transformers_computes_the_same_with_what_is_written(tmp_path, name, changes):
    theirs = decoder_models.theirs(name, **changes, num_hidden_layers=7)
    path = decoder_models.save(theirs, tmp_path / "theirs")
    config = convert.read_config(path)
    convert.write_hf(str(tmp_path / "ours"), config, convert.read_params(path, config))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    )
    text = torch.tensor(np.random.default_rng(0).integers(0, decoder_models.VOCAB, (2, 40)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(text).logits, theirs(text).logits)


def test_random_weights_go_out_and_come_back(tmp_path):
    config = DecoderConfig(
        vocab_size=50,
        d_model=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        d_ff=32,
        num_layers=2,
        qk_norm=True,
        max_length=77,
    )
    params = decoder.init(config, jax.random.key(0))
    convert.write_hf(str(tmp_path / "out"), config, params)
    assert convert.read_config(str(tmp_path / "out")) == config
    found = convert.read_params(str(tmp_path / "out"), config)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert decoder_config.from_fields(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_several_files_are_read_into_their_shardings(tmp_path):
    theirs = decoder_models.theirs("qwen3")
    decoder_models.save(theirs, tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    path = str(tmp_path / "many")
    config = convert.read_config(path)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    whole = convert.read_params(path, config)
    axes = lm.logical_axes(whole)
    # The embedding's 97 rows do not divide over the mesh axis `tensor`, so they are not sharded.
    axes["token_embedder"]["embedding"] = (None, "embed")
    where = sharding.tree_shardings(whole, axes, mesh)
    spread = convert.read_params(path, config, shardings=where)
    jax.tree.map(np.testing.assert_array_equal, spread, whole)
    kernel = spread["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size / 4


def test_composite_folder_of_gemma3(tmp_path):
    """The text model is read from the folder of a model that also reads images."""
    text = decoder_models.theirs("gemma3")
    fields = json.loads(text.config.to_json_string(use_diff=False))
    tensors = {name: value.numpy() for name, value in text.state_dict().items()}
    tensors.pop("lm_head.weight")
    (tmp_path / "both").mkdir()
    config = {"model_type": "gemma3", "text_config": fields, "vision_config": {}}
    (tmp_path / "both" / "config.json").write_text(json.dumps(config))
    named = {f"language_model.{name}": value for name, value in tensors.items()}
    named["vision_tower.x"] = named["multi_modal_projector.y"] = np.zeros(3, np.float32)
    safetensors.numpy.save_file(named, tmp_path / "both" / TENSORS)
    path = str(tmp_path / "both")
    found = convert.read_config(path)
    assert found.final_softcap is None  # the composite's class does not apply it
    params = convert.read_params(path, found)
    embedding = tensors["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["token_embedder"]["embedding"], embedding)
    text.config.final_logit_softcapping = None
    rng = np.random.default_rng(0)
    inputs, lengths, targets = decoder_models.prompts_and_targets(rng, (4, 4), 12)
    expected = decoder_models.their_logits(text, inputs, lengths, targets)
    batch = Batch(
        jnp.asarray(inputs),
        jnp.asarray(targets),
        jnp.ones(targets.shape),
        input_lengths=jnp.asarray(lengths),
    )
    logits = lm.logits(found, params, batch)
    assert np.max(np.abs(logits - expected)) < 2e-5 * np.max(np.abs(expected))


def test_names_without_a_prefix_and_old_frequencies(tmp_path):
    decoder_models.save(decoder_models.theirs("llama_tied"), tmp_path / "x")
    whole = convert.read_params(str(tmp_path / "x"), convert.read_config(str(tmp_path / "x")))
    tensors = tensors_of(tmp_path / "x")
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
    bare["lm_head.weight"] = bare.pop("embed_tokens.weight")  # of two that are tied, one is kept
    safetensors.numpy.save_file(bare, tmp_path / "x" / TENSORS)
    config = convert.read_config(str(tmp_path / "x"))
    found = convert.read_params(str(tmp_path / "x"), config)
    jax.tree.map(np.testing.assert_array_equal, found, whole)


def test_what_goes_with_the_weights_is_copied(tmp_path):
    path = decoder_models.save(decoder_models.theirs("qwen3"), tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").write_text("{}")
    (tmp_path / "x" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "x" / "LICENSE").write_text("free")
    (tmp_path / "x" / "generation_config.json").write_text('{"eos_token_id": [5, 9], "top_k": 3}')
    config = convert.read_config(path)
    params = convert.read_params(path, config)
    convert.write_hf(str(tmp_path / "out"), config, params, source=path, card="# A model\n")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    copied = {"tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"}
    assert names == {*copied, "config.json", TENSORS, "README.md"}
    assert special_ids.stated(tmp_path / "out")["eos_token_id"] == [5, 9]
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert fields["eos_token_id"] == [5, 9]
    (tmp_path / "out" / "generation_config.json").unlink()
    edit(tmp_path / "out", {"eos_token_id": 7})
    assert special_ids.stated(tmp_path / "out")["eos_token_id"] == 7


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 3}])
@pytest.mark.parametrize("has_generation_config", [True, False])
def test_an_exported_model_never_generates_ids_that_no_piece_has(
    has_generation_config, options, tmp_path
):
    pieces = 90
    path = decoder_models.save(decoder_models.theirs("llama"), tmp_path / "x")
    generation = tmp_path / "x" / "generation_config.json"
    if has_generation_config:
        stated = {"eos_token_id": [5, 9], "pad_token_id": 9, "suppress_tokens": [3]}
        generation.write_text(json.dumps(stated))
    else:
        generation.unlink()
    config = convert.read_config(path)
    assert isinstance(config, DecoderConfig)
    params = convert.read_params(path, config)
    # Training leaves the rows of spare ids as they were: here the likeliest of all.
    kernel = params["decoder"]["logits_dense"]["kernel"]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, pieces:].multiply(100.0)
    prompts = torch.tensor(np.random.default_rng(0).integers(10, pieces, (8, 6)))
    for num_pieces in (None, pieces):
        folder = str(tmp_path / f"hf_{num_pieces}")
        convert.write_hf(folder, config, params, num_pieces=num_pieces, source=path)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        assert model.generation_config.eos_token_id == [5, 9]
        torch.manual_seed(0)
        tokens = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=8,
            pad_token_id=9,
            **options,
        )[:, prompts.shape[1] :]
        has_spare = bool((tokens >= pieces).any())
        assert has_spare == (num_pieces is None)
        if has_generation_config:
            assert not (tokens == 3).any()  # which the source suppresses


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config must be .* absent"),
        ("gemma3", {"quantization_config": {"bits": 4}}, "quantization_config must be .* absent"),
        ("llama", {"residual_scale": 2.0}, "the key residual_scale=2.0 is not known"),
        ("gpt_oss", {}, "model_type must be one of llama, .*gemma3, got 'gpt_oss'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act must be one of silu, .*got 'relu'"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type must be one of"),
        ("llama", {"rope_scaling": {"type": "llama3", "factor": 2}}, "needs low_freq_factor"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
        ("llama", {"rope_scaling": {"mrope_section": [1]}}, "not known: mrope_section"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 changes"),
        ("llama", {"sliding_window": 3}, "llama has no sliding_window"),
        ("qwen3", {"layer_types": ["linear_attention"]}, "layer_types must be 32 of"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "changes the numbers"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "must be given for"),
        ("qwen3", {"num_key_value_heads": 5}, "num_attention_heads must be a multiple"),
        ("llama", {"final_logit_softcapping": 3.0}, "the key final_logit_softcapping=3.0 is not"),
        ("llama", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "of llama must"),
        (
            "qwen2",
            {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "use_sliding_window must be true, got False",
        ),
        ("gemma2", {"sliding_window": None}, "sliding_window must be a positive integer, got None"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping must be a positive"),
        ("llama", {"rope_scaling": {"rope_type": None}}, "rope_type must be .*got None"),
        ("llama", {"hidden_size": 30, "num_attention_heads": 4}, "hidden_size must be a multiple"),
        ("gemma3", {}, "needs an object text_config"),
    ],
)
def test_what_changes_the_numbers_is_refused(kind, changes, message):
    with pytest.raises(ValueError, match=message):
        decoder_fields.read({"model_type": kind, **changes})


WRONG = (None, "2", "", -1, 0, 1.5, True, [], ["a"], {}, {"a": 1}, 10**30, math.nan, math.inf)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_value_of_another_kind_is_read_as_nothing_else_or_named_with_its_key(kind):
    """A file may hold any JSON: a `config.json` that a script wrote, or that was edited."""
    fields = json.loads(CLASSES[kind](num_hidden_layers=3).to_json_string(use_diff=False))
    fields |= {"rope_scaling": None, "rope_theta": 1e4, "sliding_window_pattern": 6}
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"rope_theta": 1e4, "beta_fast": 32, "beta_slow": 1, "attention_factor": 1.0}
    if not kind.startswith("gemma3"):
        fields = {**fields, "sliding_window_pattern": None, "rope_parameters": rope}
    refused = 0
    for key, value in itertools.product(fields, WRONG):
        changed = {**fields, key: value}
        if key in ("rope_theta", "rope_scaling"):
            del changed["rope_parameters"]
        refused += _is_refused_by_name(changed, key)
    assert refused > 200
    for key, value in itertools.product(rope, WRONG):
        _is_refused_by_name({**fields, "rope_scaling": {**rope, key: value}}, key)


def _is_refused_by_name(fields, key):
    try:
        config = decoder_fields.read(fields)
    except ValueError as error:
        if key not in str(error):
            raise
        return True
    assert all(type(x) is int for x in (config.num_layers, config.d_model, *config.windows))
    return False


@pytest.mark.parametrize("pattern", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_the_layers_of_a_pattern_are_those_of_transformers(pattern, key):
    stated = {"num_hidden_layers": 7, "sliding_window": 5, key: pattern}
    theirs = transformers.Gemma3TextConfig(**stated).layer_types
    # Newer files have both keys, of which transformers reads the one without an underscore.
    ours = decoder_fields.read({"model_type": "gemma3_text", "_sliding_window_pattern": 6} | stated)
    expected = tuple(5 if name == "sliding_attention" else 0 for name in theirs)
    assert (ours.windows or (0,) * 7) == expected


def test_keys_without_effect_are_taken():
    plain = {"model_type": "llama"}
    noise = dict.fromkeys(decoder_fields.WITHOUT_EFFECT, "anything")
    for name in ("max_window_layers", "use_sliding_window"):
        noise.pop(name, None)
    assert decoder_fields.read({**plain, **noise, "future": None}) == decoder_fields.read(plain)


def test_damage_is_named(tmp_path):
    path = decoder_models.save(decoder_models.theirs("llama_tied"), tmp_path / "x")
    config = convert.read_config(path)
    tensors = tensors_of(tmp_path / "x")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    safetensors.numpy.save_file({**tensors, **head}, tmp_path / "x" / TENSORS)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        convert.read_params(path, config)
    untied = dataclasses.replace(config, tie_embeddings=False)
    safetensors.numpy.save_file(tensors, tmp_path / "x" / TENSORS)
    with pytest.raises(ValueError, match=r"there is no lm_head\.weight"):
        convert.read_params(path, untied)
    tensors.pop("model.norm.weight")
    safetensors.numpy.save_file(tensors, tmp_path / "x" / TENSORS)
    with pytest.raises(ValueError, match=r"model.norm.weight .*: expected \(42,\), missing"):
        convert.read_params(path, config)


def test_weights_that_are_a_pointer_are_named(tmp_path):
    path = decoder_models.save(decoder_models.theirs("llama_tied"), tmp_path / "x")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:d60a\nsize 791656\n"
    (tmp_path / "x" / TENSORS).write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors, line 1: .*`git lfs pull`"):
        convert.read_config(path)


def test_a_missing_shard_is_named(tmp_path):
    decoder_models.save(decoder_models.theirs("qwen3"), tmp_path / "x", max_shard_size="20KB")
    config = convert.read_config(str(tmp_path / "x"))
    shard = sorted((tmp_path / "x").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        convert.read_config(str(tmp_path / "x"))
    with pytest.raises(FileNotFoundError, match=shard.name):
        convert.read_params(str(tmp_path / "x"), config)


def test_switches_that_no_class_has_are_not_written(tmp_path):
    config = DecoderConfig(
        vocab_size=8,
        d_model=8,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        d_ff=8,
        num_layers=1,
        final_softcap=3.0,
    )
    with pytest.raises(ValueError, match="no class of transformers has these switches"):
        convert.write_hf(str(tmp_path / "x"), config, decoder.init(config, jax.random.key(0)))
