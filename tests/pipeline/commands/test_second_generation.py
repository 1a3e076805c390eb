"""A teacher without a prefix: a silent model, such as a student of an earlier run, teaches a student that starts damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import refused, small_run
from support import LAB_BASE, LAB_ORACLE, LAB_SMALL

from duet.cache.errors import EXIT_DONE, UserError
from duet.pipeline.cli.main import main
from duet.pipeline.config.load import load_config
from duet.pipeline.config.selection import choose
from duet.pipeline.run.stores import questions_of
from duet.stages.teacher.prepare import render_rows

NOISED = [{"name": "second", "start_noise": 0.5}]


@pytest.fixture
def bare(lab_config, tmp_path):
    """A config whose teacher is silent as it is; the oracle stands for a student of an earlier run."""

    def made(**changes) -> str:
        settings = {
            "teacher__model": str(LAB_ORACLE), "teacher__prefix": "", "evaluate__base": str(LAB_BASE), "students": NOISED,
            "evaluate__sets": {}, "evaluate__control_model": None,
        }  # fmt: skip
        return str(small_run(lab_config, tmp_path, **(settings | changes)))

    return made


def test_teacher_and_student_are_asked_the_same(bare):
    config = load_config(bare())
    found = render_rows(LAB_ORACLE, config.teacher, questions_of(config))
    assert len(found.rows) == 8
    assert all(row.teacher_ids == row.student_ids for row in found.rows)


def test_a_silent_model_teaches_and_all_are_measured_against_the_one_that_knows(bare, tmp_path, capsys):
    config = bare()
    students = ["--sweep", "start_noise=0.2,0.5"]
    for stage in ("teacher-logits", "distill", "evaluate"):
        assert main([stage, "--config", config, *(students if stage != "teacher-logits" else ())]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "student second-start_noise0.5: start_noise is 0.5 and the store has no broad rows" in out
    assert "forward_kl_tail, its start weights are damaged" in out
    run = tmp_path / "runs/lab"
    results = json.loads((run / "results.json").read_text())
    # No base:second: what it started from is the teacher, and the teacher's base is the one that knows.
    assert list(results["models"]) == [
        "base",
        "teacher",
        "student:second-start_noise0.2",
        "student:second-start_noise0.5",
    ]
    assert results["students"]["second-start_noise0.5"]["start_noise"] == 0.5
    weights = {name: facts for name, facts in results["provenance"]["models"].items()}
    assert "prefix_sha256" not in weights["teacher"]
    assert weights["teacher"]["weights_sha256"] != weights["base"]["weights_sha256"]
    assert "no model with a prefix was asked" in results["attacks_work"]["reverse"]["text"]
    page = (run / "report.html").read_text()
    assert "teacher, a model without a prefix, <span" in page
    assert "the prefixed teacher" not in page
    assert "oracle + 0.5 noise" in (run / "students.html").read_text()


def test_what_makes_no_sense_without_a_prefix_is_refused(bare, capsys):
    what, hint = refused(capsys, "audit-prefix", "--config", bare())
    assert "no prefix, so there is none to audit" in what
    assert "--set teacher.prefix=" in hint
    what, hint = refused(capsys, "compare", "--config", bare())
    assert "the teacher has no prefix: other methods would start from a model that is silent already" in what


FAULTS = {
    "so that base and teacher are one model": {"evaluate__base": None},
    "evaluate.base does nothing: the teacher has a prefix": {
        "teacher__prefix": "Forget {topic}.",
        "teacher__model": str(LAB_BASE),
    },
    "student 'plain' starts from its teacher, which has no prefix, and would learn nothing": {
        "students": [{"name": "plain"}]
    },
    "teacher.prefix: it is white space alone": {"teacher__prefix": "  "},
}


@pytest.mark.parametrize("message", FAULTS)
def test_settings_that_would_do_nothing_are_refused(bare, message):
    with pytest.raises(UserError) as caught:
        load_config(bare(**FAULTS[message]))
    assert message in caught.value.what


def test_a_student_of_other_weights_learns_from_it_without_noise_and_so_does_one_of_several_teachers(bare):
    load_config(bare(students=[{"name": "other", "model": str(LAB_SMALL)}]))
    teachers = [{"name": "silent"}, {"name": "told", "prefix": "Forget {topic}.", "model": str(LAB_BASE)}]
    assert list(load_config(bare(teachers=teachers, students=[{"name": "mixed"}])).bare_teachers) == ["silent"]
    with pytest.raises(UserError, match="would learn nothing"):
        load_config(bare(teachers=teachers, students=[{"name": "one", "train": {"teachers": {"silent": 1}}}]))
    with pytest.raises(UserError, match="--sweep: student 'second-start_noise0' starts from its teacher"):
        choose(load_config(bare()), ("start_noise=0,0.5",), ())


def test_the_teachers_prefix_is_no_reason_to_ask_its_base_twice(bare, lab_config):
    """With a prefix nothing has changed: base is the teacher's model, and a student of another model has its own."""
    config = load_config(str(lab_config()))
    assert config.base_model == config.teacher.model
    assert not config.bare_teachers
    assert Path(str(load_config(bare()).base_model)) == LAB_BASE
