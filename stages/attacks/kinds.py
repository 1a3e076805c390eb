"""Which file has the functions of a kind of attack: those of `parts.Kind`."""

from __future__ import annotations

from duet.stages.attacks import logit_lens, multiple_choice, prompts, quantize, refusal_direction, relearn, sampling
from duet.stages.attacks.parts import Kind, ProvedKind

# Attacks that are more than texts.
OWN_FILES: dict[str, ProvedKind] = {
    "multiple_choice": multiple_choice,
    "sampling": sampling,
    "quantize_int8": quantize,
    "quantize_int4": quantize,
    "quantize_nf4": quantize,
    "quantize_awq": quantize,
    "refusal_direction": refusal_direction,
    "relearn": relearn,
    "logit_lens": logit_lens,
}


def file_of(kind: str) -> Kind:
    """The module of this kind; `prompts` for all attacks of texts."""
    return OWN_FILES.get(kind, prompts)
