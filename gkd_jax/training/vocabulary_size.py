"""Finds the vocabulary size of a recipe, which is all that array shapes need of a vocabulary."""

import os

from gkd_jax.storage import hub, loading, pretrained
from gkd_jax.text import known_sizes, task_names
from gkd_jax.training.recipe import Recipe


def num_pieces_of(recipe: Recipe) -> int:
    """Returns the number of ids of a recipe's vocabulary.

    The recipe's task is opened only if the name of the vocabulary does not determine the number. If
    the tasks are JSONL files that do not exist, or the vocabulary is a name on the Hugging Face
    hub, the number is that of the rows that the recipe's models have, by their sizes or their
    checkpoints: it is at least the number of ids.
    """
    config = recipe.data
    tasks = list(config.task_rows)
    sizes = {known_sizes.num_pieces(config.vocabulary, config.extra_ids, task) for task in tasks}
    found = sizes.pop() if len(sizes) == 1 else None
    if config.vocabulary is None:
        paths = [task_names.split(task)[0] for task in tasks]
        ends = task_names.ENDINGS
        cannot_be_read = all(path.endswith(ends) and not os.path.exists(path) for path in paths)
    else:
        cannot_be_read = hub.is_name(config.vocabulary)
    if found is None and cannot_be_read:
        rows = [
            _rows(model)
            for model in recipe.models.values()
            if model.size or not pretrained.is_remote(model.checkpoint)
        ]
        found = min(rows, default=None)
    if found is None:
        from gkd_jax.training import source  # imports TensorFlow and seqio

        found = source.open_source(recipe, check_remote=False).num_pieces
    return found


def _rows(model: pretrained.ModelConfig) -> int:
    if model.size:
        return model.architecture(model.size).vocab_size
    assert model.checkpoint is not None  # a model has a size or a checkpoint
    return loading.load_config(model.checkpoint).vocab_size
