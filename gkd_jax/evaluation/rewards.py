"""Rewards for RL + GKD (`rl.Reward`): functions from texts to one number each; higher is better.

A reward takes (prompts, outputs, references) and is called on the host between the jitted steps.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import functools

import jax
import numpy as np

from gkd_jax import losses, sharding
from gkd_jax.batch import Batch
from gkd_jax.input import data, padded_batches
from gkd_jax.models import lm
from gkd_jax.rl import Reward
from gkd_jax.storage import hub, pretrained
from gkd_jax.text import settings, text_metrics, vocabularies
from gkd_jax.text.word_vocabulary import EOS_ID


Texts = Sequence[str]


def compares(reward: Reward) -> Reward:
    """Marks a reward that compares outputs with references, of which some rows may have none.

    The mark is the attribute `compares_with_references`, which a class of rewards may have, too.
    """
    vars(reward)["compares_with_references"] = True
    return reward


@compares
def exact_answer(prompts: Texts, outputs: Texts, references: Texts) -> np.ndarray:
    """Returns 1 if the number after `The answer is` equals that of the reference, else 0."""
    del prompts
    wanted = [text_metrics.answer(reference) for reference in references]
    return np.array(
        [
            float(right is not None and text_metrics.answer(output) == right)
            for output, right in zip(outputs, wanted, strict=True)
        ]
    )


@compares
def rouge2(prompts: Texts, outputs: Texts, references: Texts) -> np.ndarray:
    """Returns the ROUGE-2 F1 of each output with its reference, from 0 to 1."""
    del prompts
    return np.array(
        [
            text_metrics.rouge([reference], [output])["rouge2"] / 100
            for output, reference in zip(outputs, references, strict=True)
        ]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brevity:
    """Rewards an output with minus the number of words by which it exceeds `limit`."""

    limit: int = 30

    def __post_init__(self):
        settings.check_types(self)

    def __call__(self, prompts: Texts, outputs: Texts, references: Texts) -> np.ndarray:
        del prompts, references
        return np.array([-float(max(len(output.split()) - self.limit, 0)) for output in outputs])


brevity = Brevity  # as gin files and command lines name it: `REWARD = @rewards.brevity`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entailment:
    """Rewards an output that a T5 classifier finds entailed by the prompt.

    This is the reward of Roit et al. (2023), which the paper's Figure 5 uses. The premise is the
    prompt (the document), the hypothesis is the output, and the reward is the log-probability of
    the label's tokens, in nats. Any T5 checkpoint that was trained to write the label can be the
    classifier. It is loaded at the first call. The defaults fit the public TRUE classifier
    (google/t5_xxl_true_nli_mixture of Honovich et al., 2022), which writes "1" for entailment and
    "0" otherwise.

    Attributes:
        model: the classifier (`pretrained.ModelConfig` with a checkpoint).
        vocabulary: the classifier's vocabulary, as VOCABULARY names one.
        extra_ids: the number of sentinels after the pieces of a SentencePiece file.
        template: the classifier's input, with the fields {premise} and {hypothesis}.
        label: the text that the classifier writes for entailment: "1" for TRUE, "entailment" for
            the task `rte`.
        prefix: a text that is removed from the beginning of the prompt ("summarize: ").
        length: the largest number of input tokens. A text that is too long loses the end of its
            premise; only where the hypothesis alone is too long does that lose its end, too.
        batch_size: rows that are scored at once.
    """

    model: pretrained.ModelConfig
    vocabulary: str
    extra_ids: int = 0
    template: str = "premise: {premise} hypothesis: {hypothesis}"
    label: str = "1"
    prefix: str = ""
    length: int = 512
    batch_size: int = 32

    def __post_init__(self):
        settings.check_types(self)
        for field in ("{premise}", "{hypothesis}"):
            if field not in self.template:
                raise ValueError(f"template must contain {field}, got {self.template!r}")
        settings.check_positive(self, "length", "batch_size")

    def __call__(self, prompts: Texts, outputs: Texts, references: Texts) -> np.ndarray:
        del references
        inputs = [
            self._encode(prompt.removeprefix(self.prefix), output)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        label = [*self._vocabulary.encode(self.label), EOS_ID]
        lengths = {"inputs": self.length, "targets": len(label)}
        scores: list[float] = []
        for start in range(0, len(inputs), self.batch_size):
            rows = [{"inputs": ids, "targets": label} for ids in inputs[start:][: self.batch_size]]
            batch, _ = padded_batches.fill_batch(rows, lengths, self.batch_size)
            scores.extend(np.asarray(self._log_probs(batch))[: len(rows)].tolist())
        return np.array(scores)

    def report(self, scores: np.ndarray) -> dict[str, float]:
        """Returns the metrics that an evaluation reports of scores.

        Returns:
            `entailment`, the mean score in nats; `entailed`, the percentage of outputs for which
            the label is more probable than all other answers together. The changes of the paper's
            Figure 5 are in points of that percentage.
        """
        called = np.asarray(scores) > np.log(0.5)
        return {"entailment": float(np.mean(scores)), "entailed": 100 * float(np.mean(called))}

    def _encode(self, premise: str, hypothesis: str) -> list[int]:
        """Returns the ids of the filled template, with as much of both texts as fits.

        The template's own words and the end of the sequence are always kept: without them the
        classifier would read a text of another form than it was trained on.
        """

        def filled(characters: int) -> list[int]:
            kept = premise[: max(characters - len(hypothesis), 0)]
            text = self.template.format(premise=kept, hypothesis=hypothesis[:characters])
            return [*self._vocabulary.encode(text), EOS_ID]

        counts = range(len(hypothesis) + len(premise) + 1)
        fits = bisect.bisect_right(counts, self.length, key=lambda count: len(filled(count)))
        if fits == 0:
            raise ValueError(
                f"length must hold the template {self.template!r}, which has {len(filled(0))} "
                f"tokens without its texts, got {self.length}"
            )
        return filled(fits - 1)

    @functools.cached_property
    def _vocabulary(self):
        local, _ = hub.local_copy(self.vocabulary, tokenizer_only=True)
        return vocabularies.load(local, extra_ids=self.extra_ids)

    @functools.cached_property
    def _log_probs(self):
        """Returns the function from a batch to the log-probability of each row's targets."""
        num_pieces = self._vocabulary.vocab_size
        config = self.model.config(num_pieces)
        # Every process scores all rows by itself; the weights are sharded over its own devices.
        sizes = self.model.mesh or sharding.MeshConfig(data=1, fsdp=-1)
        mesh = sharding.make_mesh(sizes, jax.local_devices())
        sharding.check_batch_size(self.batch_size, mesh)
        params = pretrained.place_params(self.model, config, mesh)

        def log_probs(params, batch: Batch):
            with sharding.use(mesh):
                logits = lm.logits(config, params, batch)[..., :num_pieces]
                values = losses.cross_entropy(logits, batch.targets)
                return -(values * batch.weights).sum(axis=1)

        log_probs_fn = jax.jit(log_probs)
        return lambda batch: log_probs_fn(params, data.place(batch, mesh))
