"""What our pages are made of: a frame that fetches nothing, tables, and numbers that say where they come from.

Every number that was measured is put on a page by `Numbers`, which marks it with `data-key`, a JSON Pointer (RFC 6901) into the
page's file of numbers, and with `data-as`, how it is written. So a test, or a reader, can compare page and file.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

CSS_PATH = Path(__file__).with_name("report.css")


def page(title: str, meta: str, body: str, script: str = "") -> str:
    """A self-contained page; `title` and `meta` are text, `body` is HTML.

    Its Content-Security-Policy forbids every request, and any style or script but the page's own, by their hashes.
    """
    style = CSS_PATH.read_text(encoding="utf-8")
    scripts = _hash_source(script) if script else "'none'"
    policy = (
        f"default-src 'none'; style-src {_hash_source(style)}; script-src {scripts}; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f'<body><main><h1>{escape(title)}</h1><p class="meta">{escape(meta)}</p>{body}</main>'
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def section(anchor: str, title: str, body: str) -> str:
    """A part of a page that its contents can lead to; `title` is text, `body` is HTML."""
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{body}</section>'


def note(text: str) -> str:
    """A remark in small type; text."""
    return f'<p class="note">{escape(text)}</p>'


def folded(summary: str, body: str) -> str:
    """What is shown on demand, and always in print; `summary` is text, `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def legend(palette: Mapping[str, str]) -> str:
    """The colours' meaning, as a list."""
    items = "".join(
        f'<li><svg class="swatch" viewBox="0 0 10 10" aria-hidden="true"><rect width="10" height="10" rx="2" fill="{colour}"/>'
        f"</svg>{escape(name)}</li>"
        for name, colour in palette.items()
    )
    return f'<ul class="legend">{items}</ul>'


def table(caption: str, heads: Sequence[str], rows: Sequence[str], texts: Collection[str] = ()) -> str:
    """A table that scrolls by itself where it is too wide; heads and rows are HTML, the rows `<tr>` and all.

    Columns hold numbers, but for the first and those that `texts` names by their heads.
    """
    first, *others = heads
    head = f'<th scope="col">{first}</th>' + "".join(
        f'<th class="{"text" if other in texts else "number"}" scope="col">{other}</th>' for other in others
    )
    titled = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table>{titled}'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(head: str, cells: Sequence[str]) -> str:
    """One row; `head` is text, cells are HTML, `<td>` and all."""
    breakable = re.sub(r"([.:/_])(?=\w)", r"\1<wbr>", escape(head))
    return f'<tr><th scope="row">{breakable}</th>{"".join(cells)}</tr>'


def cell(score: Mapping[str, Any] | None) -> str:
    """A table cell with a score in points, its interval and n; a dash where it was not measured."""
    return f'<td class="number">{score_in_points(score) if score else "-"}</td>'


def definition_list(pairs: Mapping[str, Any]) -> str:
    """Names and what they stand for, any text."""
    items = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in pairs.items())
    return f"<dl>{items}</dl>"


def score_in_points(score: Mapping[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f}<small>[{100 * low:.1f}, {100 * high:.1f}] n={score['n']}</small>"


def _score_plain(score: Mapping[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{_plain(score['value'])}<small>[{_plain(low)}, {_plain(high)}] n={score['n']}</small>"


def _score_in_brief(score: Mapping[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{100 * score['value']:.1f} [{100 * low:.1f},&nbsp;{100 * high:.1f}]"


def _plain(number: float | None) -> str:
    """Any number with about three digits that count."""
    if number is None or isinstance(number, bool):
        return str(number)
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def _signed(points: float) -> str:
    return f"{round(points, 1) + 0.0:+.1f}"  # no minus before nothing


# How a value is written, by the name in `data-as`; HTML. A score is an object with value, ci95 and n.
FORMS: Mapping[str, Callable[[Any], str]] = {
    "text": lambda value: escape(str(value)),
    "count": lambda value: f"{value:,}",
    "plain": lambda value: escape(value) if isinstance(value, str) else _plain(value),
    "points": lambda share: f"{100 * share:.1f}",
    "signed": lambda share: _signed(100 * share),
    "signed-points": _signed,
    "interval": lambda ci95: f"[{_signed(100 * ci95[0])}, {_signed(100 * ci95[1])}]",
    "interval-plain": lambda ci95: f"[{_plain(ci95[0])}, {_plain(ci95[1])}]",
    "p": lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
    "rule-of-three": lambda n: f"{min(100, 300 / n):.0f} %",
    "score": score_in_points,
    "score-plain": _score_plain,
    "score-brief": _score_in_brief,
}


@dataclass(frozen=True)
class Numbers:
    """A file of numbers, and its values as marked HTML. Paths are keys from the file's top downwards."""

    data: Mapping[str, Any]

    def at(self, *path: str | int) -> Any:
        """The value at a path; None where there is none."""
        node: Any = self.data
        for key in path:
            if isinstance(node, Mapping):
                node = node.get(key)
            else:
                node = node[int(key)] if isinstance(node, list) and int(key) < len(node) else None
        return node

    def show(self, form: str, *path: str | int, tag: str = "span", css: str = "") -> str:
        """The value at a path, written as `form` says, in an element that names both; a dash where there is none."""
        value = self.at(*path)
        klass = f' class="{css}"' if css else ""
        if value is None:
            return f"<{tag}{klass}>-</{tag}>"
        return f'<{tag}{klass} data-key="{escape(pointer(*path))}" data-as="{form}">{FORMS[form](value)}</{tag}>'

    def cell(self, form: str, *path: str | int) -> str:
        """The same as a table's cell of numbers."""
        return self.show(form, *path, tag="td", css="number")

    def facts(self, *path: str | int, leaving_out: Sequence[str] = ()) -> str:
        """A mapping's entries as a list of names and texts."""
        items = (key for key in self.at(*path) or {} if key not in leaving_out)
        shown = "".join(f"<dt>{escape(str(key))}</dt>{self.show('text', *path, key, tag='dd')}" for key in items)
        return f"<dl>{shown}</dl>"

    def texts(self, *path: str | int, last: str) -> str:
        """The entry `last` of each entry of a mapping, as a list of names and texts."""
        shown = "".join(
            f"<dt>{escape(str(key))}</dt>{self.show('text', *path, key, last, tag='dd')}" for key in self.at(*path)
        )
        return f"<dl>{shown}</dl>"


def pointer(*path: str | int) -> str:
    """A JSON Pointer (RFC 6901)."""
    return "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in path)
