"""Students of stores whose ids were drawn: one loss, which knows how often each id came, and no other."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from student_jobs import job, train
from support import LAB_SMALL, LAB_VOCAB_SIZE, make_plan, make_rows, write_store

from duet.cache.errors import UserError
from duet.cache.location import Folder
from duet.cache.record import Rows
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import TeacherSettings
from duet.stages.student.checks import check_settings
from duet.stages.student.passes import passes_of
from duet.stages.student.targets import mixed
from duet.stages.student.train import open_store

K = 5


def drawn_rows() -> Rows:
    rows = make_rows(range(20), positions=3, top_k=K, vocab_size=LAB_VOCAB_SIZE, forget=10)
    draws = np.random.default_rng(0).multinomial(K - 1, np.ones(K) / K, len(rows.topk_ids_NK)).astype(np.int32)
    return replace(rows, draws_NK=draws)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    location, tokenizer = Folder(tmp_path_factory.mktemp("drawn") / "s"), load_tokenizer(LAB_SMALL)
    provenance = {
        "tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64, "engine": "none", "dtype": "float32",
        "ids": {"kind": "sampled", "seed": 0},
    }  # fmt: skip
    plan = make_plan(20, 10, shard_rows=6, top_k=K, vocab_size=LAB_VOCAB_SIZE, provenance=provenance)
    write_store(location, plan, drawn_rows(), tokenizer_files(tokenizer))
    return open_store(location, verify=True)


def test_each_position_has_the_share_of_its_own_draws(drawn):
    rows = drawn_rows()
    targets = mixed([drawn[0].block_of(np.arange(20))], [1.0])
    assert rows.draws_NK is not None
    assert targets.share_NK is not None
    assert np.allclose(targets.share_NK, rows.draws_NK / (K - 1))
    by_ids = {tuple(ids): draws for ids, draws in zip(rows.topk_ids_NK.tolist(), rows.draws_NK.tolist(), strict=True)}
    for one in passes_of(targets, TrainSettings(), pad_id=0):
        assert one.teacher.share_NK is not None
        for ids, share in zip(one.topk_ids_NK.tolist(), one.teacher.share_NK.tolist(), strict=True):
            assert share == pytest.approx([draws / (K - 1) for draws in by_ids[tuple(ids)]])


def test_a_student_learns_from_them_and_says_so(tmp_path, drawn):
    losses = train(job(tmp_path / "s", epochs=12), drawn)
    assert losses[-1] < losses[0]
    summary = json.loads((tmp_path / "s/training.json").read_text())
    assert summary["loss"] == "forward_kl_sampled"
    assert "drawn" in summary["loss_reason"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "huber_raw"}, "train.loss: huber_raw is not for a store whose ids were drawn"),
        ({"loss": "forward_kl_tail"}, "forward_kl_tail is not for a store whose ids were drawn"),
        ({"top_k": 3}, "train.top_k: all draws of a position together"),
    ],
)
def test_what_drawn_ids_cannot_serve_is_refused(tmp_path, drawn, settings, message):
    with pytest.raises(UserError, match=message):
        train(job(tmp_path / "s", **settings), drawn)


def test_other_stores_have_no_draws(tmp_path, store):
    with pytest.raises(UserError, match="forward_kl_sampled is not for a store whose ids were not drawn"):
        train(job(tmp_path / "s", loss="forward_kl_sampled"), store)


def test_an_average_of_drawn_ids_and_a_mix_with_others_are_refused(drawn, store):
    both = [drawn[0].manifest, store[0].manifest]
    with pytest.raises(UserError, match="combine: average needs the same ids"):
        check_settings(TrainSettings(), "forward_kl_sampled", both[:1] * 2, "average", None)
    with pytest.raises(UserError, match="not for a store whose ids were not drawn"):
        check_settings(TrainSettings(), "forward_kl_sampled", both, "mix", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 1}, "top_k of 2 or more"),
        ({"logsumexp": False}, "need the log-sum-exp"),
        ({"engine": "vllm"}, "the engine vllm keeps no sampled ids"),
    ],
)
def test_a_teacher_that_cannot_draw_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TeacherSettings(model="m", prefix="p", ids="sampled", **settings)
    assert TeacherSettings(model="m", prefix="p", ids="sampled").usable_engine == "transformers"
