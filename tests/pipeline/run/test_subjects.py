"""What a run says of the models that it asks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_results import finished_student

from duet.cache.errors import UserError
from duet.pipeline.config.load import load_config
from duet.pipeline.run.exam import check_texts_apart, subjects_of
from duet.stages.questions.contexts import context_texts
from duet.stages.student.summary import write_summary


def test_a_student_says_on_which_attacks_it_was_trained(lab_config):
    config = load_config(str(lab_config(students=[{"name": "plain"}, {"name": "wide"}])))
    for name, seen in (("plain", None), ("wide", ["reverse", "prefill"])):
        folder = config.run.student(name).path
        folder.mkdir(parents=True)
        write_summary(folder, finished_student(name, trained_on=seen).summary)
    by_name = {subject.name: tuple(subject.trained_on) for subject in subjects_of(config, config.students)}
    assert by_name == {"base": (), "teacher": (), "student:plain": (), "student:wide": ("reverse", "prefill")}


def test_a_student_of_another_run_brings_along_on_which_attacks_it_was_trained(lab_config, tmp_path):
    models = {"elsewhere": str(a_student_in(tmp_path / "other" / "wide", ["reverse"])), "copy": "lab/models/small"}
    asked = {"models": models, "base": "lab/models/base"}
    teacher = {"model": str(a_student_in(tmp_path / "first" / "deep", ["prefill"])), "prefix": "", "max_positions": 2}
    config = load_config(str(lab_config(teacher=teacher, students=[{"name": "s", "start_noise": 0.5}], evaluate=asked)))
    by_name = {subject.name: tuple(subject.trained_on) for subject in subjects_of(config, ())}
    assert by_name == {"base": (), "teacher": ("prefill",), "model:elsewhere": ("reverse",), "model:copy": ()}


def test_an_attack_on_whose_text_a_student_of_another_run_was_trained_is_refused(lab_config, tmp_path):
    known = context_texts()["reverse"][0]
    (tmp_path / "own.yaml").write_text(json.dumps({"reverse": {"own": {"in_front": known}}}))
    evaluate = {"attack_texts": str(tmp_path / "own.yaml"), "attacks": ["reverse"]}
    for seen, refused in (([], False), (["reverse"], True)):
        model = a_student_in(tmp_path / f"{refused}" / "wide", seen)
        config = load_config(str(lab_config(evaluate=evaluate | {"models": {"elsewhere": str(model)}})))
        if refused:
            with pytest.raises(UserError, match=r"attack reverse, own: model 'elsewhere' is trained on its text"):
                check_texts_apart(config, ())
        else:
            check_texts_apart(config, ())


def a_student_in(folder: Path, seen: list[str]) -> Path:
    """The directory of a model that was trained on texts of these attacks."""
    shutil.copytree("lab/models/small", folder / "model")
    write_summary(folder, finished_student(folder.name, trained_on=seen).summary)
    return folder / "model"
