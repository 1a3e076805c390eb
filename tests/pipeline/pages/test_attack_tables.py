"""What a person sees of attacks: what they will cost, and what each brought back."""

from __future__ import annotations

from duet.cache.errors import EXIT_DONE
from duet.pipeline.cli.main import main
from duet.pipeline.pages.tables import attacks_table


def score(value: float) -> dict:
    return {"value": value, "n": 3, "ci95": [value, value]}


def test_each_attacks_row_has_its_own_numbers():
    scores = {
        "attack.reverse.forget.rougeL_recall": score(0.1),
        "attack.reverse_worst.forget.rougeL_recall": score(0.2),
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
    table = attacks_table({"models": {"base": scores, "teacher": scores}, "attacks_work": work})
    name, works, base, teacher = (list(column.cells) for column in table.columns)
    assert (name, works) == (list(kinds), ["no", "no", "no", "yes", "no"])
    assert base == teacher == [f"{value}.0 [{value}.0, {value}.0]" for value in (20, 30, 40, 70, 80)]


def test_a_dry_run_tells_the_costs_and_starts_nothing(lab_config, tmp_path, capsys):
    config = str(lab_config(evaluate__attacks="all", train__epochs=1))
    for stage in ("teacher-logits", "distill"):
        assert main([stage, "--config", config]) == EXIT_DONE
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    assert main(["evaluate", "--config", config, "--dry-run"]) == EXIT_DONE
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    costs = {row[0]: [int(cell.replace(",", "")) for cell in row[1:]] for row in rows}
    assert costs["sampling"][0] == 3 * 15 * 64, "three models, the forget questions, 64 answers each"
    assert costs["quantize_int4"] == [2 * number for number in costs["quantize_int8"]], "groups of 32 and of 64"
    assert costs["relearn"][3] == 4 * 3 * 40, "three models and the control; 1 pair, 5 pairs and benign; 40 steps"
    assert costs["logit_lens"][2:] == [0, 0]
    assert sorted(tmp_path.rglob("*")) == before
