"""Drawing: bars, heat maps, curves and trade-offs from plain values, as matplotlib figures."""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from gkd_jax.report import canvas
from gkd_jax.report.results import Cell


# Where all values lie this close together, bars from zero would look alike: dots are drawn.
_NARROW = 0.35


class Bar(NamedTuple):
    """One bar; without a cell the row stays empty."""

    label: str
    cell: Cell | None
    colour: str
    note: str = ""
    paper: float | None = None


class BarPanel(NamedTuple):
    """Bars of one student size; `reference` is a named line across them."""

    title: str
    bars: Sequence[Bar]
    reference: tuple[str, float] | None = None


class Map(NamedTuple):
    """A heat map; `cells[row][column]` may be missing."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Cell | None]]


class Line(NamedTuple):
    """A curve; a dashed one is the paper's."""

    label: str
    xs: Sequence[float]
    ys: Sequence[Cell]
    colour: str
    dashed: bool = False
    notes: Sequence[str] = ()


class LinePanel(NamedTuple):
    """Curves of one student size; `ticks` are (position, label)."""

    title: str
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]] = ()
    reference: tuple[str, float] | None = None


def bars(panels: Sequence[BarPanel], *, metric: str, signed: bool = False) -> Any:
    """Horizontal bars, one panel a student size, the labels written once."""
    count = max(len(panel.bars) for panel in panels)
    names = max(len(bar.label) for panel in panels for bar in panel.bars)
    left = 0.25 + 0.068 * names
    has_paper = any(bar.paper is not None for panel in panels for bar in panel.bars)
    bottom = 0.62 if has_paper else 0.42
    top = 0.62 if any(panel.reference for panel in panels) else 0.4
    figure = canvas.figure(left + 2.35 * len(panels) + 0.2, 0.30 * count + top + bottom + 0.08)
    axes = canvas.row(figure, len(panels), left=left, top=top, bottom=bottom, gap=0.25)
    for index, (ax, panel) in enumerate(zip(axes, panels, strict=True)):
        _draw_bars(ax, panel, signed=signed)
        ax.set_yticks(range(len(panel.bars)), [bar.label for bar in panel.bars])
        ax.tick_params(axis="y", length=0, labelleft=index == 0)
        canvas.title(ax, panel.title, raised=panel.reference is not None)
        ax.set_xlabel(metric)
    if has_paper:
        canvas.footnote(figure, "◇ the paper's number")
    return figure


def heat_maps(rows: Sequence[Sequence[Map]], *, signed: bool) -> Any:
    """Rows of maps, each with its own scale: what matters is where each is darkest."""
    columns = max(len(maps) for maps in rows)
    widest = max(len(one.columns) for maps in rows for one in maps)
    deepest = max(len(one.rows) for maps in rows for one in maps)
    width, height = 0.62 * widest + 0.15, 0.44 * deepest
    figure = canvas.figure(0.9 + columns * (width + 0.25), len(rows) * (height + 0.72))
    total_width, total_height = figure.get_size_inches()
    for row, maps in enumerate(rows):
        for column, one in enumerate(maps):
            bottom = total_height - (row + 1) * (height + 0.72) + 0.3
            start = 0.8 + column * (width + 0.25)
            ax = figure.add_axes(
                (
                    start / total_width,
                    bottom / total_height,
                    width / total_width,
                    height / total_height,
                )
            )
            _draw_map(ax, one, signed=signed, labelled=column == 0)
    return figure


