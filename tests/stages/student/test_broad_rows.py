"""Training with broad rows: their weight, their line in the metrics, and the stop on their loss."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import ValidationError
from student_jobs import ONE, job, train
from support import LAB_SMALL, LAB_VOCAB_SIZE, make_plan, make_rows, with_broad, write_store

from duet.cache.errors import Interrupted, UserError
from duet.cache.location import Folder
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.settings.student import TrainSettings, deciding_settings
from duet.stages.student.checks import check_settings
from duet.stages.student.train import open_store


@pytest.fixture(scope="module")
def broad_store(tmp_path_factory):
    """Twelve rows: four of each subset, of which the last four are broad."""
    location = Folder(tmp_path_factory.mktemp("broad") / "s")
    tokenizer = load_tokenizer(LAB_SMALL)
    known = {"tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64}
    plan = make_plan(
        12, 4, top_k=5, vocab_size=LAB_VOCAB_SIZE, provenance=known | {"engine": "none", "dtype": "float32"}
    )
    rows = make_rows(range(12), positions=3, top_k=5, vocab_size=LAB_VOCAB_SIZE, forget=4)
    write_store(location, *with_broad(plan, rows, 4), tokenizer_files(tokenizer))
    return open_store(location, verify=True)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_step_weighs_broad_rows_and_its_line_has_their_loss(tmp_path, broad_store):
    train(job(tmp_path / "s", loss="mse", batch_size=12, epochs=2, broad_weight=3.0), broad_store)
    for line in lines_of(tmp_path / "s"):
        parts = [line[f"loss_{subset}"] for subset in ("forget", "retain", "broad")]
        assert line["loss"] == pytest.approx((parts[0] + parts[1] + 3 * parts[2]) / 5, rel=1e-5)
    summary = json.loads((tmp_path / "s/training.json").read_text(encoding="utf-8"))
    assert 0 <= summary["probe"]["agreement.broad"] <= 1
    assert "12 rows (4 forget, 4 retain, 4 broad)" in (tmp_path / "s/model/README.md").read_text(encoding="utf-8")


def test_runs_without_broad_rows_are_told_as_before(tmp_path, store):
    train(job(tmp_path / "s", epochs=1), store)
    assert all("loss_broad" not in line for line in lines_of(tmp_path / "s"))
    summary = json.loads((tmp_path / "s/training.json").read_text(encoding="utf-8"))
    assert not [key for key in summary["probe"] if "broad" in key]


def test_the_identity_of_a_student_knows_new_settings_only_where_they_do_something(tmp_path, store):
    train(job(tmp_path / "s", epochs=1, probe={"steps": 2, "holdout": 0.2}), store)
    identity = json.loads((tmp_path / "s/student.json").read_text(encoding="utf-8"))["train"]
    assert "broad_weight" not in identity
    assert set(identity["probe"]) == {"steps", "holdout", "rows", "patience"}
    assert deciding_settings(TrainSettings(broad_weight=2))["broad_weight"] == 2
    probe = {"steps": 2, "holdout": 0.2, "stop_within": 0.1}
    assert deciding_settings(TrainSettings(loss="jsd_topk", probe=probe))["probe"]["stop_within"] == 0.1
    assert deciding_settings(TrainSettings())["probe"] is None


@pytest.mark.parametrize(
    ("settings", "subsets", "message"),
    [
        ({"broad_weight": 2.0}, {"forget": 1, "retain": 1}, "broad_weight does nothing: the store has no broad rows"),
        ({"broad_weight": 2.0}, {"forget": 0, "retain": 1}, "broad_weight does nothing: the store has rows of one subset"),
        ({"forget_weight": 2.0}, {"forget": 0, "retain": 1, "broad": 1}, "forget_weight does nothing: the store has no"),
        ({"retain_weight": 2.0, "forget_share": 0.0}, {"forget": 1, "retain": 1}, "does nothing with forget_share 0"),
        ({"retain_weight": 2.0, "forget_share": 0.0}, {"forget": 1, "retain": 1, "broad": 1}, None),
        ({"broad_weight": 2.0}, {"forget": 1, "retain": 1, "broad": 1}, None),
        ({"probe": {"steps": 1, "holdout": 0.5, "stop_within": 1}, "loss": "jsd_topk"}, {"forget": 2, "retain": 0},
         "stop_within does nothing: the store has forget rows only"),
    ],
)  # fmt: skip
def test_weights_that_weigh_nothing_are_refused(store, settings, subsets, message):
    manifest = replace(store[0].manifest, subsets=subsets)
    if message is None:
        check_settings(TrainSettings(**settings), "mse", [manifest], None, ONE)
        return
    with pytest.raises(UserError, match=message):
        check_settings(TrainSettings(**settings), "mse", [manifest], None, ONE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"broad_weight": 2.0, "forget_share": 1.0}, "broad_weight does nothing with forget_share 1"),
        ({"forget_weight": 2.0, "forget_share": 0.0}, "forget_weight does nothing with forget_share 0"),
        ({"probe": {"steps": 1, "stop_within": 0.1}, "loss": "jsd_topk"}, "stop_within does nothing without held-out"),
        ({"probe": {"steps": 1, "holdout": 0.1, "stop_within": 0.1}}, "stop_within is a distance in nats"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainSettings(**settings)


def test_a_distance_to_several_teachers_is_refused(store):
    probe = {"steps": 1, "holdout": 0.1, "stop_within": 0.1}
    with pytest.raises(UserError, match="stop_within has no meaning with a mix"):
        check_settings(TrainSettings(loss="jsd_topk", probe=probe), "jsd_topk", [store[0].manifest] * 2, "mix", ONE)


@pytest.mark.parametrize("patience", [None, 50])
def test_training_ends_where_the_student_is_close_to_the_teacher(tmp_path, broad_store, patience):
    """Close on the held-out broad row, to this distance and at no probe before; what is exported is that student."""
    settings = {"loss": "jsd_topk", "epochs": 60, "batch_size": 4, "export_dtype": "float32"}
    probe = {"steps": 2, "holdout": 0.25}
    train(job(tmp_path / "whole", **settings, probe=probe | {"stop_within": 1e-9}), broad_store)
    losses = {line["step"]: line["probe"]["loss.broad"] for line in lines_of(tmp_path / "whole") if line["probe"]}
    assert len(losses) == 60 * 3 // 2, "a distance that is never reached ends nothing"
    limit = min(loss for step, loss in losses.items() if step <= 20)
    reached = next(step for step, loss in losses.items() if loss <= limit)
    stopping = settings | {"probe": probe | {"stop_within": limit, "patience": patience}}
    train(job(tmp_path / "s", **stopping), broad_store)
    summary = json.loads((tmp_path / "s/training.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["stopped_early"]) == (reached, True)
    assert summary["probe"]["loss.broad"] == pytest.approx(limit, rel=1e-5)
    with pytest.raises(Interrupted):
        train(job(tmp_path / "cut", **stopping), broad_store, stop_after=reached - 1)
    assert len(train(job(tmp_path / "cut", **stopping), broad_store)) == 1


def test_without_broad_rows_the_distance_is_that_on_retain_rows(tmp_path, store):
    probe = {"steps": 3, "holdout": 0.2, "stop_within": 100.0}
    train(job(tmp_path / "s", loss="forward_kl_tail", probe=probe), store)
    [*_, last] = lines_of(tmp_path / "s")
    assert last["step"] == 3
    assert "loss.retain" in last["probe"]
