"""Stage two: the right rows reach the head, resume is exact, and only the right tokenizers are let in."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from student_jobs import ONE, TINY, job, train
from support import LAB_SMALL, LAB_VOCAB_SIZE, ROOT, make_plan, make_rows, write_store

from duet.cache.errors import LOGGER, Interrupted, UserError
from duet.cache.location import Folder
from duet.cache.watch import Watch
from duet.stages.models.identity import weights_sha256
from duet.stages.models.tokenizers import load_tokenizer, tokenizer_files, tokenizer_sha256
from duet.stages.questions.same_prompts import check_same_tokenizer
from duet.stages.settings.data import PromptSettings
from duet.stages.settings.student import TrainSettings
from duet.stages.student.alone import LEASES_NAME
from duet.stages.student.checks import check_settings
from duet.stages.student.loop import lr_factor
from duet.stages.student.losses import LOSSES, TopK, loss_of
from duet.stages.student.train import chosen_loss, open_store, train_student


def test_interrupted_and_resumed_is_the_unbroken_run_bit_for_bit(tmp_path, store):
    whole = train(job(tmp_path / "whole"), store)
    assert len(whole) == 9  # 3 epochs of batches of 8, 8 and 4 rows
    assert whole[-1] < whole[0]
    for cut in (1, 4, 7):
        broken = job(tmp_path / f"cut-{cut}")
        with pytest.raises(Interrupted, match=f"step {cut} of 9"):
            train(broken, store, stop_after=cut)
        assert train(broken, store) == whole[cut:]
        a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", f"cut-{cut}"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        lines = [json.loads(line) for line in (broken.student_dir / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 10))
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
        train_student(broken, {"teacher": store[0]}, store[1], ONE, Watch(on_progress=kill_after_five))
    with open(broken.student_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert train(broken, store) == whole[3:]
    a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ten_kills_at_random_moments_end_in_the_same_weights(tmp_path, store):
    settings = {"epochs": 30, "batch_size": 8, "lr": 1e-3, "checkpoint_steps": 5, "keep_last": 2}
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder, kills in zip(folders, ("0", "10"), strict=True):
        command = [sys.executable, "tests/helpers/kills.py", str(store[0].location), str(LAB_SMALL), str(folder)]
        done = subprocess.run(
            [*command, json.dumps(settings), kills, "0"],
            cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.split()) == int(kills), done.stdout
    assert len(set(done.stdout.split())) >= 5, "the kills hit the same step again and again"
    a, b = (load_file(folder / "model/model.safetensors") for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    a, b = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders)
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in a] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in b
    ]


def test_a_second_process_waits_for_the_first_and_finds_the_student_done(tmp_path, store):
    """As where `duet run` was killed and called again, while the stage that it had started is still at work."""
    waits, second = threading.Event(), []

    class Waits(logging.Handler):
        def emit(self, record):
            assert "another process trains in" in record.getMessage()
            waits.set()

    handler = Waits()
    with ThreadPoolExecutor() as pool:

        def start_another(report):
            if report.step == 2:
                second.append(pool.submit(train, job(tmp_path / "s"), store))
                assert waits.wait(60)

        logging.getLogger(LOGGER).addHandler(handler)
        try:
            train_student(job(tmp_path / "s"), {"teacher": store[0]}, store[1], ONE, Watch(start_another))
        finally:
            logging.getLogger(LOGGER).removeHandler(handler)
        assert second[0].result() == [], "it took steps of its own"
    lines = [json.loads(line) for line in (tmp_path / "s/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_process_whose_student_was_taken_over_writes_nothing_more(tmp_path, store):
    def take_over(report):
        if report.step == 2:
            shutil.rmtree(tmp_path / LEASES_NAME)

    with pytest.raises(UserError, match="another process trains in"):
        train_student(job(tmp_path / "s"), {"teacher": store[0]}, store[1], ONE, Watch(take_over))
    assert not list((tmp_path / "s").glob("checkpoints/*"))


@pytest.mark.parametrize("loss", [name for name, loss in LOSSES.items() if not loss.needs_draws])
def test_every_loss_is_learned_from_the_same_store(tmp_path, store, loss):
    losses = train(job(tmp_path / "s", loss=loss, epochs=12), store)
    assert losses[-1] < losses[0]
    assert json.loads((tmp_path / "s/training.json").read_text())["loss"] == loss


def test_the_loss_is_chosen_by_what_the_student_starts_from(tmp_path, store):
    train(job(tmp_path / "other"), store)
    other = json.loads((tmp_path / "other/training.json").read_text())
    assert other["loss"] == "huber_centred"
    assert "other weights" in other["loss_reason"]
    theirs, start = store[0].manifest, weights_sha256(LAB_SMALL)
    ours = replace(theirs, provenance=theirs.provenance | {"weights_sha256": start})
    assert chosen_loss(TrainSettings(), start, [ours, ours])[0] == "huber_raw"
    assert chosen_loss(TrainSettings(), start, [ours, theirs])[0] == "huber_centred"


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_that_is_0_with_one_id_is_refused_there(store, loss):
    one = replace(store[0].manifest, top_k=1)
    sides = (TopK(torch.tensor([[x]]), torch.tensor([5.0]), share_NK=torch.ones(1, 1)) for x in (1.0, 3.0))
    zero = not loss_of(loss)(*sides)
    if LOSSES[loss].needs_draws:  # for other stores, whose top_k is at least 2
        return
    for settings, manifest in (
        (TrainSettings(loss=loss, top_k=1), store[0].manifest),
        (TrainSettings(loss=loss), one),
    ):
        with pytest.raises(UserError, match="with one id it is always 0") if zero else nullcontext():
            check_settings(settings, loss, [manifest], None, None)


def test_fewer_ids_and_weights_change_what_is_learned(tmp_path, store):
    plain = train(job(tmp_path / "plain", loss="mse"), store)
    fewer = train(job(tmp_path / "fewer", loss="mse", top_k=2), store)
    assert fewer[0] < plain[0]  # the sum over 2 of the 5 ids
    weighted = job(tmp_path / "weighted", loss="mse", forget_weight=9.0)
    train(weighted, store)
    first = json.loads((weighted.student_dir / "metrics.jsonl").read_text().splitlines()[0])
    # 4 of the 8 rows are forget rows, all with 3 positions
    assert first["loss"] == pytest.approx((9 * first["loss_forget"] + first["loss_retain"]) / 10, rel=1e-5)


def test_early_stopping_exports_the_best_and_survives_an_interruption(tmp_path, store):
    """Random teacher rows cannot be generalised: the loss on held-out rows soon rises."""
    settings = {
        "epochs": 200,
        "lr": 3e-3,
        "probe": {"steps": 3, "holdout": 0.2, "patience": 2},
        "export_dtype": "float32",
    }
    train(job(tmp_path / "whole", **settings), store)
    summary = json.loads((tmp_path / "whole/training.json").read_text())
    assert summary["stopped_early"]
    assert summary["probe"]["held_out"]
    assert summary["rows"] == 16
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    probes = {line["step"]: line["probe"]["loss"] for line in lines if line["probe"]}
    assert all(step % 3 == 0 for step in probes)
    best = min(probes, key=probes.__getitem__)
    assert list(probes)[-1] == best + 6
    assert summary["probe"]["loss"] == pytest.approx(probes[best], rel=1e-5), "the exported weights are not the best"
    cut = list(probes)[-1] - 2
    with pytest.raises(Interrupted):
        train(job(tmp_path / "broken", **settings), store, stop_after=cut)
    train(job(tmp_path / "broken", **settings), store)
    a, b = (load_file(tmp_path / d / "model/model.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints_are_kept_as_asked(tmp_path, store):
    with pytest.raises(Interrupted):
        train(job(tmp_path / "s", keep_last=2, checkpoint_steps=2), store, stop_after=7)
    found = sorted(path.name for path in (tmp_path / "s/checkpoints").iterdir())
    assert found == ["step-000000006", "step-000000007"]
    files = {path.suffix for path in (tmp_path / "s/checkpoints").rglob("*") if path.is_file()}
    assert files == {".json", ".safetensors"}


def test_the_model_card_tells_where_it_came_from_and_not_what_was_forgotten(tmp_path, store):
    train(job(tmp_path / "s"), store)
    card = (tmp_path / "s/model/README.md").read_text()
    for expected in (
        "huber_centred",
        store[0].manifest.fingerprint[:16],
        "20 rows (10 forget, 10 retain)",
        "k = 5; prefix on no rows",
        "small",
    ):
        assert expected in card, expected
    assert str(tmp_path) not in card


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


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, store):
    with pytest.raises(UserError, match="the loss is"):
        train(job(tmp_path / "s", epochs=50, lr=1e30, max_grad_norm=1e30), store)


def test_learning_rate_schedule():
    factors = [lr_factor(step, 10, 0.2, "linear") for step in range(10)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 8)
    assert lr_factor(6, 10, 0.2, "cosine") == pytest.approx(0.5)
    assert lr_factor(6, 100, 0.07, "constant") == 1, "0.07 * 100 is a little more than 7"
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
        check_same_tokenizer(ours, theirs, PromptSettings(), "s")


def test_a_merely_wider_head_is_accepted_and_trained(tmp_path, store):
    tokenizer = load_tokenizer(LAB_SMALL)
    model = hf.LlamaForCausalLM(
        hf.LlamaConfig(**(TINY | {"vocab_size": LAB_VOCAB_SIZE + 100}), max_position_embeddings=64)
    )
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    losses = train(job(tmp_path / "s", tmp_path / "wide"), store)
    assert losses[-1] < losses[0]


def test_a_students_short_context_is_refused(tmp_path, store):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, max_position_embeddings=7))
    model.save_pretrained(tmp_path / "short")
    load_tokenizer(LAB_SMALL).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match="context is 7"):
        train(job(tmp_path / "s", tmp_path / "short"), store)


def test_a_head_that_is_too_narrow_for_the_stores_ids_is_refused_with_the_rows_id(tmp_path, store):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(TINY | {"vocab_size": 900})))
    model.save_pretrained(tmp_path / "narrow")
    load_tokenizer(LAB_SMALL).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match=r"row 'forget/\d+' has the id \d+, and student 's' has a head of 900 rows"):
        train(job(tmp_path / "s", tmp_path / "narrow"), store)
    assert not (tmp_path / "s").exists()


def test_only_what_a_template_makes_of_a_question_counts_and_only_where_prompts_are_chats():
    ours, theirs = load_tokenizer(LAB_SMALL), load_tokenizer(LAB_SMALL)
    plain = PromptSettings(format="plain", prefix_placement="text")
    theirs.chat_template = "{# in other words #}" + ours.chat_template
    check_same_tokenizer(ours, theirs, PromptSettings(), "s")
    theirs.chat_template = ours.chat_template.replace("{%", "Today Date: 26 Jul 2024 {%", 1)
    check_same_tokenizer(ours, theirs, plain, "s")
    with pytest.raises(UserError, match=r"its prompts go on with .*26 Jul 2024") as found:
        check_same_tokenizer(ours, theirs, PromptSettings(), "s")
    assert "prompt.date" in found.value.hint
    theirs.chat_template = None
    check_same_tokenizer(ours, theirs, plain, "s")
    with pytest.raises(UserError, match=r"student 's': .*no chat template"):
        check_same_tokenizer(ours, theirs, PromptSettings(), "s")


def test_a_student_ends_its_responses_where_its_teacher_does(tmp_path):
    """A base model learns from an instruction-tuned one, whose turns end in another token."""
    tokenizer = load_tokenizer(LAB_SMALL)
    provenance = {
        "tokenizer_sha256": tokenizer_sha256(tokenizer), "weights_sha256": "0" * 64, "engine": "none", "dtype": "float32",
        "eos_ids": [2, 4],
    }  # fmt: skip
    plan = make_plan(20, 10, shard_rows=6, top_k=5, vocab_size=LAB_VOCAB_SIZE, provenance=provenance)
    rows = make_rows(range(20), positions=3, top_k=5, vocab_size=LAB_VOCAB_SIZE, forget=10)
    write_store(tmp_path / "store", plan, rows, tokenizer_files(tokenizer))
    train(job(tmp_path / "s", epochs=1), open_store(Folder(tmp_path / "store"), verify=True))
    assert json.loads((tmp_path / "s/training.json").read_text())["added_ends"] == [4]
    assert json.loads((tmp_path / "s/model/generation_config.json").read_text())["eos_token_id"] == [2, 4]
