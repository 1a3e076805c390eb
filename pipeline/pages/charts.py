"""The pages' charts as inline SVG text: panels of one width, which a phone shows at full size and a screen side by side.

Colours come from one palette per page; whiskers and bands are 95 % intervals. A mark carries the pointer into the numbers'
file that it shows (`data-key`, see `page.py`) and a `<title>` with the numbers, which a mouse brings up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH = 360  # of a panel, in CSS pixels where the page is that wide
FEW = 24  # values of a line that get a mark each
LETTER = 7  # average width of one at the labels' size
# Okabe and Ito's colours, told apart by people with any kind of colour vision; base models are grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREYS = ("#8a8f98", "#b3b7be", "#6b7078")
_DASHES = ("", "6 3", "2 3", "9 3 2 3")  # lines are told apart on paper without colour, too


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour per model; the charts of one page share one such palette."""
    greys, bright = iter(_GREYS * len(models)), iter(_COLOURS * len(models))
    return {model: next(greys if model.split(":")[0] == "base" else bright) for model in models}


def legend_of_lines(palette: Mapping[str, str]) -> str:
    """The lines' meaning, as a list, drawn as `lines` draws them with this palette."""
    items = "".join(
        f'<li><svg class="swatch" viewBox="0 0 24 10" aria-hidden="true"><path d="M0 5H24" stroke="{colour}" stroke-width="3"'
        f' stroke-dasharray="{_DASHES[number % len(_DASHES)] or "none"}"/></svg>{escape(name)}</li>'
        for number, (name, colour) in enumerate(palette.items())
    )
    return f'<ul class="legend">{items}</ul>'


def side_by_side(panels: Sequence[str]) -> str:
    """Panels beside each other as far as the page is wide."""
    return f'<div class="charts">{"".join(panels)}</div>'


def panel(title: str, description: str, height: float, body: str, width: float = WIDTH) -> str:
    """One chart with its caption; `description` is what a screen reader says."""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}. {escape(description)}">'
        f"{body}</svg></figure>"
    )


def keyed(key: str) -> str:
    """The attribute of a mark that shows what stands at this pointer of the numbers' file."""
    return f' data-key="{escape(key)}"' if key else ""


def fitted(text: str, x: float, y: float, room: float, attributes: str = "") -> str:
    """A label that ends at `x`; one that is longer than its room is set narrower, never cut."""
    narrow = f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"' if len(text) * LETTER > room else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="end"{narrow}{attributes}>{escape(text)}</text>'


def room_for(names: Sequence[str], most: float = 126) -> float:
    """Width of a column of labels."""
    return min(max((len(name) for name in names), default=0) * LETTER, most)


def points(score: Mapping[str, Any]) -> str:
    """A score in points as a mark's title says it: `93.3 [86.7, 100.0], n = 15`."""
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}], n = {score['n']}"


@dataclass(frozen=True)
class Bar:
    """One score, 0..1, with its interval; several of one row stand closely under each other."""

    score: Mapping[str, Any]
    colour: str
    title: str
    key: str = ""
    pale: bool = False


