"""The life of a run, from a configuration to a trained student: `run`, from top to bottom."""

from collections.abc import Callable, Mapping
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import sys
import time
from typing import NamedTuple

import jax
from jax.experimental import multihost_utils
import numpy as np
import optax

from gkd_jax import gkd, rl, sharding, train_state
from gkd_jax.batch import Batch
from gkd_jax.evaluation import evaluate
from gkd_jax.evaluation.evaluate import EvalConfig
from gkd_jax.input import data
from gkd_jax.input.teacher_cache import TeacherCache
from gkd_jax.optimizers import Schedule
from gkd_jax.sampling import Sample
from gkd_jax.storage import checkpoints, pretrained
from gkd_jax.storage.pretrained import Model
from gkd_jax.text import files, vocabularies
from gkd_jax.training import metrics, run_record
from gkd_jax.training.program import (
    Program,
    Trainer,
    build,
    compile_steps,
    model_info,
    plan,
    shardings_of,
)


SIGTERM_STATUS = 143  # 128 + SIGTERM: saved, and to be started again


def run(
    *,
    model_dir: str,
    student: Model,
    data_config: data.DataConfig,
    method: gkd.GKDConfig,
    optimizer: Callable[..., optax.GradientTransformation],
    schedule: Schedule,
    trainer: Trainer,
    teacher: Model | None = None,
    evaluation: EvalConfig | None = None,
    mesh_config: sharding.MeshConfig = sharding.MeshConfig(),
    dry_run: bool = False,
    pending: frozenset[str] = frozenset(),
    name: str = "",
    config_text: Callable[[], str] = str,
    macros: Mapping[str, str] = {},
) -> None:
    """Trains a student, or goes on with what MODEL_DIR holds.

    Args:
        model_dir: where everything goes (see the README's table).
        student: what is trained.
        data_config: what it is trained on.
        method: the loss: GKD and its special cases.
        optimizer: `optimizers.adafactor` or `optimizers.adamw`.
        schedule: the learning rate.
        trainer: steps and periods.
        teacher: None for SFT.
        evaluation: None evaluates nothing.
        mesh_config: how devices are arranged.
        dry_run: build and check everything, print the plan, train nothing.
        pending: checkpoints that another run of a study will have made by then.
        name: of this run within a study, for the terminal.
        config_text: called once everything is built; written to config.gin.
        macros: the gin macros of the run, for run.json.
    """
    #### Everything that can be wrong, before anything is written ##################################
    if dry_run:
        pending |= pretrained.remote_checkpoints(student, teacher)
    program = build(
        student=student,
        teacher=teacher,
        data_config=data_config,
        method=method,
        optimizer=optimizer,
        schedule=schedule,
        trainer=trainer,
        mesh_config=mesh_config,
        pending=pending,
        check_remote=not dry_run,
    )
    shard = data.process_shard(data_config, program.mesh)
    folder = pathlib.Path(model_dir)
    evaluator = _evaluator(program, data_config, evaluation, folder, check_remote=not dry_run)
    print(plan(program, data_config, trainer), file=sys.stderr)
    if dry_run:
        for path in sorted(pending):
            print(f"not checked: {path}", file=sys.stderr)
        return
    about = run_record.describe(
        program,
        name=name or folder.name,
        student=student,
        teacher=teacher,
        data_config=data_config,
        optimizer=optimizer,
        trainer=trainer,
        evaluation=evaluation or EvalConfig(),
        macros=macros,
    )
    run_record.check_same(folder, about)
    folder.mkdir(parents=True, exist_ok=True)
    silent = jax.process_index() > 0
    if not silent:
        files.write_whole(folder / "config.gin", config_text())
        files.write_whole(folder / "model_info.txt", model_info(program))
        run_record.write(folder, about)

    #### Data, state, and where a run before this one stopped ######################################
    saved = checkpoints.Checkpoints(
        model_dir,
        keep=trainer.keep,
        keep_period=trainer.keep_period,
        best_metric=_best_metric(trainer, data_config, evaluation),
        best_mode=trainer.best_mode,
    )
    if (saved.latest_step() or 0) >= trainer.train_steps:
        print(f"{model_dir} has its {saved.latest_step()} steps already", file=sys.stderr)
        saved.close()
        return
    stream = data.TrainIterator(program.task, data_config, shard)
    cache = TeacherCache(data_config.teacher_cache) if data_config.teacher_cache else None
    resumed = saved.restore_newest(program.state, stream)
    if resumed is None:
        start = 0
        params = pretrained.initial_params(
            student,
            program.models.student,
            program.state.params,
            jax.random.key(trainer.seed),
            "student",
        )
        create = functools.partial(train_state.create, optimizer=program.optimizer)
        state = jax.jit(create, out_shardings=shardings_of(program.state))(params)
        del params
    else:
        start, state = resumed
        print(f"resumed from step {start} of {model_dir}", file=sys.stderr)
    teacher_params = None
    if program.teacher is not None:
        assert teacher is not None
        assert program.models.teacher is not None
        key = jax.random.key(trainer.seed + 1)
        teacher_params = pretrained.initial_params(
            teacher, program.models.teacher, program.teacher, key, "teacher"
        )
    writer = metrics.Writer(model_dir, resume_step=start, silent=silent)
    description = checkpoints.describe_model(
        program.models.student,
        vocabularies.content_hash(program.vocabulary),
        program.models.num_pieces,
    )

    #### Both kinds of step, compiled before the first #############################################
    steps = compile_steps(program, data_config)
    progress = metrics.Progress(
        trainer.train_steps,
        start=start,
        every=trainer.log_period,
        name=f"{name}: " if name else "",
        silent=silent,
    )

    #### The loop: Algorithm 1 #####################################################################
    pending_step = ahead = None
    stopping = False
    with contextlib.ExitStack() as closing:
        closing.callback(writer.close)
        closing.callback(saved.close)
        told_to_stop = closing.enter_context(_stop_at_sigterm())
        clock = metrics.DeviceClock()
        closing.callback(clock.close)

        place = functools.partial(data.place, mesh=program.mesh, num_rows=data_config.batch_size)

        def draw(step: int, params) -> _Drawn:
            """The batch of a step, its targets sampled where its coin says so."""
            rows = next(stream)
            if step == 0 and not silent:
                run_record.write(folder, {**about, "first_batch": run_record.batch_hash(rows)})
            keys = gkd.step_keys(trainer.seed, step)
            if not gkd.is_on_policy(trainer.seed, step, program.method):
                scored = rows if cache is None else cache.attach(rows)
                return _Drawn(rows, place(scored), keys)
            batch = place(rows)
            if program.method.rl is not None and shard != data.WHOLE:  # texts of all rows
                rows = multihost_utils.process_allgather(batch, tiled=True)
            began = time.monotonic()
            sample = steps.sample[batch.inputs.shape[1], batch.targets.shape[1]]
            batch, drawn = sample(params, batch, keys.sampling)
            return _Drawn(rows, batch, keys, drawn, clock.seconds(began, drawn.weights))

        def saves(done: int) -> bool:
            return done == trainer.train_steps or _due(done, trainer.save_period)

        for step in range(start, trainer.train_steps):
            done, staleness = step + 1, float(ahead is not None)
            now = ahead or draw(step, state.params)
            # Not across a checkpoint, which knows the stream's position and no samples.
            early = trainer.sample_ahead and not stopping and not saves(done)
            ahead = draw(done, state.params) if early else None
            scored, extra = None, ()
            if now.sample is not None and program.method.rl is not None:
                # While the device samples, the host waits for the update before.
                pending_step = _log(pending_step, writer, progress, schedule)
                scored = _rewards(program, now.rows, now.sample)
                extra = (data.place_array(scored.advantages, program.mesh),)
            updates = steps.update_dataset if now.sample is None else steps.update_samples
            update = updates[now.rows.inputs.shape[1], now.rows.targets.shape[1]]
            began = time.monotonic()
            state, values = update(state, teacher_params, now.batch, now.keys.dropout, *extra)

            # The device works on this step; the host waits for the one before and logs it.
            _log(pending_step, writer, progress, schedule)
            if trainer.sample_ahead and now.sample is not None:
                values = {**values, "staleness": staleness}
            pending_step = _Pending(step, now, scored, values, clock.seconds(began, values["loss"]))
            stopping |= told_to_stop(done)
            last = done == trainer.train_steps or (stopping and ahead is None)
            scores = None
            if evaluator and (_due(done, trainer.eval_period) or done == trainer.train_steps):
                pending_step = _log(pending_step, writer, progress, schedule)
                scores = evaluator(state.params, teacher_params, done)
                writer.write(done, scores)
            if last or saves(done):
                pending_step = _log(pending_step, writer, progress, schedule)
                saved.save(done, state, stream, description, scores)
            if last:
                break
        if (best := saved.best()) is not None:
            print(f"best checkpoint: step {best[0]}, {trainer.best_metric} {best[1]:.4g}")
    if stopping and done < trainer.train_steps:
        print(f"SIGTERM: saved step {done}; run the same command to go on", file=sys.stderr)
        raise SystemExit(SIGTERM_STATUS)


