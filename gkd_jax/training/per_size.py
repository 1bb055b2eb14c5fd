"""Settings that follow a model's size, for gin files: the paper's learning rates and steps do."""

from collections.abc import Callable, Mapping
from typing import Any


def by_size(size: str, values: Mapping[str, Any]) -> Any:
    """The value for a size.

    Args:
        size: as STUDENT_SIZE has it.
        values: of each size.

    Raises:
        ValueError: naming the size and those that there are.
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
    """The learning rate for a size and a divergence.

    Args:
        size: as STUDENT_SIZE has it.
        values: of each size.
        divergence: of the method; None for SFT.
        reverse_kl: in place of the size's with the reverse KL, which is more sensitive to high
            rates (Agarwal et al., 2024, App. A.4); None is the size's.

    Raises:
        ValueError: naming the size and those that there are.
    """
    if reverse_kl is not None and getattr(divergence, "__name__", "") == "reverse_kl":
        return reverse_kl
    return by_size(size, values)
