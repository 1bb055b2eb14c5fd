"""`RunFolder`: the MODEL_DIR of a run, from which the run begins or resumes."""

from collections.abc import Mapping, Sequence
import functools
import sys
from typing import Any

import jax

from gkd_jax.batch import Batch
from gkd_jax.gkd import TrainState
from gkd_jax.input import data, streams
from gkd_jax.storage import checkpoints, pretrained, processes, saved_model, tokenizer_files
from gkd_jax.text import files, task_names, vocabularies
from gkd_jax.training import metrics, run_record
from gkd_jax.training.plan import model_info
from gkd_jax.training.program import Program, initial_state
from gkd_jax.training.source import Source


class RunFolder:
    """The MODEL_DIR of a run, with what it holds and what this start changes.

    Attributes:
        program: the run's shapes and jitted functions.
        source: the opened task.
        folder: the MODEL_DIR.
        name: the name of the run within a study, or "".
        about: the contents of run.json, as this start will write them (`run_record.describe_run`).
        changes: the differences to the run that the folder holds (`run_record.changes`).
        is_new: whether the folder holds no checkpoint yet.
        description: the model's description, saved with every checkpoint.
    """

    def __init__(
        self,
        program: Program,
        source: Source,
        folder: files.AnyPath,
        *,
        name: str = "",
        evaluated: Sequence[str] = (),
        allow_changes: Sequence[str] = (),
        macros: Mapping[str, str] = {},
        commits: Mapping[str, str] = {},
    ):
        """Compares a recipe with what MODEL_DIR holds; writes nothing.

        Args:
            evaluated: the names that the evaluated tasks have in metrics.
            allow_changes: names of the recipe's fields that a resumed run may change, as
                `run_record.fields_named` reads them.

        Raises:
            ValueError: if the folder holds a run with another configuration, or if the recipe has
                no field of a name in `allow_changes`.
        """
        self.program, self.source, self.folder, self.name = program, source, folder, name
        self._evaluated = evaluated
        self.about = run_record.describe_run(
            program, source, name=name or folder.name, macros=macros, commits=commits
        )
        # A name that is no field is refused even where there is nothing to resume.
        self._may_change = [
            field for name in allow_changes for field in run_record.fields_named(self.about, name)
        ]
        self.description = saved_model.describe_model(
            program.models.student, vocabularies.content_hash(source.vocabulary), source.num_pieces
        )
        self.look()

    def look(self) -> None:
        """Compares the recipe with what MODEL_DIR holds now: sets `changes` and `is_new`.

        Raises:
            ValueError: if the folder holds a run with another configuration.
        """
        before = run_record.read(self.folder)
        self.changes, self.is_new = [], before is None
        if before is not None:
            self.changes = run_record.changes(self.folder, before, self.about, self._may_change)
            self.about["changes"] = before.get("changes", [])
            self.about["first_batch"] = before.get("first_batch")

    @property
    def is_finished(self) -> bool:
        """Whether the newest checkpoint is of the last step or a later one, and was evaluated."""
        newest = max(saved_model.saved_steps(self.folder), default=-1)
        last = self.program.recipe.train.train_steps
        return newest >= last and not self.lacks_evaluation(newest)

    def lacks_evaluation(self, done: int) -> bool:
        """Returns whether the evaluation after `done` steps is due and not in metrics.jsonl.

        A step is saved before it is evaluated, so a run that ended during the evaluation has the
        checkpoint alone. An evaluation without a number leaves a line with its step alone.
        """
        if not self.program.recipe.evaluates_after(done):
            return False
        if self.is_new:  # lines that are there belong to a start that failed
            return True
        lines = metrics.read(self.folder / metrics.FILE)
        of_step = [line for line in lines if line["step"] == done]
        return not any(len(line) == 1 or task_names.evaluation_in(line) for line in of_step)

    def check_learnt(self) -> None:
        """Checks that not every step of a run that has ended was skipped.

        Raises:
            FloatingPointError: if `skip_nonfinite` skipped all steps. The checkpoints stay.
        """
        file = self.folder / metrics.FILE
        skipped = [line["train/skipped"] for line in metrics.read(file) if "train/skipped" in line]
        if skipped and all(skipped):
            raise FloatingPointError(
                f"all {len(skipped)} steps were skipped, because their loss or gradient was not "
                f"finite: the student learnt nothing, and its checkpoint holds the weights of the "
                f"start. {file} has train/loss and train/grad_norm of each step. Without "
                "recipe.TrainConfig.skip_nonfinite a run in another MODEL_DIR stops at its first "
                "such step and stores the batch"
            )

    @functools.cached_property
    def checkpoints(self) -> checkpoints.Checkpoints:
        """Opens the checkpoints of the folder, which is made if it does not exist."""
        config = self.program.recipe.train
        best_metric = None
        if config.best_metric is not None and self._evaluated:
            where = f"{self._evaluated[0]}/" if len(self._evaluated) == 1 else ""
            best_metric = f"eval/{where}{config.best_metric}"
        scores = {}
        if best_metric is not None and not self.is_new:
            scores = metrics.values_by_step(self.folder / metrics.FILE, best_metric)
        return checkpoints.Checkpoints(
            str(self.folder),
            keep=config.keep,
            keep_period=config.keep_period,
            best_metric=best_metric,
            best_mode=config.best_mode,
            scores=scores,
        )

    def begin(self) -> tuple[int, TrainState, streams.TrainIterator]:
        """Returns the number of steps done, the state after them, and the stream at that step."""
        program, recipe = self.program, self.program.recipe
        shard = data.process_shard(recipe.data, program.mesh)
        stream = streams.TrainIterator(self.source.tasks, recipe.data, shard)
        self._check_first_batch(run_record.batch_hash(_first_batch(stream)), shard)
        if self.is_new:
            params = pretrained.initial_params(
                recipe.student,
                program.models.student,
                program.state.params,
                jax.random.key(recipe.train.seed),
                "student",
            )
            return 0, initial_state(program, params), stream
        kept = None if self._reads_other_data else stream
        # A start that changed the data may have ended before its first checkpoint.
        changed = (one["step"] for one in self.about["changes"] if _is_of_data(one))
        step, state = self.checkpoints.restore_newest(
            program.state, kept, stream_since=max(changed, default=-1)
        )
        print(f"resumed from step {step} of {self.folder}", file=sys.stderr)
        for change in self.changes:
            said = f"{change['field']} is {change['new']!r} from here on, not {change['old']!r}"
            print(f"step {step}: {said}", file=sys.stderr)
        longer = any(change["field"] == "train.train_steps" for change in self.changes)
        if longer and recipe.schedule.cooldown_steps:
            print(
                f"WARNING: with {recipe.train.train_steps} steps the cool-down of "
                f"{recipe.schedule.cooldown_steps} steps lies elsewhere than it did",
                file=sys.stderr,
            )
        self.about["changes"] += [{"step": step, **change} for change in self.changes]
        return step, state, stream

    @property
    def _reads_other_data(self) -> bool:
        """Whether a field of the data was changed on purpose."""
        return any(map(_is_of_data, self.changes))

    def _check_first_batch(self, found: str, shard: data.Shard) -> None:
        """Refuses to resume on other data, wherever the files are now.

        The first batch must be the recorded one, unless a field of the data was changed on purpose.
        """
        recorded = self.about["first_batch"]
        self.about["first_batch"] = found
        if recorded is None or self._reads_other_data or shard != data.WHOLE:
            return
        if recorded != found:
            raise ValueError(
                f"MODEL_DIR {str(self.folder)!r} holds a run on other data: the first batch of "
                f"task {self.program.recipe.data.name!r} is not what it was. Take another MODEL_DIR"
            )

    def write(self, config_text: str) -> None:
        """Writes config.gin, model_info.txt, run.json and the student's tokenizer to the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            self._keep_tokenizer()
            files.write_whole(self.folder / "config.gin", config_text)
            files.write_whole(self.folder / "model_info.txt", model_info(self.program))
            files.write_record(self.folder / "run.json", self.about)

    def _keep_tokenizer(self) -> None:
        """Copies the student's tokenizer, so that the run needs the student's folder no longer.

        A resumed run copies it only if the folder has no tokenizer of the run's vocabulary.
        """
        recipe = self.program.recipe
        if not self.is_new and tokenizer_files.find(str(self.folder)) is not None:
            return
        source = tokenizer_files.for_run(
            recipe.data, recipe.student.checkpoint, self.description["vocabulary"]
        )
        if source is not None:
            tokenizer_files.copy(source, self.folder)


def _first_batch(stream: streams.TrainIterator) -> Batch:
    """Returns the first batch of a stream.

    With `shard_by_process`, only some processes may have no examples. All of them raise then, so
    that none waits for a process that has ended.
    """
    elsewhere = ValueError("another process cannot read its first batch: see its message")
    return processes.call_together(stream.peek, elsewhere)


def _is_of_data(change: Mapping[str, Any]) -> bool:
    """Returns whether a change of `run_record.changes` is one of the training data."""
    return change["field"].startswith("data.")
