"""training.json: what is written is read, in the same form, and a file of another form is named."""

from __future__ import annotations

import json

import pytest
from student_jobs import job, train

from duet.cache.errors import UserError
from duet.stages.student.summary import is_trained, read_summary, write_summary

KEYS = [
    "name", "loss", "loss_reason", "teachers", "combine", "head", "steps", "stopped_early", "rows", "train_s", "rows_per_s",
    "tokens_per_s", "stall_share", "peak_memory_gb", "parameters", "trained_parameters", "processes", "left_out", "added_ends",
    "curve", "probe",
]  # fmt: skip


def test_a_summary_is_read_and_written_again_byte_for_byte(tmp_path, store):
    student_dir = tmp_path / "s"
    assert not is_trained(student_dir)
    train(job(student_dir, epochs=1), store)
    assert is_trained(student_dir)
    path = student_dir / "training.json"
    written = path.read_bytes()
    assert list(json.loads(written)) == KEYS
    write_summary(student_dir, read_summary(student_dir))
    assert path.read_bytes() == written
    assert list(json.loads(written)["teachers"]["teacher"]) == ["fingerprint", "weight"]


def test_a_summary_with_other_entries_is_refused_by_its_name(tmp_path, store):
    train(job(tmp_path / "s", epochs=1), store)
    path = tmp_path / "s/training.json"
    raw = json.loads(path.read_text())
    for broken in ({key: raw[key] for key in KEYS if key != "head"}, raw | {"heads": ""}, raw | {"teachers": None}, []):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match=r"training\.json is not as this version of Duet writes it"):
            read_summary(tmp_path / "s")
