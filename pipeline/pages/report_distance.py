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
    sets = next(iter(found.values()))
    rows = [
        row(
            f"{of['set']}, distance {of['distance']}",
            [numbers.cell("score", "by_distance", model, number, "kept") for model in found],
        )
        for number, of in enumerate(sets)
    ]
    heads = ["set", *map(escape, found)]
    return section(
        "by-distance", "By distance", note(TEXT) + table("Kept, % [95 % interval], n questions", heads, rows)
    )
