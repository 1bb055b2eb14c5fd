"""Converted checkpoints give the logits and greedy tokens of transformers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from gkd_jax import convert, sampling
from gkd_jax.batch import Batch
from gkd_jax.models import t5


torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,
    "d_ff": 40,
    "num_layers": 3,
    "num_decoder_layers": 2,  # transformers' cache cannot hold more than num_layers
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
MODELS = {
    "t5_1_0": ("t5", "T5", "relu", {}),
    "t5_1_1": ("t5", "T5", "gated-gelu", {"tie_word_embeddings": False}),
    "mt5": ("mt5", "MT5", "gated-gelu", {"tie_word_embeddings": False}),
    # transformers 5 scales umT5's states whatever the configuration says; so the file says it.
    "umt5": ("umt5", "UMT5", "gated-gelu", {"scale_decoder_outputs": True}),
}
OWN_HEAD = ("t5_1_1", "mt5", "umt5")


def make_folder(folder, name):
    """A folder of random weights with transformers' names and a config.json like public ones."""
    kind, prefix, activation, extra = MODELS[name]
    config_class = getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}ForConditionalGeneration")
    model = model_class(config_class(**SIZES, feed_forward_proj=activation))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if "layer_norm" in key:
            tensors[key] = 1 + 0.2 * noise
        elif "relative_attention_bias" in key:
            tensors[key] = noise
        else:
            tensors[key] = noise * (0.7 if "shared" in key else value.shape[-1] ** -0.5)
    for key in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors.pop(key, None)
    if name not in OWN_HEAD:
        tensors.pop("lm_head.weight", None)
    folder.mkdir()
    fields = {"model_type": kind, "feed_forward_proj": activation, **SIZES, **extra}
    fields["architectures"] = [model_class.__name__]
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors_torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder), model_class.from_pretrained(folder, attn_implementation="eager").eval()


def random_batch():
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, SIZES["vocab_size"], (3, 30)).astype(np.int32)
    targets = rng.integers(2, SIZES["vocab_size"], (3, 25)).astype(np.int32)
    for row, length in enumerate((30, 17, 4)):  # padded, and longer than the position buckets
        inputs[row, length:] = 0
    return Batch(jnp.asarray(inputs), jnp.asarray(targets), jnp.ones(targets.shape))


def torch_logits(model, batch):
    inputs = torch.tensor(np.asarray(batch.inputs), dtype=torch.long)
    decoder_inputs = torch.tensor(np.asarray(t5.shift_right(batch.targets)), dtype=torch.long)
    with torch.no_grad():
        return model(
            input_ids=inputs, attention_mask=inputs != 0, decoder_input_ids=decoder_inputs
        ).logits.numpy()


def torch_greedy(model, batch, length):
    inputs = torch.tensor(np.asarray(batch.inputs), dtype=torch.long)
    with torch.no_grad():
        tokens = model.generate(
            input_ids=inputs,
            attention_mask=inputs != 0,
            max_new_tokens=length,
            do_sample=False,
            num_beams=1,
        )[:, 1:].numpy()
    return np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))


def assert_equal_models(config, params, model):
    batch = random_batch()
    expected = torch_logits(model, batch)
    logits = np.asarray(t5.logits(config, params, batch))
    assert np.max(np.abs(logits - expected)) < 2e-5 * np.max(np.abs(expected))
    # A folder that gkd_jax wrote makes transformers suppress the pad id; the others do not.
    banned = tuple(model.generation_config.suppress_tokens or ())
    drawn = sampling.sample(
        config,
        params,
        batch.inputs,
        max_length=12,
        sampling=sampling.SamplingConfig(temperature=0.0, banned_ids=banned),
    )
    np.testing.assert_array_equal(drawn.tokens, torch_greedy(model, batch, 12))


@pytest.mark.parametrize("name", MODELS)
def test_reading_equals_transformers(tmp_path, name):
    folder, model = make_folder(tmp_path / "theirs", name)
    config = convert.read_config(folder)
    assert config.tie_embeddings == (name not in OWN_HEAD)
    assert config.scale_logits == (name in ("t5_1_0", "umt5"))
    assert config.per_layer_relpos == (name == "umt5")
    assert_equal_models(config, convert.read_params(folder, config), model)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(tmp_path, name):
    folder, _ = make_folder(tmp_path / "theirs", name)
    config = convert.read_config(folder)
    params = convert.read_params(folder, config)
    ours = str(tmp_path / "ours")
    convert.write_hf(ours, config, params)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(ours, attn_implementation="eager")
    if name in OWN_HEAD:
        assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert_equal_models(config, params, model.eval())
    assert model.generation_config.decoder_start_token_id == 0


