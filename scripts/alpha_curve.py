"""Draws docs/hardening.md's curve over start_noise from a run's results, and prints its numbers as a table.

    python scripts/alpha_curve.py runs/curve/results.json docs/images/alpha.svg

The run sweeps `start_noise`, asks half of the people in training, and has the others as its set `never_asked`. Every value is
distinctive recall in points, of the student with that share of noise.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from duet.cache.files import publishing, read_json
from duet.pipeline.run.terminal import say

Results = Mapping[str, Any]
Curve = dict[float, float]  # points by share of noise

KEPT, ATTACKED = "without attack", "under attack"
SETS = {
    "forget": "forget",
    "forget_unasked": "forget, not asked",
    "retain": "retain",
    "heldout_unasked": "held-out, asked",
    "never_asked": "never asked",
}
TEXTS = ("reverse", "prefix_injection", "role_play")
WORST = "worst text per question"
WIDTH, HEIGHT, LEFT, TOP, SIDE = 370, 300, 34, 26, 190  # of a panel and its plot, in pixels
MARKS = (
    "M-3-3h6v6h-6z",
    "M0-4L4 3H-4z",
    "M-4 0L0-4L4 0L0 4z",
    "M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "M-3-3L3 3M3-3L-3 3",
)
STYLE = (
    "text{font:11px sans-serif;fill:#333}.name{font-weight:bold}.grid{stroke:#ccc;stroke-width:.6}"
    ".line{fill:none;stroke:#111;stroke-width:1.4}.mark{fill:#fff;stroke:#111;stroke-width:1.3}"
    ".full{fill:#111}.leader{stroke:#999;stroke-width:.5}"
)


def curves_of(results: Results) -> dict[str, dict[str, Curve]]:
    """The curves of both panels, by name."""
    students, models = _students(results), results["models"]
    above, relearning = results["above_control"], results["relearning"]
    kept: dict[str, Curve] = {
        title: {a: 100 * models[name][f"{of_set}.distinctive_recall"]["value"] for a, name in students.items()}
        for of_set, title in SETS.items()
    }
    attacked: dict[str, Curve] = {
        "worst text": {
            a: 100 * max(above[name][kind][WORST]["model"] for kind in TEXTS) for a, name in students.items()
        }
    }
    for case in next(iter(above.values()))["prefill"]:
        title = f"begun, {case.removeprefix('tokens_')} tokens"
        attacked[title] = {a: 100 * above[name]["prefill"][case]["model"] for a, name in students.items()}
    for kind, title in (("quantize_int8", "8 bits"), ("quantize_int4", "4 bits")):
        attacked[title] = {a: 100 * above[name][kind][WORST]["model"] for a, name in students.items()}
    for lesson in next(iter(relearning.values())):
        attacked[f"relearned, {lesson}"] = {
            a: 100 * max(relearning[name][lesson]["distinctive_recall"]) for a, name in students.items()
        }
    return {KEPT: kept, ATTACKED: attacked}


def _students(results: Results) -> dict[float, str]:
    """The names of the students in the results, by their share of noise."""
    shares = {facts.get("start_noise", 0.0): f"student:{name}" for name, facts in results["students"].items()}
    return dict(sorted(shares.items()))


def drawn(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """An SVG of the panels beside each other; lines are told apart by their marks and by names at their ends."""
    panels = [_panel(title, lines, WIDTH * number) for number, (title, lines) in enumerate(curves.items())]
    width = WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="Recall by start_noise">'
        f'<style>{STYLE}</style><rect width="{width}" height="{HEIGHT}" fill="#fff"/>{"".join(panels)}</svg>\n'
    )


def _panel(title: str, lines: Mapping[str, Curve], left: float) -> str:
    last = max(a for curve in lines.values() for a in curve)

    def place(a: float, points: float) -> tuple[float, float]:
        return left + LEFT + a / last * SIDE, TOP + (1 - points / 100) * (HEIGHT - TOP - 50)

    parts = [f'<text class="name" x="{left + LEFT}" y="14">{escape(title)}</text>']
    for points in (0, 25, 50, 75, 100):
        (x, y), end = place(0, points), place(last, points)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {y:.1f}H{end:.1f}"/>')
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{points}</text>')
    for a in sorted({a for curve in lines.values() for a in curve}):
        x, y = place(a, 0)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{a:g}</text>')
    x, y = place(last / 2, 0)
    parts.append(f'<text x="{x:.1f}" y="{y + 36:.1f}" text-anchor="middle">start_noise</text>')
    ends = _spread([place(last, curve[max(curve)])[1] for curve in lines.values()])
    for number, ((name, curve), label_y) in enumerate(zip(lines.items(), ends, strict=True)):
        parts.append(_line(name, [place(a, points) for a, points in curve.items()], number, label_y))
    return "".join(parts)


def _line(name: str, dots: Sequence[tuple[float, float]], number: int, label_y: float) -> str:
    """One line with the marks of its number, and its name behind its end."""
    css = "mark full" if number >= len(MARKS) else "mark"
    mark = f'class="{css}" d="{MARKS[number % len(MARKS)]}"'
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in dots)
    marks = "".join(f'<path {mark} transform="translate({x:.1f} {y:.1f})"/>' for x, y in dots)
    (x, y), label_x = dots[-1], dots[-1][0] + 22
    return (
        f'<path class="line" d="M{path}"/>{marks}'
        f'<path class="leader" d="M{x + 5:.1f} {y:.1f}L{label_x - 9:.1f} {label_y:.1f}"/>'
        f'<path {mark} transform="translate({label_x - 4:.1f} {label_y:.1f})"/>'
        f'<text x="{label_x + 4:.1f}" y="{label_y + 4:.1f}">{escape(name)}</text>'
    )


def _spread(heights: Sequence[float], apart: float = 14) -> list[float]:
    """These heights, moved as little as keeps each `apart` from the next, and none below the lowest of them."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    for before, i in itertools.pairwise(order):
        moved[i] = max(moved[i], moved[before] + apart)
    lowest = max(heights)
    for i in reversed(order):
        moved[i] = min(moved[i], lowest)
        lowest = moved[i] - apart
    return moved


def table(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """The same numbers as Markdown."""
    shares = sorted({a for lines in curves.values() for curve in lines.values() for a in curve})
    rows = ["| start_noise | " + " | ".join(f"{a:g}" for a in shares) + " |", "| --- |" + " --- |" * len(shares)]
    for lines in curves.values():
        rows += [f"| {name} | " + " | ".join(f"{curve[a]:.1f}" for a in shares) + " |" for name, curve in lines.items()]
    return "\n".join(rows)


def main(results: str, drawing: str) -> None:
    curves = curves_of(read_json(Path(results)))
    Path(drawing).parent.mkdir(parents=True, exist_ok=True)
    with publishing(Path(drawing)) as temporary:
        temporary.write_text(drawn(curves), encoding="utf-8")
    say(table(curves))


if __name__ == "__main__":
    main(*sys.argv[1:])
