"""The implementation that the suite checks by default: gkd_jax itself.

The loss under test is the one that training minimises, computed by `gkd.update` on T5 models. The
suite prescribes logits, so these T5s are lookup tables: embeddings are one-hot and all layers are
zero, and therefore the logits at t are row `targets[t - 1]` of the output head.
"""

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gkd_jax import divergences, gkd, sampling
from gkd_jax.batch import Batch
from gkd_jax.gkd_config import Divergence
from gkd_jax.models import lm, t5
from gkd_jax.storage import pretrained, saved_model, vocabulary_checks
from gkd_jax.text import vocabularies
from gkd_jax.text.word_vocabulary import WordVocabulary
from gkd_jax.training import samples, train_state


STUDENT = t5.T5Config(
    vocab_size=40,
    d_model=16,
    num_heads=2,
    head_dim=8,
    d_ff=16,
    num_encoder_layers=1,
    num_decoder_layers=2,
    relpos_buckets=8,
    relpos_max_distance=20,
)
LENGTH = 6
# The logit of ids without a piece. It is so large that a softmax that wrongly includes these ids
# gives a clearly different loss.
UNUSED_LOGIT = 20.0


def _keep_gradient(updates, state, params=None):
    return jax.tree.map(jnp.zeros_like, updates), updates