def curves(
    panels: Sequence[LinePanel], *, x_label: str, y_label: str, sharing_y: bool = False
) -> Any:
    """Curves with whiskers of one standard error, each named at its end."""
    names = max((len(line.label) for panel in panels for line in panel.lines), default=0)
    right = 0.3 + 0.065 * names
    figure = canvas.figure(0.6 + len(panels) * (2.5 + right), 3.0)
    axes = canvas.row(
        figure, len(panels), left=0.6, top=0.42, bottom=0.5, gap=right + 0.35, right=right
    )
    for ax, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            _draw_line(ax, line)
        if panel.ticks:
            ax.set_xticks(*zip(*panel.ticks, strict=True))
            ax.set_xticks([], minor=True)
        canvas.title(ax, panel.title)
        ax.set_xlabel(x_label)
        ax.grid(axis="y", color=canvas.RULE, linewidth=0.6)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.margins(x=0.04, y=0.1)
        ends = [(line.xs[-1], line.ys[-1].mean, line.label, line.colour) for line in panel.lines]
        if panel.reference:
            name, value = panel.reference
            ax.axhline(value, color=canvas.MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            ends.append((-math.inf, value, name, canvas.MUTED))
        _name_ends(ax, ends)
    axes[0].set_ylabel(y_label)
    if sharing_y:
        low = min(ax.get_ylim()[0] for ax in axes)
        high = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(low, high)
    return figure


def trade_off(panels: Sequence[LinePanel], *, x_label: str, y_label: str) -> Any:
    """Points in a plane, joined in order; `Line.notes` name the points."""
    # One legend, of the lines of all panels.
    lines = {line.label: line for panel in panels for line in panel.lines}
    names = max(map(len, lines)) if len(lines) > 1 else 0
    right = 0.65 + 0.062 * names if names else 0.2
    figure = canvas.figure(0.65 + 3.6 * len(panels) + right, 3.4)
    axes = canvas.row(figure, len(panels), left=0.65, top=0.4, bottom=0.52, gap=0.55, right=right)
    for ax, panel in zip(axes, panels, strict=True):
        for line in panel.lines:
            _draw_line(ax, line)
        ax.margins(x=0.2, y=0.14)
        taken: list[Any] = []
        for line in panel.lines:
            _annotate(ax, line, taken)
        canvas.title(ax, panel.title)
        ax.set_xlabel(x_label)
        ax.grid(color=canvas.RULE, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(y_label)
    if names:
        handles = [
            axes[0].plot([], [], color=one.colour, **_stroke(one))[0] for one in lines.values()
        ]
        axes[-1].legend(
            handles, list(lines), frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
        )
    return figure


def _draw_bars(ax: Any, panel: BarPanel, *, signed: bool) -> None:
    cells = [bar.cell for bar in panel.bars if bar.cell]
    drawn = [cell.mean + side * (cell.error or 0.0) for cell in cells for side in (-1, 1)]
    papers = [bar.paper for bar in panel.bars if bar.paper is not None]
    everything = [*drawn, *papers, *([panel.reference[1]] if panel.reference else [])]
    low, high = (min(everything), max(everything)) if everything else (0.0, 1.0)
    narrow = bool(drawn) and not signed and low > 0 and high - low < _NARROW * high
    span = (high - low) if narrow else max(high, 0.0) - min(low, 0.0)
    span = span or 1.0
    start = low - 0.12 * span if narrow else min(low, 0.0)
    ax.set_xlim(start - (0.3 * span if low < 0 else 0), max(high, 0.0) + 0.62 * span)
    ax.set_ylim(max(len(panel.bars), 1) - 0.4, -0.6)
    if panel.reference:
        name, value = panel.reference
        ax.axvline(value, color=canvas.MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(
            f"{name} {value:.1f}",
            (value, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7.5,
            color=canvas.MUTED,
        )
    for row, bar in enumerate(panel.bars):
        _draw_bar(ax, row, bar, span=span, narrow=narrow, signed=signed)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.spines["left"].set_visible(not narrow and low >= 0)
    if low < 0:
        ax.axvline(0, color=canvas.GREY, linewidth=0.8)
    ax.tick_params(axis="x", length=0, labelbottom=narrow)
    if narrow:
        ax.grid(axis="both", color=canvas.RULE, linewidth=0.6)
        ax.locator_params(axis="x", nbins=4)


def _draw_bar(ax: Any, row: int, bar: Bar, *, span: float, narrow: bool, signed: bool) -> None:
    reach = -math.inf
    if bar.paper is not None:
        ax.plot(
            bar.paper, row, "D", color=canvas.INK, markerfacecolor="white", markersize=4, zorder=4
        )
        reach = bar.paper + 0.02 * span
    if bar.cell is None:
        return
    mean, error = bar.cell.mean, bar.cell.error
    if narrow:
        ax.plot(mean, row, "o", color=bar.colour, markersize=6.5, zorder=3)
        mean_reach = mean + 0.025 * span
    else:
        ax.barh(row, mean, height=0.68, color=bar.colour, zorder=2)
        mean_reach = mean
    if error:
        ax.errorbar(mean, row, xerr=error, color=canvas.INK, linewidth=0.9, capsize=0, zorder=3)
    text = f"{mean:+.1f}" if signed else f"{mean:.1f}"
    if signed and mean < 0:
        place, side, offset = mean - (error or 0.0), "right", -4
    else:
        place, side, offset = max(mean_reach + (error or 0.0), reach), "left", 4
    number = ax.annotate(
        text,
        (place, row),
        xytext=(offset, 0),
        textcoords="offset points",
        va="center",
        ha=side,
        fontsize=8.5,
        fontweight="bold",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        zorder=5,
    )
    if bar.note:
        ax.annotate(
            f" {bar.note}",
            (1, 0),
            xycoords=number,
            va="bottom",
            ha="left",
            fontsize=7.5,
            color=canvas.MUTED,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            zorder=4.5,
        )


def _draw_map(ax: Any, one: Map, *, signed: bool, labelled: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
    from matplotlib.patches import Rectangle

    values = [cell.mean for row in one.cells for cell in row if cell]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if signed and low < 0:
        reach = max(-low, high, 1e-9)
        norm = TwoSlopeNorm(0.0, -reach, reach)
        shades = LinearSegmentedColormap.from_list("gain", ["#c98a5c", "#f6f5f2", "#3f739f"])
    else:
        norm = Normalize(low, high if high > low else low + 1.0)
        shades = LinearSegmentedColormap.from_list("value", ["#eaf0f5", "#a9c3da", "#3f739f"])
    form = ("+.2f" if max(map(abs, values), default=0) < 2 else "+.1f") if signed else ".1f"
    for y, row in enumerate(one.cells):
        for x, value in enumerate(row):
            if value is None:
                ax.add_patch(
                    Rectangle((x, y), 1, 1, facecolor="#fafafa", edgecolor="white", linewidth=2)
                )
                continue
            shade = shades(norm(value.mean))
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=2))
            dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.55
            colour = "white" if dark else canvas.INK
            text = f"{value.mean:{form}}"
            raised = 0.42 if value.error is not None else 0.52
            ax.text(
                x + 0.5,
                y + raised,
                text,
                ha="center",
                va="center",
                color=colour,
                fontsize=8.5,
                fontweight="bold" if value.mean == high else "normal",
            )
            if value.error is not None:
                ax.text(
                    x + 0.5,
                    y + 0.76,
                    f"±{value.error:.1f}",
                    ha="center",
                    va="center",
                    color=colour,
                    fontsize=6.2,
                )
    ax.set_xlim(0, len(one.columns))
    ax.set_ylim(len(one.rows), 0)
    ax.set_xticks(
        [x + 0.5 for x in range(len(one.columns))], one.columns, color=canvas.INK, fontsize=7.5
    )
    ax.set_yticks([y + 0.5 for y in range(len(one.rows))], one.rows)
    ax.tick_params(length=0, labelleft=labelled)
    ax.spines[:].set_visible(False)
    canvas.title(ax, one.title)


def _draw_line(ax: Any, line: Line) -> None:
    means = [y.mean for y in line.ys]
    ax.plot(line.xs, means, color=line.colour, zorder=3, **_stroke(line))
    if any(y.error for y in line.ys):
        errors = [y.error or 0.0 for y in line.ys]
        ax.errorbar(
            line.xs, means, yerr=errors, color=line.colour, fmt="none", elinewidth=0.9, zorder=2
        )


def _stroke(line: Line) -> dict[str, Any]:
    if line.dashed:
        return {
            "linewidth": 1.0,
            "linestyle": (0, (2, 2)),
            "marker": "D",
            "markersize": 3,
            "markerfacecolor": "white",
        }
    return {"linewidth": 1.7, "marker": "o", "markersize": 4.5, "markeredgecolor": "white"}


def _name_ends(ax: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names right of the axes, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    height = ax.figure.get_size_inches()[1] * ax.get_position().height
    gap = (high - low) * 0.155 / height
    order = sorted(ends, key=lambda end: end[1])
    places = [end[1] for end in order]
    for _ in range(60):
        for index in range(len(places) - 1):
            short = gap - (places[index + 1] - places[index])
            if short > 1e-9:
                places[index] -= short / 2
                places[index + 1] += short / 2
    for (_, _, name, colour), place in zip(order, places, strict=True):
        ax.annotate(
            name,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8,
            annotation_clip=False,
        )


def _annotate(ax: Any, line: Line, taken: list[tuple[float, float]]) -> None:
    """Names of points, left out where another already stands within a label's size."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    # On the side that the line does not go to.
    rising = (line.ys[-1].mean - line.ys[0].mean) * (line.xs[-1] - line.xs[0]) > 0
    for x, y, note in zip(line.xs, line.ys, line.notes, strict=False):
        place = ((x - left) / (right - left), (y.mean - low) / (high - low))
        if any(abs(place[0] - a) < 0.11 and abs(place[1] - b) < 0.05 for a, b in taken):
            continue
        taken.append(place)
        outside = place[0] > 0.75 and len(note) > 6
        ax.annotate(
            note,
            (x, y.mean),
            xytext=(-6 if outside else 6, -9 if rising != outside else 5),
            ha="right" if outside else "left",
            textcoords="offset points",
            fontsize=7,
            color=line.colour,
        )
