"""Small line charts as inline SVG, for the pages of single runs."""

from collections.abc import Callable, Sequence
import html
import math
from typing import NamedTuple


WIDTH, HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 28, 24
# So many points are drawn: more cannot be told apart at this width.
_MOST_POINTS = 300
_INK, _MUTED, _RULE = "#22262b", "#5d656d", "#e4e6e9"
_Place = Callable[[float, float], tuple[float, float]]


class Series(NamedTuple):
    """A named curve of (step, value); `averaged` is drawn as its running mean over a faint line."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    averaged: bool = False


def line_chart(title: str, series: Sequence[Series]) -> str:
    """One chart; "" where no series has a point."""
    series = [one for one in series if one.points]
    if not series:
        return ""
    xs = [x for one in series for x, _ in one.points]
    ys = sorted(y for one in series for _, y in one.points)
    # A few spikes must not flatten the rest.
    low, high = ys[0], ys[-1]
    if len(ys) > 100:
        low, high = ys[len(ys) // 200], ys[-1 - len(ys) // 200]
    if low > 0 and low < 0.6 * high:
        low = 0.0
    if high <= low:
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    ticks = ticks_of(low, high)
    high = max(high, ticks[-1])
    left, right = min(xs), max(xs)
    alone = left == right
    if alone:
        left, right = left - 1, right + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - left) / (right - left) * (WIDTH - _LEFT - _RIGHT)
        inside = min(max(y, low), high)
        return across, HEIGHT - _BOTTOM - (inside - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}" font-family="system-ui, sans-serif">',
        _label(title, 0, 13, size=12, fill=_INK, weight=600),
    ]
    for tick in ticks:
        _, y = place(left, tick)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_RULE}"/>'
        )
        parts.append(_label(short(tick), _LEFT - 6, y + 3.5, anchor="end"))
    if alone:
        parts.append(
            _label(f"step {xs[0]:,.0f}", place(xs[0], low)[0], HEIGHT - 8, anchor="middle")
        )
    else:
        parts.append(_label(f"step {left:,.0f}", _LEFT, HEIGHT - 8))
        parts.append(_label(f"{right:,.0f}", WIDTH - _RIGHT, HEIGHT - 8, anchor="end"))
    for one in series:
        parts += _curve(one, place, valued=len(series) == 1)
    if len(series) > 1:
        parts.append(_names(series))
    parts.append("</svg>")
    return "".join(parts)


def ticks_of(low: float, high: float) -> list[float]:
    """Two to seven round numbers within [low, high], or just around its end."""
    step = 10.0 ** math.floor(math.log10(high - low))
    for factor in (2, 1, 0.5, 0.2):
        if (high - low) / (step * factor) >= 2.5:
            step *= factor
            break
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)] or [low]


def short(value: float) -> str:
    """12345.0 -> "12,345", 0.00012 -> "1.2e-4"."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def running_mean(points: Sequence[tuple[float, float]], parts: int) -> list[tuple[float, float]]:
    """The mean of each of `parts` stretches, placed at their middles."""
    size = max(len(points) / parts, 1.0)
    means = []
    for index in range(math.ceil(len(points) / size)):
        stretch = points[round(index * size) : round((index + 1) * size)]
        if stretch:
            xs, ys = zip(*stretch, strict=True)
            means.append((sum(xs) / len(xs), sum(ys) / len(ys)))
    return means


def _curve(one: Series, place: _Place, *, valued: bool) -> list[str]:
    parts = []
    points = list(one.points)
    averaged = one.averaged and len(points) > 60
    if len(points) > _MOST_POINTS:
        points = running_mean(points, _MOST_POINTS)
    if averaged:
        parts.append(_path(points, place, one.colour, 'stroke-width="1" opacity="0.3"'))
        points = running_mean(one.points, 30)
    parts.append(_path(points, place, one.colour, 'stroke-width="1.8"'))
    if not averaged and len(points) <= 40:
        for x, y in points:
            across, up = place(x, y)
            parts.append(
                f'<circle cx="{across:.1f}" cy="{up:.1f}" r="2.6" fill="{one.colour}">'
                f"<title>step {x:,.0f}: {y:.4g}</title></circle>"
            )
    if valued:
        across, up = place(*points[-1])
        above = up - 7 if up > _TOP + 14 else up + 15
        anchor = "end" if across > WIDTH - 60 else "middle"
        text = short(float(f"{points[-1][1]:.3g}"))
        parts.append(_label(text, across, above, anchor=anchor, fill=one.colour, weight=600))
    return parts


def _path(
    points: Sequence[tuple[float, float]], place: _Place, colour: str, attributes: str
) -> str:
    steps = " ".join(f"{across:.1f},{up:.1f}" for across, up in (place(x, y) for x, y in points))
    return (
        f'<polyline fill="none" stroke="{colour}" stroke-linejoin="round" {attributes} '
        f'points="{steps}"/>'
    )


def _label(
    text: str,
    x: float | int,
    y: float | int,
    *,
    size: float | int = 10.5,
    anchor: str = "start",
    fill: str = _MUTED,
    weight: int = 400,
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{fill}" '
        f'font-weight="{weight}">{html.escape(text)}</text>'
    )


def _names(series: Sequence[Series]) -> str:
    """Between the first and the last step, in the colours of the curves."""
    spans = "".join(
        f'<tspan fill="{one.colour}" dx="{10 if index else 0}">{html.escape(one.name)}</tspan>'
        for index, one in enumerate(series)
    )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return (
        f'<text x="{middle}" y="{HEIGHT - 8}" font-size="10.5" text-anchor="middle" '
        f'font-weight="600">{spans}</text>'
    )
