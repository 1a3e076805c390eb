"""Tiny random models of many architectures, for the tests of all that must hold for each of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The config and what it has of its own, with numbers at which it shows in the logits.
ARCHITECTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, {}),
    "llama-tied": (hf.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {}),
    "gemma": (hf.GemmaConfig, {}),
    "gemma2": (
        hf.Gemma2Config,
        {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 0.5, "sliding_window": 24},
    ),
    "gemma3": (
        hf.Gemma3TextConfig,
        {
            "final_logit_softcapping": 3.0,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3": (hf.Phi3Config, {}),
    "phi": (hf.PhiConfig, {"num_key_value_heads": 2}),  # a head with a bias
    "mistral": (hf.MistralConfig, {"sliding_window": 24}),
    "gpt-neox": (hf.GPTNeoXConfig, {}),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.2}),
    "granite": (hf.GraniteConfig, {"logits_scaling": 4.0}),
}


def tiny_config(name: str, vocab_size: int, **more: Any) -> Any:
    config, own = ARCHITECTURES[name]
    return config(**(SIZES | own | {"vocab_size": vocab_size} | more))


def tiny_model(config: Any, cls: Any = hf.AutoModelForCausalLM.from_config) -> Any:
    torch.manual_seed(0)
    return noisy(cls(config).float().eval())


def noisy(model: Any) -> Any:
    """Biases, norms and adapters start as zeros and ones, which would hide a formula that leaves them out."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model
