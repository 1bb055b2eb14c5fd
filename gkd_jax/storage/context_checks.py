"""Warns of texts that are longer than a model was made for."""

import sys

from gkd_jax.models import lm


def warn_of_long_texts(config: lm.Config, name: str, prompt: int, target: int) -> None:
    """Warns if the longest texts of a run are longer than a model was made for.

    This is no error, because the texts of a task may all be shorter than the lengths allow.

    Args:
        config: the model's config.
        name: what the warning calls the model, such as "student".
        prompt: the largest number of tokens of a prompt.
        target: the largest number of tokens of an answer.
    """
    limit = config.context_length
    if limit is not None and prompt + target > limit:
        print(
            f"WARNING: TASK_FEATURE_LENGTHS allows texts of {prompt + target} tokens ({prompt} of "
            f"the prompt and {target} of the answer), and the {name} was made for texts of at most "
            f"{limit} (max_position_embeddings): what it writes beyond them may be poor",
            file=sys.stderr,
        )
