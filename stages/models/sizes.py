"""The sizes of a model, from its config.json alone: built on torch's meta device, its weights have shapes and no bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.stages.models.directory import load_config, text_config

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSizes:
    """Counts of numbers. Widths are those of a layer's parts, per token."""

    parameters: int
    embedding: int  # of the parameters: embeddings and output head, tied ones once
    layers: int
    hidden: int
    attention: int  # heads x their size
    keys: int  # key heads x their size; as many are values
    inner: int  # of the feed-forward part
    vocabulary: int
    dtype: str  # of the weights on disk, as the config says

    @staticmethod
    def of(model_dir: Path, trust_remote_code: bool = False) -> ModelSizes:
        config = text_config(load_config(model_dir, trust_remote_code))
        model = meta_model(model_dir, trust_remote_code)
        ends = {id(p): p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
        heads = getattr(config, "num_attention_heads", None) or 0  # none: a recurrent model
        head = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
        return ModelSizes(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            embedding=sum(parameter.numel() for parameter in ends.values()),
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            attention=heads * head,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head,
            inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            vocabulary=config.vocab_size,
            dtype=str(getattr(config, "dtype", None) or "float32").removeprefix("torch."),
        )

    def dtype_of(self, asked: str) -> str:
        """What "auto", the model's own, stands for."""
        return self.dtype if asked == "auto" else asked


def meta_model(model_dir: Path, trust_remote_code: bool = False) -> Any:
    """The model without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model_dir, trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{model_dir} is not a causal language model that transformers knows: {str(error).splitlines()[0]}",
            "name a model for text generation, or install the transformers release that has it",
        ) from None
