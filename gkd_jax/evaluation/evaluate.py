"""Decodes the split of a task and scores the result with the task's own metric functions.

`make_decoder` makes a function that decodes batches to `DecodedRow`s, `compute_metrics` computes
their metrics, and `write_rows` writes them to a file. `EvalConfig` holds the settings. Training
evaluates with these functions; the command `gkd-jax eval`, which calls them too, is
`infer.evaluate_checkpoint`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import json
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from gkd_jax import divergences, gkd, rl, sharding
from gkd_jax.batch import Batch
from gkd_jax.decoding import calculator_decoding
from gkd_jax.decoding.beam_search import beam_search
from gkd_jax.evaluation import decodings
from gkd_jax.input import data
from gkd_jax.models import lm
from gkd_jax.rl import Reward
from gkd_jax.sampling import SamplingConfig, banned_tail, sample, weights_until_eos
from gkd_jax.text import files, settings, text_metrics


class DecodedRow(NamedTuple):
    """One decoded text."""

    example: dict[str, Any]  # of the task, with its `*_pretokenized` texts
    prediction: str
    tokens: list[int]  # EOS included
    divergence: list[float] | None  # KL(teacher || student) a token, nats; None without a teacher
    teacher_inputs: str | None = None  # the teacher's own prompt; None if it has none
    truncated: bool = False  # it reached the largest length before it ended


Decoder = Callable[..., Iterator[DecodedRow]]
TokenDivergence = Callable[[lm.Params, lm.Params, Batch], jax.Array]


class Teacher(NamedTuple):
    """The teacher of the rows that are decoded."""

    divergence: TokenDivergence  # see `teacher_divergence`
    params: lm.Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Which examples are decoded, and how.

    Attributes:
        task: the name of the task; None takes the training task.
        split: the split of the task.
        decoding: "greedy", "sample" (temperature sampling), "beam" or "likeliest". The last one
            picks the most probable of `choices`, as the authors of MMLU do (`evaluate.py` of
            https://github.com/hendrycks/test). The paper decodes greedily and scores exact match,
            where a model may write something other than a letter.
        temperature: the temperature of "sample".
        num_samples: samples of each input, for "sample"; two or more add `self_bleu`.
        calculator: for "greedy": write the correct result after each `expression =`, as in the
            paper's GSM8K evaluation.
        num_beams, alpha: the number of beams and the length penalty of "beam"; the defaults are
            the paper's for WMT.
        choices: texts of one token each, all different, for "likeliest", which also considers the
            token of a text behind a space.
        batch_size: examples that are read at once; None takes the training batch size.
        decode_rows: for "greedy" and "sample": the most rows that are decoded at a time, over all
            devices. A row that ends makes place for the next example (see `sampling.sample`), so
            that `batch_size` may be the size of the split. A teacher scores as many rows at a
            time. None decodes and scores a whole batch at once.
        num_examples: decode this many examples, the first ones; None decodes all, 0 none.
        target_length: the largest number of decoded tokens; None takes the training length.
        seed: the seed of "sample".
        rewards: functions of `gkd_jax.evaluation.rewards`. The mean of each over the split is
            reported under its name.
    """

    task: str | None = None
    split: str = "validation"
    decoding: str = "greedy"
    temperature: float = 1.0
    num_samples: int = 1
    calculator: bool = False
    num_beams: int = 4
    alpha: float = 0.6
    choices: tuple[str, ...] = ("A", "B", "C", "D")
    batch_size: int | None = None
    decode_rows: int | None = None
    num_examples: int | None = None
    target_length: int | None = None
    seed: int = 0
    rewards: Sequence[Reward] = ()

    def __post_init__(self):
        settings.check_types(self)
        made = tuple(reward() if isinstance(reward, type) else reward for reward in self.rewards)
        object.__setattr__(self, "rewards", made)
        if not all(map(callable, made)):
            raise ValueError(
                f"rewards must be functions such as (@rewards.exact_answer,), got {made!r}"
            )
        names = [_reward_name(reward) for reward in made]
        if len(set(names)) < len(names):
            raise ValueError(
                f"rewards must have different names, under which they are reported, got {names}"
            )
        if self.decoding not in decodings.USED_BY:
            raise ValueError(
                f"decoding must be 'greedy', 'sample', 'beam' or 'likeliest', got {self.decoding!r}"
            )
        settings.check_seed(self.seed)
        settings.check_positive(self, "num_beams", "num_samples")
        settings.check_positive(self, "batch_size", "decode_rows", "target_length")
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0 (no length penalty), got {self.alpha}")
        if self.decoding == "sample" and not self.temperature > 0:
            raise ValueError(f"temperature must be positive to sample, got {self.temperature}")
        if self.num_samples > 1 and self.decoding != "sample":
            raise ValueError(
                f"num_samples={self.num_samples} needs decoding='sample', got {self.decoding!r}"
            )
        if self.calculator and self.decoding != "greedy":
            raise ValueError(f"the calculator needs decoding='greedy', got {self.decoding!r}")
        if self.num_examples is not None and self.num_examples < 0:
            raise ValueError(
                f"num_examples must be at least 0 (no evaluation) or None, got {self.num_examples}"
            )
        if self.decode_rows and (self.calculator or self.decoding not in ("greedy", "sample")):
            how = "the calculator" if self.calculator else repr(self.decoding)
            raise ValueError(
                "decode_rows needs decoding='greedy' without a calculator, or 'sample': "
                f"decode_rows={self.decode_rows} with {how} would decode whole batches"
            )

    def lengths(self, of_training: Mapping[str, int]) -> dict[str, int]:
        """Returns feature lengths; "targets" is the largest number of decoded tokens."""
        return {**of_training, "targets": self.target_length or of_training["targets"]}

    def check_mesh(self, batch_size: int, mesh: Mesh) -> None:
        """Raises ValueError unless the mesh divides the rows that are read and decoded."""
        sharding.check_batch_size(batch_size, mesh)
        if self.decode_rows is not None:
            sharding.check_batch_size(self.decode_rows, mesh, name="decode_rows")


