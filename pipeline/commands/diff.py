"""`duet diff`: two evaluated runs beside each other. What differs between them, and which numbers moved beyond their intervals.

A number is compared on the same questions, question by question, where both runs kept the scores of each (items.json) and their
data are the same; else from the two intervals. Where the definition of a metric has changed its scores do not compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table

from duet.cache.files import read_json
from duet.pipeline.commands.report import scored_run
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.run.terminal import is_verbose, say_json, show

PARTS = ("settings", "data", "weights", "stores", "versions")
SHOWN = 60  # characters of a value in the terminal
HASH = 12  # characters of a hash that are shown
PAIRED, UNPAIRED = "same questions", "two intervals"


def diff(run_a: str, run_b: str, as_json: bool) -> None:
    """Print how two runs differ."""
    found = differences(scored_run(run_a), scored_run(run_b))
    if as_json:
        say_json(found)
    else:
        show(tables(found, is_verbose()), result=True)


def differences(one: RunDir, other: RunDir) -> dict[str, Any]:
    """What differs, as plain data: each part by key, first run and second; and every number that both have."""
    a, b = read_json(one.results), read_json(other.results)
    facts = [_facts(results) for results in (a, b)]
    kept = [read_json(run.items) if run.items.is_file() else {} for run in (one, other)]
    numbers, changed = _numbers(a, b, kept)
    return {
        "format_version": 1,
        "runs": [str(one.path), str(other.path)],
        **{part: dict(_unequal(facts[0][part], facts[1][part])) for part in PARTS},
        "numbers": numbers,
        "changed_definitions": changed,
        "only_in": [_only(a, b), _only(b, a)],
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
    """Models and scores that only the first has."""
    return [
        model if model not in other["models"] else f"{model}: {key}"
        for model, scores in one["models"].items()
        for key in (scores if model in other["models"] else [model])
        if key not in other["models"].get(model, {})
    ]


def _numbers(
    a: Mapping[str, Any], b: Mapping[str, Any], kept: list[dict[str, Any]]
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every score that both runs have with an interval, by model and metric id; and the ids whose definitions differ."""
    same_data = {name for name, of in _data(a).items() if of == _data(b).get(name)}
    found: dict[str, dict[str, Any]] = {}
    changed: dict[str, None] = {}
    for model, scores in a["models"].items():
        for key, score in scores.items():
            other = b["models"].get(model, {}).get(key)
            if not (other and score.get("ci95") and other.get("ci95")):
                continue
            if _version(a, key) != _version(b, key):
                changed[key] = None
                continue
            pairable = all(name in same_data for name in _sets_in(key, {*a["sets"], *b["sets"]}))
            found.setdefault(model, {})[key] = _moved(model, key, (score, other), kept if pairable else [{}, {}])
    return found, list(changed)


def _data(results: Mapping[str, Any]) -> dict[str, Any]:
    return results.get("provenance", {}).get("data", {})


def _version(results: Mapping[str, Any], key: str) -> Any:
    """The version of a score's metric: the longest id that the score's own ends with."""
    ids = [name for name in results.get("versions", {}) if key == name or key.endswith(f".{name}")]
    return results["versions"][max(ids, key=len)] if ids else None


def _sets_in(key: str, names: set[str]) -> list[str]:
    return [name for name in names if f".{name}." in f".{key}."]


def _moved(
    model: str, key: str, pair: tuple[Mapping[str, Any], Mapping[str, Any]], kept: list[dict[str, Any]]
) -> dict[str, Any]:
    """One number of both runs: its values, the second less the first with its interval, how it was found, and whether it moved.

    It did where the interval leaves 0 out and, question by question, p is below 0.05.
    """
    from duet.stages.evaluate.items import score_of
    from duet.stages.metrics.uncertainty import compare, unpaired_ci95

    one, other = (score_of(items, model, key, record) for items, record in zip(kept, pair, strict=True))
    values = {"values": [record["value"] for record in pair], "n": [record["n"] for record in pair]}
    if one is not None and other is not None and one.clusters == other.clusters:
        found = compare(other, one)
        how = {"how": PAIRED, "p": found["p"], "moved": found["distinguishable"]}
        return {**values, "difference": found["difference"], "ci95": found["ci95"], **how}
    low, high = unpaired_ci95(*pair)
    difference = pair[1]["value"] - pair[0]["value"]
    return {**values, "difference": difference, "ci95": [low, high], "how": UNPAIRED, "moved": low > 0 or high < 0}


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
        yield f"not compared, their definitions differ: {', '.join(found['changed_definitions'])}"
    for run, only in zip(found["runs"], found["only_in"], strict=True):
        if only:
            yield f"only in {run}: {', '.join(only[:5])}{f' and {len(only) - 5} more' if len(only) > 5 else ''}"


def _short(value: Any) -> str:
    """A value as the terminal shows it; of a hash, the beginning."""
    text = "-" if value is None else str(value)
    words = [word[:HASH] if len(word) == 64 and word.isalnum() else word for word in text.split(" ")]
    text = " ".join(words).replace("[", r"\[")
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
