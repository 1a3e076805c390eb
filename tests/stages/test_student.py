"""Stage two: the right rows reach the head, resume is exact, and only the right tokenizers are let in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import LAB_SMALL, LAB_VOCAB_SIZE, make_plan, make_rows, write_store
from safetensors.torch import load_file

from cache.codec import Block, Layout, encode
from cache.errors import Interrupted, UserError
from cache.places import Folder
from cache.reader import Store
from stages.models import load_tokenizer, tokenizer_files, tokenizer_sha256
from stages.settings import TrainSettings
from stages.student import Group, StudentJob, lr_factor, open_store, supervised_logits, train_student
from stages.tokenizers import check_same_tokenizer

TINY = {
    "vocab_size": LAB_VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ARCHITECTURES = {
    "llama": hf.LlamaConfig(**TINY),
    "llama-tied": hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "qwen2": hf.Qwen2Config(**TINY, num_key_value_heads=1),
    "gemma2-softcap": hf.Gemma2Config(**TINY, num_key_value_heads=1, head_dim=16, final_logit_softcapping=3.0),
    "cohere-scale": hf.CohereConfig(**TINY, logit_scale=0.2),
    "phi-bias": hf.PhiConfig(**TINY),
    "gpt-neox": hf.GPTNeoXConfig(**TINY),
}


def block(count: int, positions: int | None = 3) -> Block:
    rows = make_rows(range(count), positions, top_k=5, vocab_size=LAB_VOCAB_SIZE)
    return encode(rows, Layout(5, LAB_VOCAB_SIZE), "lossless")[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_supervised_logits_are_those_of_the_models_own_forward_pass(name):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.float32).eval()
    group = Group.of(block(5), pad_id=0)
    batch = group.batch
    with torch.no_grad():
        got = supervised_logits(model, batch)
        for n, (row, position) in enumerate(zip(batch.batch_index_N, batch.position_N, strict=True)):
            length = int(batch.attention_mask_BT[row].sum())
            alone = model(batch.input_ids_BT[row : row + 1, :length]).logits[0, position]
            assert torch.allclose(got[n], alone, atol=1e-4)
    assert got.shape == (15, LAB_VOCAB_SIZE)
    assert group.teacher_ids_NK.shape == (15, 5)


def test_a_group_keeps_teacher_rows_beside_student_rows():
    rows = block(4, positions=None)
    group = Group.of(rows, pad_id=0)
    assert np.array_equal(group.teacher_ids_NK.numpy(), rows.topk_ids())
    assert np.array_equal(group.teacher_NK.numpy(), rows.topk_logits())
    assert group.batch.batch_index_N.tolist() == [0, 1, 1, 2, 2, 2, 3]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> tuple[Store, object]:
    place = Folder(tmp_path_factory.mktemp("store") / "s")
    tokenizer = load_tokenizer(LAB_SMALL)
    plan = make_plan(
        20, 10, shard_rows=6, top_k=5, vocab_size=LAB_VOCAB_SIZE,
        provenance={"tokenizer_sha256": tokenizer_sha256(tokenizer)},
    )  # fmt: skip
    rows = make_rows(range(20), positions=3, top_k=5, vocab_size=LAB_VOCAB_SIZE, forget=10)
    write_store(place, plan, rows, tokenizer_files(tokenizer))
    return open_store(place, verify=True)


def job(student_dir: Path, model_dir: Path = LAB_SMALL, **train) -> StudentJob:
    settings = TrainSettings(epochs=3, batch_size=4, accumulation=2, lr=1e-3, checkpoint_steps=3, **train)
    return StudentJob("s", model_dir, student_dir, settings, "cpu")


def train(a_job: StudentJob, store, stop_after: int | None = None) -> list[float]:
    losses: list[float] = []
    train_student(
        a_job, *store, lambda r: losses.append(r.loss), lambda: stop_after is not None and len(losses) >= stop_after
    )
    return losses


def test_interrupted_and_resumed_is_the_unbroken_run_bit_for_bit(tmp_path, store):
    whole = train(job(tmp_path / "whole"), store)
    assert len(whole) == 8  # 3 epochs of 5 batches, two per step, the last alone
    assert whole[-1] < whole[0]
    for cut in (1, 4, 7):
        broken = job(tmp_path / f"cut-{cut}")
        with pytest.raises(Interrupted, match=f"step {cut} of 8"):
            train(broken, store, stop_after=cut)
        assert train(broken, store) == whole[cut:]
        a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", f"cut-{cut}"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        lines = [json.loads(line) for line in (broken.student_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 9))
        assert not (broken.student_dir / "checkpoints").exists()


def test_a_kill_between_checkpoints_repeats_only_what_followed(tmp_path, store):
    """A crash leaves a checkpoint at step 3 and metrics up to step 5, the last line torn."""
    whole = train(job(tmp_path / "whole"), store)
    broken, seen = job(tmp_path / "broken"), []

    class Kill(Exception):
        pass

    def kill_after_five(report):
        seen.append(report.loss)
        if len(seen) == 5:
            raise Kill

    with pytest.raises(Kill):
        train_student(broken, *store, kill_after_five, lambda: False)
    with open(broken.student_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert train(broken, store) == whole[3:]
    a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_student_is_not_trained_again_and_another_is_refused(tmp_path, store):
    first = job(tmp_path / "s")
    train(first, store)
    assert train(first, store) == []
    with pytest.raises(UserError, match=r"holds another run: train.weight_decay is 0.0 there and 0.1 now"):
        train(job(tmp_path / "s", weight_decay=0.1), store)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        train(job(tmp_path / "other"), store)


def test_accumulation_and_batch_size_are_the_same_step(tmp_path, store):
    """Two batches of 4 accumulated give the loss of one batch of 8 of the same rows."""
    one = StudentJob("s", LAB_SMALL, tmp_path / "a", TrainSettings(epochs=1, batch_size=8, lr=1e-3), "cpu")
    two = StudentJob(
        "s", LAB_SMALL, tmp_path / "b", TrainSettings(epochs=1, batch_size=4, accumulation=2, lr=1e-3), "cpu"
    )
    assert np.allclose(train(one, store), train(two, store), rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, store):
    with pytest.raises(UserError, match="the loss is"):
        train_student(
            StudentJob("s", LAB_SMALL, tmp_path / "s", TrainSettings(epochs=50, lr=1e30, max_grad_norm=1e30), "cpu"),
            *store,
            lambda r: None,
            lambda: False,
        )


def test_learning_rate_schedule():
    factors = [lr_factor(step, 10, 0.2, "linear") for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    assert lr_factor(6, 10, 0.2, "cosine") == pytest.approx(0.5)
    assert {lr_factor(step, 10, 0.0, "constant") for step in range(10)} == {1.0}


def change_tokenizer(path: Path, change) -> None:
    raw = json.loads((path / "tokenizer.json").read_text())
    change(raw)
    (path / "tokenizer.json").write_text(json.dumps(raw))


def swap_two_ids(raw) -> None:
    vocabulary = raw["model"]["vocab"]
    a, b = [token for token, id_ in vocabulary.items() if id_ in (300, 301)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def drop_the_last_merges(raw) -> None:
    raw["model"]["merges"] = raw["model"]["merges"][:300]


@pytest.mark.parametrize(
    ("change", "message"), [(swap_two_ids, "2 ids differ, the first is 300"), (drop_the_last_merges, "gives the ids")]
)
def test_a_tokenizer_of_the_same_width_but_another_meaning_is_refused(tmp_path, change, message):
    ours = load_tokenizer(LAB_SMALL)
    ours.save_pretrained(tmp_path / "theirs")
    change_tokenizer(tmp_path / "theirs", change)
    theirs = load_tokenizer(tmp_path / "theirs")
    assert len(theirs) == len(ours)
    with pytest.raises(UserError, match=message):
        check_same_tokenizer(ours, theirs, LAB_VOCAB_SIZE, "s")


def test_a_merely_wider_head_is_accepted_and_trained(tmp_path, store):
    tokenizer = load_tokenizer(LAB_SMALL)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**(TINY | {"vocab_size": LAB_VOCAB_SIZE + 100}), max_position_embeddings=64)
    )
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    losses = train(job(tmp_path / "s", tmp_path / "wide"), store)
    assert losses[-1] < losses[0]
    with pytest.raises(UserError, match="its head has 500 rows"):
        check_same_tokenizer(tokenizer, tokenizer, 500, "s")


def test_a_students_short_context_is_refused(tmp_path, store):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, max_position_embeddings=7))
    model.save_pretrained(tmp_path / "short")
    load_tokenizer(LAB_SMALL).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="context is 7"):
        train(job(tmp_path / "s", tmp_path / "short"), store)