# An optimizer that leaves the parameters as they are and stores the gradient as its state, from
# which the suite reads the gradient of `gkd.update`.
_KEEP_GRADIENT = optax.GradientTransformation(lambda params: params, _keep_gradient)
_update = jax.jit(gkd.update, static_argnums=0)
_per_token = jax.jit(gkd.per_token_loss, static_argnums=(0, 1))
_logits = jax.jit(t5.logits, static_argnums=0)
_encode = jax.jit(t5.encode, static_argnums=0)
_decode_step = jax.jit(t5.decode_step, static_argnums=0)
_sample_targets = jax.jit(gkd.sample_targets, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _teacher_gradient(config, models, student_params, teacher_params, batch):
    def total(params):
        values = gkd.per_token_loss(config, models, student_params, params, batch)
        return jnp.sum(values * batch.weights)

    return jax.grad(total)(teacher_params)


class GKDJax:
    """All functions that the suite checks, except a fused loss and a sampled estimate."""

    def divergence(self, student_logits, teacher_logits, beta):
        return np.asarray(
            _divergence(beta)(jnp.asarray(student_logits), jnp.asarray(teacher_logits))
        )

    def top_k_divergence(self, student_logits, teacher_logits, beta, k):
        top = divergences.top_k(jnp.asarray(teacher_logits), k)
        student, teacher = divergences.outcomes(jnp.asarray(student_logits), top)
        return np.asarray(_divergence(beta)(student, teacher))

    def divergence_and_gradient(self, student_logits, teacher_logits, beta):
        teacher = jnp.asarray(teacher_logits)
        values, pull_back = jax.vjp(
            lambda student: _divergence(beta)(student, teacher), jnp.asarray(student_logits)
        )
        return np.asarray(values), np.asarray(pull_back(jnp.ones_like(values))[0])

    def tempered_divergence(
        self, student_logits, teacher_logits, beta, student_temperature, teacher_temperature
    ):
        tables = _Tables(student_logits, teacher_logits)
        config = _config(beta, student_temperature, teacher_temperature)
        batch = tables.batch(np.ones(student_logits.shape[:2]))
        values = _per_token(config, tables.models, tables.student, tables.teacher, batch)
        return np.asarray(values)[:, 1:]

    def loss_and_gradients(
        self, student_logits, teacher_logits, targets, weights, beta, num_microbatches
    ):
        """Returns the loss and its gradients with respect to both models' logits.

        Of `targets`, only the last target of each row is used. The models are lookup tables, whose
        batch has the tables' row numbers in place of the other targets.
        """
        tables = _Tables(student_logits, teacher_logits)
        batch = tables.batch(weights, targets)
        state = train_state.create(tables.student, _KEEP_GRADIENT)
        config, models = _config(beta), tables.models
        key = jax.random.key(0)
        learner = gkd.Learner(
            config=config,
            models=models,
            optimizer=_KEEP_GRADIENT,
            num_microbatches=num_microbatches,
        )
        state, metrics = _update(learner, state, tables.teacher, batch, key)
        of_teacher = _teacher_gradient(config, models, tables.student, tables.teacher, batch)
        return float(metrics["loss"]), *map(tables.of_logits, (state.opt_state, of_teacher))

    def target_weights(self, tokens, eos_id, pad_id):
        return np.asarray(sampling.weights_until_eos(jnp.asarray(tokens), (eos_id,)))

    def decoder_inputs(self, targets):
        return np.asarray(t5.shift_right(jnp.asarray(targets)))

    def teacher_forced_logits(self, inputs, targets):
        batch = _batch(inputs, targets, np.ones(targets.shape))
        return np.asarray(_logits(STUDENT, _student_params(), batch))

    def cached_logits(self, inputs, targets):
        params, tokens = _student_params(), self.decoder_inputs(targets)
        encoded = _encode(STUDENT, params, jnp.asarray(inputs, jnp.int32))
        cache = t5.init_cache(STUDENT, params, encoded, targets.shape[1])
        steps = []
        for t in range(targets.shape[1]):
            column = jnp.asarray(tokens[:, t], jnp.int32)
            logits, cache = _decode_step(STUDENT, params, column, cache)
            steps.append(np.asarray(logits))
        return np.stack(steps, axis=1)

    def sample(self, inputs, seed, step):
        shape = (len(inputs), LENGTH)
        batch = _batch(inputs, np.zeros(shape), np.zeros(shape))
        models = gkd.ModelPair(student=STUDENT, teacher=None, num_pieces=STUDENT.vocab_size)
        key = gkd.step_keys(seed, step).sampling
        _, drawn = _sample_targets(_config(0.5), models, _student_params(), batch, key)
        return np.asarray(drawn.tokens), np.asarray(drawn.weights)

    def sample_statistics(self, tokens, weights):
        return samples.sample_statistics(tokens, weights, t5.EOS_IDS)

    def is_on_policy(self, seed, step, on_policy_fraction):
        return gkd.is_on_policy(
            seed, step, gkd.GKDConfig(on_policy_fraction=float(on_policy_fraction))
        )

    def configure_sft(self, on_policy_fraction):
        gkd.GKDConfig(divergence=None, on_policy_fraction=on_policy_fraction)

    def check_vocabularies(self, student_pieces, teacher_pieces):
        """Checks a checkpoint with the student's vocabulary against the teacher's vocabulary."""
        student, teacher = (
            WordVocabulary(pieces[3:]) for pieces in (student_pieces, teacher_pieces)
        )
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = f"{folder}/checkpoint"
            content = vocabularies.content_hash(student)
            saved_model.write_params(checkpoint, STUDENT, _student_params(), content)
            model = pretrained.ModelConfig(checkpoint=checkpoint)
            vocabulary_checks.shared_pieces(teacher, {"student": model})


@functools.cache
def _divergence(beta: float) -> Divergence:
    if beta in (0, 1):
        return divergences.reverse_kl if beta else divergences.forward_kl
    return functools.partial(divergences.jsd, beta=beta)


@functools.cache
def _config(
    beta: float, student_temperature: float = 1.0, teacher_temperature: float = 1.0
) -> gkd.GKDConfig:
    return gkd.GKDConfig(
        divergence=_divergence(beta),
        student_temperature=student_temperature,
        teacher_temperature=teacher_temperature,
    )


@functools.cache
def _student_params() -> t5.Params:
    rng = np.random.default_rng(1)

    def leaf(path, x):
        if path[-1].key == "scale":
            return jnp.ones(x.shape)
        return jnp.asarray(rng.normal(0, 2 * x.shape[-2] ** -0.5, x.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, lm.abstract_params(STUDENT))


def _batch(inputs, targets, weights) -> Batch:
    return Batch(
        jnp.asarray(inputs, jnp.int32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )


class _Tables:
    """T5 models of a student and a teacher whose logits at [b, t] are given.

    Position [b, t] has its own id, and the row of the output head at this id has the logits of the
    position. A batch therefore has one target more than the logits have positions: target t is the
    id of position t, which the decoder reads one step later. The first position of a batch has
    weight 0.
    """

    def __init__(self, student_logits: np.ndarray, teacher_logits: np.ndarray):
        rows, length, self._pieces = student_logits.shape
        self._ids = 1 + np.arange(rows * length).reshape(rows, length)
        size = rows * length + 1
        config = t5.T5Config(
            vocab_size=max(size, self._pieces) + 3,
            d_model=size,
            num_heads=1,
            head_dim=1,
            d_ff=1,
            num_encoder_layers=1,
            num_decoder_layers=1,
        )
        self.models = gkd.ModelPair(student=config, teacher=config, num_pieces=self._pieces)
        self.student, self.teacher = (
            self._params(config, logits) for logits in (student_logits, teacher_logits)
        )

    def _params(self, config: t5.T5Config, logits: np.ndarray) -> t5.Params:
        shapes: Any = lm.abstract_params(config)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        # The RMS norm of the decoder scales a one-hot vector to this length.
        scale = np.sqrt(config.d_model)
        embedding = scale * np.eye(config.vocab_size, config.d_model, dtype=np.float32)
        kernel = np.full((config.d_model, config.vocab_size), UNUSED_LOGIT / scale, np.float32)
        kernel[:, : self._pieces] = 0
        kernel[self._ids, : self._pieces] = logits / scale
        params["token_embedder"]["embedding"] = jnp.asarray(embedding)
        params["decoder"]["logits_dense"]["kernel"] = jnp.asarray(kernel)
        for stack in ("encoder", "decoder"):
            params[stack][f"{stack}_norm"]["scale"] = jnp.ones(config.d_model)
        return params

    def batch(self, weights: np.ndarray, targets: np.ndarray | None = None) -> Batch:
        """Returns the batch with which the models give the logits of the tables.

        Args:
            weights: the weight of each position.
            targets: targets whose last column becomes the last target; None means id 1.
        """
        last = np.ones((len(weights), 1)) if targets is None else targets[:, -1:]
        inputs = np.ones((len(weights), 1))
        return _batch(inputs, np.hstack([self._ids, last]), np.pad(weights, ((0, 0), (1, 0))))

    def of_logits(self, gradient: t5.Params) -> np.ndarray:
        """Returns the gradient with respect to the logits, from that of the parameters."""
        kernel = np.asarray(gradient["decoder"]["logits_dense"]["kernel"])
        return kernel[self._ids, : self._pieces] / np.sqrt(kernel.shape[0])
