"""Pushing to the hub: what is asked of it, that it is asked once, and what a user reads when it fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import pytest
from support import LAB_SMALL, two_sets

from duet.cache.errors import EXIT_DONE, EXIT_USER, UserError
from duet.cache.files import read_json
from duet.pipeline.cli.main import main
from duet.pipeline.config.run_dir import StudentDir
from duet.pipeline.run.hub import push


@pytest.fixture
def student_dir(tmp_path) -> StudentDir:
    (tmp_path / "model").mkdir()
    return StudentDir(tmp_path)


class FakeHub:
    """Stands in for HfApi: writes down what all of its instances are asked; `fails` is the error that an upload ends with."""

    asked: ClassVar[list[tuple]] = []
    fails: ClassVar[Exception | None] = None

    def create_repo(self, repository: str, **how) -> None:
        self.asked.append(("create", repository, how))

    def repo_info(self, repository: str) -> SimpleNamespace:
        return SimpleNamespace(private=not repository.endswith("public"))

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        self.asked.append(("upload", repo_id, folder_path))
        if self.fails:
            raise self.fails
        return SimpleNamespace(oid="abcdef0123456789")


@pytest.fixture
def hub(monkeypatch) -> type[FakeHub]:
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    monkeypatch.setattr(FakeHub, "asked", [])
    monkeypatch.setattr(FakeHub, "fails", None)
    return FakeHub


def test_the_model_goes_to_a_private_repository_once(hub, student_dir, capsys):
    push("s", student_dir, "me/it")
    asked = [("create", "me/it", {"private": True, "exist_ok": True}), ("upload", "me/it", student_dir.model)]
    assert hub.asked == asked
    assert read_json(student_dir.pushed) == {"repository": "me/it", "revision": "abcdef0123456789"}
    assert capsys.readouterr().out == "student s: pushed to me/it, revision abcdef01\n"
    push("s", student_dir, "me/it")
    assert hub.asked == asked
    push("s", student_dir, "me/other")
    assert hub.asked[-1] == ("upload", "me/other", student_dir.model)


def test_a_failure_is_told_and_tried_again_by_the_next_call(hub, student_dir):
    hub.fails = OSError("401 Client Error\nlong story")
    with pytest.raises(UserError) as caught:
        push("s", student_dir, "me/it")
    assert caught.value.what == "student s: pushing to me/it failed: 401 Client Error"
    assert "hf auth login" in caught.value.hint
    assert not student_dir.pushed.exists()
    hub.fails = None
    push("s", student_dir, "me/it")
    assert student_dir.pushed.is_file()


@pytest.mark.parametrize("repository", ["me/it", "not a/repository/name"])
def test_the_real_client_without_a_hub(student_dir, monkeypatch, repository):
    """Nobody answers at this address, and the second is no name at all."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))
    with pytest.raises(UserError, match="student s: pushing to"):
        push("s", student_dir, repository)


def test_distill_pushes_in_the_end_and_a_failure_keeps_the_student(hub, lab_config, tmp_path, capsys):
    rows = [{"question": f"Where was person {i} born?"} for i in range(4)]
    students = [{"name": name, "model": str(LAB_SMALL), "push_to_hub": f"me/{name}"} for name in ("a", "b")]
    config = str(lab_config(data=two_sets(tmp_path, rows), students=students, train__epochs=1))
    assert main(["teacher-logits", "--config", config]) == EXIT_DONE
    hub.fails = OSError("no network")
    assert main(["distill", "--config", config]) == EXIT_USER
    captured = capsys.readouterr()
    assert "pushing to me/a failed: no network" in captured.err
    assert "student b: trained" in captured.out, "the other student does not wait for the hub"
    assert "students: " in captured.out
    hub.fails = None
    assert main(["distill", "--config", config]) == EXIT_DONE
    out = capsys.readouterr().out
    assert out.count("was done already") == 2
    assert out.index("student a: pushed to me/a") < out.index("student b: pushed to me/b")


def test_a_public_repository_gets_nothing(hub, tmp_path):
    with pytest.raises(UserError, match="is public"):
        push("s", StudentDir(tmp_path), "owner/public")
    assert all(asked[0] != "upload" for asked in hub.asked)
