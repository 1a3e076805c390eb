"""Train a student on exported teacher logits with TRL's SFTTrainer: a subclass with another loss.

pip install trl
duet cache export runs/lab/teacher/*/ lab-hf --format hf
python examples/sft_trainer.py lab-hf lab/models/base student
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from plain_loop import collate, loss_of_batch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import duet


class StoreTrainer(SFTTrainer):
    """Its rows are those of an export, its loss is the paper's, at the teacher's ids only. For one device.

    It is the mean over the positions of a whole step, also where that comes in parts (`gradient_accumulation_steps`), whose
    numbers of positions differ.
    """

    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        parts, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return parts, sum(len(part["position_N"]) for part in parts)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self.head = getattr(self, "head", None) or duet.Head.of(model)
        return loss_of_batch(model, self.head, inputs, num_items_in_batch)


def settings(target: str | Path, **more: Any) -> SFTConfig:
    """Rows come as they are: nothing is tokenized, dropped or packed again."""
    kept = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}, "report_to": "none"}
    return SFTConfig(str(target), **kept, **more)


def trainer_of(model: Any, tokenizer: Any, rows: datasets.Dataset, config: SFTConfig) -> StoreTrainer:
    return StoreTrainer(model, config, data_collator=collate, train_dataset=rows, processing_class=tokenizer)


def main(export: str, start: str, target: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(Path(export, "duet", "tokenizer"))
    gpu = torch.cuda.is_available()
    config = settings(
        target, num_train_epochs=30, per_device_train_batch_size=16, learning_rate=3e-4, save_strategy="no",
        use_cpu=not gpu, bf16=gpu and torch.cuda.is_bf16_supported(),
    )  # fmt: skip
    trainer = trainer_of(model, tokenizer, datasets.load_from_disk(export), config)
    trainer.train()
    trainer.save_model(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
