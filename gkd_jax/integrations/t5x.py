"""GKD inside T5X: a T5X model with gkd_jax's loss, and the T5X trainer that this model needs.

A T5X pretrain or finetune gin file becomes a GKD run if its model is a `GKDModel` and its
`trainer_cls` is `GKDTrainer`. T5X still does everything else: data, optimizer, partitioning,
checkpoints, evaluation and inference. docs/checkpoints.md, "Staying on T5X", explains how to
install T5X beside gkd_jax, with an example.

The teacher's parameters are an argument of the compiled step, sharded like those of any T5X model.
Inside the step they are the collection `teacher` in the train state's `flax_mutables`. They are not
constants of the program, are not donated and are not saved: a checkpoint of the run holds only the
student, so the student's ordinary T5X gin file can evaluate it and decode with it.

Axes: B batch, V vocabulary.
"""

# If T5X is not installed, pyright resolves `t5x` to this file.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Callable, Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import seqio
from t5x import decoding, metrics, models, trainer, utils

from gkd_jax import convert, divergences, losses, sampling
from gkd_jax.gkd_config import Divergence, Reduction
from gkd_jax.models import lm, t5


Batch = Mapping[str, jax.Array]  # The features of T5X by name, each of shape [B, ...].

# A feature [B] that repeats in every row the number by which the loss of the whole batch is
# divided. T5X splits a batch into microbatches, which would otherwise divide by their own numbers.
_COUNT = "loss_count"


