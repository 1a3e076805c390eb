"""What is left of each request of a chain after each later one: a table, chain.html and chain.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from os.path import relpath
from typing import Any

from rich.table import Table

from duet.cache.files import publish_json, publishing, read_json
from duet.pipeline.config.chain import chained_student, set_names, steps_of
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.charts import Line, colours, legend_of_lines, lines, side_by_side
from duet.pipeline.pages.page import Numbers, note, page, pointer, section, table
from duet.pipeline.pages.results import DISTINCTIVE, HEADLINE
from duet.pipeline.pages.tables import WIDTH, interval, plain_table, points
from duet.pipeline.run.terminal import is_verbose, say, show

PARTS = {"requests": "to be forgotten", "sets": "further sets"}
CAPTION = "What is said of each request's questions, then of further sets; ROUGE-L recall in points"


def write_chain(config: Config) -> None:
    """Print the table and write chain.json and chain.html; every run of the chain has been evaluated."""
    found = chain_results(config)
    publish_json(config.run.chain_json, found)
    with publishing(config.run.chain_page) as temporary:
        temporary.write_text(render(found), encoding="utf-8")
    verbose = is_verbose()
    show(chain_table(found, verbose), width=None if verbose else WIDTH)
    say(f"chain: {config.run.chain_json}")
    say(f"report of the chain: {config.run.chain_page}")


def chain_results(config: Config) -> dict[str, Any]:
    """The content of chain.json: base's scores, and after each request the student's, by set; of forget sets by request."""
    runs = [config.run, *(step.run for step in steps_of(config))]
    student, after = f"student:{chained_student(config).name}", []
    for number, run in enumerate(runs):
        results, called = read_json(run.results), set_names(config, number)
        outcome, report = results["outcomes"][student], relpath(run.report, config.run.path)
        after.append(
            {"request": list(called)[-1], "topic": results["topic"], "verdict": outcome["verdict"], "report": report}
            | by_request(results, student, called)
        )
    last, called = read_json(runs[-1].results), set_names(config, len(runs) - 1)
    return {
        "format_version": 1,
        "run": config.name,
        "student": student,
        "base": by_request(last, "base", called),
        "after": after,
    }


def by_request(results: Mapping[str, Any], model: str, called: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """A model's scores of what it says: `requests`, by request; and `sets`, of all else that was asked."""
    kept = [name for name in results["sets"] if name not in called.values()]
    return {
        part: {
            title: {metric: results["models"][model][f"{name}.{metric}"] for metric in (HEADLINE, DISTINCTIVE)}
            for title, name in names.items()
        }
        for part, names in (("requests", called), ("sets", {name: name for name in kept}))
    }


@dataclass(frozen=True)
class Row:
    """One row of a table of scores by request: its heads, and where its `requests` and `sets` are in the file."""

    heads: Sequence[str]  # text in front of the scores
    path: Sequence[str | int]
    last: str = ""  # behind them


def _rows(found: Mapping[str, Any]) -> list[Row]:
    after = [Row([of["request"]], ("after", at), of["verdict"]) for at, of in enumerate(found["after"])]
    return [Row(["base"], ("base",)), *after]


def _compared_rows(results: Mapping[str, Any]) -> list[Row]:
    """Of each model of compare.json, a row after each request; of those that are not trained, after the last."""
    chain = results["chain"]
    at = [(name, number) for name in results["models"] for number, of in enumerate(chain) if name in of["models"]]
    return [Row([name, chain[number]["request"]], ("chain", number, "models", name)) for name, number in at]


