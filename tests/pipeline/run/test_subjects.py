"""What a run says of the models that it asks."""

from __future__ import annotations

from report_results import finished_student

from duet.pipeline.config.load import load_config
from duet.pipeline.run.exam import subjects_of
from duet.stages.student.summary import write_summary


def test_a_student_says_on_which_attacks_it_was_trained(lab_config):
    config = load_config(str(lab_config(students=[{"name": "plain"}, {"name": "wide"}])))
    for name, seen in (("plain", None), ("wide", ["reverse", "prefill"])):
        folder = config.run.student(name).path
        folder.mkdir(parents=True)
        write_summary(folder, finished_student(name, trained_on=seen).summary)
    by_name = {subject.name: tuple(subject.trained_on) for subject in subjects_of(config, config.students)}
    assert by_name == {"base": (), "teacher": (), "student:plain": (), "student:wide": ("reverse", "prefill")}
