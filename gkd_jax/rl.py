"""Reinforcement learning combined with distillation: the reward term of Agarwal et al. (2024).

This module has the settings, the advantages and the policy loss of the paper's Eq. 5:

    maximise  (1 - alpha) E_{y ~ Q}[r(y)] - alpha E_{y ~ Q}[D(P || Q)(y | x)]

The gradient of the reward is estimated by REINFORCE: it is the gradient of log Q(sequence) times
the advantage, which is the reward minus a baseline that does not depend on the sequence itself. The
divergence is that of GKD, and no gradient flows through the sampling. alpha = 1 is pure
distillation. With the initial student as the teacher and the reverse KL, the objective is RLEF*
(Roit et al., 2023).

alpha weighs two terms of different scale: the policy term sums log-probabilities over tokens,
whereas D is a mean over tokens (Eq. 2), and JSD(0.9) is about ten times smaller than a KL.

Axes: N sampled sequences (those of one prompt are neighbours), T target.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from gkd_jax.text import settings


Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], np.ndarray]
"""A reward takes the prompts, the outputs and the references, N texts each, and returns N numbers.

It is called on the host, once a step.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RLConfig:
    """The reward and its weight.

    Attributes:
        reward: the function that scores the student's samples (see `rewards`).
        alpha: the weight of the divergence; the reward has the weight 1 - alpha. The paper's XSum
            runs use 0.05, 0.1, 0.25 and 0.5.
    """

    reward: Reward
    alpha: float

    def __post_init__(self):
        settings.check_types(self)
        if isinstance(self.reward, type):  # gin gives the class of `@rewards.brevity`
            object.__setattr__(self, "reward", self.reward())
        if not callable(self.reward):
            raise ValueError(
                f"reward must be a function such as @rewards.exact_answer, got {self.reward!r}"
            )
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")


def needs_references(reward: Reward) -> bool:
    """Returns whether a reward has the mark of `rewards.compares`."""
    # What gin or a decorator wraps has the attributes of the function, by functools.wraps.
    return getattr(reward, "compares_with_references", False)


def rewards_of(
    reward: Reward, prompts: Sequence[str], outputs: Sequence[str], references: Sequence[str]
) -> Float[np.ndarray, " N"]:
    """Returns the rewards of N outputs, after checking what the reward function returned.

    Raises:
        ValueError: if the function returns anything but one finite number for each output. A result
            of another length, for example, would be averaged, or divided among prompts, as if it
            were right.
    """
    return _numbers(reward(prompts, outputs, references), len(outputs))


def _numbers(returned: Any, num_outputs: int) -> Float[np.ndarray, " N"]:
    """Returns rewards as one finite float64 for each of N outputs; the error is `rewards_of`'s."""
    try:
        found = np.asarray(returned)
    except ValueError:  # lists of different lengths
        found = np.asarray(returned, object)
    is_numeric = jnp.issubdtype(found.dtype, jnp.floating) or found.dtype.kind in "biu"
    if found.shape != (num_outputs,) or not is_numeric:
        raise ValueError(
            f"a reward must return one number for each of the {num_outputs} outputs, got an array "
            f"of shape {found.shape} and dtype {found.dtype}: {str(returned)[:200]}"
        )
    found = found.astype(np.float64)
    if not np.all(np.isfinite(found)):
        raise ValueError(f"every reward must be a finite number, got {found.tolist()}")
    return found


def advantages(rewards: Float[np.ndarray, " N"], num_samples: int = 1) -> Float[np.ndarray, " N"]:
    """Returns the advantage of each sample: its reward minus the mean reward of other samples.

    This baseline leaves out the sample's own reward, so that the gradient stays unbiased. A sample
    without others keeps its reward.

    Args:
        num_samples: the number of samples of each prompt. If there are several, the others are
            those of the same prompt (REINFORCE leave-one-out), else the rest of the batch.

    Raises:
        ValueError: for a reward that is not a finite number.
    """
    rewards = _numbers(rewards, len(rewards))
    groups = rewards.reshape(-1, num_samples) if num_samples > 1 else rewards[None]
    size = groups.shape[1]
    if size == 1:
        return rewards.astype(np.float32)
    others = (groups.sum(1, keepdims=True) - groups) / (size - 1)
    return (groups - others).reshape(-1).astype(np.float32)


def policy_loss(
    log_probs: Float[Array, "N T"], weights: Float[Array, "N T"], advantages: Float[Array, " N"]
) -> Float[Array, ""]:
    """Returns the REINFORCE loss: the sum over sequences of -advantage x log Q(sequence).

    Args:
        log_probs: log Q of each sampled token under the distribution that it was drawn from, in
            nats.
        weights: 1.0 on tokens up to and including EOS, 0.0 elsewhere.
        advantages: the advantage of each sequence, a constant of the gradient.

    Raises:
        ValueError: for advantages of another shape, which would be broadcast.
    """
    if np.shape(advantages) != weights.shape[:1]:
        raise ValueError(
            f"advantages must be one number for each of the {weights.shape[0]} sequences, got the "
            f"shape {np.shape(advantages)}"
        )
    log_q = jnp.sum(jnp.where(weights > 0, log_probs, 0.0), axis=1)
    return -jnp.sum(advantages * log_q)