def _columns(numbers: Numbers, rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The part and the title of each column, those of earlier requests first."""
    return list(dict.fromkeys((part, title) for part in PARTS for row in rows for title in numbers.at(*row.path, part)))


def chain_table(found: Mapping[str, Any], verbose: bool = False) -> Table:
    """A row for base and after each request; a column for each forget set and further set, and the verdict."""
    return _table(Numbers(found), _rows(found), ("after",), verbose, "verdict")


def compared_chain_table(results: Mapping[str, Any], verbose: bool = False) -> Table:
    """A row for each model after each request, from compare.json."""
    return _table(Numbers(results), _compared_rows(results), ("model", "after"), verbose)


def _table(numbers: Numbers, rows: Sequence[Row], heads: Sequence[str], verbose: bool, last: str = "") -> Table:
    columns = _columns(numbers, rows)
    shown = plain_table(CAPTION + ("; [95 % interval]" if verbose else "; -v adds intervals"))
    for title in (*heads, *(title for _, title in columns), *([last] if last else [])):
        shown.add_column(title, justify="left" if title in (*heads, last) else "right", overflow="fold")
    for row in rows:
        scores = [numbers.at(*row.path, *column, HEADLINE) for column in columns]
        cells = [(interval if verbose else points)(score) if score else "" for score in scores]
        shown.add_row(*row.heads, *cells, *([row.last] if last else []))
    return shown


def compared_section(results: Mapping[str, Any]) -> str:
    """The same as a part of compare.html."""
    body = _html_table(Numbers(results), _compared_rows(results), ("model", "after"))
    return section("chain", "After each request", body)


def _html_table(numbers: Numbers, rows: Sequence[Row], heads: Sequence[str], last: str = "") -> str:
    columns = _columns(numbers, rows)
    texts = (*heads[1:], *([last] if last else []))
    shown = []
    for row in rows:
        first, *others = (escape(text) for text in row.heads)
        cells = [numbers.cell("score", *row.path, *column, HEADLINE) for column in columns]
        behind = f"<td>{escape(row.last)}</td>" if last else ""
        shown.append(f'<tr><th scope="row">{first}</th>{_texts(others)}{"".join(cells)}{behind}</tr>')
    titles = [escape(title) for _, title in columns]
    return table(f"{CAPTION}, [95 % interval].", [*heads, *titles, *([last] if last else [])], shown, texts)


def _texts(texts: Sequence[str]) -> str:
    return "".join(f"<td>{text}</td>" for text in texts)


def render(found: Mapping[str, Any]) -> str:
    """chain.html, a pure function of chain.json."""
    numbers, after = Numbers(found), found["after"]
    reports = "".join(
        f'<li><a href="{escape(of["report"])}">{escape(of["request"])}</a>: '
        f"{numbers.show('text', 'after', at, 'topic')}, {numbers.show('text', 'after', at, 'verdict')}</li>"
        for at, of in enumerate(after)
    )
    body = (
        section("requests", "Requests", f"<ol>{reports}</ol>")
        + section("table", "After each request", _html_table(numbers, _rows(found), ("after",), "verdict"))
        + section("chart", "Step by step", _charts(found))
    )
    meta = f"Run {found['run']}; {found['student']}, and base before the first request"
    return page(f"{len(after)} requests, one after another", meta, body)


def _charts(found: Mapping[str, Any]) -> str:
    """A chart of the forget sets and one of the further sets: recall after each request, a line for each."""
    numbers, rows = Numbers(found), _rows(found)[1:]  # without base
    of_parts = {part: [title for of, title in _columns(numbers, rows) if of == part] for part in PARTS}
    palette = colours([title for titles in of_parts.values() for title in titles])
    panels = []
    for part, titles in of_parts.items():
        series = {title: _line(numbers, rows, part, title) for title in titles}
        if series:
            axes = ("requests so far", "ROUGE-L recall, points")
            panels.append(lines(series, palette, axes, f"What is said: {PARTS[part]}", top=100))
    explained = "A set's line begins at the first request after which it was asked. Bands are 95 % intervals."
    return note(explained) + legend_of_lines(palette) + side_by_side(panels)


def _line(numbers: Numbers, rows: Sequence[Row], part: str, title: str) -> Line:
    """One set's scores in points, at the number of requests that it was asked after."""
    found = [(x, row.path, numbers.at(*row.path, part, title, HEADLINE)) for x, row in enumerate(rows, start=1)]
    at = [(x, path, score) for x, path, score in found if score]
    return Line(
        [x for x, _, _ in at],
        [100 * score["value"] for _, _, score in at],
        [[100 * end for end in score["ci95"]] for _, _, score in at],
        pointer(*at[-1][1], part, title, HEADLINE),
    )
