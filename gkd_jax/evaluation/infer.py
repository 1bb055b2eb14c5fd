"""Decoding with a checkpoint: `run` is `gkd-jax infer`, `evaluate_checkpoint` is `gkd-jax eval`.

`infer` writes predictions as JSONL; `eval` also scores them. `infer` makes the data of SeqKD, too:
the teacher decodes the training split, and `gkd_jax.input.jsonl` reads the result as a task.
"""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import json
import pathlib
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from gkd_jax import sharding
from gkd_jax.evaluation import decodings, evaluate, made_by
from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.evaluation.opened import Opened, open_model_and_task
from gkd_jax.input import padded_batches, row_ids
from gkd_jax.input.data import DataConfig
from gkd_jax.input.split import Split
from gkd_jax.storage import processes, saved_model
from gkd_jax.storage.pretrained import ModelConfig, place_params, warn_of_long_texts
from gkd_jax.text import files, settings, task_names


# A decoder, the batches that it decodes, and the number of rows of a batch.
_Ready = tuple[evaluate.Decoder, Iterator[padded_batches.PaddedBatch], int]


def _prepare(
    opened: Opened, evaluation: EvalConfig, mesh: sharding.MeshConfig, text_file: str | None = None
) -> _Ready | None:
    """Checks everything, and loads the model except in a dry run.

    Returns:
        The decoder, to which the model's parameters are bound; the batches of the task's split, or
        of the lines of `text_file`; and the number of rows of a batch. None in a dry run.
    """
    model, data = opened.model, opened.data
    if evaluation.num_examples == 0:
        raise ValueError("num_examples must be a positive integer or None, got 0")
    if evaluation.task is not None:
        raise ValueError(
            f"MIXTURE_OR_TASK_NAME is the task that is decoded, here {data.name!r}, and "
            f"EvalConfig.task must be None, got {evaluation.task!r}"
        )
    if model.memory != "device":
        raise ValueError(f"a model decodes in memory='device', got {model.memory!r}")
    if text_file is None:
        opened.check_split(evaluation.split)
    config, num_pieces = opened.config_and_num_pieces()
    device_mesh = sharding.make_mesh(model.mesh or mesh)
    size = evaluation.batch_size or data.batch_size
    evaluation.check_mesh(size, device_mesh)
    trained = {name: data.feature_lengths[name] for name in ("inputs", "targets")}
    lengths = evaluation.lengths(trained)
    warn_of_long_texts(config, "model", lengths["inputs"], lengths["targets"])
    if opened.dry_run:
        return None
    decoder = evaluate.make_decoder(
        config,
        evaluation,
        vocabulary=opened.vocabulary,
        num_pieces=num_pieces,
        mesh=device_mesh,
        length=lengths["targets"],
    )
    params = place_params(model, config, device_mesh)
    limit = evaluation.num_examples
    if text_file is None:
        split = Split(opened.task, evaluation.split, lengths, limit, data.use_cached)
        batches = padded_batches.in_order(split, size)
    else:  # All lines are checked before the first batch.
        prompts = row_ids.read_prompts(text_file, opened.vocabulary, lengths["inputs"])[:limit]
        batches = (
            padded_batches.fill_batch(prompts[start : start + size], lengths, size)
            for start in range(0, len(prompts), size)
        )
    return functools.partial(decoder, params), batches, size


def evaluate_checkpoint(
    *,
    model: ModelConfig,
    data: DataConfig,
    evaluation: EvalConfig,
    output_dir: str,
    mesh: sharding.MeshConfig = sharding.MeshConfig(),
    dry_run: bool = False,
) -> None:
    """Writes metrics.json and predictions.jsonl to OUTPUT_DIR, and prints the metrics.

    Args:
        data: the task, the vocabulary, the lengths and the batch size.
        dry_run: check everything, but decode nothing.

    Raises:
        ValueError: if OUTPUT_DIR cannot be made or holds such files of another origin, or if no
            example is to be evaluated.
    """
    processes.on_first_process(made_by.check_evaluation, output_dir)
    opened = open_model_and_task(model, data, dry_run=dry_run)
    writes = jax.process_index() == 0
    # The content of a large checkpoint takes long to hash: only the process that records it does.
    about = _describe_evaluation(opened, evaluation) if writes and not dry_run else {}
    ready = _prepare(opened, evaluation, mesh)
    if ready is None:
        return
    decode, batches, _ = ready
    folder = pathlib.Path(output_dir)
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    decoded = list(decode(batches))
    values = evaluate.compute_metrics(opened.task, decoded, evaluation)
    name = task_names.display_name(data.name)
    if writes:
        if opened.task.metric_fns and not values:
            print(
                f"WARNING: {name} has no metric, because no row of the split "
                f"{evaluation.split!r} has a target: give the rows answers, or decode prompts with "
                "`gkd-jax infer`",
                file=sys.stderr,
            )
        evaluate.write_rows(folder / "predictions.jsonl", decoded, opened.vocabulary)
        files.write_record(folder / "metrics.json", {name: values, "evaluation": about})
        print(json.dumps({name: values}))


