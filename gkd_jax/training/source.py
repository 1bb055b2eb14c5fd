"""`open_source`: opens the task and the vocabulary of a run, and checks them against its recipe.

This happens before any array exists, so that a mistake is reported at once.
"""

from typing import Any, NamedTuple, NoReturn

from gkd_jax import rl
from gkd_jax.gkd_config import GKDConfig
from gkd_jax.input import named_tasks, teacher_cache
from gkd_jax.storage import content, tokenizer_files, vocabulary_checks
from gkd_jax.text import vocabularies
from gkd_jax.training.recipe import Recipe, describe


class Source(NamedTuple):
    """An opened task with its vocabulary."""

    tasks: dict[str, Any]  # by their names in the recipe
    vocabulary: Any  # of all inputs and targets
    num_pieces: int  # the ids that all models and the vocabulary share, extra ids included
    cached_k: int = 0  # ids per position in the teacher's stored scores; 0 without a cache
    eos_ids: tuple[int, ...] | None = None  # None if there are none, or if nothing was read
    tokenizer: Any = None  # of the student, by `tokenizer_files.find_for_task`


def open_source(
    recipe: Recipe, *, pending: frozenset[str] = frozenset(), check_remote: bool = True
) -> Source:
    """Opens the task that a recipe trains on.

    Args:
        pending: checkpoints that are not opened (see `program.build`).
        check_remote: whether remote vocabularies and JSONL files are read; False keeps a dry run
            off the network.

    Raises:
        ValueError: if a split, a teacher cache or a checkpoint does not fit the task and its
            vocabulary, or if a row without a target would be trained on.
    """
    tokenizer = tokenizer_files.find_for_task(
        recipe.data, recipe.student, pending, check_remote=check_remote
    )
    tasks, vocabulary = named_tasks.open_tasks(
        recipe.data, tokenizer=tokenizer, check_remote=check_remote
    )
    # A dry run knows no contents of a remote vocabulary.
    is_read = check_remote or not vocabularies.is_remote(vocabulary)
    for name, task in tasks.items():
        named_tasks.check_split(task, recipe.data.split)
        named_tasks.check_rows(task, recipe.data.split, check_remote=check_remote)
        named_tasks.check_teacher_inputs(name, task, recipe.data)
        why = _why_targets(recipe.method)
        if why is not None and is_read:
            named_tasks.check_targets(task, recipe.data.split, why, check_remote=check_remote)
    num_pieces = vocabulary_checks.shared_pieces(
        vocabulary, recipe.models, pending, check_remote=check_remote
    )
    cached_k, num_pieces = _check_cache(recipe, vocabulary, num_pieces, pending)
    ends = vocabularies.end_ids(vocabulary) if is_read else ()
    return Source(tasks, vocabulary, num_pieces, cached_k, ends or None, tokenizer)


def _why_targets(method: GKDConfig) -> str | None:
    """Returns why every row needs a target; None if prompts alone can be trained on."""
    if method.uses_targets():
        return "prompts alone can be trained on only with ON_POLICY_FRACTION=1.0"
    if method.rl is not None and rl.needs_references(method.rl.reward):
        return "REWARD compares samples with targets (rewards.brevity needs none)"
    return None


def _check_cache(
    recipe: Recipe, vocabulary: Any, num_pieces: int, pending: frozenset[str]
) -> tuple[int, int]:
    """Checks that the recipe's teacher cache fits the run, if there is one.

    Returns:
        k, the number of stored ids per position (0 without a cache), and the number of ids that the
        vocabulary, the models and the cache share.

    Raises:
        ValueError: if the method, the temperature, the vocabulary or the teacher is not that of the
            cache.
    """
    path, method = recipe.data.teacher_cache, recipe.method
    if path is None:
        return 0, num_pieces

    def refuse(fault: str) -> NoReturn:
        raise ValueError(f"teacher_cache={path!r} {fault}")

    about = teacher_cache.read_about(path)
    if method.divergence is None or (method.mixing == "example" and method.uses_samples()):
        refuse(
            "serves steps on the dataset's targets alone: it needs a divergence, and mixing='step'"
        )
    if method.teacher_temperature != about["temperature"]:
        refuse(
            f"was made at temperature {about['temperature']}, got "
            f"teacher_temperature {describe(method.teacher_temperature)}"
        )
    stored, wanted = (
        "with" if "teacher_inputs" in lengths else "without"
        for lengths in (about["feature_lengths"], recipe.data.feature_lengths)
    )
    if stored != wanted:
        refuse(
            f"was made {stored} prompts of the teacher's own ('teacher_inputs' of "
            f"TASK_FEATURE_LENGTHS), and the run is {wanted} them"
        )
    found = about.get("vocabulary_content")
    if found is None:
        refuse("does not say which vocabulary it was made with: run `gkd-jax score` again")
    is_unread = isinstance(vocabulary, vocabularies.Unread)
    expected = found if is_unread else vocabularies.content_hash(vocabulary)
    if found != expected:
        refuse(
            f"was made with another vocabulary (content {found[:12]}) than this task's (content "
            f"{expected[:12]})"
        )
    if recipe.self_teacher is not None:
        refuse(
            f"holds the scores of a frozen teacher, got the teacher {recipe.teacher}, which learns"
        )
    teacher = recipe.teachers.get("teacher")
    checkpoint = None if teacher is None else teacher.checkpoint
    if checkpoint is not None and checkpoint not in pending:
        found, expected = content.content_id(checkpoint), about.get("content")
        if expected != found:
            refuse(
                f"holds the scores of {about['checkpoint']!r} (content {str(expected)[:12]}), and "
                f"TEACHER_CHECKPOINT is another: {checkpoint!r} (content {found[:12]})"
            )
    if about["num_pieces"] > num_pieces:
        refuse(
            f"has probabilities of {about['num_pieces']} ids, and the vocabulary and the models of "
            f"this run share only {num_pieces}: score with the student's tokenizer as VOCABULARY"
        )
    return about["k"], about["num_pieces"]
