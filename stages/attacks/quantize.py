"""The attacks quantize_int8 and quantize_int4: does what was forgotten come back when weights are rounded?

Training moves weights a little, rounding moves them back a little (arXiv 2410.16454). Round-to-nearest, symmetric, of every
linear layer's weights but the output head's: int8 with a scale per output channel, int4 with a scale per group of inputs. What
is asked is a model with the rounded weights in its own dtype, so no kernel for integers is needed.

Shapes: O outputs, I inputs, M groups of a row, G weights of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from duet.cache.watch import Watch
from duet.stages.attacks.names import title
from duet.stages.attacks.parts import (
    PLAIN,
    Answers,
    Cost,
    Evidence,
    asked,
    identity_on_sets,
    of_variants,
    on_sets,
    points,
    said,
)
from duet.stages.exam.exam import DISTINCTIVE, Exam, Subject, references_of
from duet.stages.exam.session import ModelSession
from duet.stages.metrics import text as metrics
from duet.stages.metrics.uncertainty import Score
from duet.stages.models.loading import load_model

# variant -> bits and weights per scale (None: a whole row)
VARIANTS: dict[str, dict[str, tuple[int, int | None]]] = {
    "quantize_int8": {"per_channel": (8, None)},
    "quantize_int4": {"groups_32": (4, 32), "groups_64": (4, 64)},
}
SAME = 0.02  # difference of recall that rounding to 8 bits may make


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, dict[str, list[str]]]:
    """Per attacked set and variant, the answers to its questions."""
    return on_sets(session, subject, kind, watch, lambda name: quantized_answers(session, subject, kind, name, watch))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers."""
    return identity_on_sets(session, subject, kind, VARIANTS[kind])


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    return asked(session, subject, session.exam.attacked, times=len(VARIANTS[kind]))


def recalls(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """ROUGE-L recall of each variant by its title, float64 [N]."""
    references, outputs = references_of(exam.sets[name]), answers[f"attack.{kind}.{name}"]
    return {title(variant, name): metrics.rouge_l(references, outputs[variant])[0] for variant in VARIANTS[kind]}


def facts(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """Distinctive recall of each variant by its title, float64 [N]."""
    words, outputs = exam.distinctive[name], answers[f"attack.{kind}.{name}"]
    return {title(variant, name): metrics.distinctive_recall(words, outputs[variant]) for variant in VARIANTS[kind]}


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    return of_variants(exam, kind, name, list(recalls(answers, exam, kind, name).values())) | of_variants(
        exam, kind, name, list(facts(answers, exam, kind, name).values()), DISTINCTIVE
    )


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """Rounding to 8 bits leaves base as it is."""
    base = evidence.models["base"]
    plain, rounded_base = base[PLAIN], base[f"attack.{kind}.{PLAIN}"]
    text = f"base: recall {points(plain)}, rounded {points(rounded_base)}"
    if abs(plain.value - rounded_base.value) <= SAME:
        return said(True, "base", text)
    return said(False, "base", f"rounding to 8 bits changes base itself on this model. {text}")


def rounded(weight_OI: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """The weights as `bits`-bit integers times a scale, in float32 arithmetic and the dtype of the input.

    Scale s = max|w| / (2^(bits-1) - 1) over a row or over `group` inputs of it (the last group may be shorter); w becomes
    s * round(w / s), so that no weight moves by more than s / 2.
    """
    inputs = weight_OI.shape[1]
    size = group or inputs
    padded = nn.functional.pad(weight_OI.float(), (0, -inputs % size))
    groups_OMG = padded.unflatten(1, (-1, size))
    scale = groups_OMG.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    steps = torch.where(scale > 0, groups_OMG / scale, 0).round()
    return (steps * scale).flatten(1)[:, :inputs].to(weight_OI.dtype)


def quantize(model: Any, bits: int, group: int | None) -> int:
    """Round the weights of all linear layers but the output head, in place; returns how many weights that are."""
    head, count = model.get_output_embeddings(), 0
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = rounded(module.weight.data, bits, group)
            count += module.weight.numel()
    return count


def quantized_answers(
    session: ModelSession, subject: Subject, kind: str, name: str, watch: Watch
) -> dict[str, list[str]]:
    """Per variant, the greedy answers of the quantised model to a set's questions."""
    from duet.stages.engines.transformers_engine import TransformersEngine

    found = {}
    for number, (variant, (bits, group)) in enumerate(VARIANTS[kind].items()):
        spec = session.spec()
        model = load_model(spec.model_dir, spec.dtype, spec.trust_remote_code).to(spec.device)
        quantize(model, bits, group)
        engine = TransformersEngine(spec, model)
        outputs = engine.generate(session.prompts(subject, name), session.exam.settings.max_new_tokens)
        engine.close()
        found[variant] = [session.text(ids) for ids in outputs]
        watch.on_progress(f"{subject.name}, {kind}", number + 1, len(VARIANTS[kind]))
    return found
