"""Where a model keeps its decoder layers."""

from __future__ import annotations

from typing import Any

import torch

from duet.cache.errors import UserError
from duet.stages.models.directory import text_config


def decoder_layers(model: Any) -> torch.nn.ModuleList:
    """The language model's stack of layers, never a vision tower's: the list that is as long as its config says."""
    count = text_config(model.config).num_hidden_layers
    decoder = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_decoder()
    lists = [module for module in decoder.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count]
    if not lists:
        raise UserError(
            f"{type(model).__name__} has no list of its {count} decoder layers",
            "leave out what needs it: train.last_layers, train.compile and train.parallel: fsdp; of evaluate.attacks, "
            "logit_lens and refusal_direction",
        )
    return lists[0]