def bars(rows: Mapping[str, Sequence[Bar]], title: str, floor: float | None = None, before: float | None = None) -> str:
    """Horizontal bars, by row; the dashed line is the floor, the solid one the score without an attack."""
    left, right, gap = room_for(list(rows)) + 8, 40, 9
    thick = 14 if all(len(row) == 1 for row in rows.values()) else 11
    scale, top = WIDTH - left - right, 6
    parts, y = [], float(top)
    for name, row in rows.items():
        parts.append(fitted(name, left - 8, y + len(row) * thick / 2 + 4, left - 8))
        for bar in row:
            parts.append(_bar(bar, left, y, thick, scale))
            y += thick
        y += gap
    ticks = "".join(
        f'<line class="grid" x1="{left + v * scale:.1f}" x2="{left + v * scale:.1f}" y1="0" y2="{y - 4:.1f}"/>'
        f'<text class="tick" x="{left + v * scale:.1f}" y="{y + 10:.1f}" text-anchor="middle">{v * 100:.0f}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    )
    for kind, share in (("floor", floor), ("before", before)):
        if share is not None:
            x = left + share * scale
            parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{y - 4:.1f}"/>')
    return panel(title, "Points out of 100, whiskers are 95 % intervals.", y + 16, ticks + "".join(parts))


def _bar(bar: Bar, left: float, y: float, thick: float, scale: float) -> str:
    value, (low, high) = bar.score["value"], bar.score["ci95"]
    middle = y + thick / 2
    x_low, x_high = left + low * scale, left + high * scale
    pale = ' fill-opacity="0.45"' if bar.pale else ""
    return (
        f"<g{keyed(bar.key)}><title>{escape(bar.title)}: {points(bar.score)}</title>"
        f'<rect x="{left:.1f}" y="{y + 0.5:.1f}" width="{max(value * scale, 1):.1f}" height="{thick - 1}" rx="1.5" '
        f'fill="{bar.colour}"{pale}/>'
        f'<path class="whisker" d="M{x_low:.1f} {middle:.1f}H{x_high:.1f}M{x_low:.1f} {middle - 3:.1f}v6'
        f'M{x_high:.1f} {middle - 3:.1f}v6"/>'
        f'<text class="value" x="{WIDTH}" y="{middle + 4:.1f}" text-anchor="end">{100 * value:.1f}</text></g>'
    )


@dataclass(frozen=True)
class Dot:
    """Two shares, 0..1, each with its interval where it has one."""

    x: float
    y: float
    x_ci95: Sequence[float] | None = None
    y_ci95: Sequence[float] | None = None
    keys: Sequence[str] = ()  # of x and of y
    shape: str = "circle"  # or of _SPOTS: models of one kind are told apart from others without colour, too


def scatter(
    dots: Mapping[str, Dot],
    palette: Mapping[str, str],
    axes: tuple[str, str],
    title: str,
    upright: Upright | None = None,
) -> str:
    """Labelled dots with whiskers; both axes end at 100 % and begin at the same round number below all of them."""
    if not dots:
        return "<p>Nothing was measured on both subsets.</p>"
    left, top, side, line_height = 44, 8, 216, 16
    lowest = min(min(dot.x, dot.y, *(dot.x_ci95 or ()), *(dot.y_ci95 or ())) for dot in dots.values())
    lowest = min(lowest, upright[1]) if upright else lowest
    lowest = min(max(math.floor(lowest * 10) / 10, 0), 0.9)
    label_x = left + side + 22
    width = max(WIDTH, label_x + room_for(list(dots), math.inf))
    height = max(top + side + 40, top + len(dots) * line_height + 4)

    def place(x: float, y: float) -> tuple[float, float]:
        right, up = ((share - lowest) / (1 - lowest) for share in (x, y))
        return left + right * side, top + (1 - up) * side

    parts = [_square_grid(left, top, side, lowest), _axis_names(left, top, side, side, axes)]
    if upright:
        (x, _), said = place(upright[1], 0), f"{upright[0]}: {axes[0]} {100 * upright[1]:.1f}"
        parts.append(
            f"<g{keyed(upright[2])}><title>{escape(said)}</title>"
            f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + side}"/>'
            f'<text class="tick" x="{x + 4:.1f}" y="{top + side - 5}">{escape(upright[0])}</text></g>'
        )
    # Labels stand in a column beside the plot, in the order of their dots: they never cover each other.
    for number, (name, dot) in enumerate(sorted(dots.items(), key=lambda item: place(item[1].x, item[1].y)[1])):
        (x, y), label_y = place(dot.x, dot.y), top + line_height * (number + 0.5)
        other = f'<path d="M{x:.1f} {y:.1f}{_SPOTS.get(dot.shape)}"'
        spot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"' if dot.shape == "circle" else other
        reach_x = [place(share, 0)[0] for share in dot.x_ci95 or ()] or [x, x]
        reach_y = [place(0, share)[1] for share in dot.y_ci95 or ()] or [y, y]
        said = f"{name}: {axes[0]} {100 * dot.x:.1f}, {axes[1]} {100 * dot.y:.1f}"
        parts.append(
            f"<g{keyed(' '.join(dot.keys))}><title>{escape(said)}</title>"
            f'<path class="leader" d="M{x:.1f} {y:.1f}L{label_x - 4} {label_y:.1f}"/>'
            f'<path class="whisker" d="M{reach_x[0]:.1f} {y:.1f}H{reach_x[1]:.1f}M{x:.1f} {reach_y[0]:.1f}V{reach_y[1]:.1f}"/>'
            f'{spot} fill="{palette[name]}"/>'
            f'<text x="{label_x}" y="{label_y + 4:.1f}">{escape(name)}</text></g>'
        )
    return panel(title, f"{axes[0]} to the right, {axes[1]} upwards.", height, "".join(parts), width)


Upright = tuple[str, float, str]  # a dashed line across the height: its name, its x as a share, and its key
_SPOTS = {"square": "m-5 -5h10v10h-10z", "triangle": "m0 -7l6 11h-12z", "diamond": "m0 -7l6 7l-6 7l-6 -7z"}


def _square_grid(left: float, top: float, side: float, lowest: float) -> str:
    """Six lines each way from `lowest` to 100 %."""
    parts = []
    for share in (i / 5 for i in range(6)):
        x, y, tick = left + share * side, top + (1 - share) * side, 100 * (lowest + (1 - lowest) * share)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + side}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.0f}</text>'
            f'<text class="tick" x="{x:.1f}" y="{top + side + 14}" text-anchor="middle">{tick:.0f}</text>'
        )
    return "".join(parts)


