"""The attacks quantize_…: does what was forgotten come back when weights are rounded?

Training moves weights a little, rounding moves them back a little (arXiv 2410.16454). Rounded are all linear layers' weights
but the output head's: int8 with a scale per output channel, int4 with a scale per group of inputs, NF4 per block, and `awq`,
int4 with scales that are calibrated on questions to be kept. `rounding.py` says how. What is asked is a model with the rounded
weights in its own dtype.

Shapes: N sampled inputs of a layer, I inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from duet.cache.watch import Watch
from duet.stages.attacks.parts import (
    PLAIN,
    Answers,
    Cost,
    Evidence,
    asked,
    drawn,
    facts,
    identity_on_sets,
    on_sets,
    points,
    recalls,
    said,
    scores,
)
from duet.stages.attacks.rounding import rounded, rounded_nf4, scaled
from duet.stages.exam.exam import Subject
from duet.stages.exam.session import ModelSession
from duet.stages.models.directory import text_config
from duet.stages.models.loading import load_model
from duet.stages.models.sizes import meta_model

__all__ = [
    "cost",
    "facts",
    "identity",
    "is_quantised",
    "is_reached",
    "proof",
    "quantize",
    "recalls",
    "run",
    "scores",
    "untouched",
]
# variant -> bits, or NF4; and weights per scale (None: a whole row)
VARIANTS: dict[str, dict[str, tuple[int | str, int | None]]] = {
    "quantize_int8": {"per_channel": (8, None)},
    "quantize_int4": {"groups_32": (4, 32), "groups_64": (4, 64)},
    "quantize_nf4": {"blocks_64": ("nf4", 64)},
    "quantize_awq": {"groups_128": (4, 128)},
}
CALIBRATED = {"quantize_awq": (64, 8)}  # number of answered questions to be kept, and inputs of a layer kept of each
SAME = 0.02  # difference of recall that rounding to 8 bits may make
UNTOUCHED = "weights are quantised already, or most are not in linear layers"  # as reasons go on
MOST = 0.9  # share of a model's matrices that must be rounded, by their weights, for the attack to have been one


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, Any]:
    """Per attacked set and variant, the answers to its questions, and under `rounded.<kind>` whether weights were rounded."""
    found = on_sets(session, subject, kind, watch, lambda name: quantized_answers(session, subject, kind, name, watch))
    return found | {f"rounded.{kind}": is_reached(meta_model(session.model_dir, session.exam.trust_remote_code))}


def untouched(answers: Answers) -> list[str]:
    """The attacks of this file that left one model as it is, or most of it: see `is_reached`."""
    return [kind for kind in VARIANTS if not answers.get(f"rounded.{kind}", True)]


def is_quantised(config: Any) -> bool:
    """Whether a model's weights are packed: there is nothing to be rounded."""
    return any(getattr(part, "quantization_config", None) for part in (config, text_config(config)))


def is_reached(model: Any) -> bool:
    """Whether rounding changes MOST of a model: not one that is packed, nor one whose matrices are not those of linear layers,
    such as GPT-2's or experts that are stored together.
    """
    head = model.get_output_embeddings()
    modules = [m for m in model.modules() if m is not head and not isinstance(m, nn.Embedding)]
    matrices = sum(weight.numel() for m in modules for weight in m.parameters(recurse=False) if weight.ndim > 1)
    linear = sum(layer.weight.numel() for layer in _linear_layers(model).values())
    return not is_quantised(model.config) and linear >= MOST * matrices


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers, of the texts that calibrate the scales too."""
    deciding: object = VARIANTS[kind]
    if kind in CALIBRATED:
        deciding = [deciding, CALIBRATED[kind], _calibration(session, subject, kind)]
    return identity_on_sets(session, subject, kind, deciding)


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    read = _calibration(session, subject, kind) * len(session.exam.attacked) if kind in CALIBRATED else []
    found = asked(session, subject, session.exam.attacked, times=len(VARIANTS[kind]))
    return found + Cost(prompt_tokens=sum(map(len, read)))


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """Rounding to 8 bits leaves base as it is."""
    base = evidence.models["base"]
    plain, rounded_base = base[PLAIN], base[f"attack.{kind}.{PLAIN}"]
    text = f"base: recall {points(plain)}, rounded {points(rounded_base)}"
    if abs(plain.value - rounded_base.value) <= SAME:
        return said(True, "base", text)
    return said(False, "base", f"rounding to 8 bits changes base itself on this model. {text}")


def quantize(model: Any, bits: int | str, group: int | None, read: Mapping[str, torch.Tensor] | None = None) -> int:
    """Round the weights of all linear layers but the output head, in place; returns how many weights that are.

    `read` are inputs of the layers by name, [N, I] each, where the scales are calibrated. A quantised model stays as it is.
    """
    count = 0
    layers = {} if is_quantised(model.config) else _linear_layers(model)
    for name, module in layers.items():
        weight = module.weight.data
        if bits == "nf4":
            module.weight.data = rounded_nf4(weight, group or weight.numel())
        elif read is not None:
            module.weight.data = scaled(weight, read[name], int(bits), group or weight.shape[1])
        else:
            module.weight.data = rounded(weight, int(bits), group)
        count += weight.numel()
    return count


def _linear_layers(model: Any) -> dict[str, nn.Linear]:
    head = model.get_output_embeddings()
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


@torch.no_grad()
def inputs_of_layers(model: Any, texts: Sequence[Sequence[int]], per_text: int) -> dict[str, torch.Tensor]:
    """What each linear layer but the head reads at `per_text` positions of each text, evenly spread; by name, [N, I] each."""
    layers = _linear_layers(model)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in layers}

    def keep(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        read_NI = inputs[0].flatten(0, -2)
        found[name].append(read_NI[np.unique(np.linspace(0, len(read_NI) - 1, per_text, dtype=int)).tolist()])

    hooks = [layer.register_forward_pre_hook(functools.partial(keep, name)) for name, layer in layers.items()]
    for ids in texts:
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(read) if read else torch.empty(0, layers[name].in_features) for name, read in found.items()}


def _calibration(session: ModelSession, subject: Subject, kind: str) -> list[list[int]]:
    """Token ids of answered questions to be kept, as the subject is asked them, drawn by the seed: the same for all models."""
    exam = session.exam
    texts = [
        prompt + answer
        for name, query_set in exam.judged.items()
        if query_set.expect == "kept"
        for prompt, answer, query in zip(
            session.prompts(subject, name), session.full_answers(name), query_set.queries, strict=True
        )
        if query.answer
    ]
    return drawn(texts, CALIBRATED[kind][0], exam.settings.seed)


def quantized_answers(
    session: ModelSession, subject: Subject, kind: str, name: str, watch: Watch
) -> dict[str, list[str]]:
    """Per variant, the greedy answers of the quantised model to a set's questions."""
    from duet.stages.engines.transformers_engine import TransformersEngine

    found = {}
    for number, (variant, (bits, group)) in enumerate(VARIANTS[kind].items()):
        spec = session.spec()
        model = load_model(spec.model_dir, spec.dtype, spec.trust_remote_code).to(spec.device)
        texts = _calibration(session, subject, kind) if kind in CALIBRATED else []
        quantize(model, bits, group, inputs_of_layers(model, texts, CALIBRATED[kind][1]) if texts else None)
        engine = TransformersEngine(spec, model)
        outputs = engine.generate(session.prompts(subject, name), session.exam.settings.max_new_tokens)
        engine.close()
        found[variant] = [session.text(ids) for ids in outputs]
        watch.on_progress(f"{subject.name}, {kind}", number + 1, len(VARIANTS[kind]))
    return found
