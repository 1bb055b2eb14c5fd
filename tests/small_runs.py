"""Options of small whole runs: the task `arithmetic` with a T5 of a few thousand parameters."""

import pathlib

import jax
import small_tokenizers

from gkd_jax import convert, gkd, sharding
from gkd_jax.input.data import DataConfig
from gkd_jax.models import lm, t5
from gkd_jax.models.decoder_config import DecoderConfig
from gkd_jax.storage import pretrained, saved_model
import gkd_jax.tasks.arithmetic  # noqa: F401
from gkd_jax.text import vocabularies
from gkd_jax.training import metrics, optimizers
from gkd_jax.training.recipe import Recipe, TrainConfig


LENGTHS = {"inputs": 48, "targets": 32}


def small(size, vocab_size):
    del size
    return t5.T5Config(
        vocab_size=vocab_size,
        d_model=16,
        num_heads=2,
        head_dim=8,
        d_ff=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )


def write_teacher(folder):
    """Writes random weights with the vocabulary of `arithmetic` and returns their path."""
    config, vocabulary = small("tiny", 256), vocabularies.arithmetic()
    content = vocabularies.content_hash(vocabulary)
    params = t5.init(config, jax.random.key(1))
    saved_model.write_params(str(folder), config, params, content, vocabulary.vocab_size)
    return str(folder)


def write_decoder(folder, tokenizer, rows, seed):
    """Writes a random Qwen3 with a tokenizer as a Hugging Face folder."""
    config = DecoderConfig(
        vocab_size=rows,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=16,
        num_layers=1,
        qk_norm=True,
    )
    params = lm.init(config, jax.random.key(seed))
    convert.write_hf(str(folder), config, params)
    small_tokenizers.write(folder, "qwen", tokenizer)
    return pretrained.ModelConfig(checkpoint=str(folder))


def step_lines(model_dir):
    """The lines of a run's metrics.jsonl that are about steps of training."""
    lines = metrics.read(pathlib.Path(model_dir) / "metrics.jsonl")
    return [line for line in lines if "train/loss" in line]


def options(model_dir, *, steps, fraction=0.0, divergence=None, student=None, **more):
    """The arguments of `train.train` for a short run; `more` replaces fields of the recipe."""
    fields = {
        "student": student or pretrained.ModelConfig(architecture=small, size="tiny"),
        # Every start of a run reads its examples; all 50,000 would take longer than a run's steps.
        "data": DataConfig(
            task="arithmetic", feature_lengths=LENGTHS, batch_size=8, num_examples=1000
        ),
        "method": gkd.GKDConfig(on_policy_fraction=fraction, divergence=divergence),
        "optimizer": optimizers.Adafactor(),
        "schedule": optimizers.Linear(learning_rate=0.02),
        "train": TrainConfig(train_steps=steps, save_period=3, log_period=100),
        "mesh": sharding.MeshConfig(data=4, fsdp=2, tensor=1),
        **more,
    }
    return {"model_dir": str(model_dir), "recipe": Recipe(**fields)}
