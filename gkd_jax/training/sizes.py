"""How many ids a recipe's vocabulary has, of which alone shapes depend."""

from gkd_jax.text import known_sizes
from gkd_jax.training.recipe import Recipe


def num_pieces_of(recipe: Recipe) -> int:
    """The ids of the recipe's vocabulary; its task is opened only where no name tells them."""
    config = recipe.data
    found = known_sizes.num_pieces(config.vocabulary, config.extra_ids, config.task)
    if found is None:
        from gkd_jax.training import source  # brings TensorFlow and seqio

        found = source.open_source(recipe, check_remote=False).num_pieces
    return found