def _axis_names(left: float, top: float, width: float, height: float, axes: tuple[str, str]) -> str:
    middle = top + height / 2
    return (
        f'<text class="name" x="{left + width / 2:.1f}" y="{top + height + 30:.1f}" text-anchor="middle">'
        f'{escape(axes[0])}</text><text class="name" x="11" y="{middle:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 11 {middle:.1f})">{escape(axes[1])}</text>'
    )


@dataclass(frozen=True)
class Line:
    """One series; `bands` are the intervals of its values where it has them."""

    xs: Sequence[float]
    ys: Sequence[float]
    bands: Sequence[Sequence[float]] = ()
    key: str = ""


def curves(by_model: Mapping[str, Sequence[Sequence[float]]], palette: Mapping[str, str], title: str) -> str:
    """Loss over optimizer steps, one line per model; see `lines`."""
    loss = {name: [(step, value) for step, value in pairs if value > 0] for name, pairs in by_model.items()}
    series = {name: Line([s for s, _ in pairs], [v for _, v in pairs]) for name, pairs in loss.items() if pairs}
    if not series:
        return "<p>No training curve was recorded.</p>"
    return lines(series, palette, ("optimizer step", "loss"), title)


def lines(
    series: Mapping[str, Line],
    palette: Mapping[str, str],
    axes: tuple[str, str],
    title: str,
    top: float | None = None,
) -> str:
    """One line per model, not empty; logarithmic where the values are positive and span more than a factor of 20.

    With `top`, the vertical axis is linear and ends there.
    """
    values = [v for line in series.values() for v in (*line.ys, *(edge for band in line.bands for edge in band))]
    log = top is None and min(values) > 0 and max(values) / min(values) > 20
    ticks = _log_ticks(min(values), max(values)) if log else _linear_ticks(top or max(values))
    lowest, highest = (min(ticks[0], *values), max(ticks[-1], *values)) if log else (0.0, top or ticks[-1])
    first, last = (pick(x for line in series.values() for x in line.xs) for pick in (min, max))
    first = min(first, 0)
    left, plot_top, width, height = 48, 8, WIDTH - 48 - 12, 190
    scaled = math.log10 if log else float

    def place(x: float, value: float) -> tuple[float, float]:
        share = (scaled(value) - scaled(lowest)) / ((scaled(highest) - scaled(lowest)) or 1)
        return left + (x - first) / ((last - first) or 1) * width, plot_top + (1 - share) * height

    parts = [_axis_names(left, plot_top, width, height, (axes[0], axes[1] + (", log scale" if log else "")))]
    for tick in ticks:
        y = place(first, tick)[1]
        parts.append(
            f'<line class="grid" x1="{left}" x2="{WIDTH - 12}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,g}</text>'
        )
    for x in sorted({first, (first + last) // 2, last}):
        parts.append(
            f'<text class="tick" x="{place(x, highest)[0]:.1f}" y="{plot_top + height + 15}" text-anchor="middle">{x:g}</text>'
        )
    numbers = {name: number for number, name in enumerate(palette)}
    for name, line in series.items():
        parts.append(_line(name, line, palette[name], _DASHES[numbers[name] % len(_DASHES)], place))
    return panel(title, f"{axes[1]} by {axes[0]}.", plot_top + height + 38, "".join(parts))


def _line(name: str, line: Line, colour: str, dashes: str, place: Any) -> str:
    """A band, the line above it and, where there are few, a mark per value."""
    above = [place(x, high) for x, (_, high) in zip(line.xs, line.bands, strict=False)]
    below = [place(x, low) for x, (low, _) in zip(line.xs, line.bands, strict=False)]
    edge = " ".join(f"{x:.1f},{y:.1f}" for x, y in (*above, *reversed(below)))
    band = f'<polygon points="{edge}" fill="{colour}" fill-opacity="0.15"/>' if edge else ""
    placed = [place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    spots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in placed)
    marks = f'<path class="marks" d="{spots}" stroke="{colour}"/>' if len(placed) <= FEW else ""
    return (
        f"<g{keyed(line.key)}><title>{escape(name)}</title>{band}"
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}" fill="none" stroke-width="1.8" '
        f'stroke="{colour}"{dashed}/>{marks}</g>'
    )


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _linear_ticks(high: float) -> list[float]:
    if high <= 0:
        return [0.0, 1.0]
    step = 10 ** math.floor(math.log10(high)) / 2
    while high / step > 6:
        step *= 2
    return [step * i for i in range(math.ceil(high / step) + 1)]
