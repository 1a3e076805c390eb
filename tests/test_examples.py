"""The examples for other trainers run on an exported store and have `duet distill`'s losses at every step."""

from __future__ import annotations

import itertools
import json

import plain_loop
import pytest
import yaml
from command_line import duet
from support import LAB_BASE, ROOT

from duet.cache.exchange import export_store
from duet.cache.location import Folder
from duet.cache.reader import Store
from duet.stages.models.loading import load_model

BATCH, EPOCHS, LR = 4, 6, 1e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(exports' folder, rows of each step, losses of `duet distill`) of a run that taught eight of the lab's questions."""
    folder = tmp_path_factory.mktemp("run")
    raw = yaml.safe_load((ROOT / "configs/lab.yaml").read_text(encoding="utf-8"))
    raw |= {"runs_dir": str(folder / "runs"), "device": "cpu", "students": [{"name": "base"}], "evaluate": {"sets": {}}}
    raw["teacher"] |= {"model": str(LAB_BASE), "engine": "transformers", "max_positions": 3}
    for subset in ("forget", "retain"):
        lines = (ROOT / raw["data"][subset]["path"]).read_text(encoding="utf-8").splitlines()[:6]
        raw["data"][subset]["path"] = str(folder / f"{subset}.jsonl")
        (folder / f"{subset}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    steady = {"warmup": 0.0, "decay": "constant"}
    raw["train"] = {"epochs": EPOCHS, "batch_size": BATCH, "lr": LR, "dtype": "float32", **steady}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    for stage in ("teacher-logits", "distill"):
        done = duet(stage, "--config", str(folder / "config.yaml"))
        assert done.code == 0, done.err
    [metrics] = (folder / "runs").rglob("metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in metrics.read_text(encoding="utf-8").splitlines()]
    [manifest] = (folder / "runs").rglob("manifest.json")
    store = Store(Folder(manifest.parent))
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


def test_every_epoch_of_the_plain_loop_has_every_row(trained):
    rows = plain_loop.read_rows(trained[0] / "parquet")
    steps = list(plain_loop.shuffled(rows, batch_size=5, epochs=2))
    assert sorted(name for names in steps for name in names) == sorted([*rows, *rows])
    assert steps[: len(steps) // 2] != steps[len(steps) // 2 :]


def test_trls_trainer_has_the_losses_of_duet_distill(trained, tmp_path):
    pytest.importorskip("trl")
    import datasets
    import sft_trainer
    from transformers import AutoTokenizer, TrainerCallback

    folder, steps, losses = trained
    rows = datasets.load_from_disk(str(folder / "hf"))
    number = {row_id: at for at, row_id in enumerate(rows["row_id"])}
    rows = rows.select([number[row_id] for names in steps for row_id in names])  # in the order of Duet's steps
    config = sft_trainer.settings(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type="constant",
        train_sampling_strategy="sequential", use_cpu=True, save_strategy="no", logging_steps=1, disable_tqdm=True,
        dataloader_pin_memory=False, bf16=False,
    )  # fmt: skip
    found: list[float] = []

    class Noting(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            found.extend([logs["loss"]] if "loss" in logs else [])

    tokenizer = AutoTokenizer.from_pretrained(folder / "hf" / "duet" / "tokenizer")
    trainer = sft_trainer.trainer_of(load_model(LAB_BASE, "float32"), tokenizer, rows, config)
    trainer.add_callback(Noting())
    trainer.train()
    assert len(found) == len(losses)
    assert found == pytest.approx(losses, rel=1e-3, abs=1e-4)  # its log has four digits
