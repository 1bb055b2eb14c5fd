"""Decoding a task's split and scoring it with the task's own metric functions."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np
import seqio

from gkd_jax import data, sharding
from gkd_jax.beam_search import beam_search
from gkd_jax.models import t5
from gkd_jax.sampling import SamplingConfig, banned_tail, sample


Row = tuple[dict[str, Any], str]  # an example and the text decoded for it
Decoder = Callable[..., Iterator[Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How a split is decoded and how much of it.

    Attributes:
        task: what is decoded; None is the task that is trained on.
        split: of the task.
        decoding: "greedy", "sample" (temperature sampling) or "beam".
        temperature: of "sample".
        num_beams, alpha: of "beam"; the defaults are the paper's for WMT.
        batch_size: rows decoded at once; None takes the training batch's.
        num_examples: the first so many; None is all.
        target_length: most tokens to decode; None takes the training feature length.
        seed: of "sample".
    """

    task: str | None = None
    split: str = "validation"
    decoding: str = "greedy"
    temperature: float = 1.0
    num_beams: int = 4
    alpha: float = 0.6
    batch_size: int | None = None
    num_examples: int | None = None
    target_length: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.decoding not in ("greedy", "sample", "beam"):
            raise ValueError(
                f"decoding must be 'greedy', 'sample' or 'beam', got {self.decoding!r}"
            )
        if not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ValueError(f"num_beams must be a positive integer, got {self.num_beams!r}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0 (no length penalty), got {self.alpha}")
        if self.decoding == "sample" and not self.temperature > 0:
            raise ValueError(f"temperature must be positive to sample, got {self.temperature}")
        for name in ("batch_size", "num_examples", "target_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")


def make_decoder(
    config: t5.T5Config,
    evaluation: EvalConfig,
    *,
    vocabulary: seqio.Vocabulary,
    mesh: Mesh,
    length: int,
) -> Decoder:
    """A function (params, batches, first=0) -> each example with the text decoded for it.

    Batches before `first` are skipped; those after it are decoded as if they had not been.
    """
    temperature = evaluation.temperature if evaluation.decoding == "sample" else 0.0
    banned = banned_tail(config, vocabulary.vocab_size)
    sampling = SamplingConfig(temperature=temperature, banned_ids=banned)

    def decode(params, inputs, key):
        with sharding.use(mesh):
            if evaluation.decoding != "beam":
                drawn = sample(config, params, inputs, key, max_length=length, sampling=sampling)
                return drawn.tokens
            beams = beam_search(
                config,
                params,
                inputs,
                max_length=length,
                num_beams=evaluation.num_beams,
                alpha=evaluation.alpha,
                banned_ids=banned,
            )
            return beams.tokens[:, 0]

    # Replicated, so that every process can read all rows.
    decode_fn = jax.jit(decode, out_shardings=sharding.replicated(mesh))

    def predictions(params, batches, *, first: int = 0):
        for index, (batch, examples) in enumerate(batches):
            if index < first:
                continue
            key = jax.random.fold_in(jax.random.key(evaluation.seed), index)
            tokens = decode_fn(params, data.place(batch, mesh).inputs, key)
            # Rows beyond the examples fill the last batch up: they do not count.
            for example, row in zip(examples, np.asarray(tokens), strict=False):
                yield example, to_text(vocabulary, row)

    return predictions


def to_text(vocabulary: seqio.Vocabulary, tokens: np.ndarray) -> str:
    """Text of decoded ids, up to EOS."""
    ids = tokens.tolist()
    if vocabulary.eos_id in ids:
        ids = ids[: ids.index(vocabulary.eos_id)]
    return vocabulary.decode([token for token in ids if token != 0])


def score(task: seqio.Task, rows: list[Row]) -> dict[str, float]:
    """The task's metrics of (example, prediction) rows, postprocessed as the task says."""
    if not rows:
        raise ValueError(f"task {task.name!r} has no examples to evaluate")
    targets = [
        task.postprocess_fn(text(example, "targets"), example=example, is_target=True)
        for example, _ in rows
    ]
    guesses = [
        task.postprocess_fn(prediction, example=example, is_target=False)
        for example, prediction in rows
    ]
    values: dict[str, float] = {}
    for metric_fn in task.metric_fns:
        results: Mapping[str, Any] = metric_fn(targets, guesses)
        values.update({name: float(value) for name, value in results.items()})
    return values


def write_rows(path: pathlib.Path, rows: list[Row]) -> None:
    """JSONL of inputs, targets and predictions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for example, prediction in rows:
            line = {
                "inputs": text(example, "inputs"),
                "targets": text(example, "targets"),
                "prediction": prediction,
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def text(example: Mapping[str, Any], feature: str) -> str:
    """A feature's text before tokenization."""
    value = example[f"{feature}_pretokenized"]
    return value.decode() if isinstance(value, bytes) else str(value)
