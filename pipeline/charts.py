"""The pages' charts as inline SVG text: grouped bars with intervals and floors, training curves, labelled dots."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

WIDTH = 760
# Okabe and Ito's colours, told apart by people with any kind of colour vision; base models are grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_GREYS = ("#8a8f98", "#b3b7be", "#6b7078")


def colours(models: Sequence[str]) -> dict[str, str]:
    """A colour per model; the charts of one page share one such palette."""
    greys, bright = iter(_GREYS * len(models)), iter(_COLOURS * len(models))
    return {model: next(greys if model.split(":")[0] == "base" else bright) for model in models}


@dataclass(frozen=True)
class Bar:
    """One bar: its model, a score with interval (0..1), and the floors that it should be read against."""

    model: str
    score: Mapping[str, Any]


def bars(
    groups: Mapping[str, Sequence[Bar]],
    floors: Mapping[str, Mapping[str, float]],
    palette: Mapping[str, str],
    title: str,
) -> str:
    """Horizontal bars, one group per query set; whiskers are 95 % intervals, dashed lines the higher floor."""
    left, right, bar_height, gap = 150, 64, 16, 30
    scale = WIDTH - left - right
    parts, y = [], 26
    for name, group in groups.items():
        parts.append(f'<text class="group" x="0" y="{y}">{escape(name)}</text>')
        top = y + 8
        for number, bar in enumerate(group):
            parts.append(_bar(bar, left, top + number * (bar_height + 4), bar_height, scale, palette[bar.model]))
        bottom = top + len(group) * (bar_height + 4)
        floor = max(floors.get(name, {}).values(), default=None)
        if floor is not None:
            x = left + floor * scale
            parts.append(f'<line class="floor" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 3}" y2="{bottom}"/>')
        y = bottom + gap
    axis = "".join(
        f'<line class="grid" x1="{left + v * scale:.1f}" x2="{left + v * scale:.1f}" y1="14" y2="{y - gap}"/>'
        f'<text class="tick" x="{left + v * scale:.1f}" y="{y - gap + 16}" text-anchor="middle">{v * 100:.0f}</text>'
        for v in (0, 0.25, 0.5, 0.75, 1)
    )
    return _svg(
        WIDTH, y, title, "Points out of 100, whiskers are 95 % intervals, dashes the floor.", axis + "".join(parts)
    )


def _bar(bar: Bar, left: int, y: int, height: int, scale: int, colour: str) -> str:
    value, (low, high) = bar.score["value"], bar.score["ci95"]
    middle = y + height / 2
    x_low, x_high = left + low * scale, left + high * scale
    return (
        f'<text class="name" x="{left - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.model)}</text>'
        f'<rect x="{left}" y="{y}" width="{max(value * scale, 1):.1f}" height="{height}" rx="2" fill="{colour}"/>'
        f'<path class="whisker" d="M{x_low:.1f} {middle}H{x_high:.1f}M{x_low:.1f} {y + 4}V{y + height - 4}'
        f'M{x_high:.1f} {y + 4}V{y + height - 4}"/>'
        f'<text class="value" x="{WIDTH}" y="{middle + 4}" text-anchor="end">{100 * value:.1f}</text>'
    )


def curves(by_model: Mapping[str, Sequence[Sequence[float]]], palette: Mapping[str, str], title: str) -> str:
    """Loss over optimizer steps, one line per model; logarithmic where the losses span more than a factor of 20."""
    lines = {name: [(s, v) for s, v in points if v > 0] for name, points in by_model.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return "<p>No training curve was recorded.</p>"
    values = [v for points in lines.values() for _, v in points]
    low, high, last = min(values), max(values), max(s for points in lines.values() for s, _ in points)
    log = high / low > 20
    ticks = _log_ticks(low, high) if log else _linear_ticks(high)
    bottom, top = (min(ticks[0], low), max(ticks[-1], high)) if log else (0.0, ticks[-1])
    left, height, plot_top = 56, 260, 12
    plot_height, plot_width = height - plot_top - 44, WIDTH - left - 10
    transform = math.log10 if log else float

    def place(step: float, value: float) -> tuple[float, float]:
        share = (transform(value) - transform(bottom)) / ((transform(top) - transform(bottom)) or 1)
        return left + step / last * plot_width, plot_top + (1 - share) * plot_height

    parts = [
        f'<line class="grid" x1="{left}" x2="{WIDTH - 10}" y1="{place(0, t)[1]:.1f}" y2="{place(0, t)[1]:.1f}"/>'
        f'<text class="tick" x="{left - 6}" y="{place(0, t)[1] + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
    ]
    for step in sorted({0, last // 2, last}):
        x = place(step, top)[0]
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 28}" text-anchor="middle">{step:g}</text>')
    parts.append(
        f'<text class="name" x="{left + plot_width / 2}" y="{height - 6}" text-anchor="middle">optimizer step</text>'
    )
    for name, points in lines.items():
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(s, v) for s, v in points))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke-width="1.6" stroke="{palette[name]}">'
            f"<title>{escape(name)}</title></polyline>"
        )
    scale = "logarithmic" if log else "linear"
    return _svg(WIDTH, height, title, f"Loss by optimizer step, {scale} axis.", "".join(parts))


def _log_ticks(low: float, high: float) -> list[float]:
    return [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def _linear_ticks(high: float) -> list[float]:
    step = 10 ** math.floor(math.log10(high)) / 2
    while high / step > 6:
        step *= 2
    return [step * i for i in range(math.ceil(high / step) + 1)]


@dataclass(frozen=True)
class Dot:
    """Two shares, 0..1, and where they are known their 95 % intervals."""

    x: float
    y: float
    x_ci95: tuple[float, float] | None = None
    y_ci95: tuple[float, float] | None = None

    @property
    def lowest(self) -> float:
        return min(self.x, self.y, *(self.x_ci95 or ()), *(self.y_ci95 or ()))


def scatter(dots: Mapping[str, Dot], palette: Mapping[str, str], axes: tuple[str, str], title: str) -> str:
    """Labelled dots; both axes end at 100 % and begin at the same round number below all of them; whiskers are
    intervals."""
    if not dots:
        return "<p>Nothing was measured on both subsets.</p>"
    left, top, side, line_height = 56, 12, 300, 18
    lowest = math.floor(min(dot.lowest for dot in dots.values()) * 10) / 10
    lowest = min(lowest, 0.9)
    label_x, height = left + side + 60, max(top + side + 44, top + len(dots) * line_height)

    def place(dot: Dot) -> tuple[float, float]:
        x, y = ((share - lowest) / (1 - lowest) for share in (dot.x, dot.y))
        return left + x * side, top + (1 - y) * side

    def whiskers(dot: Dot) -> str:
        if not (dot.x_ci95 or dot.y_ci95):
            return ""
        (x_low, _), (x_high, _) = (place(Dot(end, dot.y)) for end in dot.x_ci95 or (dot.x, dot.x))
        (_, y_low), (_, y_high) = (place(Dot(dot.x, end)) for end in dot.y_ci95 or (dot.y, dot.y))
        x, y = place(dot)
        return f'<path class="whisker" d="M{x_low:.1f} {y:.1f}H{x_high:.1f}M{x:.1f} {y_low:.1f}V{y_high:.1f}"/>'

    parts = []
    for tick in (lowest + (1 - lowest) * i / 5 for i in range(6)):
        x, y = place(Dot(tick, tick))
        parts.append(
            f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + side}"/>'
            f'<text class="tick" x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{100 * tick:.0f}</text>'
            f'<text class="tick" x="{x:.1f}" y="{top + side + 16}" text-anchor="middle">{100 * tick:.0f}</text>'
        )
    parts.append(
        f'<text class="name" x="{left + side / 2}" y="{top + side + 38}" text-anchor="middle">{escape(axes[0])}</text>'
        f'<text class="name" x="12" y="{top + side / 2}" text-anchor="middle" '
        f'transform="rotate(-90 12 {top + side / 2})">{escape(axes[1])}</text>'
    )
    # Labels stand in a column beside the plot, in the order of their dots: they never cover each other.
    for number, (name, dot) in enumerate(sorted(dots.items(), key=lambda item: place(item[1])[1])):
        (x, y), label_y = place(dot), top + line_height * (number + 0.5)
        parts.append(
            f'<path class="leader" d="M{x:.1f} {y:.1f}L{label_x - 6} {label_y:.1f}"/>'
            f'{whiskers(dot)}<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{palette[name]}"/>'
            f'<text x="{label_x}" y="{label_y + 4:.1f}">{escape(name)}: {100 * dot.x:.1f} / {100 * dot.y:.1f}</text>'
        )
    return _svg(WIDTH, height, title, f"{axes[0]} to the right, {axes[1]} upwards.", "".join(parts))


def _svg(width: float, height: float, title: str, description: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(description)}</desc>{body}</svg>"
    )
