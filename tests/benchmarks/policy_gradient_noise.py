"""Measures how much of RL's gradient is signal, for exact answers on word problems.

    python tests/benchmarks/policy_gradient_noise.py STUDENT TEACHER --first=2500 --batches=24

STUDENT and TEACHER are MODEL_DIRs of gin/quickstart.gin or gin/sweeps/arithmetic.toml. For every
batch of 64 problems x 8 samples, the gradient g of each term of the loss is computed by itself. The
signal |E g| comes from products of different batches, whose noise is independent. The noise is
sqrt(E|g - E g|^2). Signal and noise would be equal in a batch that is noise^2 / signal^2 times as
large. In much smaller batches, a larger learning rate only makes longer random steps.
"""

import argparse
import json

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from gkd_jax import Batch, forward_kl, jsd, load_model, rl, sample
from gkd_jax.evaluation import rewards
from gkd_jax.losses import sequence_mean
from gkd_jax.models import lm
from gkd_jax.sampling import SamplingConfig, weights_until_eos
from gkd_jax.tasks import arithmetic  # pyright: ignore[reportMissingImports]
from gkd_jax.text import vocabularies


PROMPTS, SAMPLES, SOURCE, TARGET = 64, 8, 40, 24
BANNED = (0, 2)  # pad and unknown
EOS = 1


def gradient_functions(student_config, teacher_config, teacher):
    """Functions (params, batch, advantages) -> flat gradient, one for each term of Eq. 5."""

    def policy(params, batch, advantages):
        logits = lm.logits(student_config, params, batch).at[..., jnp.array(BANNED)].set(-jnp.inf)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)
        weights = batch.weights
        return rl.policy_loss(log_probs[..., 0], weights, advantages) / len(advantages)

    def divergence(function, **settings):
        def loss(params, batch, advantages):
            del advantages
            logits = [
                lm.logits(config, weights, batch)
                for config, weights in ((student_config, params), (teacher_config, teacher))
            ]
            total, count = sequence_mean(function(*logits, **settings), batch.weights)
            return total / count

        return loss

    losses = {
        "policy, exact answers": policy,
        "forward KL": divergence(forward_kl),
        "JSD(0.9)": divergence(jsd, beta=0.9),
    }
    return {
        name: jax.jit(lambda *x, f=f: jax.flatten_util.ravel_pytree(jax.grad(f)(*x))[0])
        for name, f in losses.items()
    }


def signal_and_noise(gradients: np.ndarray) -> tuple[float, float]:
    """|E g| and sqrt(E|g - E g|^2), estimated from rows of independent gradients."""
    count = len(gradients)
    squares = np.square(gradients).sum()
    products = (np.square(gradients.sum(0)).sum() - squares) / (count * (count - 1))
    return float(np.sqrt(max(products, 0.0))), float(np.sqrt(max(squares / count - products, 0.0)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student")
    parser.add_argument("teacher")
    parser.add_argument("--first", type=int, default=0, help="of the training problems")
    parser.add_argument("--batches", type=int, default=24)
    values = parser.parse_args()
    (config, params), (teacher_config, teacher) = map(load_model, (values.student, values.teacher))
    vocabulary = vocabularies.load("arithmetic")
    problems = arithmetic.problems()["train"][values.first :]
    functions = gradient_functions(config, teacher_config, teacher)
    sampling = SamplingConfig(temperature=1.0, banned_ids=BANNED, eos_ids=(EOS,))
    draw = jax.jit(
        lambda x, key: (
            sample(
                config, params, x, key, max_length=TARGET, sampling=sampling, num_samples=SAMPLES
            ).tokens
        )
    )
    rng, found, means = np.random.default_rng(0), {name: [] for name in functions}, []
    for index in range(values.batches):
        rows = [problems[i] for i in rng.integers(0, len(problems), PROMPTS)]
        inputs = np.zeros((PROMPTS, SOURCE), np.int32)
        for row, (question, _) in zip(inputs, rows, strict=True):
            ids = [*vocabulary.encode(question), EOS]
            row[: len(ids)] = ids
        tokens = draw(jnp.asarray(inputs), jax.random.fold_in(jax.random.key(1), index))
        weights = weights_until_eos(tokens, (EOS,))
        texts = [
            vocabulary.decode([token for token in row[: int(size)] if token > EOS])
            for row, size in zip(tokens.tolist(), np.asarray(weights).sum(1), strict=True)
        ]
        references = [chain for _, chain in rows for _ in range(SAMPLES)]
        right = rewards.exact_answer(texts, texts, references)
        means.append(right.mean())
        advantages = jnp.asarray(rl.advantages(right, SAMPLES))
        batch = Batch(jnp.repeat(jnp.asarray(inputs), SAMPLES, axis=0), tokens, weights)
        for name, function in functions.items():
            found[name].append(np.asarray(function(params, batch, advantages), np.float64))
    result = {"reward": float(np.mean(means))}
    for name, gradients in found.items():
        signal, noise = signal_and_noise(np.stack(gradients))
        result[name] = {"signal": signal, "noise": noise}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
