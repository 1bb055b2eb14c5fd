"""Finds the vocabulary size of a recipe, which is all that array shapes need of a vocabulary."""

import os

from gkd_jax.storage.pretrained import ModelConfig
from gkd_jax.text import known_sizes
from gkd_jax.training.recipe import Recipe


def num_pieces_of(recipe: Recipe) -> int:
    """Returns the number of ids of a recipe's vocabulary.

    The recipe's task is opened only if the name of the vocabulary does not determine the number. If
    the task is a JSONL file that does not exist, the number is that of the rows that models of the
    recipe's sizes have: it is at least the number of ids.
    """
    config = recipe.data
    found = known_sizes.num_pieces(config.vocabulary, config.extra_ids, config.task)
    if found is None and _is_absent(config.task) and config.vocabulary is None:
        models = (recipe.student, recipe.teacher)
        models = [model for model in models if isinstance(model, ModelConfig) and model.size]
        rows = [model.architecture(model.size).vocab_size for model in models]
        found = min(rows, default=None)
    if found is None:
        from gkd_jax.training import source  # imports TensorFlow and seqio

        found = source.open_source(recipe, check_remote=False).num_pieces
    return found


def _is_absent(task: str) -> bool:
    return task.endswith((".jsonl", ".jsonl.gz")) and not os.path.exists(task)
