"""What is left of each request of a chain after each later one: a table, and chain.json."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from duet.cache.files import publish_json, read_json
from duet.pipeline.config.chain import set_names, steps_of, student_of
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.results import DISTINCTIVE, HEADLINE
from duet.pipeline.pages.tables import WIDTH, interval, plain_table, points
from duet.pipeline.run.terminal import is_verbose, say, show


def write_chain(config: Config) -> None:
    """Print the table and write chain.json; every run of the chain has been evaluated."""
    found = chain_results(config)
    publish_json(config.run.chain_json, found)
    verbose = is_verbose()
    show(chain_table(found, verbose), width=None if verbose else WIDTH)
    say(f"chain: {config.run.chain_json}")


def chain_results(config: Config) -> dict[str, Any]:
    """The content of chain.json: base's scores, and after each request the student's, by set; of forget sets by request."""
    runs = [config.run, *(step.run for step in steps_of(config))]
    student, after = f"student:{student_of(config).name}", []
    for number, run in enumerate(runs):
        results, called = read_json(run.results), set_names(config, number)
        outcome = results["outcomes"][student]["verdict"]
        after.append({"request": list(called)[-1], "verdict": outcome, **_scores(results, student, called)})
    last, called = read_json(runs[-1].results), set_names(config, len(runs) - 1)
    return {
        "format_version": 1,
        "run": config.name,
        "student": student,
        "base": _scores(last, "base", called),
        "after": after,
    }


def _scores(results: dict[str, Any], model: str, called: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A model's scores of what it says: `requests`, by request; and `sets`, of all else that was asked."""
    kept = [name for name in results["sets"] if name not in called.values()]
    return {
        part: {
            title: {metric: results["models"][model][f"{name}.{metric}"] for metric in (HEADLINE, DISTINCTIVE)}
            for title, name in names.items()
        }
        for part, names in (("requests", called), ("sets", {name: name for name in kept}))
    }


def chain_table(found: dict[str, Any], verbose: bool = False) -> Table:
    """A row for base and after each request; a column for each forget set and further set, and the verdict."""
    columns = [(part, title) for part in ("requests", "sets") for title in _titles(found, part)]
    caption = "what is said of each request's questions, then of further sets; ROUGE-L recall in points"
    table = plain_table(caption + ("; [95 % interval]" if verbose else "; -v adds intervals"))
    for title in ("after", *(title for _, title in columns), "verdict"):
        table.add_column(title, justify="left" if title in ("after", "verdict") else "right", overflow="fold")
    shown = interval if verbose else points
    for row in ({"request": "base", "verdict": ""} | found["base"], *found["after"]):
        cells = [shown(of[HEADLINE]) if (of := row[part].get(title)) else "" for part, title in columns]
        table.add_row(row["request"], *cells, row["verdict"])
    return table


def _titles(found: dict[str, Any], part: str) -> list[str]:
    return list(dict.fromkeys(title for row in (found["base"], *found["after"]) for title in row[part]))
