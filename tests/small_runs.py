"""The runs that the tests of whole runs start: `arithmetic` with a T5 of a few thousand numbers."""

from gkd_jax import gkd, optimizers, sharding
from gkd_jax.input.data import DataConfig
from gkd_jax.models import t5
from gkd_jax.storage import pretrained
import gkd_jax.tasks.arithmetic  # noqa: F401
from gkd_jax.training import train


LENGTHS = {"inputs": 48, "targets": 32}


def small(size, *, vocab_size):
    return t5.t5_1_1(
        size, vocab_size=vocab_size, d_model=16, num_heads=2, head_dim=8, d_ff=32, num_layers=1
    )


def options(model_dir, *, steps, fraction=0.0, divergence=None, teacher=None, student=None, **more):
    student = student or pretrained.Model(architecture=small, size="tiny")
    return {
        "model_dir": str(model_dir),
        "student": student,
        "teacher": teacher,
        "data_config": DataConfig(task="arithmetic", feature_lengths=LENGTHS, batch_size=8),
        "method": gkd.GKDConfig(on_policy_fraction=fraction, divergence=divergence),
        "optimizer": optimizers.adafactor,
        "schedule": optimizers.linear_schedule(learning_rate=0.02, total_steps=100),
        "trainer": train.Trainer(train_steps=steps, save_period=3, log_period=100),
        "mesh_config": sharding.MeshConfig(data=4, fsdp=2, tensor=1),
        **more,
    }
