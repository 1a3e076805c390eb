"""The examples for other trainers run on an exported store and have `duet distill`'s losses at every step."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import plain_loop
import pytest
import yaml
from command_line import duet
from support import LAB_BASE, ROOT

from duet.cache.errors import UserError
from duet.cache.exchange import export_store
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.stages.models.loading import load_model

BATCH, EPOCHS, LR = 4, 6, 1e-3


def taught(folder: Path, rows: int | None, positions: int, **train: Any) -> tuple[str, Store]:
    """The config, and the store, of a run that taught the lab's questions, or the first `rows` of both sets."""
    raw = yaml.safe_load((ROOT / "configs/lab.yaml").read_text(encoding="utf-8"))
    raw |= {"runs_dir": str(folder / "runs"), "device": "cpu", "students": [{"name": "base"}], "evaluate": {"sets": {}}}
    raw["teacher"] |= {"model": str(LAB_BASE), "engine": "transformers", "max_positions": positions}
    for subset in ("forget", "retain"):
        lines = (ROOT / raw["data"][subset]["path"]).read_text(encoding="utf-8").splitlines()[:rows]
        raw["data"][subset]["path"] = str(folder / f"{subset}.jsonl")
        (folder / f"{subset}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    raw["train"] = {"dtype": "float32", **train}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    for stage in ("teacher-logits", "distill"):
        done = duet(stage, "--config", str(folder / "config.yaml"))
        assert done.code == 0, done.err
    [manifest] = (folder / "runs").rglob("manifest.json")
    return str(folder / "config.yaml"), Store(Folder(manifest.parent))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(exports' folder, rows of each step, losses of `duet distill`) of a run that taught twelve of the lab's questions."""
    folder = tmp_path_factory.mktemp("run")
    train = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "warmup": 0.0, "decay": "constant"}
    _, store = taught(folder, 6, 3, **train)
    [metrics] = (folder / "runs").rglob("metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    batches = itertools.islice(store.batches(store.order(seed=0), BATCH), len(losses))
    steps = [block.row_ids.to_pylist() for _, block in batches]
    for exchange_format in ("parquet", "hf"):
        export_store(store.location, folder / exchange_format, exchange_format)
    return folder, steps, losses


def test_the_plain_loop_has_the_losses_of_duet_distill(trained):
    folder, steps, losses = trained
    found = plain_loop.train(load_model(LAB_BASE, "float32"), plain_loop.read_rows(folder / "parquet"), steps, LR)
    assert len(found) == len(losses) >= EPOCHS
    assert losses[-1] < losses[0] / 2
    assert found[0] == pytest.approx(losses[0], rel=1e-6)
    # Duet sums its passes in another order: rounding, which AdamW's steps pass on (2e-5 after 18 steps on two threads).
    assert found == pytest.approx(losses, rel=1e-4)


def test_rows_of_drawn_ids_are_refused_as_duet_distill_refuses_them_for_this_loss(trained):
    row = next(iter(plain_loop.read_rows(trained[0] / "parquet").values()))
    plain_loop.collate([row])
    with pytest.raises(UserError, match="were drawn"):
        plain_loop.collate([row | {"draws": row["ids"]}])


def test_every_epoch_of_the_plain_loop_has_every_row(trained):
    rows = plain_loop.read_rows(trained[0] / "parquet")
    steps = list(plain_loop.shuffled(rows, batch_size=5, epochs=2))
    assert sorted(name for names in steps for name in names) == sorted([*rows, *rows])
    assert steps[: len(steps) // 2] != steps[len(steps) // 2 :]


def trls_steps(rows: Any, folder: Path, logs: Path, **settings: Any) -> list[dict[str, float]]:
    """What TRL's trainer logs of every step of one epoch on these rows, in their order."""
    import sft_trainer
    from transformers import AutoTokenizer, TrainerCallback

    config = sft_trainer.settings(
        logs, num_train_epochs=1, learning_rate=LR, lr_scheduler_type="constant", train_sampling_strategy="sequential",
        use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
        **settings,
    )  # fmt: skip
    found: list[dict[str, float]] = []

    class Noting(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            found.extend([logs] if logs and "loss" in logs else [])

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf" / "duet" / "tokenizer")
    trainer = sft_trainer.trainer_of(load_model(LAB_BASE, "float32"), tokenizer, rows, config)
    trainer.add_callback(Noting())
    trainer.train()
    return found


def test_trls_trainer_has_the_losses_of_duet_distill(trained, tmp_path):
    pytest.importorskip("trl")
    import datasets

    folder, steps, losses = trained
    rows = datasets.load_from_disk(str(folder / "hf"))
    number = {row_id: at for at, row_id in enumerate(rows["row_id"])}
    rows = rows.select([number[row_id] for names in steps for row_id in names])  # in the order of Duet's steps
    logged = trls_steps(rows, folder, tmp_path, per_device_train_batch_size=BATCH)
    found = [step["loss"] for step in logged]
    assert len(found) == len(losses)
    assert found == pytest.approx(losses, rel=1e-3, abs=1e-4)  # its log has four digits


def test_a_step_of_trls_trainer_is_the_same_in_parts(trained, tmp_path):
    """Parts of a step have different numbers of positions: the mean of their means is not that of the step."""
    pytest.importorskip("trl")
    import datasets

    def shortened(row: dict[str, Any], number: int) -> dict[str, Any]:
        names = ("response", "position", "ids", "logits", "logsumexp") if number % 5 < 2 else ()
        return {name: row[name][:1] for name in names}

    folder, *_ = trained
    rows = datasets.load_from_disk(str(folder / "hf")).map(shortened, with_indices=True)
    assert len(set(map(len, rows["response"]))) > 1
    for parts, whole in ((2, 6), (6, 6), (4, 8)):  # the last step of eight rows has four
        at_once = trls_steps(rows, folder, tmp_path, per_device_train_batch_size=whole)
        in_parts = trls_steps(
            rows, folder, tmp_path, per_device_train_batch_size=whole // parts, gradient_accumulation_steps=parts
        )
        for key in ("loss", "grad_norm"):
            found, wanted = ([step[key] for step in logged] for logged in (in_parts, at_once))
            assert found == pytest.approx(wanted, rel=1e-3), (parts, key)


def test_the_student_of_trls_trainer_forgets_and_keeps_what_that_of_duet_distill_does(tmp_path):
    """Each with the order of rows and the schedule of its own."""
    pytest.importorskip("trl")
    import datasets
    import sft_trainer
    from transformers import AutoTokenizer

    config, store = taught(tmp_path, None, 1, epochs=12, batch_size=16, lr=LR)
    export_store(store.location, tmp_path / "hf", "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf/duet/tokenizer")
    settings = sft_trainer.settings(
        tmp_path / "logs", num_train_epochs=12, per_device_train_batch_size=16, learning_rate=LR, use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    rows = datasets.load_from_disk(str(tmp_path / "hf"))
    trainer = sft_trainer.trainer_of(load_model(LAB_BASE, "float32"), tokenizer, rows, settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))
    people = (ROOT / "lab/data/heldout.jsonl").read_text(encoding="utf-8").splitlines()[::8]
    (tmp_path / "heldout.jsonl").write_text("\n".join(people) + "\n", encoding="utf-8")
    asked = {
        "sets.heldout": {"path": str(tmp_path / "heldout.jsonl"), "id_field": "id", "expect": "kept"},
        "models.trl": str(tmp_path / "trl"),
        "attacks": [], "likelihood": False, "membership": None, "max_new_tokens": 16,
    }  # fmt: skip
    changes = [f"--set=evaluate.{key}={json.dumps(value)}" for key, value in asked.items()]
    done = duet("evaluate", "--config", config, *changes)
    assert done.code == 0, done.err
    [results] = (tmp_path / "runs").rglob("results.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["models"]
    found = {
        model: [100 * scores[model][f"{name}.rougeL_recall"]["value"] for name in ("forget", "retain", "heldout")]
        for model in ("base", "student:base", "model:trl")
    }
    assert min(found["base"]) > 95
    for model in ("student:base", "model:trl"):
        forgotten, *kept = found[model]
        assert forgotten < 15, found
        assert min(kept) > 90, found
    assert found["model:trl"] == pytest.approx(found["student:base"], abs=10), found