class _Drawn(NamedTuple):
    """What a step trains on."""

    rows: Batch  # as the dataset has it, on the host
    batch: Batch
    keys: gkd.StepKeys
    sample: Sample | None = None
    sample_s: concurrent.futures.Future[float] | None = None


class _Pending(NamedTuple):
    """A step that was dispatched but not waited for."""

    step: int
    drawn: _Drawn
    scored: "_Scored | None"
    values: dict[str, jax.Array | float]
    update_s: concurrent.futures.Future[float]


class _Scored(NamedTuple):
    """What the reward said of the samples of a step, by prompt, then sample."""

    rewards: np.ndarray
    advantages: np.ndarray


def _rewards(program: Program, rows: Batch, drawn: Sample) -> _Scored:
    """The reward of each sample, from texts, on the host; all processes compute the same.

    Prompt and reference are the texts of the batch's ids: what the student saw, cut as it was.
    """
    method = program.method
    assert method.rl is not None
    texts = [
        [evaluate.to_text(program.vocabulary, row) for row in np.asarray(ids)]
        for ids in (rows.inputs, drawn.tokens, rows.targets)
    ]
    prompts, outputs, references = texts
    prompts = [text for text in prompts for _ in range(method.num_samples)]
    references = [text for text in references for _ in range(method.num_samples)]
    rewards = np.asarray(method.rl.reward(prompts, outputs, references))
    return _Scored(rewards, rl.advantages(rewards, method.num_samples))


