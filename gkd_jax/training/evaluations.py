"""`Evaluations`: decodes and scores the tasks on which a run evaluates its student."""

from collections.abc import Iterator
import dataclasses
import functools
import sys
from typing import Any

import jax
import seqio

from gkd_jax import gkd
from gkd_jax.evaluation import evaluate
from gkd_jax.input import named_tasks, padded_batches
from gkd_jax.input.split import Split
from gkd_jax.models import lm
from gkd_jax.text import files, task_names, vocabularies
from gkd_jax.training import teachers
from gkd_jax.training.program import Program
from gkd_jax.training.source import Source


class Evaluations:
    """Decodes and scores every task that a recipe evaluates on. A mixture is done task by task."""

    def __init__(
        self, program: Program, source: Source, model_dir: files.AnyPath, *, check_remote: bool
    ):
        """Opens the tasks and checks them against the model; decodes nothing yet.

        Args:
            model_dir: the folder that receives decoded rows, in `eval/<task>/<step>.jsonl`.
            check_remote: whether remote vocabularies are read; False keeps a dry run off the
                network.

        Raises:
            ValueError: if a task has another vocabulary than the training task, if it lacks the
                split, if the mesh does not divide the batch size, or if no task can have the
                recipe's `best_metric`.
        """
        recipe = program.recipe
        assert recipe.evaluation is not None
        self._program, self._source, self._folder = program, source, model_dir
        self._config = recipe.evaluation
        self._lengths = self._config.lengths(recipe.data.feature_lengths)
        self._batch_size = self._config.batch_size or recipe.data.batch_size
        self._config.check_mesh(self._batch_size, program.mesh)
        # The name in metrics -> the seqio task, and the name in the recipe of the task or mixture.
        self._tasks = dict(self._open(check_remote))
        self._divergences: dict[gkd.ModelPair, evaluate.TokenDivergence] = {}
        best, has_several = recipe.train.best_metric, len(self._tasks) > 1
        if best and has_several != any(best.startswith(f"{name}/") for name in self._tasks):
            raise ValueError(
                f"best_metric must be {'TASK/METRIC' if has_several else 'a metric alone'} where "
                f"the evaluated tasks are {self.names}, got {best!r}"
            )

    @property
    def names(self) -> list[str]:
        """The names of the evaluated tasks in metrics: `eval/<name>/<metric>`."""
        return list(self._tasks)

    def _open(self, check_remote: bool) -> Iterator[tuple[str, tuple[Any, str]]]:
        """Yields the entries of `self._tasks`."""
        name, tasks = self._config.task, self._source.tasks
        if name is not None and name in tasks:
            tasks = {name: tasks[name]}
        elif name is not None:
            tasks = {name: self._open_other(name, check_remote)}
        for name, task in tasks.items():
            is_mixture = isinstance(task, seqio.Mixture)
            for part in task.tasks if is_mixture else [task]:
                named_tasks.check_split(part, self._config.split)
                named_tasks.check_rows(part, self._config.split, check_remote=check_remote)
                yield part.name if is_mixture else task_names.display_name(name), (part, name)

    def _open_other(self, name: str, check_remote: bool) -> Any:
        """Opens a task that is not trained on."""
        recipe, expected = self._program.recipe, self._source.vocabulary
        task, vocabulary = named_tasks.open_task(
            dataclasses.replace(recipe.data, task=name),
            tokenizer=self._source.tokenizer,
            check_remote=check_remote,
            file_vocabulary=expected,
        )
        if not vocabularies.same(vocabulary, expected):
            raise ValueError(
                f"EVAL_TASK {name!r} has another vocabulary than {recipe.data.name!r}, which "
                "the student is trained on: set VOCABULARY for both, or evaluate another task"
            )
        return task

    @functools.cached_property
    def _decoder(self) -> evaluate.Decoder:
        """The decoder. It is made at first use: a dry run must not read a remote vocabulary."""
        program = self._program
        return evaluate.make_decoder(
            program.models.student,
            self._config,
            vocabulary=self._source.vocabulary,
            num_pieces=program.models.num_pieces,
            mesh=program.mesh,
            length=self._lengths["targets"],
        )

    def _teacher(self, task: str, params: lm.Params | None) -> evaluate.Teacher | None:
        """Returns the teacher of a task; None if no teacher has been given it."""
        learner, models = self._program.learner, self._program.models
        if learner.teacher_shares:
            models = next(
                (one.models for one in learner.teacher_shares if one.task == task), models
            )
            params = (params or {}).get(task)
        if models.teacher is None or params is None:
            return None
        if models not in self._divergences:
            self._divergences[models] = evaluate.teacher_divergence(models, self._program.mesh)
        return evaluate.Teacher(self._divergences[models], params)

    def check_first_examples(self) -> None:
        """Reads a batch of each task, so that unreadable data stop the run before it trains.

        Raises:
            ValueError: if a split has no example or cannot be read; the message names it and its
                task.
        """
        for name, (task, _) in self._tasks.items():
            where = f"the evaluation's task {name!r}, split {self._config.split!r}"
            try:
                first = next(self._batches(task), None)
            except Exception as error:
                raise ValueError(f"{where}, cannot be read: {error}") from error
            if first is None:
                raise ValueError(f"{where}, has no examples")

    def _batches(self, task: Any) -> Iterator[padded_batches.PaddedBatch]:
        # A task without prompts of the teacher's own is scored behind the student's.
        lengths = {k: v for k, v in self._lengths.items() if k in task.output_features}
        config, use_cached = self._config, self._program.recipe.data.use_cached
        split = Split(task, config.split, lengths, config.num_examples, use_cached)
        return padded_batches.in_order(split, self._batch_size)

    def __call__(
        self, params: lm.Params, teacher_params: lm.Params | None, step: int
    ) -> dict[str, float]:
        """Decodes and scores every task with these parameters; also writes the decoded rows.

        Args:
            teacher_params: the teacher's parameters, for the divergence, or those of several
                teachers by their tasks; None without a teacher.

        Returns:
            The metrics, named `eval/<task>/<metric>`.
        """
        found: dict[str, float] = {}
        for name, (task, in_recipe) in self._tasks.items():
            teacher = self._teacher(in_recipe, teacher_params)
            rows = list(self._decoder(params, self._batches(task), teacher=teacher))
            values = evaluate.compute_metrics(task, rows, self._config)
            if jax.process_index() == 0:
                path = self._folder / "eval" / name / f"{step}.jsonl"
                evaluate.write_rows(path, rows, self._source.vocabulary)
            shown = "  ".join(f"{key} {value:.2f}" for key, value in values.items())
            if "teacher_divergence" in values:
                own = any(row.teacher_inputs is not None for row in rows)
                prompts = "prompts of its own" if own else "the student's prompts"
                who = teachers.in_words(self._program.recipe, self._program.teacher, in_recipe)
                shown += f" (teacher: {who}, reading {prompts})"
            print(f"step {step}: {name} {self._config.split}: {shown}", file=sys.stderr)
            found.update({f"eval/{name}/{key}": value for key, value in values.items()})
        return found
