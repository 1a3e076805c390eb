"""`duet diff`: each kind of difference is named, numbers are paired where the questions are the same, and only what moved is
said to have moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_results import full_results

from duet.cache.errors import UserError
from duet.cache.files import json_bytes
from duet.pipeline.cli.main import main
from duet.pipeline.commands.diff import PAIRED, UNPAIRED, diff, differences
from duet.pipeline.config.run_dir import RunDir
from duet.stages.evaluate import over_seeds
from duet.stages.evaluate.items import as_json, score_of
from duet.stages.metrics.uncertainty import Score, score

REFERENCES = [f"answer {number // 2}" for number in range(40)]
KEY = "forget.rougeL_recall"


def run_of(folder: Path, values: np.ndarray, with_items: bool = True, **changed: Any) -> RunDir:
    """An evaluated run in which student a has these values per question."""
    found: Score = score(values, REFERENCES)
    results = full_results() | changed
    results["models"]["student:a"] = {KEY: found.as_json()}
    folder.mkdir()
    (folder / "results.json").write_bytes(json_bytes(results))
    if with_items:
        (folder / "items.json").write_bytes(json_bytes(as_json({"student:a": {KEY: found}})))
    return RunDir(folder)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).random(40)


def test_the_same_run_differs_in_nothing(tmp_path, values):
    run = run_of(tmp_path / "a", values)
    found = differences(run, run)
    assert not any(found[part] for part in ("settings", "data", "weights", "stores", "versions", "changed_definitions"))
    assert found["only_in"] == [[], []]
    assert {of["difference"] for scores in found["numbers"].values() for of in scores.values()} == {0.0}
    assert not any(of["moved"] for scores in found["numbers"].values() for of in scores.values())


def test_what_differs_is_named_by_its_key(tmp_path, values):
    other = full_results()
    other["provenance"]["config"]["train"] = {"lr": 0.001, "later": None}
    other["provenance"]["config"]["students"][1]["model"] = "small"
    other["provenance"]["data"]["forget"]["sha256"] = "0" * 64
    other["provenance"]["models"]["student:a"]["weights_sha256"] = "9" * 64
    other["environment"] = {"torch": "2.14.0", "time": "now"}
    other["teacher_stores"]["teacher"]["fingerprint"] = "e" * 64
    found = differences(run_of(tmp_path / "a", values), run_of(tmp_path / "b", values, **other))
    assert found["settings"] == {
        "train.lr": [0.0003, 0.001],
        "train.tags": [[], None],
        "students.b.model": [None, "small"],
    }
    assert found["data"] == {"forget": [f"15 rows, {'d' * 64}", f"15 rows, {'0' * 64}"]}
    assert found["weights"] == {"student:a.weights_sha256": ["2" * 64, "9" * 64]}
    assert found["versions"] == {"torch": ["2.13.0", "2.14.0"]}
    assert found["stores"] == {"teacher": ["f" * 64, "e" * 64]}
    assert found["numbers"]["student:a"][KEY]["how"] == UNPAIRED  # the questions are others
    assert found["numbers"]["student:a"]["forget.rougeL_recall"]["moved"] is False


def test_the_same_questions_show_a_small_move_that_two_intervals_do_not(tmp_path, values):
    lower = values - 0.1 - 0.01 * np.random.default_rng(1).random(40)
    before, after = run_of(tmp_path / "a", values), run_of(tmp_path / "b", lower)
    paired = differences(before, after)["numbers"]["student:a"][KEY]
    assert (paired["how"], paired["moved"]) == (PAIRED, True)
    assert paired["difference"] == pytest.approx(float((lower - values).mean()))
    assert paired["ci95"][0] < paired["difference"] < paired["ci95"][1] < 0
    unpaired = differences(before, run_of(tmp_path / "c", lower, with_items=False))["numbers"]["student:a"][KEY]
    assert (unpaired["how"], unpaired["moved"]) == (UNPAIRED, False)
    assert unpaired["difference"] == pytest.approx(paired["difference"])


def test_a_changed_definition_is_not_compared(tmp_path, values):
    other = full_results()
    other["versions"]["rougeL_recall"] = 4
    found = differences(run_of(tmp_path / "a", values), run_of(tmp_path / "b", values, **other))
    assert KEY in found["changed_definitions"]
    assert KEY not in found["numbers"].get("student:a", {})
    assert (
        found["numbers"]["base"]["forget.refusal_rate"]["values"][0]
        == other["models"]["base"]["forget.refusal_rate"]["value"]
    )


@pytest.mark.parametrize(
    ("key", "metric"),
    [
        ("attack.reverse_worst.forget.rougeL_recall", "attack.reverse_worst"),
        ("attack.reverse_worst.forget.rougeL_recall", "rougeL_recall"),
        ("attack.sampling.forget.leak@16", "leak@k"),
        ("mia.loss.forget", "mia.loss"),
        ("lm_eval.mmlu/5.acc", "lm_eval"),
    ],
)
def test_a_changed_attack_is_a_changed_definition_too(tmp_path, values, key, metric):
    """The metric is named in the middle of the score's id, or in front."""
    runs = []
    for number in (1, 2):
        results = full_results()
        results["versions"] = {"rougeL_recall": 1, "unrelated": number, metric: number}
        run = run_of(tmp_path / str(number), values, **results)
        content = json.loads(run.results.read_bytes())
        content["models"]["student:a"] = {key: score(values).as_json(), "forget.exact_match": score(values).as_json()}
        run.results.write_bytes(json_bytes(content))
        runs.append(run)
    found = differences(*runs)
    assert key in found["changed_definitions"]
    assert set(found["numbers"]["student:a"]) == {"forget.exact_match"}


