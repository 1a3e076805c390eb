"""`duet diff`: two evaluated runs beside each other. What differs between them, and which numbers moved beyond their intervals.

A number is compared on the same questions, question by question, where both runs kept the scores of each (items.json) and their
data are the same; else from the two intervals. Where the definition of a metric has changed its scores do not compare. Students
that were trained with several seeds are also compared as one row, over their seeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table

from duet.cache.files import read_json
from duet.pipeline.commands.report import scored_run
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.pages.results import DISTINCTIVE
from duet.pipeline.run.terminal import is_verbose, say_json, show

if TYPE_CHECKING:
    from duet.stages.metrics.uncertainty import Score

PARTS = ("settings", "data", "weights", "stores", "versions")
SHOWN = 60  # characters of a value in the terminal
HASH = 12  # characters of a hash that are shown
PAIRED, UNPAIRED = "same questions", "two intervals"
OVER_SEEDS = ", over seeds"  # ends the name of a row of several models


@dataclass(frozen=True)
class Evaluated:
    """One of the two runs."""

    results: Mapping[str, Any]  # results.json
    kept: Mapping[str, Any]  # items.json; empty where the run has none

    @staticmethod
    def of(run: RunDir) -> Evaluated:
        return Evaluated(read_json(run.results), read_json(run.items) if run.items.is_file() else {})

    @cached_property
    def rows(self) -> dict[str, Mapping[str, Any]]:
        """The scores of each model, and of each row over seeds."""
        over_seeds = self.results.get("over_seeds", {})
        return {**self.results["models"], **{f"{row}{OVER_SEEDS}": of["scores"] for row, of in over_seeds.items()}}

    @property
    def data(self) -> Mapping[str, Any]:
        return self.results.get("provenance", {}).get("data", {})

    def versions(self, key: str) -> dict[str, int]:
        """The versions of all that defines a score: the metrics whose ids are a part of its own, as of
        `attack.reverse.forget.rougeL_recall` the attack's and the recall's."""
        whole = re.sub(r"leak@[0-9]+", "leak@k", key)
        own = f".{whole.replace('/', '.')}."
        return {
            name: of for name, of in self.results.get("versions", {}).items() if f".{name.replace('/', '.')}." in own
        }

    def items(self, row: str, key: str) -> list[Score] | None:
        """A score with its items, of each model of the row; None where any of them are not kept."""
        from duet.stages.evaluate.items import score_of

        several = row.removesuffix(OVER_SEEDS)
        models = [row] if several == row else self.results["over_seeds"][several]["models"]
        records = {model: self.results["models"].get(model, {}).get(key) for model in models}
        found = [score_of(self.kept, model, key, record) if record else None for model, record in records.items()]
        whole = [one for one in found if one is not None]
        return whole if len(whole) == len(found) else None


def diff(run_a: str, run_b: str, as_json: bool) -> None:
    """Print how two runs differ."""
    found = differences(scored_run(run_a), scored_run(run_b))
    if as_json:
        say_json(found)
    else:
        show(tables(found, is_verbose()), result=True)


def differences(one: RunDir, other: RunDir) -> dict[str, Any]:
    """What differs, as plain data: each part by key, first run and second; and every number that both have."""
    a, b = Evaluated.of(one), Evaluated.of(other)
    facts = [_facts(side.results) for side in (a, b)]
    numbers, changed = _numbers(a, b)
    return {
        "format_version": 1,
        "runs": [str(one.path), str(other.path)],
        **{part: dict(_unequal(facts[0][part], facts[1][part])) for part in PARTS},
        "numbers": numbers,
        "changed_definitions": changed,
        "only_in": [_only(a.rows, b.rows), _only(b.rows, a.rows)],
    }


def _facts(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What can differ between two runs beside their numbers, by part."""
    provenance = results.get("provenance", {})
    metrics = {f"metric {name}": version for name, version in results.get("versions", {}).items()}
    return {
        "settings": provenance.get("config", {}),
        "data": {name: f"{of['rows']} rows, {of['sha256']}" for name, of in provenance.get("data", {}).items()},
        "weights": provenance.get("models", {}),
        "stores": {name: store.get("fingerprint") for name, store in results.get("teacher_stores", {}).items()},
        "versions": {key: of for key, of in results.get("environment", {}).items() if key != "time"} | metrics,
    }