def test_saved_again_and_in_shards(tmp_path):
    """Folders that transformers saves, with several files and an index, are read."""
    folder, model = make_folder(tmp_path / "theirs", "t5_1_1")
    saved = tmp_path / "saved"
    model.save_pretrained(saved, max_shard_size="20KB")
    assert (saved / "model.safetensors.index.json").is_file()
    assert len(list(saved.glob("*.safetensors"))) > 2
    config = convert.read_config(str(saved))
    assert config == convert.read_config(folder)
    assert_equal_models(config, convert.read_params(str(saved), config), model)


def test_bfloat16_file_of_transformers(tmp_path):
    folder, model = make_folder(tmp_path / "theirs", "t5_1_0")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    config = convert.read_config(saved)
    assert config == convert.read_config(folder)
    params = convert.read_params(saved, config)
    embedding = np.asarray(params["token_embedder"]["embedding"])
    expected = model.shared.weight.to(torch.float32).detach().numpy()
    np.testing.assert_array_equal(embedding, expected)


def edit_json(file, **fields):
    stored = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**stored, **fields}))


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        # MADLAD-400, CodeT5, and a model that starts its targets with another id.
        ("config.json", {"eos_token_id": 2, "pad_token_id": 1}, "pad_token_id must be 0, got 1"),
        ("config.json", {"bos_token_id": 1, "eos_token_id": 2}, "eos_token_id must be 1, got 2"),
        ("config.json", {"decoder_start_token_id": 7}, "decoder_start_token_id must be 0, got 7"),
        ("generation_config.json", {"eos_token_id": [1, 5]}, r"eos_token_id must be 1, got \[1, 5"),
        (
            "generation_config.json",
            {"decoder_start_token_id": 4},
            "decoder_start_token_id must be 0, got 4",
        ),
        ("generation_config.json", {"forced_bos_token_id": 9}, "forced_bos_token_id must be abs"),
        ("generation_config.json", {"bad_words_ids": [[5]]}, r"bad_words_ids must be absent"),
        (
            "generation_config.json",
            {"suppress_tokens": [3, 9]},
            r"suppress_tokens must be the last",
        ),
    ],
)
def test_another_way_to_decode_is_refused_by_name(tmp_path, file, fields, message):
    folder, _ = make_folder(tmp_path / "theirs", "t5_1_1")
    edit_json(tmp_path / "theirs" / file, **fields)
    with pytest.raises(ValueError, match=f"not decoded as T5 is: .*{file}.*{message}"):
        convert.read_config(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # transformers obeys these two, and not `feed_forward_proj`.
        ({"dense_act_fn": "relu"}, 'dense_act_fn must be "gelu_new" or absent, got .relu.'),
        ({"is_gated_act": False}, "is_gated_act must be true or absent, got False"),
        ({"quantization_config": {"bits": 8}}, "quantization_config must be null or absent"),
        ({"num_layers": 10**30}, "num_layers must be at most 10000, got 10000000"),
        ({"relative_attention_max_distance": 4}, "max_distance more than half of it, got 8 and 4"),
        ({"relative_attention_num_buckets": 2}, "num_buckets must be at least 4.* got 2 and 20"),
        ({"scale_decoder_outputs": "no"}, "scale_decoder_outputs must be true or false, got 'no'"),
        ({"model_type": ["t5"]}, r"model_type must be one of t5, .*got \['t5'\]"),
        ({"model_type": "olmo2"}, "model_type must be one of t5, .*llama.*qwen3.*got .olmo2"),
    ],
)
def test_what_transformers_computes_otherwise_or_not_at_all_is_refused(tmp_path, fields, message):
    folder, _ = make_folder(tmp_path / "theirs", "t5_1_1")
    edit_json(tmp_path / "theirs" / "config.json", **fields)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        convert.read_config(folder)


def test_an_mt5_is_never_scaled_whatever_its_file_says(tmp_path):
    folder, _ = make_folder(tmp_path / "theirs", "mt5")
    edit_json(tmp_path / "theirs" / "config.json", scale_decoder_outputs=True)
    model = transformers.MT5ForConditionalGeneration.from_pretrained(folder).eval()
    config = convert.read_config(folder)
    assert_equal_models(config, convert.read_params(folder, config), model)


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_start_token_id": 0, "eos_token_id": [1], "pad_token_id": 0},
        {"decoder_start_token_id": None, "eos_token_id": 1, "suppress_tokens": None},
        {"suppress_tokens": [0, 94, 95]},
    ],
)
def test_the_usual_ids_may_be_written_in_several_ways(tmp_path, fields):
    folder, _ = make_folder(tmp_path / "theirs", "t5_1_1")
    expected = convert.read_config(folder)
    edit_json(tmp_path / "theirs" / "generation_config.json", **fields)
    assert convert.read_config(folder) == expected