def test_distinctive_words_of_other_sets_are_another_definition(tmp_path, values):
    """Which words are common is counted over all sets: one more, and the same answer has other distinctive words."""
    runs = []
    for number in (0, 1):
        results = full_results()
        results["provenance"]["data"]["more"] = {"rows": 440, "sha256": str(number) * 64}
        run = run_of(tmp_path / str(number), values, **results)
        content = json.loads(run.results.read_bytes())
        content["models"]["student:a"]["forget.distinctive_recall"] = score(values - 0.5 * number).as_json()
        run.results.write_bytes(json_bytes(content))
        runs.append(run)
    found = differences(*runs)
    assert "forget.distinctive_recall" in found["changed_definitions"]
    assert set(found["numbers"]["student:a"]) == {KEY}
    assert "forget.distinctive_recall" in differences(runs[0], runs[0])["numbers"]["student:a"]


def test_two_intervals_without_a_width_show_no_move(tmp_path, values):
    """One document's perplexity: 20.1 and 20.2 have no intervals that they could leave."""
    runs = [run_of(tmp_path / str(n), values, with_items=False) for n in (1, 2)]
    for run, value in zip(runs, (20.1, 20.2), strict=True):
        content = json.loads(run.results.read_bytes())
        content["models"]["student:a"] = {"neutral.perplexity": {"value": value, "n": 1, "ci95": [value, value]}}
        run.results.write_bytes(json_bytes(content))
    assert differences(*runs)["numbers"]["student:a"]["neutral.perplexity"]["moved"] is False


def test_items_of_another_result_are_not_taken(values):
    found = score(values, REFERENCES)
    kept = json.loads(json_bytes(as_json({"m": {KEY: found, "aggregate": Score(0.5, 3, (0.4, 0.6))}})))
    again = score_of(kept, "m", KEY, found.as_json())
    assert again is not None
    assert again.items.tolist() == found.items.tolist()
    assert again.clusters == found.clusters
    assert score_of(kept, "m", KEY, {**found.as_json(), "value": found.value + 1e-6}) is None
    assert score_of(kept, "m", "aggregate", {"value": 0.5, "n": 3, "ci95": [0.4, 0.6]}) is None


def test_as_text_and_as_json(tmp_path, values, capsys):
    run_of(tmp_path / "a", values)
    other = full_results()
    other["provenance"]["config"]["train"]["lr"] = 0.001
    run_of(tmp_path / "b", values - 0.5, **other)
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    text = capsys.readouterr().out
    assert "train.lr" in text
    assert "1 of" in text
    assert PAIRED in text
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"] == {"train.lr": [0.0003, 0.001]}


def test_a_folder_without_results_is_refused(tmp_path, values):
    run_of(tmp_path / "a", values)
    with pytest.raises(UserError, match=r"has no results\.json"):
        diff(str(tmp_path / "a"), str(tmp_path), as_json=True)


def test_rows_over_seeds_are_compared_over_seeds_and_questions(tmp_path, values):
    """The mean over seeds and questions moves as all seeds do; the interval is that of seeds, not of one model."""

    def seeded(name: str, shift: float, with_items: bool = True) -> RunDir:
        rng = np.random.default_rng(2)
        members = {f"student:{n}": score(values + shift + 0.01 * rng.random(40), REFERENCES) for n in ("a", "b")}
        row = over_seeds.rows_of(
            {"student:s": list(members)},
            {m: {KEY: of} for m, of in members.items()},
            {m: {"verdict": "unclear"} for m in members},
            0,
        )
        results = full_results() | {"over_seeds": row}
        run = run_of(tmp_path / name, values, with_items=False, **results)
        results["models"] |= {m: {KEY: of.as_json()} for m, of in members.items()}
        run.results.write_bytes(json_bytes(results))
        if with_items:
            run.items.write_bytes(json_bytes(as_json({m: {KEY: of} for m, of in members.items()})))
        return run

    before, after = seeded("one", 0.0), seeded("two", -0.2)
    found = differences(before, after)["numbers"]["student:s, over seeds"][KEY]
    assert (found["how"], found["moved"]) == (PAIRED, True)
    assert found["difference"] == pytest.approx(-0.2)
    assert found["values"][1] - found["values"][0] == pytest.approx(-0.2)
    low, high = found["ci95"]
    assert low < -0.2 < high < 0
    unpaired = differences(before, seeded("three", -0.2, with_items=False))["numbers"]["student:s, over seeds"][KEY]
    assert unpaired["how"] == UNPAIRED
    assert unpaired["ci95"][1] > high
    alone = run_of(tmp_path / "alone", values, over_seeds={})
    assert "student:s, over seeds" in differences(before, alone)["only_in"][0]
