"""The optimizers (Adafactor as in T5X, AdamW) and the paper's learning-rate schedule.

Parameters under a path component `layers` are stacked on axis 0. Like T5X, Adafactor treats each
layer of a stack as a parameter of its own, with its own factors, scale and clipping.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from gkd_jax.gkd_config import Schedule
from gkd_jax.text import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """The paper's learning-rate schedule: a rise from 0, a constant part, and a fall to 0.

    Rise and fall are linear, and the fall ends with the run.

    Attributes:
        learning_rate: the learning rate of the constant part.
        warmup_steps: the updates of the rise (the paper's XSum runs: 2,000 of 40,000).
        cooldown_steps: the updates of the fall (the paper's XSum runs: the last 10,000).
    """

    learning_rate: float
    warmup_steps: int = 0
    cooldown_steps: int = 0

    def __post_init__(self):
        settings.check_types(self)
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        for name in ("warmup_steps", "cooldown_steps"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")

    def over(self, total_steps: int) -> Schedule:
        """Returns the rate in a run of `total_steps` updates, as a function of those done before.

        Raises:
            ValueError: if the rise and the fall together are longer than the run.
        """
        if self.warmup_steps + self.cooldown_steps > total_steps:
            raise ValueError(
                f"warmup_steps and cooldown_steps must fit the run's {total_steps} steps, got "
                f"{self.warmup_steps} + {self.cooldown_steps}: lower WARMUP_STEPS and "
                "COOLDOWN_STEPS (or these two fields, where a gin file sets them), or train longer"
            )

        def schedule(count):
            count = jnp.asarray(count, jnp.float32)
            rise = count / self.warmup_steps if self.warmup_steps else jnp.ones(())
            left = total_steps - count
            fall = left / self.cooldown_steps if self.cooldown_steps else jnp.ones(())
            return self.learning_rate * jnp.clip(jnp.minimum(rise, fall), 0.0, 1.0)

        return schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW (Loshchilov & Hutter, 2019).

    Attributes:
        b1, b2: the decay rates of the means of gradients and of squared gradients.
        eps: a number added to the root of the mean of squared gradients.
        weight_decay: the rate of weight decay. Each update subtracts this share, times the learning
            rate, of every kernel and embedding. As in T5X and big_vision, the scales of norms, the
            biases and the position biases do not decay: they set a scale or an offset, and a
            smaller one is another function.
        max_grad_norm: the global norm to which gradients are clipped first; None does not clip.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None

    def __post_init__(self):
        settings.check_types(self)
        _check_max_grad_norm(self.max_grad_norm)
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("eps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def __call__(self, schedule: Schedule) -> optax.GradientTransformation:
        """Returns the optimizer whose learning rate follows `schedule`."""
        adam = optax.adamw(
            schedule,
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=_decays,
        )
        return _clipped(adam, self.max_grad_norm)


_NEVER_DECAYED = ("scale", "bias", "rel_embedding")


def _decays(params: Any) -> Any:
    """Returns a tree of flags that are true for the parameters to which weight decay applies."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _place(path)[1] not in _NEVER_DECAYED, params
    )


class AdafactorState(NamedTuple):
    """Adafactor's count and running means of squared gradients.

    Each of the three trees has the structure of the parameters. A parameter that has no entry in a
    tree has zeros there, of shape (1,) or, for stacked layers, [L, 1].
    """

    count: Int[Array, ""]  # updates done
    v_row: Any  # of factored parameters, squared gradients averaged over the last dimension
    v_col: Any  # of factored parameters, squared gradients averaged over the dimension before
    v: Any  # of unfactored parameters, the squared gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor:
    """Adafactor (Shazeer & Stern, 2018) as T5X runs it: scaled by the parameters, no momentum.

    The learning rate is a relative step size, because an update is multiplied by the RMS of its
    parameter.

    Attributes:
        decay_rate: d in 1 - (count + 1)^-d, the decay of the second moments.
        clipping_threshold: the largest RMS of the update of one parameter (or one layer of a stack)
            before the learning rate.
        min_parameter_scale: the least RMS by which an update is multiplied.
        epsilon: a number added to squared gradients.
        min_dim_size_to_factor: the second moments of an unstacked matrix are factored if both of
            its dimensions have at least this size.
        stacked_min_dim_size_to_factor: the same size for the matrices of stacked layers. T5X
            factors those of its scanned network at any size (0), of its plain network from 128.
        max_grad_norm: the global norm to which gradients are clipped first; None does not clip.
    """

    decay_rate: float = 0.8
    clipping_threshold: float = 1.0
    min_parameter_scale: float = 1e-3
    epsilon: float = 1e-30
    min_dim_size_to_factor: int = 128
    stacked_min_dim_size_to_factor: int = 0
    max_grad_norm: float | None = None

    def __post_init__(self):
        settings.check_types(self)
        _check_max_grad_norm(self.max_grad_norm)
        for name in ("decay_rate", "clipping_threshold", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.min_parameter_scale >= 0:
            raise ValueError(
                f"min_parameter_scale must be at least 0, got {self.min_parameter_scale}"
            )

    def __call__(self, schedule: Schedule) -> optax.GradientTransformation:
        """Returns the optimizer whose relative step size follows `schedule`."""
        optimizer = optax.GradientTransformation(
            self._init, functools.partial(self._update, schedule)
        )
        return _clipped(optimizer, self.max_grad_norm)

    def _is_factored(self, stacked: bool, name: str, shape: tuple[int, ...]) -> bool:
        least = self.stacked_min_dim_size_to_factor if stacked else self.min_dim_size_to_factor
        return len(shape) == 2 and name != "rel_embedding" and min(shape) >= least

    def _init(self, params):
        def leaf(path, param):
            stacked, name = _place(path)
            lead, shape = (param.shape[:1], param.shape[1:]) if stacked else ((), param.shape)
            if self._is_factored(stacked, name, shape):
                sizes = [(shape[0],), (shape[1],), (1,)]
            else:
                sizes = [(1,), (1,), shape]
            # The state is donated, so each of the three must be an array of its own.
            return tuple(jnp.zeros((*lead, *size)) for size in sizes)

        rows, cols, full = _transpose(jax.tree_util.tree_map_with_path(leaf, params), params, 3)
        return AdafactorState(jnp.zeros((), jnp.int32), rows, cols, full)

    def _update(self, schedule: Schedule, updates, state, params=None):
        decay = 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -self.decay_rate
        rate = schedule(state.count)

        def leaf(path, grad, param, v_row, v_col, v):
            stacked, name = _place(path)
            factored = self._is_factored(stacked, name, param.shape[1:] if stacked else param.shape)

            def run(grad, param, *moments):
                step, *moments = _adafactor_step(
                    grad,
                    *moments,
                    decay=decay,
                    clipping_threshold=self.clipping_threshold,
                    epsilon=self.epsilon,
                    factored=factored,
                )
                scale = jnp.maximum(_rms(param), self.min_parameter_scale)
                return -rate * scale * step, *moments

            return (jax.vmap(run) if stacked else run)(grad, param, v_row, v_col, v)

        results = jax.tree_util.tree_map_with_path(
            leaf, updates, params, state.v_row, state.v_col, state.v
        )
        steps, rows, cols, full = _transpose(results, updates, 4)
        return steps, AdafactorState(state.count + 1, rows, cols, full)


# The names in gin files and on command lines, as in `OPTIMIZER = @optimizers.adamw`.
adafactor = Adafactor
adamw = AdamW
Optimizer = Adafactor | AdamW


def _adafactor_step(grad, v_row, v_col, v, *, decay, clipping_threshold, epsilon, factored):
    """Returns the clipped step and the new moments of one parameter, or one layer of a stack."""
    grad = grad.astype(jnp.float32)
    squared = jnp.square(grad) + epsilon
    if factored:
        v_row = decay * v_row + (1 - decay) * jnp.mean(squared, axis=1)
        v_col = decay * v_col + (1 - decay) * jnp.mean(squared, axis=0)
        row = jax.lax.rsqrt(v_row / jnp.mean(v_row))
        step = grad * row[:, None] * jax.lax.rsqrt(v_col)[None, :]
    else:
        v = decay * v + (1 - decay) * squared
        step = grad * jax.lax.rsqrt(v)
    return step / jnp.maximum(1.0, _rms(step) / clipping_threshold), v_row, v_col, v


def _check_max_grad_norm(max_grad_norm: float | None) -> None:
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")


def _clipped(
    optimizer: optax.GradientTransformation, max_grad_norm: float | None
) -> optax.GradientTransformation:
    """Returns the optimizer with its gradients clipped to a global norm first."""
    if max_grad_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)


def _place(path) -> tuple[bool, str]:
    """Returns whether the parameter at a tree path is stacked over layers, and its name."""
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return "layers" in names, names[-1] if names else ""


def _rms(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.mean(jnp.square(x)))


def _transpose(tree_of_tuples, like, num: int):
    """Turns a tree of tuples of length `num` into a tuple of trees with the structure of `like`."""
    outer = jax.tree.structure(like)
    return jax.tree.transpose(outer, jax.tree.structure((0,) * num), tree_of_tuples)
