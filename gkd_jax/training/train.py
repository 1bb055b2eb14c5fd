"""`train`: a whole run, from a recipe to a trained student. Read it from top to bottom."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import os
import sys
import time

from etils import epath
import jax

from gkd_jax.gkd import TrainState, teacher_now
from gkd_jax.storage import pretrained, vocabulary_checks
from gkd_jax.text import files, vocabularies
from gkd_jax.training import (
    interrupts,
    metrics,
    run_lock,
    run_record,
    save_times,
    teachers,
    throughput,
    trackers,
)
from gkd_jax.training.evaluations import Evaluations
from gkd_jax.training.plan import plan
from gkd_jax.training.program import Program, build, start_compiling
from gkd_jax.training.progress import Progress
from gkd_jax.training.recipe import Recipe
from gkd_jax.training.rollouts import Rollouts
from gkd_jax.training.run_folder import RunFolder
from gkd_jax.training.source import Source, open_source
from gkd_jax.training.step_log import Step, StepLog


def train(
    *,
    recipe: Recipe,
    model_dir: str,
    dry_run: bool = False,
    pending: frozenset[str] = frozenset(),
    name: str = "",
    allow_changes: Sequence[str] = (),
    config_text: Callable[[], str] = str,
    macros: Mapping[str, str] = {},
) -> None:
    """Trains a student, or resumes the run that MODEL_DIR holds.

    Args:
        model_dir: the folder that receives checkpoints, metrics and records; docs/configuration.md
            lists what it holds.
        dry_run: build and check everything and print the plan, but train nothing.
        pending: checkpoints that an earlier phase of a study will make; a dry run does not open
            them.
        name: the name of this run within a study.
        allow_changes: recipe fields that a resumed run may change.
        config_text: returns the text of config.gin; called after the steps are compiled, when gin
            knows which values were used.
        macros: the gin macros of the run, for run.json.

    Raises:
        ValueError: if anything is wrong with the recipe, the data or MODEL_DIR.
        FloatingPointError: if the loss or the gradient of a step is not finite; with
            `skip_nonfinite`, if those of all steps are not.
        SystemExit: after a signal, once a checkpoint is saved.
    """
    #### Checks, before anything is written ########################################################
    folder = epath.Path(model_dir)
    recipe, commits = _with_local_files(recipe, folder, dry_run)
    if dry_run:
        pending |= pretrained.remote_checkpoints(*recipe.models.values())
    _check_places(recipe, folder, pending)
    source = open_source(recipe, pending=pending, check_remote=not dry_run)
    program = build(
        recipe, source.num_pieces, eos_ids=source.eos_ids, cached_k=source.cached_k, pending=pending
    )
    vocabulary_checks.check_special_ids(
        program.models.student, source.vocabulary, check_remote=not dry_run
    )
    evaluate = None
    if recipe.evaluation is not None:
        evaluate = Evaluations(program, source, folder, check_remote=not dry_run)
    if jax.process_index() == 0:
        print(plan(program), file=sys.stderr)
    _warn_of_long_texts(program)
    if dry_run:
        _check_dry(folder, program, source, pending, allow_changes)
        return
    run = RunFolder(
        program,
        source,
        folder,
        name=name,
        evaluated=evaluate.names if evaluate else (),
        allow_changes=allow_changes,
        macros=macros,
        commits=commits,
    )
    if run.is_finished:
        run.check_learnt()
        print(f"{model_dir} has its {recipe.train.train_steps} steps already", file=sys.stderr)
        return
    if evaluate is not None:
        evaluate.check_first_examples()
    with run_lock.hold(folder):
        run.look()  # the job that held the lock before may have saved a checkpoint
        if not run.is_finished:
            _train(run, evaluate, config_text)
    run.check_learnt()


def _train(run: RunFolder, evaluate: Evaluations | None, config_text: Callable[[], str]) -> None:
    """Trains from the first step, or from the newest checkpoint, to the last step."""
    program, recipe, config = run.program, run.program.recipe, run.program.recipe.train
    compiled_steps = start_compiling(program)
    start, state, stream = run.begin()
    teachers.warn_of_random_weights(recipe)
    teacher_params = teachers.initial_params(recipe, program.learner, program.teacher)
    steps = compiled_steps()
    run.write(config_text())
    saved = run.checkpoints
    with contextlib.ExitStack() as closing:
        resume_step = None if run.is_new else start
        writer = metrics.Writer(run.folder, resume_step=resume_step, also=config.metrics_to)
        clock = throughput.DeviceClock()
        shown = Progress(config.train_steps, start=start, every=config.log_period, name=run.name)
        for opened in (writer, saved, clock, shown):
            closing.callback(opened.close)
        rollouts = Rollouts(program, run.source, steps, stream, clock)
        log = StepLog(writer, shown, program)
        interruption = closing.enter_context(interrupts.watch())

        def evaluate_at(done: int, state: TrainState) -> None:
            assert evaluate is not None
            teacher = teacher_now(program.learner, state, teacher_params)
            values = evaluate(state.params, teacher, done)
            writer.write(done, values)
            saved.record_metrics(done, values)

        if run.lacks_evaluation(start):
            evaluate_at(start, state)
        times = save_times.SaveTimes(config.save_period)
        for step in range(start, config.train_steps):
            done = step + 1
            evaluates = recipe.evaluates_after(done)
            saves = times.is_due(done) or evaluates or done == config.train_steps
            # Never draw ahead across a checkpoint: it stores the stream's position, but no samples.
            ahead = config.sample_ahead and not interruption.signal and not saves

            # (x, y): y is sampled from the student, or the data set's, as the coin decides.
            rollout = rollouts.draw(step, state.params, draw_next=ahead)
            began = time.monotonic()
            # theta <- theta - eta * gradient of the mean of D(teacher || student_theta)(y | x)
            state, values = rollout.update(
                state, teacher_params, rollout.batch, rollout.keys.dropout, rollout.advantages
            )
            # While the device works on this step, the host waits for the previous step and logs it.
            log.add(Step(step, rollout, values, clock.seconds(began, values["loss"])))

            stops = interruption.is_due(done) and not rollouts.is_ahead
            if saves or stops:
                log.flush()
                saved.save(done, state, stream, run.description)
            if stops and done < config.train_steps:  # the next start makes up for an evaluation
                interruption.exit(done)
            if evaluates:
                saved.wait()  # if the evaluation fails, the weights are safe
                evaluate_at(done, state)
            if saves:
                times.saved()
        if (best := saved.best()) is not None and jax.process_index() == 0:
            print(f"best checkpoint: step {best[0]}, {config.best_metric} {best[1]:.4g}")


def _check_places(recipe: Recipe, folder: files.AnyPath, pending: frozenset[str]) -> None:
    """Checks that the models are where the recipe says, and that the run can be written and logged.

    Raises:
        ModuleNotFoundError: if the package of a tracker is not installed.
        FileNotFoundError, NotADirectoryError: if a checkpoint is missing.
        ValueError: if MODEL_DIR cannot be a folder, or is the folder of a model.
    """
    for name, model in recipe.models.items():
        place = model.checkpoint
        if place is None or place in pending:
            continue
        if epath.Path(place) == folder or (
            os.path.exists(folder) and os.path.exists(place) and os.path.samefile(folder, place)
        ):
            raise ValueError(
                f"MODEL_DIR {os.fspath(folder)!r} is the folder of the {name}'s checkpoint: a run "
                "needs a folder of its own"
            )
        pretrained.check_exists(place)
    files.check_can_be_folder(folder, "MODEL_DIR", may_be_in_bucket=True)
    if jax.process_index() == 0:
        trackers.check_installed(recipe.train.metrics_to)


def _warn_of_long_texts(program: Program) -> None:
    """Warns of models that were made for shorter texts than those of the run."""
    recipe, models = program.recipe, program.models
    prompt, target, *teachers = recipe.data.shapes()[-1]
    evaluated = None if recipe.evaluation is None else recipe.evaluation.target_length
    pretrained.warn_of_long_texts(
        models.student, "student", prompt, max(target, evaluated or target)
    )
    read = teachers[0] if program.reads_own_prompts else prompt
    for config in dict.fromkeys(config for config, _ in program.learner.teachers):
        pretrained.warn_of_long_texts(config, "teacher", read, target)


def _with_local_files(
    recipe: Recipe, folder: files.AnyPath, dry_run: bool
) -> tuple[Recipe, dict[str, str]]:
    """Downloads the models and the tokenizer that the recipe names as on the Hugging Face hub.

    A resumed run takes the commits that run.json in its folder names.

    Returns:
        The recipe with the downloaded folders, and the commit of each name.
    """
    before = None if dry_run and files.in_bucket(folder) else run_record.read(folder)
    pinned = (before or {}).get("hub", {})
    models, chosen, commits = pretrained.with_local_files(
        recipe.models, recipe.data, pinned, dry_run=dry_run
    )
    return dataclasses.replace(recipe.with_models(models), data=chosen), commits


def _check_dry(
    folder: files.AnyPath,
    program: Program,
    source: Source,
    pending: frozenset[str],
    allow_changes: Sequence[str],
) -> None:
    """Compares a dry run with what MODEL_DIR holds, and lists what it did not check.

    A dry run opens nothing remote: no checkpoint, no data, no vocabulary and no MODEL_DIR in a
    bucket.
    """
    recipe = program.recipe
    unknown = pending & {model.checkpoint for model in recipe.models.values()}
    unknown |= set(filter(files.is_remote, recipe.data.task_rows))
    if vocabularies.is_remote(source.vocabulary):
        unknown |= {vocabularies.location(source.vocabulary)}
    if files.in_bucket(folder):
        unknown |= {os.fspath(folder)}
    if not unknown:
        RunFolder(program, source, folder, allow_changes=allow_changes)
    for path in sorted(unknown) if jax.process_index() == 0 else ():
        print(f"not checked: {path}", file=sys.stderr)