def make_decoder(
    config: lm.Config,
    evaluation: EvalConfig,
    *,
    vocabulary: Any,
    num_pieces: int,
    mesh: Mesh,
    length: int,
) -> Decoder:
    """Makes a function (params, batches, first=0, teacher=None) -> one `DecodedRow` per text.

    The function skips batches before `first`, and decodes the later ones as if it had not skipped
    any, so that an interrupted run can continue. With a `Teacher`, it also computes the divergence
    at each decoded token.

    Args:
        num_pieces: the number of ids that the vocabulary and the models share. Further ids are
            never decoded, and a batch that has one raises ValueError.
        length: the largest number of tokens to decode.
    """
    from gkd_jax.text import vocabularies  # needs seqio, which `bench` and `precompile` do not

    ends = vocabularies.end_ids(vocabulary) or lm.eos_ids(config)
    sampling = SamplingConfig(
        temperature=evaluation.temperature if evaluation.decoding == "sample" else 0.0,
        banned_ids=banned_tail(config, num_pieces),
        eos_ids=ends,
    )
    decode_fn = _decode_fn(config, evaluation, sampling, vocabulary, mesh, length)
    repeats = evaluation.num_samples

    def predictions(params, batches, *, first: int = 0, teacher: Teacher | None = None):
        for index, (batch, examples) in enumerate(batches):
            if index < first:
                continue
            data.check_ids(batch, num_pieces)
            key = jax.random.fold_in(jax.random.key(evaluation.seed), index)
            placed = data.place(batch, mesh)
            tokens = np.asarray(decode_fn(params, placed.inputs, placed.input_lengths, key))
            weights = np.asarray(weights_until_eos(jax.numpy.asarray(tokens), ends))
            values = None
            if teacher is not None:
                rows = jax.tree.map(lambda x: np.repeat(x, repeats, axis=0), batch)
                rows = rows._replace(targets=tokens, weights=weights)
                values = _scores(teacher, params, rows, evaluation.decode_rows, mesh)
            has_own = teacher is not None and batch.teacher_inputs is not None
            # The last batch is padded with rows that have no example: leave them out.
            for i in range(len(examples) * repeats):
                size = int(weights[i].sum())
                decoded = tokens[i, :size].tolist()
                ended = evaluation.decoding == "likeliest" or tokens[i, size - 1] in ends
                yield DecodedRow(
                    examples[i // repeats],
                    vocabularies.decode(vocabulary, decoded),
                    decoded,
                    None if values is None else values[i, :size].tolist(),
                    text(examples[i // repeats], "teacher_inputs") if has_own else None,
                    not ended,
                )

    return predictions


def _scores(
    teacher: Teacher, params: lm.Params, batch: Batch, size: int | None, mesh: Mesh
) -> np.ndarray:
    """Returns the divergence at each token of a batch, computed for at most `size` rows at once.

    The result is on the host and has the shape (rows, T). None as `size` takes all rows at once.
    """
    rows, found = len(batch.targets), []
    for start in range(0, rows, size or rows):
        part = jax.tree.map(lambda x, i=start: x[i : i + (size or rows)], batch)
        placed = data.place(part, mesh)
        found.append(np.asarray(teacher.divergence(params, teacher.params, placed)))
    return np.concatenate(found)


def _decode_fn(
    config: lm.Config,
    evaluation: EvalConfig,
    sampling: SamplingConfig,
    vocabulary: Any,
    mesh: Mesh,
    length: int,
):
    """Makes the jitted function (params, inputs, lengths, key) -> tokens.

    The tokens are replicated, so that every process can read all rows.
    """
    banned, ends = sampling.special_ids(config)
    if evaluation.calculator:
        decode = calculator_decoding.make_decode(
            config, vocabulary, mesh=mesh, max_length=length, banned_ids=banned, eos_ids=ends
        )
        return lambda params, inputs, lengths, key: decode(params, inputs, lengths)
    if evaluation.decoding == "likeliest":
        chosen = _single_tokens(vocabulary, evaluation.choices)
        others = tuple(token for token in range(config.vocab_size) if token not in chosen)
        sampling = dataclasses.replace(sampling, banned_ids=others, eos_ids=(min(chosen),))
        length = 1

    def decode_batch(params, inputs, lengths, key):
        with sharding.use(mesh):
            if evaluation.decoding != "beam":
                return sample(
                    config,
                    params,
                    inputs,
                    key,
                    max_length=length,
                    input_lengths=lengths,
                    sampling=sampling,
                    num_samples=evaluation.num_samples,
                    decode_rows=evaluation.decode_rows,
                ).tokens
            beams = beam_search(
                config,
                params,
                inputs,
                max_length=length,
                input_lengths=lengths,
                num_beams=evaluation.num_beams,
                alpha=evaluation.alpha,
                banned_ids=banned,
                eos_ids=ends,
            )
            return beams.tokens[:, 0]

    return jax.jit(decode_batch, out_shardings=sharding.replicated(mesh))


def _single_tokens(vocabulary: Any, choices: Sequence[str]) -> set[int]:
    """Returns the ids of the choices, each of which must be one token that no other choice is.

    Many tokenizers have another token for a word behind a space. After "Answer:" a model writes
    that one, and the authors of MMLU compare those, too.
    """
    ids = [vocabulary.encode(choice) for choice in choices]
    if not ids or any(len(tokens) != 1 for tokens in ids) or len({*map(tuple, ids)}) != len(ids):
        raise ValueError(
            f"decoding 'likeliest' needs choices of one token each, all different, "
            f"got {tuple(choices)} with the tokens {ids}"
        )
    behind_spaces = [vocabulary.encode(f" {choice}") for choice in choices]
    return {tokens[0] for tokens in [*ids, *behind_spaces] if len(tokens) == 1}


def teacher_divergence(models: gkd.ModelPair, mesh: Mesh) -> TokenDivergence:
    """Makes a function (student params, teacher params, batch) -> KL(teacher || student) per token.

    Both models have temperature 1, whatever the training minimises, so that runs are comparable.
    """
    method = gkd.GKDConfig(divergence=divergences.forward_kl)

    def values(params, teacher_params, batch):
        with sharding.use(mesh):
            return gkd.per_token_loss(method, models, params, teacher_params, batch)

    return jax.jit(values, out_shardings=sharding.replicated(mesh))


def compute_metrics(
    task: Any, rows: Sequence[DecodedRow], evaluation: EvalConfig
) -> dict[str, float]:
    """Computes the metrics of decoded rows, after the task's own postprocessing.

    Returns:
        The metrics of the task. If the rows have divergences, also `teacher_divergence` in nats:
        the mean over each sequence's tokens, then over sequences (Eq. 2). For several samples of
        each input, also `self_bleu`. For each reward of `evaluation`, its mean under the name of
        the function, or the numbers that its method `report` returns. Rows without a target do not
        count in a reward that compares texts with targets, as in the metrics of the task.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError(f"task {task.name!r} has no examples to evaluate")
    targets = [
        task.postprocess_fn(text(row.example, "targets"), example=row.example, is_target=True)
        for row in rows
    ]
    guesses = [
        task.postprocess_fn(row.prediction, example=row.example, is_target=False) for row in rows
    ]
    values: dict[str, float] = {}
    for metric_fn in task.metric_fns:
        results: Mapping[str, Any] = metric_fn(targets, guesses)
        values.update({name: float(value) for name, value in results.items()})
    means = [np.mean(row.divergence) for row in rows if row.divergence]
    if means:
        values["teacher_divergence"] = float(np.mean(means))
    texts = [row.prediction for row in rows]
    if evaluation.num_samples > 1:
        step = evaluation.num_samples
        groups = [texts[i : i + step] for i in range(0, len(texts), step)]
        values.update(text_metrics.self_bleu(groups))
    for reward in evaluation.rewards:
        scored = rows
        if rl.needs_references(reward):
            pairs = zip(rows, targets, strict=True)
            scored = [row for row, target in pairs if target is not None]
            if not scored:
                continue
        inputs, references = (
            [text(row.example, name) for row in scored] for name in ("inputs", "targets")
        )
        outputs = [row.prediction for row in scored]
        scores = rl.rewards_of(reward, inputs, outputs, references)
        report = getattr(reward, "report", None)
        if report is None:
            values[_reward_name(reward)] = float(np.mean(scores))
        else:
            values.update(report(scores))
    return values


def _reward_name(reward: Reward) -> str:
    return getattr(reward, "__name__", type(reward).__name__).lower()


def write_rows(path: files.AnyPath, rows: Sequence[DecodedRow], vocabulary: Any) -> None:
    """Writes rows as JSONL; with a teacher, each row has its tokens and their divergences."""
    from gkd_jax.text import vocabularies

    path.parent.mkdir(parents=True, exist_ok=True)
    with files.naming(path), path.open("w", encoding="utf-8") as file:
        for row in rows:
            line: dict[str, Any] = {
                "inputs": text(row.example, "inputs"),
                "targets": text(row.example, "targets"),
                "prediction": row.prediction,
            }
            if row.divergence is not None:
                if row.teacher_inputs is not None:
                    line["teacher_inputs"] = row.teacher_inputs
                line["tokens"] = [vocabularies.piece(vocabulary, token) for token in row.tokens]
                line["token_divergence"] = [round(value, 4) for value in row.divergence]
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def text(example: Mapping[str, Any], feature: str) -> str:
    """Returns the text of a feature before tokenization."""
    value = example[f"{feature}_pretokenized"]
    return value.decode() if isinstance(value, bytes) else str(value)
