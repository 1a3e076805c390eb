"""docs/compare-with.md: each translated config is valid here, and has the numbers of the one that it translates."""

from __future__ import annotations

import re

import pytest
import yaml
from support import ROOT

from duet.cache.exchange_distillkit import Grid, config_text
from duet.stages.settings.student import TrainSettings
from duet.stages.settings.teacher import StoreSettings

PAGE = (ROOT / "docs" / "compare-with.md").read_text(encoding="utf-8")
SECTIONS = {text.split("\n", 1)[0]: text for text in PAGE.split("\n## ")[1:]}


def both(name: str) -> tuple[dict, dict]:
    theirs, ours = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", SECTIONS[name], re.DOTALL))
    return theirs, ours


@pytest.mark.parametrize(
    ("name", "where"), [("TRL", ()), ("DistillKit", ("training_args",)), ("open-unlearning", ("args",))]
)
def test_a_translated_config_has_the_numbers_of_the_other(name, where):
    theirs, ours = both(name)
    for key in where:
        theirs = theirs[key]
    train = TrainSettings(**ours["train"])
    batch_size = theirs["per_device_train_batch_size"] * theirs["gradient_accumulation_steps"]
    assert (train.lr, train.epochs, train.batch_size) == (
        theirs["learning_rate"],
        theirs["num_train_epochs"],
        batch_size,
    )
    names = {"warmup_ratio": "warmup", "lr_scheduler_type": "decay"} | {key: key for key in ("weight_decay", "seed")}
    names |= {key: key for key in ("max_grad_norm", "gradient_checkpointing")}
    compared = [getattr(train, own) == theirs[key] for key, own in names.items() if key in theirs]
    assert compared
    assert all(compared)
    assert set(theirs) <= {*names, "learning_rate", "num_train_epochs", "per_device_train_batch_size"} | {
        "gradient_accumulation_steps"
    }


def test_distillkits_config_is_of_the_layout_that_an_export_writes():
    theirs, ours = both("DistillKit")
    written = yaml.safe_load(config_text(Grid(8, ours["teacher"]["top_k"], 128_256, "float32")))
    assert theirs["teacher"]["logprob_compressor"].items() <= written.items()
    assert StoreSettings(**ours["store"]).values == written["exact_dtype"]
    [loss] = theirs["loss_functions"]
    assert ours["train"]["loss"].startswith(loss["function"])
    assert ours["train"]["temperature"] == loss["temperature"]