def _log(
    step: _Pending | None, writer: metrics.Writer, progress: metrics.Progress, schedule: Schedule
) -> None:
    """Waits for a step's results and writes its line; nothing where there is none to wait for."""
    if step is None:
        return
    numbers: dict[str, float] = {}
    sample = step.drawn.sample
    if sample is not None:
        weights = np.asarray(jax.device_get(sample.weights))
        tokens = np.asarray(jax.device_get(sample.tokens))
        log_probs = np.asarray(jax.device_get(sample.log_probs))
        found = metrics.sample_statistics(tokens, weights)
        numbers["train/sample_length"] = found["length"]
        numbers["train/truncated_fraction"] = found["truncated_fraction"]
        numbers["train/sample_entropy"] = float(-(log_probs * weights).sum() / weights.sum())
        numbers["train/distinct_2"] = found["distinct_2"]
    if step.scored is not None:
        numbers["train/reward"] = float(step.scored.rewards.mean())
        numbers["train/reward_std"] = float(step.scored.rewards.std())
    values = {name: float(value) for name, value in jax.device_get(step.values).items()}
    line = {
        **{f"train/{name}": value for name, value in values.items()},
        "train/on_policy": float(sample is not None),
        "train/learning_rate": float(schedule(step.step)),
        **numbers,
        "time/sample_s": step.drawn.sample_s.result() if step.drawn.sample_s else 0.0,
        "time/update_s": step.update_s.result(),
    }
    writer.write(step.step + 1, line)
    progress.step(step.step + 1, line)
    finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
    if not finite and "skipped" not in values:
        kind = "dataset" if sample is None else "on-policy"
        batch = step.drawn.batch
        arrays = batch._asdict() | (batch.teacher._asdict() if batch.teacher else {})
        del arrays["teacher"]
        dumped = writer.dump(step.step, arrays)
        raise FloatingPointError(
            f"step {step.step} ({kind} batch): loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}; the batch is in {dumped}, and the last checkpoint is from "
            "before it. train.Trainer.skip_nonfinite = True goes on"
        )