class GKDModel(models.EncoderDecoderModel):
    """A student whose loss is the divergence from a frozen teacher (Algorithm 1).

    Args:
        module: the student's network, such as `@network.Transformer()`.
        teacher_module: the teacher's network, such as `@teacher/network.Transformer()`.
        teacher_checkpoint: a T5X checkpoint of the teacher, in any format that T5X restores.
        input_vocabulary: the vocabulary of the inputs.
        output_vocabulary: the vocabulary of the targets, which both models share. Ids beyond its
            pieces only round the size of the embedding up: the divergence leaves them out, and
            they are never sampled.
        optimizer_def: the student's optimizer.
        on_policy_fraction: the paper's lambda, the probability that a step trains on the student's
            own samples.
        divergence: a function (student_logits, teacher_logits) -> divergence per token.
        teacher_temperature: divides the teacher's logits inside the divergence.
        sampling_temperature: the temperature of the student's samples, which are drawn without
            top-k and top-p.
        reduction: `losses.sequence_mean` (Eq. 2) or `losses.token_mean`.
        teacher_dtype: the dtype of the teacher in memory, "float32" or "bfloat16"; None keeps the
            stored dtype.
        decode_fn: the decoding function of evaluation.
        default_decoder_params: the parameters of `decode_fn`.
    """

    def __init__(
        self,
        module: Any,
        teacher_module: Any,
        teacher_checkpoint: str,
        input_vocabulary: seqio.Vocabulary,
        output_vocabulary: seqio.Vocabulary,
        optimizer_def: Any,
        on_policy_fraction: float = 1.0,
        divergence: Divergence = divergences.forward_kl,
        teacher_temperature: float = 1.0,
        sampling_temperature: float = 1.0,
        reduction: Reduction = losses.sequence_mean,
        teacher_dtype: str | None = None,
        decode_fn: Callable[..., Any] = decoding.beam_search,
        default_decoder_params: Any = None,
    ):
        if not 0 <= on_policy_fraction <= 1:
            raise ValueError(f"on_policy_fraction must lie in [0, 1], got {on_policy_fraction}")
        for name, value in (("teacher", teacher_temperature), ("sampling", sampling_temperature)):
            if not value > 0:
                raise ValueError(f"{name}_temperature must be positive, got {value}")
        vocabularies = (input_vocabulary, output_vocabulary)
        super().__init__(
            module,
            *vocabularies,
            optimizer_def,
            decode_fn=decode_fn,
            default_decoder_params=default_decoder_params,
        )
        sample = functools.partial(
            decoding.temperature_sample,
            temperature=sampling_temperature,
            topk=0,  # T5X's default of 1 decodes greedily at every temperature.
            logit_callback_fn=self._ban,
        )
        self.teacher = models.EncoderDecoderModel(teacher_module, *vocabularies, None)
        self.teacher_checkpoint, self.teacher_dtype = teacher_checkpoint, teacher_dtype
        self.on_policy_fraction, self.sample_fn = on_policy_fraction, sample
        self.divergence, self.reduction = divergence, reduction
        self.teacher_temperature = teacher_temperature

    def loss_fn(
        self,
        params: Any,
        batch: Batch,
        dropout_rng: jax.Array | None,
        flax_mutables: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, ""], tuple[dict[str, Any], Mapping[str, Any]]]:
        """Returns the divergence on the batch's targets, reduced to one number, and the metrics.

        T5X differentiates the divergence with respect to `params` only.

        Args:
            params: the student's parameters.
            batch: the features of T5X, with one sequence per row.
            dropout_rng: the key of the student's dropout; None turns dropout off.
            flax_mutables: a mapping with the teacher's parameters under "teacher".

        Returns:
            The loss, and (metrics, `flax_mutables`).

        Raises:
            ValueError: if `flax_mutables` has no teacher, or if rows are packed.
        """
        if not flax_mutables or "teacher" not in flax_mutables:
            raise ValueError(
                "the train state holds no teacher: GKDModel needs train.trainer_cls = @GKDTrainer"
            )
        if "decoder_segment_ids" in batch:
            raise ValueError(
                "GKD samples and averages whole sequences, got a packed batch: set pack = False in "
                "train/utils.DatasetConfig and train_eval/utils.DatasetConfig"
            )
        pieces = self.output_vocabulary.vocab_size
        student_logits = self._compute_logits(params, batch, dropout_rng)
        teacher_logits = self.teacher._compute_logits(flax_mutables["teacher"], batch)
        values = self.divergence(
            student_logits[..., :pieces],
            jax.lax.stop_gradient(teacher_logits[..., :pieces] / self.teacher_temperature),
        )
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        total, count = self.reduction(values, weights)
        count = batch[_COUNT][0] if _COUNT in batch else count
        loss = total / jnp.maximum(count, 1.0)
        computed = self._compute_metrics(
            logits=student_logits, targets=batch["decoder_target_tokens"], mask=weights, loss=loss
        )
        # T5X's own loss is a sum, which these metrics divide by numbers such as that of tokens.
        # The loss here is a mean already, so such metrics are dropped.
        computed = {k: v for k, v in computed.items() if not k.startswith("loss_per_")}
        return loss, (computed, flax_mutables)

    def eval_fn(
        self, params: Any, batch: Batch, flax_mutables: Mapping[str, Any] | None = None
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """Returns the loss on the data set's targets without dropout, and the metrics."""
        loss, (computed, _) = self.loss_fn(params, batch, None, flax_mutables)
        return loss, computed

    def training_batch(
        self, params: Any, batch: Batch, key: jax.Array
    ) -> tuple[dict[str, jax.Array], Bool[Array, ""]]:
        """Returns the batch that a step trains on, and whether its targets are student samples.

        One random coin per step decides for all rows of the batch.

        Args:
            params: the student's parameters.
            batch: the features of T5X with the data set's targets.
            key: the key of the coin and of the samples.
        """
        weights = batch["decoder_loss_weights"].astype(jnp.float32)
        chosen = {**batch, "decoder_loss_weights": weights}
        coin, sampling_key = jax.random.split(key)
        on_policy = jax.random.uniform(coin) < self.on_policy_fraction
        if self.on_policy_fraction > 0:
            chosen = jax.lax.cond(
                on_policy, lambda: self.sample_targets(params, chosen, sampling_key), lambda: chosen
            )
        weights = chosen["decoder_loss_weights"]
        _, count = self.reduction(weights, weights)
        return {**chosen, _COUNT: jnp.full(weights.shape[:1], count)}, on_policy

    def sample_targets(self, params: Any, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """Returns the batch with targets sampled from the student, up to and including EOS."""
        policy = models.EncoderDecoderModel(
            self.module, self.input_vocabulary, self.output_vocabulary, None, self.sample_fn
        )
        tokens = policy.predict_batch(params, batch, rng=key)
        tokens = tokens.astype(batch["decoder_target_tokens"].dtype)
        eos_id = self.output_vocabulary.eos_id or t5.EOS_IDS[0]
        return {
            **batch,
            "decoder_target_tokens": tokens,
            "decoder_input_tokens": jnp.pad(tokens[:, :-1], ((0, 0), (1, 0))),
            "decoder_loss_weights": sampling.weights_until_eos(tokens, (eos_id,)),
        }

    def _ban(self, logits: Float[Array, "B V"], state: Any) -> Float[Array, "B V"]:
        """Returns logits that exclude pad and the ids without a piece from sampling."""
        size = logits.shape[-1]
        tail = range(self.output_vocabulary.vocab_size, size)
        allowed = sampling.allowed_ids(size, (self.output_vocabulary.pad_id, *tail))
        return jnp.where(allowed[None], logits, -jnp.inf)

    def load_teacher(self, partitioner: Any) -> tuple[Any, Any]:
        """Reads the teacher's parameters; each process reads the shards of its own devices.

        Returns:
            The parameters and their mesh axes.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if the checkpoint is not one of a T5, or has another number of parameters
                than `teacher_module`.
        """
        tokens = ("encoder_input_tokens", "decoder_input_tokens")
        initializer = utils.TrainStateInitializer(
            optimizer_def=None,
            init_fn=self.teacher.get_initial_variables,
            input_shapes=dict.fromkeys(tokens, (1, 1)),
            input_types=dict.fromkeys(tokens, jnp.int32),
            partitioner=partitioner,
        )
        # T5X itself would silently read only the first layers of a checkpoint with more layers.
        stored = lm.abstract_params(convert.read_config(self.teacher_checkpoint))
        sizes = [
            sum(x.size for x in jax.tree.leaves(params))
            for params in (stored, initializer.global_train_state_shape.params)
        ]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"teacher_checkpoint {self.teacher_checkpoint!r} holds {sizes[0]:,} parameters, "
                f"teacher_module has {sizes[1]:,}: bind the teacher's sizes in its own gin scope"
            )
        source = utils.RestoreCheckpointConfig(
            path=self.teacher_checkpoint, mode="specific", dtype=self.teacher_dtype, strict=False
        )
        state, manager = utils.create_checkpoint_manager_and_restore(
            initializer, partitioner, source, source.path, None, use_orbax=True
        )
        manager.close()
        return state.params, initializer.train_state_axes.params


class GKDTrainer(trainer.Trainer):
    """T5X's trainer with steps that use the teacher and the student's samples of a `GKDModel`."""

    @functools.cached_property
    def _teacher(self) -> tuple[Any, Any]:
        return self._model.load_teacher(self._partitioner)

    @functools.cached_property
    def _partitioned_train_step(self):
        def train_step(train_state, batch, teacher):
            keys = jax.random.split(self._get_step_rng(train_state.step))
            batch, on_policy = self._model.training_batch(train_state.params, batch, keys[0])
            new_state, computed = trainer.train_with_lr(
                train_state.replace_flax_mutables({"teacher": teacher}),
                batch,
                learning_rate=self._learning_rate_fn(train_state.step),
                dropout_rng=keys[1],
                model=self._model,
                num_microbatches=self._num_microbatches,
                weight_metrics_computer=self._weight_metrics_computer,
                data_partition_spec=self._partitioner.data_partition_spec,
            )
            computed["on_policy"] = metrics.AveragePerStep.from_model_output(
                on_policy.astype(jnp.float32)
            )
            return new_state.replace_flax_mutables(train_state.flax_mutables), computed

        return self._partition(train_step, (self._train_state_axes, None), donate_argnums=(0,))

    @functools.cached_property
    def _partitioned_eval_step(self):
        def eval_step(train_state, batch, teacher):
            train_state = train_state.replace_flax_mutables({"teacher": teacher})
            return trainer.eval_step(self._model, train_state, batch)

        return self._partition(eval_step, None)

    def _partition(self, step, out_axes, **options) -> "_WithTeacher":
        """Partitions a function of (train state, batch, teacher) and binds the teacher."""
        teacher, teacher_axes = self._teacher
        axes = (self._train_state_axes, self._partitioner.data_partition_spec, teacher_axes)
        return _WithTeacher(self._partitioner.partition(step, axes, out_axes, **options), teacher)


@dataclasses.dataclass(frozen=True)
class _WithTeacher:
    """A step that T5X compiles and calls with (train state, batch); the teacher is added."""

    step: Any
    teacher: Any

    def __call__(self, train_state, batch):
        return self.step(train_state, batch, self.teacher)

    def lower(self, train_state, batch) -> "_WithTeacher":
        return _WithTeacher(self.step.lower(train_state, batch, self.teacher), self.teacher)

    def compile(self) -> "_WithTeacher":
        return _WithTeacher(self.step.compile(), self.teacher)
