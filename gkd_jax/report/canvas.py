"""The canvas of every figure: its look, its colours, and axes placed in inches.

matplotlib is imported at the first drawing, and without pyplot: no window, no global state.
"""

from collections.abc import Iterator
import contextlib
import pathlib
from typing import Any
import warnings


INK, MUTED, RULE = "#22262b", "#6f7780", "#d9dce0"
ACCENT, MIDDLE, PALE = "#2b5c8a", "#7fa3c4", "#bfd0e0"
WARM, GREY, LIGHT_GREY = "#b3622d", "#8d949c", "#c6cacf"
# One colour a divergence, from mean-seeking to mode-seeking; told apart in grey too.
DIVERGENCE_COLOURS = {
    "forward_kl": "#b3622d",
    "jsd(0.1)": "#d6a24a",
    "jsd(0.5)": "#6c9a7b",
    "jsd(0.9)": "#3f86a8",
    "reverse_kl": "#2b4a7a",
    "total_variation": "#8a6a9c",
}
DOTS_PER_INCH = 200


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The look of every figure; labels are text, never TeX.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "report draws with matplotlib, which is not installed: pip install 'gkd_jax[report]'"
        ) from error
    look: Any = {
        "font.size": 8.5,
        "font.family": "DejaVu Sans",
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "axes.edgecolor": RULE,
        "axes.axisbelow": True,
        "xtick.color": MUTED,
        "ytick.color": RULE,
        "ytick.labelcolor": INK,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "ytick.major.size": 0,
    }
    with matplotlib.rc_context(look), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        yield


def save(figure: Any, path: pathlib.Path) -> None:
    """As PNG; nothing in it changes from one call to the next."""
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), facecolor="white")


def row(
    figure: Any,
    count: int,
    *,
    left: float,
    top: float,
    bottom: float,
    gap: float,
    right: float = 0.2,
) -> list[Any]:
    """Axes side by side; all lengths in inches."""
    width, height = figure.get_size_inches()
    each = (width - left - right - gap * (count - 1)) / count
    return [
        figure.add_axes(
            (
                (left + index * (each + gap)) / width,
                bottom / height,
                each / width,
                (height - top - bottom) / height,
            )
        )
        for index in range(count)
    ]


def title(ax: Any, text: str, *, raised: bool = False) -> None:
    """Raised above the name of a reference line."""
    ax.set_title(text, loc="left", pad=19 if raised else 6)


def footnote(figure: Any, text: str) -> None:
    width, height = figure.get_size_inches()
    figure.text(1 - 0.1 / width, 0.07 / height, text, ha="right", fontsize=7.5, color=MUTED)
