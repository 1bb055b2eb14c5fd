"""Functions for gin files that choose a setting by model size, such as the paper's learning rates.

In a gin file:

    TRAIN_STEPS = @per_size.by_size()
    per_size.by_size.size = %STUDENT_SIZE
    per_size.by_size.values = {'small': 250000, 'large': 110000}
"""

from collections.abc import Callable, Mapping
from typing import Any


def by_size(size: str, values: Mapping[str, Any]) -> Any:
    """Returns the value of a setting for a model size.

    Raises:
        ValueError: if there is no value for this size; names the known sizes.
    """
    if size not in values:
        raise ValueError(
            f"expected one of the sizes {', '.join(values)}, got {size!r}: give STUDENT_SIZE "
            "as one of them, or the setting itself"
        )
    return values[size]


def learning_rate(
    size: str,
    values: Mapping[str, float],
    divergence: Callable | None = None,
    reverse_kl: float | None = None,
) -> float:
    """Returns the learning rate for a model size and a divergence; errors are those of `by_size`.

    Args:
        values: the learning rate for each size.
        divergence: the method's divergence; None for SFT.
        reverse_kl: the learning rate for the reverse KL at any size. This divergence is more
            sensitive to high rates (Agarwal et al., 2024, App. A.4). None makes no exception.
    """
    if reverse_kl is not None and getattr(divergence, "__name__", "") == "reverse_kl":
        return reverse_kl
    return by_size(size, values)
