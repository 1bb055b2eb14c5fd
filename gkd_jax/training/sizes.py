"""Finds the vocabulary size of a recipe, which is all that array shapes need of a vocabulary."""

from gkd_jax.text import known_sizes
from gkd_jax.training.recipe import Recipe


def num_pieces_of(recipe: Recipe) -> int:
    """Returns the number of ids of a recipe's vocabulary.

    The recipe's task is opened only if the name of the vocabulary does not determine the number.
    """
    config = recipe.data
    found = known_sizes.num_pieces(config.vocabulary, config.extra_ids, config.task)
    if found is None:
        from gkd_jax.training import source  # imports TensorFlow and seqio

        found = source.open_source(recipe, check_remote=False).num_pieces
    return found
