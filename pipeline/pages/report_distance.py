"""The report's table of what is kept by distance from the topic. See `report.py`."""

from __future__ import annotations

from html import escape

from duet.pipeline.pages.page import Numbers, note, row, section, table

TEXT = (
    "Share of base's distinctive recall that is kept on sets at growing distance from the topic, the nearest first: a "
    "model that forgets too much loses these before the others. A dash where base itself is not above the floor."
)


def distance_section(numbers: Numbers) -> str:
    """Sets from near to far by rows, models by columns; nothing where no set has a distance."""
    found = numbers.at("by_distance") or {}
    if not found:
        return ""
    rows = [
        row(
            f"{name}, distance {distance}",
            [numbers.cell("score", "by_distance", "kept", model, name) for model in found["kept"]],
        )
        for name, distance in found["sets"].items()
    ]
    heads = ["set", *map(escape, found["kept"])]
    return section(
        "by-distance", "By distance", note(TEXT) + table("Kept, % [95 % interval], n questions", heads, rows)
    )
