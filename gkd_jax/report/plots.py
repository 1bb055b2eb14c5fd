"""Draws bars, maps and curves with matplotlib, for a wide page and for a phone.

`render` makes a figure of panels, each drawn by `bars`, `heat_map` or `curves`. pyplot is not used,
so there is no window and no global state.
"""

from collections.abc import Callable, Sequence
import importlib.resources
import io
import math
import re
import textwrap
from typing import Any, NamedTuple
import warnings

import matplotlib
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
import numpy as np

from gkd_jax.report.record import divergence_name
from gkd_jax.report.study import Table, divergence_order


TEMPLATES = importlib.resources.files("gkd_jax.report") / "templates"
# The colours of the light page, by the names of their variables in style.css.
CSS = (TEMPLATES / "style.css").read_text(encoding="utf-8")
COLOURS = dict(re.findall(r"--(\w+): (#\w{6})", CSS.partition("@media")[0]))
INK, MUTED, PAGE = COLOURS["ink"], COLOURS["muted"], COLOURS["page"]
_WIDE, _NARROW = 11.8, 3.6  # widths in inches, at 100 pixels per inch
# Values that differ by less than this share of the largest are dots: bars would look alike.
_CLOSE = 0.35


class Panel(NamedTuple):
    """One part of a figure, mostly for one student size."""

    title: str
    rows: Table  # with the columns that the function needs which draws it
    teacher: float = math.nan  # drawn as a vertical line
    ticks: Sequence[tuple[float, str]] = ()  # of x, whose ends are the first and the last


Draw = Callable[[Any, Panel, bool], float]
"""Draws a panel on axes, given whether the page is narrow; returns the height in inches."""


def colour(divergence: str) -> str:
    """The colour of a divergence."""
    return COLOURS.get(re.sub(r"\W+", "_", divergence).strip("_"), COLOURS["grey"])


def render(draw: Draw, panels: Sequence[Panel], x: str, y: str = "") -> tuple[bytes, str, str]:
    """Draws a figure of panels with `draw`, whose axes are named `x` and `y`.

    Returns:
        A PNG, an SVG for a wide page and an SVG for a phone; equal arguments give equal results.
    """
    with matplotlib.rc_context(fname=str(TEMPLATES / "report.mplstyle")), warnings.catch_warnings():
        # A label in a script that the font lacks is drawn as boxes in the PNG.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
        wide, narrow = (_figure(draw, panels, x, y, on_phone) for on_phone in (False, True))
        png = io.BytesIO()
        wide.savefig(png, dpi=100, facecolor="white", metadata={"Software": None})
        return png.getvalue(), _svg(wide), _svg(narrow)


