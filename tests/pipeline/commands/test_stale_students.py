"""A student that is done, and a store that the run has made anew since."""

from __future__ import annotations

import json

from command_line import duet, refused, small_run

from duet.cache.errors import EXIT_DONE


def test_a_student_of_an_earlier_store_is_refused_before_others_are_trained_and_before_it_is_scored(
    lab_config, tmp_path, capsys
):
    config = str(small_run(lab_config, tmp_path, students=[{"name": name} for name in "abc"], evaluate__attacks=[]))
    for command in (["teacher-logits"], ["distill", "--only", "a"]):
        assert duet(*command, "--config", config).code == EXIT_DONE
    path = tmp_path / "retain.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("born", "raised"), encoding="utf-8")
    assert duet("teacher-logits", "--config", config).code == EXIT_DONE
    earlier = json.loads((tmp_path / "runs/lab/a/student.json").read_text())["teachers"]["teacher"]
    now = json.loads((tmp_path / "runs/lab/teacher/store.json").read_text())["teachers"]["teacher"]["fingerprint"]
    said = f"was trained on another store of teacher than the run has now: {earlier[:16]} there and {now[:16]} now"
    for command in (["distill", "--jobs", "2"], ["distill"], ["evaluate", "--only", "a"]):
        assert said in refused(capsys, *command, "--config", config)[0]
    assert not list((tmp_path / "runs/lab").glob("[bc]"))
    assert duet("distill", "--config", config, "--only", "b").code == EXIT_DONE