def _unequal(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Where two trees differ, by dotted key; entries of a list that have names are found by them.

    What is not there counts as null, which is the default of settings that came later.
    """
    one, other = _by_name(one), _by_name(other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in dict.fromkeys([*one, *other]):
            yield from _unequal(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
    elif one != other:
        yield key, [one, other]


def _by_name(node: Any) -> Any:
    named = isinstance(node, list) and node and all(isinstance(entry, Mapping) and "name" in entry for entry in node)
    return {entry["name"]: entry for entry in node} if named else node


def _only(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Rows and scores that only the first has."""
    return [
        row if row not in other else f"{row}: {key}"
        for row, scores in one.items()
        for key in (scores if row in other else [row])
        if key not in other.get(row, {})
    ]


def _numbers(a: Evaluated, b: Evaluated) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every score that both runs have with an interval, by row and metric id; and the ids whose definitions differ, to which
    the distinctive words of other sets belong."""
    same_data = {name for name, of in a.data.items() if of == b.data.get(name)}
    sets = {*a.results["sets"], *b.results["sets"]}
    same_words = a.data == b.data  # of answers, the distinctive ones: which are common is counted over all sets
    found: dict[str, dict[str, Any]] = {}
    changed: dict[str, None] = {}
    for row, scores in a.rows.items():
        for key, score in scores.items():
            other = b.rows.get(row, {}).get(key)
            if not (other and score.get("ci95") and other.get("ci95")):
                continue
            if a.versions(key) != b.versions(key) or (key.endswith(f".{DISTINCTIVE}") and not same_words):
                changed[key] = None
                continue
            pairable = all(name in same_data for name in _sets_in(key, sets))
            items = (a.items(row, key), b.items(row, key)) if pairable else (None, None)
            found.setdefault(row, {})[key] = _moved((score, other), items)
    return found, list(changed)


def _sets_in(key: str, names: set[str]) -> list[str]:
    return [name for name in names if f".{name}." in f".{key}."]


def _moved(
    pair: tuple[Mapping[str, Any], Mapping[str, Any]], items: tuple[list[Score] | None, list[Score] | None]
) -> dict[str, Any]:
    """One number of both runs: its values, the second less the first with its interval, how it was found, and whether it moved.

    It did where the interval leaves 0 out and, question by question, p is below 0.05. `items` are of each run's models, more
    than one in a row over seeds.
    """
    from duet.stages.metrics.uncertainty import unpaired_ci95

    one, other = items
    values = {"values": [record["value"] for record in pair], "n": [record["n"] for record in pair]}
    if one and other and len({score.clusters for score in (*one, *other)}) == 1:
        found = _compared(one, other)
        how = {"how": PAIRED, "p": found["p"], "moved": found["distinguishable"]}
        return {**values, "difference": found["difference"], "ci95": found["ci95"], **how}
    low, high = unpaired_ci95(*pair)
    difference = pair[1]["value"] - pair[0]["value"]
    moved = (low > 0 or high < 0) and low < high  # two intervals without a width say nothing of how far apart is far
    return {**values, "difference": difference, "ci95": [low, high], "how": UNPAIRED, "moved": moved}


def _compared(one: list[Score], other: list[Score]) -> dict[str, Any]:
    """The second less the first on the same questions; over seeds too, where there are several."""
    import numpy as np

    from duet.stages.metrics.seeds import difference
    from duet.stages.metrics.uncertainty import compare

    if len(one) == len(other) == 1:
        return compare(other[0], one[0])
    before, after = ({"": np.stack([score.items for score in scores])} for scores in (one, other))
    return difference(after, before, {"": one[0].clusters}, {"": 1.0})


def tables(found: Mapping[str, Any], verbose: bool = False) -> Group:
    """What `differences` found, to be read: the parts that differ, then the numbers that moved; `verbose`, all numbers."""
    parts = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for column in ("", Path(found["runs"][0]).name, Path(found["runs"][1]).name):
        parts.add_column(column, overflow="fold")
    for part in PARTS:
        parts.add_row(f"[bold]{part}[/bold]", "" if found[part] else "the same", "")
        for key, pair in found[part].items():
            parts.add_row(f"  {key}".replace("[", r"\["), *(_short(value) for value in pair))
    return Group(parts, "", _numbers_table(found["numbers"], verbose), *_notes(found))


def _numbers_table(numbers: Mapping[str, Mapping[str, Any]], verbose: bool) -> Table:
    rows = [(model, key, of) for model, scores in numbers.items() for key, of in scores.items()]
    moved = [row for row in rows if row[2]["moved"]]
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = f"{len(moved)} of {len(rows)} numbers moved beyond their intervals"
    for column in ("model", "number", "first", "second", "difference", "compared by"):
        table.add_column(column, overflow="fold", justify="right" if column in ("first", "second") else "left")
    for model, key, of in rows if verbose else moved:
        low, high = of["ci95"]
        interval = f"{of['difference']:+.3f} [{low:+.3f}, {high:+.3f}]".replace("[", r"\[")
        table.add_row(model, key, *(f"{value:.3f}" for value in of["values"]), interval, of["how"])
    return table


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    if found["changed_definitions"]:
        changed = ", ".join(found["changed_definitions"])
        yield f"not compared, their definitions differ (distinctive words are those of all sets together): {changed}"
    for run, only in zip(found["runs"], found["only_in"], strict=True):
        if only:
            yield f"only in {run}: {', '.join(only[:5])}{f' and {len(only) - 5} more' if len(only) > 5 else ''}"


def _short(value: Any) -> str:
    """A value as the terminal shows it; of a hash, the beginning."""
    text = "-" if value is None else str(value)
    words = [word[:HASH] if len(word) == 64 and word.isalnum() else word for word in text.split(" ")]
    text = " ".join(words).replace("[", r"\[")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