def _due(done: int, period: int | None) -> bool:
    return period is not None and done % period == 0


@contextlib.contextmanager
def _stop_at_sigterm():
    """A function of the steps done: whether to save and end after this one.

    Of several processes each may get the signal at another step, or only one may get it: JAX's
    preemption service then chooses a step that all have still to reach.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda done: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _evaluator(
    program: Program,
    data_config: data.DataConfig,
    evaluation: EvalConfig | None,
    folder: pathlib.Path,
    *,
    check_remote: bool,
):
    """A function (params, teacher_params, step) -> metrics of one evaluation, or None."""
    if evaluation is None:
        return None
    lengths = dict(data_config.feature_lengths)
    lengths["targets"] = evaluation.target_length or lengths["targets"]
    name = evaluation.task or data_config.task
    task = program.task
    if name != data_config.task:
        chosen = dataclasses.replace(data_config, task=name)
        task, _ = data.open_task(chosen, check_remote=check_remote)
    data.check_split(task, evaluation.split)
    batch_size = evaluation.batch_size or data_config.batch_size
    sharding.check_batch_size(batch_size, program.mesh)
    token_divergence = None
    if program.teacher is not None:
        token_divergence = evaluate.teacher_divergence(program.models, program.mesh)
    decoder = evaluate.make_decoder(
        program.models.student,
        evaluation,
        vocabulary=program.vocabulary,
        num_pieces=program.models.num_pieces,
        mesh=program.mesh,
        length=lengths["targets"],
        divergence=token_divergence,
    )

    def evaluate_at(params, teacher_params, step: int) -> dict[str, float]:
        batches = data.eval_batches(
            task,
            feature_lengths=lengths,
            split=evaluation.split,
            batch_size=batch_size,
            num_examples=evaluation.num_examples,
            use_cached=data_config.use_cached,
        )
        rows = list(decoder(params, batches, teacher_params=teacher_params))
        values = evaluate.score(task, rows, evaluation)
        if jax.process_index() == 0:
            path = folder / "eval" / _file_name(name) / f"{step}.jsonl"
            evaluate.write_rows(path, rows, program.vocabulary)
        shown = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
        print(f"step {step}: {name} {evaluation.split}: {shown}", file=sys.stderr)
        return {f"eval/{name}/{key}": value for key, value in values.items()}

    return evaluate_at


def _best_metric(
    trainer: Trainer, data_config: data.DataConfig, evaluation: EvalConfig | None
) -> str | None:
    """`Trainer.best_metric` as evaluations write it."""
    if trainer.best_metric is None or evaluation is None:
        return None
    return f"eval/{evaluation.task or data_config.task}/{trainer.best_metric}"


def _file_name(task: str) -> str:
    """A folder for a task, which may be the path of a JSONL file."""
    return os.path.basename(task)


def phase_dir(model_dir: str, phase: str) -> str:
    """The MODEL_DIR of one run of a study; for gin files, which cannot join strings."""
    return os.path.join(model_dir, phase)
