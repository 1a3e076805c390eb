"""The terminal's tables: scores, attacks and their costs, each on a screen of 100 columns."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from duet.cache.errors import EXIT_DONE
from duet.pipeline.cli.main import main
from duet.pipeline.pages.tables import WIDTH, attacks_table, costs_table, kept_lines, results_table
from duet.stages.attacks.run import Cost
from duet.stages.settings.attacks import ATTACKS

SETS = {"forget": 15, "forget_rephrased": 30, "retain": 45, "heldout": 440}
MODELS = ("base", "teacher", "student:base", "base:small", "student:small")
VERDICT = "suppressed until attacked"


def score(value: float) -> dict:
    return {"value": value, "n": 3, "ci95": [value, value]}


def test_each_attacks_row_has_its_own_numbers():
    scores = {
        "attack.reverse.forget.rougeL_recall": score(0.1),
        "attack.reverse_worst.forget.rougeL_recall": score(0.25),
        "attack.reverse_worst.forget.distinctive_recall": score(0.2),
        "attack.reversed_query_worst.forget.rougeL_recall": score(0.3),
        "attack.multiple_choice_worst.forget.rougeL_recall": score(0.4),
        "attack.multiple_choice_worst.forget.picked": score(0.5),
        "attack.sampling.forget.leak@1": score(0.6),
        "attack.sampling.forget.leak@64": score(0.7),
        "attack.logit_lens.forget.mrr_best": score(0.8),
        "attack.reverse_worst.other.forget.rougeL_recall": score(0.9),
    }
    kinds = ("reverse", "reversed_query", "multiple_choice", "sampling", "logit_lens")
    work = {kind: {"works": kind == "sampling", "on": "base", "text": ""} for kind in kinds}
    results = {"models": {"base": scores, "teacher": scores}, "attacks_work": work}
    for verbose, cell in ((False, "{0}.0"), (True, "{0}.0 [{0}.0, {0}.0]")):
        name, works, base, teacher = (list(column.cells) for column in attacks_table(results, verbose).columns)
        told = ["reverse", "reversed_query (ROUGE-L)", "multiple_choice (ROUGE-L)", "sampling", "logit_lens"]
        assert (name, works) == (told, ["no", "no", "no", "yes", "no"])
        assert base == teacher == [cell.format(value) for value in (20, 30, 40, 70, 80)]


def test_the_control_has_a_column_beside_the_models():
    key = "attack.reverse_worst.forget.distinctive_recall"
    results = {"models": {"base": {key: score(1.0)}}, "attacks_work": {"reverse": {"works": True}}}
    table = attacks_table(results | {"control": {key: score(0.1)}})
    assert [list(column.cells) for column in table.columns] == [["reverse"], ["yes"], ["100.0"], ["10.0"]]
    assert "control: a model that never knew" in "\n".join(lines_of(table))
    assert "control" not in "\n".join(lines_of(attacks_table(results)))


def lab_like(sets: dict[str, int] = SETS) -> dict[str, Any]:
    """What results.json holds of an evaluation with every attack, as the tables need it."""
    scores = {f"{name}.rougeL_recall": score(1.0) for name in sets}
    scores |= {
        f"attack.{kind}_worst.forget.{metric}": score(1.0)
        for kind in ATTACKS
        for metric in ("rougeL_recall", "distinctive_recall")
    }
    return {
        "sets": {name: {"n": n} for name, n in sets.items()},
        "models": dict.fromkeys(MODELS, scores),
        "outcomes": {model: {"verdict": VERDICT} for model in MODELS},
        "performance_shift": {model: {"value": -100.0} for model in MODELS[1:]},
        "floors": {"forget.rougeL_recall": {"refusal": 0.0, "echo": 0.04}},
        "attacks_work": {kind: {"works": kind != "relearn"} for kind in ATTACKS},
    }


def lines_of(table: Any, width: int | None = None) -> list[str]:
    """As the command prints it into a file, which is 160 columns wide."""
    console = Console(file=io.StringIO(), width=160, highlight=False, soft_wrap=True)
    console.print(table, width=width)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_the_tables_of_an_evaluation_like_the_labs_fit_without_being_squeezed():
    results = lab_like()
    costs = {kind: Cost(12_345, 1_234_567, 12_345_678, 123_456) for kind in ("questions", *ATTACKS)}
    for table, rows in (
        (results_table(results), len(MODELS)),
        (attacks_table(results), len(ATTACKS)),
        (costs_table(costs, len(MODELS)), len(costs)),
    ):
        lines = lines_of(table)
        assert len(lines) <= 1 + rows + 2, "a heading, a line per row, and at most two lines that explain"
        assert max(map(len, lines)) <= WIDTH
        assert lines == lines_of(table, WIDTH)


def test_a_table_of_many_sets_is_folded_with_every_number_whole():
    names = {f"a_set_of_questions_{number}": 9 for number in range(8)}
    lines = lines_of(results_table(lab_like(names)), WIDTH)
    assert max(map(len, lines)) <= WIDTH
    assert sum(line.count("100.0") for line in lines) == len(MODELS) * len(names)


def test_an_attack_that_a_student_was_trained_on_is_marked_in_its_column_alone():
    results = lab_like() | {"students": {"base": {"trained_on": ["reverse"]}, "small": {}}}
    table = attacks_table(results)
    columns = {
        str(column.header): dict(zip(table.columns[0].cells, column.cells, strict=True)) for column in table.columns
    }
    assert columns["student:base"]["reverse"] == "100.0+"
    marked = [(model, kind) for model in MODELS for kind, cell in columns[model].items() if cell.endswith("+")]  # type: ignore[union-attr]
    assert marked == [("student:base", "reverse")]
    assert "+: trained on texts of this attack" in "\n".join(lines_of(table))
    assert max(map(len, lines_of(table))) <= WIDTH


def test_questions_to_be_kept_behind_texts_stand_beside_the_students_own_base():
    def kept(recall: float, refused: float) -> dict:
        plain = {"plain.rougeL_recall": score(0.99), "plain.refusal_rate": score(0.01)}
        return {"reverse": {"rougeL_recall": score(recall), "refusal_rate": score(refused)} | plain}

    found = {"base": kept(0.9, 0.0), "student:base": kept(0.8, 0.2), "base:small": kept(0.7, 0.05)}
    found |= {"student:small": kept(0.6, 0.3)}
    lines = kept_lines({"kept_under_attack": found})
    assert lines == [
        "student:base, 3 questions to be kept behind reverse texts: recall 80.0 [80.0, 80.0], without 99.0, base 90.0; "
        "refused 20.0 [20.0, 20.0] %, without 1.0, base 0.0",
        "student:small, 3 questions to be kept behind reverse texts: recall 60.0 [60.0, 60.0], without 99.0, base 70.0; "
        "refused 30.0 [30.0, 30.0] %, without 1.0, base 5.0",
    ]


@pytest.mark.parametrize("verbose", [False, True])
def test_the_scores_end_with_the_verdict_and_the_details_come_with_verbose(verbose):
    table = results_table(lab_like(), verbose)
    headers = [str(column.header) for column in table.columns]
    text = "\n".join(lines_of(table))
    assert headers[-1] == "verdict"
    assert list(table.columns[-1].cells)[: len(MODELS)] == [VERDICT] * len(MODELS)
    for detail in ("n=440", "[100.0, 100.0]", "performance", "floor: echo", "4.0"):
        assert (detail in text) == verbose, detail
    if not verbose:
        assert headers[1:-1] == [*SETS]


def test_a_dry_run_tells_the_costs_and_starts_nothing(lab_config, tmp_path, capsys):
    config = str(lab_config(evaluate__attacks="all", train__epochs=1))
    for stage in ("teacher-logits", "distill"):
        assert main([stage, "--config", config]) == EXIT_DONE
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main(["evaluate", "--config", config, "--dry-run"]) == EXIT_DONE
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    costs = {
        row[0]: [int(cell.replace(",", "")) for cell in row[1:]]
        for row in rows
        if len(row) == 5 and row[1][0].isdigit()
    }
    assert set(ATTACKS) - {"translation"} <= costs.keys()
    assert costs["sampling"][0] == 4 * 15 * 4, "three models and the control, the forget questions, 4 answers each"
    assert costs["quantize_int4"] == [2 * number for number in costs["quantize_int8"]], "groups of 32 and of 64"
    assert costs["relearn"][3] == 4 * 3 * 5 * 40, (
        "three models and the control; 1 pair, 5 pairs and benign; five rates; 40 steps"
    )
    assert costs["logit_lens"][2:] == [0, 0]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_names_of_three_seeds_students_stay_whole_in_the_head():
    seeds = [f"student:base-seed{number}" for number in range(3)]
    results = lab_like()
    scores = results["models"]["base"]
    results = results | {"models": dict.fromkeys(("base", "teacher", *seeds), scores), "control": scores}
    head = []
    for line in lines_of(attacks_table(results), 80):
        if line.startswith(("reverse", "prefix_injection")):
            break
        head.append(line)
    assert "…" not in "".join(head)
    assert all(f"d{number}" in "".join(head) for number in range(3))