def _describe_evaluation(opened: Opened, evaluation: EvalConfig) -> dict[str, Any]:
    """Returns what metrics.json says of how a checkpoint was evaluated.

    Call this before decoding: a run that goes on meanwhile may delete the step.
    """
    checkpoint = opened.model.checkpoint
    step_folder = saved_model.find_step(checkpoint) if checkpoint else None
    read, _ = opened.describe(evaluation.split)
    return {
        **settings.describe(evaluation),
        "checkpoint": read.pop("checkpoint"),
        "step": int(step_folder.name) if step_folder and step_folder.name.isdecimal() else None,
        "content": read.pop("content"),
        "model_and_data": read,
    }


def run(
    *,
    model: ModelConfig,
    data: DataConfig,
    evaluation: EvalConfig,
    output: str,
    text_file: str | None = None,
    mesh: sharding.MeshConfig = sharding.MeshConfig(),
    dry_run: bool = False,
) -> None:
    """Decodes a split to a JSONL file of `inputs`, `targets` (the prediction) and `reference`.

    A prediction that reached the largest length before it ended has `truncated`, too.

    The same call continues a run that was stopped, after the lines that the file holds. A record
    beside the file (`made_by`) says what made it, and a file with another origin is never touched.
    The file is itself a task (`gkd_jax.input.jsonl`).

    Args:
        data: the task, the vocabulary, the lengths and the batch size.
        text_file: decode the lines of this file instead of the task's split.
        dry_run: check everything, but decode nothing.

    Raises:
        ValueError: if another checkpoint or other settings made the file, or if `infer` did not
            make it at all.
    """
    opened = open_model_and_task(model, data, dry_run=dry_run)
    about, unread = _describe(opened, evaluation, text_file)
    processes.on_first_process(made_by.check, output, about, unread)
    ready = _prepare(opened, evaluation, mesh, text_file)
    if ready is None:
        return
    decode, batches, batch_size = ready
    path = pathlib.Path(output)
    writes = jax.process_index() == 0
    if writes:
        path.parent.mkdir(parents=True, exist_ok=True)
        made_by.write(path, about)
    # Skip whole batches only, because the key of a sampled row depends on its batch.
    decoded = decode(batches, first=_skip(path, batch_size * evaluation.num_samples))
    appended = path.open("a", encoding="utf-8") if writes else contextlib.nullcontext()
    with files.naming(path), appended as file:
        for row in decoded:
            if file is not None:
                line = _line(row)
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
    if writes:
        lines, _ = files.read_records(path)  # with those that an earlier run wrote
        made_by.write(path, about, num_lines=len(lines))
        num_truncated = sum("truncated" in line for line in lines)
        if num_truncated:
            length = evaluation.lengths(opened.data.feature_lengths)["targets"]
            print(
                f"WARNING: {num_truncated} of {len(lines)} predictions reached {length} tokens "
                "before they ended. Their lines say so, and a student of them learns no end",
                file=sys.stderr,
            )
        print(f"wrote {path}", file=sys.stderr)


def _line(row: evaluate.DecodedRow) -> dict[str, Any]:
    """Returns a prediction as a row of training data, with `messages` or `inputs` and `targets`."""
    reference: dict[str, Any] = {"reference": evaluate.text(row.example, "targets")}
    if row.truncated:  # so that a student of this text does not learn to end where it was cut off
        reference["truncated"] = True
    chat = row.example.get("chat")
    if not chat:
        inputs = evaluate.text(row.example, "inputs")
        return {"inputs": inputs, "targets": row.prediction, **reference}
    asked = json.loads(chat)
    answer = {"role": "assistant", "content": row.prediction}
    return {**asked, "messages": [*asked["messages"], answer], **reference}


def _describe(
    opened: Opened, evaluation: EvalConfig, text_file: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Returns what determines the lines of an output, and the names of the hashes left out.

    See `Opened.describe`.
    """
    about, unread = opened.describe(evaluation.split if text_file is None else None)
    if text_file is not None:
        about["text_file"] = text_file
        if opened.dry_run and files.is_remote(text_file):
            unread.append("text_content")
        else:  # A fault in the file is reported before the model is loaded.
            lines = "\n".join(files.read_lines(text_file))
            about["text_content"] = hashlib.sha256(lines.encode()).hexdigest()
    about["batch_size"] = evaluation.batch_size or opened.data.batch_size
    names = ["decoding", "num_examples", "target_length", *decodings.USED_BY[evaluation.decoding]]
    return about | {name: getattr(evaluation, name) for name in names}, unread


def _skip(path: pathlib.Path, lines_a_batch: int) -> int:
    """Returns the number of whole batches in the file; the first process cuts the rest off."""
    batches = 0
    if jax.process_index() == 0:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        batches = sum(line.endswith(b"\n") for line in lines) // lines_a_batch
        if lines:
            files.write_whole(path, b"".join(lines[: batches * lines_a_batch]))
    return int(multihost_utils.broadcast_one_to_all(np.asarray(batches)))
