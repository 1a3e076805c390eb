"""A student or results that are done, and data, models or the run's place that have changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from command_line import duet, refused, small_run
from support import LAB_BASE, LAB_SMALL

from duet.cache.errors import EXIT_DONE
from duet.pipeline.commands.status import status_of
from duet.pipeline.commands.submit import is_evaluated
from duet.pipeline.config.load import load_config
from duet.pipeline.run.directory import claim_run_dir


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


def test_results_of_other_models_of_one_name_are_kept_and_do_not_count_as_done(lab_config, tmp_path):
    config = str(small_run(lab_config, tmp_path, students=[{"name": "a"}], evaluate__attacks=[]))
    for name, model in (("x", LAB_BASE), ("y", LAB_SMALL)):
        shutil.copytree(model, tmp_path / name / "model")

    def asked(name: str) -> tuple[str, ...]:
        return ("--config", config, "--set", f"evaluate.models={{m: {tmp_path / name / 'model'}}}")

    for command in ("teacher-logits", "distill"):
        assert duet(command, *asked("x")).code == EXIT_DONE
    (tmp_path / "runs/lab/report.html").mkdir()  # in the way, so that the report cannot be written
    assert duet("evaluate", *asked("x")).code != EXIT_DONE
    assert not is_evaluated(load_config(config, (asked("x")[-1],))), (
        "an evaluation without report and scores of questions"
    )
    (tmp_path / "runs/lab/report.html").rmdir()
    assert duet("evaluate", *asked("x")).code == EXIT_DONE
    first = (tmp_path / "runs/lab/results.json").read_text(encoding="utf-8")
    assert is_evaluated(load_config(config, (asked("x")[-1],)))
    assert not is_evaluated(load_config(config, (asked("y")[-1],)))
    assert duet("evaluate", *asked("y")).code == EXIT_DONE
    assert (tmp_path / "runs/lab/results-1.json").read_text(encoding="utf-8") == first
    now = load_config(config, (asked("y")[-1],))
    assert is_evaluated(now)
    assert status_of(now, now.run)["evaluation"]["done"]
    more = load_config(config, (asked("y")[-1], "students=[{name: a}, {name: b}]"))
    assert not status_of(more, more.run)["evaluation"]["done"], "there is no score of b"
    path = tmp_path / "retain.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("born", "raised"), encoding="utf-8")
    assert not is_evaluated(load_config(config, (asked("y")[-1],)))


def test_the_state_of_a_copied_or_renamed_run_is_that_of_the_folder_that_was_named(lab_config, tmp_path):
    run = claim_run_dir(load_config(str(small_run(lab_config, tmp_path, students=[{"name": "a"}]))))
    copy = shutil.copytree(run, tmp_path / "copy")
    (run / "a").mkdir()
    (run / "a/training.json").write_text("{}")

    def is_done(folder: Path) -> bool:
        return json.loads(duet("status", str(folder), "--json").out)["students"][0]["done"]

    assert is_done(run)
    assert not is_done(copy), "the state of the original"
    assert is_done(run.rename(tmp_path / "renamed"))