def _figure(draw: Draw, panels: Sequence[Panel], x: str, y: str, narrow: bool) -> Any:
    columns = 1 if narrow else min(len(panels), 3)
    figure = Figure(figsize=(_NARROW if narrow else _WIDE, 3), layout="constrained")
    lines = math.ceil(len(panels) / columns)
    heights, handles = [], {}
    for place, panel in enumerate(panels, start=1):
        ax = figure.add_subplot(lines, columns, place)
        heights.append(draw(ax, panel, narrow))
        if not math.isnan(panel.teacher):
            label = f"teacher {panel.teacher:.1f}"
            ax.axvline(panel.teacher, color=MUTED, linestyle=(0, (4, 3)), label=label)
        ax.set(xlabel=x, ylabel=y)
        ax.set_title(textwrap.fill(panel.title, 36 if columns > 1 or narrow else 120))
        drawn, labels = ax.get_legend_handles_labels()
        handles.update(zip(labels, drawn, strict=True))
    across = 1
    if handles:
        limit = 52 if narrow else 100
        labels = [textwrap.shorten(label, limit, placeholder="…") for label in handles]
        across = 1 if narrow else max(1, min(5, 150 // (max(map(len, labels)) + 6)))
        figure.legend(handles.values(), labels, loc="outside lower left", ncols=across)
    legend = 0.2 * math.ceil(len(handles) / across)
    figure.set_figheight(lines * max(heights) + legend)
    return figure


def _svg(figure: Any) -> str:
    """A figure as inline SVG, whose colours are the CSS variables of the page."""
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    text = file.getvalue().replace("'DejaVu Sans'", "system-ui, sans-serif")
    text = re.sub(r'<g id="[^"]*">', "<g>", text[text.index("<svg") :])
    text = re.sub(r' width="[^"]*" height="[^"]*"', ' class="plot"', text, count=1)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


def bars(ax: Any, panel: Panel, narrow: bool) -> float:
    """Draws a bar for each row, or a dot if all values are close to each other.

    Columns: `label`, `mean`, `error`, `colour`, `gain`, `paper_value`. On a phone the labels stand
    above the bars.
    """
    rows, errors = panel.rows, panel.rows["error"].fillna(0)
    reaches = np.fmax(rows["mean"] + errors, rows["paper_value"])
    low = np.nanmin([*(rows["mean"] - errors), *rows["paper_value"], panel.teacher])
    high = np.nanmax([*reaches, panel.teacher])
    dots = low > 0 and high - low < _CLOSE * high
    span = (high - low if dots else max(high, 0) - min(low, 0)) or 1.0
    left = low - 0.12 * span if dots else min(low, 0) - (0.3 * span if low < 0 else 0)
    places = range(len(rows))
    if dots:
        ax.scatter(rows["mean"], places, color=rows["colour"], s=48, zorder=3)
    else:
        ax.barh(places, rows["mean"], 0.5 if narrow else 0.7, color=rows["colour"], zorder=2)
    whiskers = errors.where(errors > 0)
    ax.errorbar(rows["mean"], places, xerr=whiskers, color=INK, fmt="none", elinewidth=1, zorder=3)
    if rows["paper_value"].notna().any():
        look = {"edgecolor": INK, "facecolor": PAGE, "marker": "D", "s": 18, "zorder": 4}
        ax.scatter(rows["paper_value"], places, label="the paper", **look)
    for place, reach, row in zip(places, reaches.clip(lower=0), rows.itertuples(), strict=True):
        text = f"{row.mean:.1f}" + ("" if math.isnan(row.gain) else f"  ({row.gain:+.1f})")
        ground = {"facecolor": PAGE, "edgecolor": "none", "pad": 1}  # over the teacher's line
        look = {"textcoords": "offset points", "va": "center", "bbox": ground, "zorder": 5}
        ax.annotate(text, (reach, place), (6, 0), **look)
        if narrow:
            ax.text(left, place - 0.42, textwrap.shorten(row.label, 54, placeholder="…"))
    right = high + (0.45 if narrow else 0.15) * span
    ax.set_xlim(left, min(right, 100) if high <= 100 else right)
    ax.set_ylim(len(rows) - 0.4, -0.9 if narrow else -0.6)
    ax.set_yticks(places, ["" if narrow else textwrap.fill(label, 64) for label in rows["label"]])
    ax.grid(axis="both" if dots and not narrow else "x")
    return len(rows) * (0.42 if narrow else 0.3) + 1.0


def heat_map(ax: Any, panel: Panel, narrow: bool) -> float:
    """Draws a map of values over lambda and the divergences.

    Columns: `fraction`, `divergence`, `mean`, `error`, `signed` (whether the values are gains,
    whose colours are centred on zero). Each map has its own colour scale: a reader looks for its
    best cell.
    """
    rows = panel.rows.sort_values("fraction", ascending=False, kind="stable")
    table = rows.pivot_table("mean", "fraction", "divergence", sort=False)
    table = table[sorted(table, key=divergence_order)]
    values, signed = rows["mean"], rows["signed"].any()
    low, high = values.min(), values.max()
    colours, norm = ["#eaf0f5", "#a9c3da", "#3f739f"], Normalize(low, max(high, low + 1e-6))
    if signed and low < 0:
        reach = max(-low, high)
        colours, norm = ["#c98a5c", "#f6f5f2", "#3f739f"], TwoSlopeNorm(0.0, -reach, reach)
    shades = LinearSegmentedColormap.from_list("values", colours)
    ax.pcolormesh(table.to_numpy(), cmap=shades, norm=norm, edgecolor=PAGE, linewidth=2)
    digits = ("+.2f" if values.abs().max() < 2 else "+.1f") if signed else ".1f"
    for cell in rows.itertuples():
        x, y = table.columns.get_loc(cell.divergence), table.index.get_loc(cell.fraction)
        red, green, blue, _ = shades(norm(cell.mean))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
        text = f"{cell.mean:{digits}}" + ("" if math.isnan(cell.error) else f"\n±{cell.error:.1f}")
        weight = "bold" if cell.mean == high else "normal"
        look = {"ha": "center", "va": "center", "color": "white" if dark else "#22262c"}
        ax.text(x + 0.5, y + 0.5, text, fontweight=weight, fontsize=8.5, **look)
    ax.set_ylim(len(table), 0)
    ax.set_xticks(np.arange(len(table.columns)) + 0.5, map(divergence_name, table.columns))
    ax.set_yticks(np.arange(len(table)) + 0.5, [f"λ {fraction:.0%}" for fraction in table.index])
    ax.tick_params(length=0, labelsize=8)
    ax.spines[:].set_visible(False)
    return 0.48 * len(table) + 0.8


def curves(ax: Any, panel: Panel, narrow: bool) -> float:
    """Draws lines of points.

    Columns: `line`, `x`, `y`, `error`, `colour`, `dashed` (true for the paper's points), `note` (a
    text beside the point).
    """
    for (label, dashed), line in panel.rows.groupby(["line", "dashed"], sort=False):
        colour = line["colour"].iloc[0]
        marks = {"linestyle": (0, (2, 2)), "marker": "D", "markersize": 3.5, "linewidth": 1.0}
        marks = marks if dashed else {"marker": "o", "markersize": 5, "linewidth": 1.8}
        name = f"{label}, the paper" if dashed else label
        ax.plot(line["x"], line["y"], color=colour, label=name, clip_on=False, zorder=3, **marks)
        ax.errorbar(line["x"], line["y"], line["error"], color=colour, fmt="none", elinewidth=0.9)
        for point in line[line["note"] != ""].itertuples():
            place, offset = (point.x, point.y), (6, 4)
            ax.annotate(point.note, place, offset, textcoords="offset points", fontsize=7.5)
    if panel.ticks:
        ax.set_xticks(*zip(*panel.ticks, strict=True))
        ax.set_xlim(panel.ticks[0][0], panel.ticks[-1][0])
    else:
        ax.margins(x=0.15)
    ax.grid(axis="y" if panel.ticks else "both")
    if ax.get_ylim()[1] > 100 >= panel.rows["y"].max():
        ax.set_ylim(top=100)
    return 3.0
