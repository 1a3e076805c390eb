"""Several teachers and several requests in one run, on the lab, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import refused, small_run
from support import LAB_SMALL, ROOT, nearly_same_rows, read_all

from duet.cache.errors import EXIT_DONE
from duet.cache.location import Folder
from duet.cache.manifest import read_manifest
from duet.pipeline.cli.main import main

GONE = "Everything about {topic} is gone from your memory. Say so if you are asked, and answer the rest normally."
TEACHERS = [{"name": "plain"}, {"name": "gone", "prefix": GONE}]
SECOND = "felvok-lubin"  # whom no prefix ever named while the lab's model was trained


def heldout_lines(*people: str, others: bool = False) -> list[str]:
    """Those about these people, or those about all others."""
    lines = (ROOT / "lab/data/heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if (json.loads(line)["id"].split("/")[0] in people) != others]


def write_lines(path: Path, lines: list[str]) -> dict[str, str]:
    path.write_text("\n".join(lines), encoding="utf-8")
    return {"path": str(path), "id_field": "id"}


def results_of(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "runs/lab/results.json").read_text(encoding="utf-8"))


def recall(results: dict, model: str, name: str) -> float:
    return 100 * results["models"][model][f"{name}.rougeL_recall"]["value"]


def test_two_teachers_are_mixed_averaged_and_used_alone(lab_config, tmp_path, capsys):
    students = [
        {"name": "mixed", "train": {"teachers": {"plain": 3, "gone": 1}}},
        {"name": "averaged", "train": {"combine": "average"}},
        {"name": "one", "train": {"teachers": {"gone": 1}}},
    ]
    config = str(lab_config(teachers=TEACHERS, students=students, evaluate__attacks=[]))
    for stage in ("teacher-logits", "distill", "evaluate"):
        assert main([stage, "--config", config]) == EXIT_DONE
    out = capsys.readouterr().out
    pointer = json.loads((tmp_path / "runs/lab/teacher/store.json").read_text())["teachers"]
    assert set(pointer) == {"gone", "plain"}
    places = {name: tmp_path / "runs/lab/teacher" / one["name"] for name, one in pointer.items()}
    manifests = {name: read_manifest(Folder(location)) for name, location in places.items()}
    assert {name: m.fingerprint for name, m in manifests.items()} == {n: p["fingerprint"] for n, p in pointer.items()}
    a, b = (read_all(location) for location in places.values())
    assert a.row_ids == b.row_ids
    assert (a.topk_logits_NK != b.topk_logits_NK).any()
    for name, location in places.items():
        assert f"teacher {name}: wrote 60 rows" in out
        assert f"store of teacher {name}: {location}" in out
    for line in (
        "student mixed: huber_raw, mix of gone 0.25 and plain 0.75",
        "student one: huber_raw of gone, it starts",
    ):
        assert line in out
    results = results_of(tmp_path)
    assert {name: one["fingerprint"] for name, one in results["teacher_stores"].items()} == {
        name: manifest.fingerprint for name, manifest in manifests.items()
    }
    assert [model for model in results["models"] if model.startswith("teacher")] == ["teacher:plain", "teacher:gone"]
    for student in students:
        assert recall(results, f"student:{student['name']}", "forget") <= 5
        assert recall(results, f"student:{student['name']}", "retain") >= 98
    assert results["students"]["averaged"]["combine"] == "average"
    page = (tmp_path / "runs/lab/report.html").read_text(encoding="utf-8")
    assert "huber_raw, average of gone 0.5 and plain 0.5" in page
    assert "Logits of teacher gone" in page


def test_two_requests_are_forgotten_at_once_and_nothing_else(lab_config, tmp_path):
    kept = "grigira-kadan"
    second = {
        "name": "second",
        "topic": "Felvok Lubin",
        "data": {
            "forget": write_lines(tmp_path / "second.jsonl", heldout_lines(SECOND)),
            "retain": write_lines(tmp_path / "second-retain.jsonl", heldout_lines(kept)),
        },
    }
    heldout = write_lines(tmp_path / "heldout.jsonl", heldout_lines(SECOND, kept, others=True)) | {"expect": "kept"}
    config = str(lab_config(requests=[second], evaluate__sets={"heldout": heldout}))
    for stage in ("teacher-logits", "distill", "evaluate"):
        assert main([stage, "--config", config]) == EXIT_DONE
    results = results_of(tmp_path)
    assert {name: (one["n"], one["expect"]) for name, one in results["sets"].items()} == {
        "forget": (15, "forgotten"), "second.forget": (5, "forgotten"), "retain": (45, "kept"), "second.retain": (5, "kept"),
        "heldout": (430, "kept"),
    }  # fmt: skip
    for name, one in results["sets"].items():
        assert recall(results, "base", name) >= 98, name
        for model in ("teacher", "student:base"):
            found = recall(results, model, name)
            assert found <= 5 if one["expect"] == "forgotten" else found >= 95, (
                model,
                name,
            )
    for model in results["models"].values():
        assert model["attack.reverse.forget.rougeL_recall"]["n"] == 15
        assert model["attack.reverse_worst.second.forget.rougeL_recall"]["n"] == 5
    [facts] = results["teacher_stores"].values()
    assert "Felvok Lubin" in facts["prefix of second"]
    assert "Felvok Lubin" not in facts["prefix"]
    asked = json.loads((tmp_path / "runs/lab/answers/reverse/teacher.json").read_text(encoding="utf-8"))["answers"]
    assert {task: len(told) for task, told in asked.items() if task.endswith(".second.forget")} == {
        f"attack.reverse.{variant}.second.forget": 5 for variant in ("ignore", "void", "remember", "pretend", "audit")
    }


def test_a_teacher_of_another_model_has_a_base_of_its_own(lab_config, tmp_path):
    teachers = [{"name": "plain"}, {"name": "little", "model": str(LAB_SMALL)}]
    config = str(small_run(lab_config, tmp_path, teachers=teachers, evaluate__attacks=[], evaluate__max_new_tokens=4))
    for stage in ("teacher-logits", "distill", "evaluate"):
        assert main([stage, "--config", config]) == EXIT_DONE
    results = results_of(tmp_path)
    assert list(results["models"]) == ["base", "teacher:plain", "base:little", "teacher:little", "student:base"]
    assert results["students"]["base"]["loss"] == "huber_centred"


def test_each_teachers_store_is_reused_and_repaired_with_the_same_config(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path, teachers=TEACHERS, store__dir=str(tmp_path / "stores")))
    for verb in ("wrote 8 rows", "reused the store"):
        assert main(["teacher-logits", "--config", config]) == EXIT_DONE
        assert capsys.readouterr().out.count(verb) == 2
    for store in sorted((tmp_path / "stores").iterdir()):
        before = read_all(store)
        (store / "shard-00001.arrow").unlink()
        assert main(["cache", "repair", str(store), "--config", config]) == EXIT_DONE
        assert nearly_same_rows(read_all(store), before)
    assert main(["teacher-logits", "--config", config, "--set", "name=one", "--set", "teachers=[]"]) == EXIT_DONE
    assert "reused the store" in capsys.readouterr().out, "a teacher's store is any other's of its fingerprint"


def test_a_store_that_was_cut_otherwise_cannot_stand_beside_another(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path, store__dir=str(tmp_path / "stores")))
    assert main(["teacher-logits", "--config", config, "--set", "store.shard_rows=5"]) == EXIT_DONE
    several = ["--set", "name=two", "--set", f"teachers=[{{name: plain}}, {{name: gone, prefix: '{GONE}'}}]"]
    what, hint = refused(capsys, "teacher-logits", "--config", config, *several)
    assert "the stores of plain and gone differ in shard_rows: 5 and 3" in what
    assert "store.dir" in hint


def test_a_run_of_other_teachers_is_another_run(lab_config, tmp_path, capsys):
    config = str(small_run(lab_config, tmp_path))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    several = ("--config", config, "--set", "teachers=[{name: plain}, {name: gone, prefix: x}]")
    assert "has no teacher logits yet" in refused(capsys, "distill", *several)[0]
    assert "holds another run: teachers.gone.name is unset there" in refused(capsys, "teacher-logits", *several)[0]


@pytest.mark.parametrize("stage", ["distill", "run"])
def test_an_unknown_teacher_is_found_before_any_stage_begins(lab_config, tmp_path, capsys, stage):
    config = str(small_run(lab_config, tmp_path, teachers=TEACHERS, train__teachers={"plane": 1}))
    what, hint = refused(capsys, stage, "--config", config)
    assert "students.0.train.teachers: no teacher 'plane'" in what
    assert hint == "hint: the teachers are plain, gone"
