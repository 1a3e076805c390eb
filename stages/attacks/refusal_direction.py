"""The attack refusal_direction: is what was forgotten only refused, by a direction that can be taken out?

A chat model's refusals hang on one direction of its residual stream (Arditi et al. 2024, arXiv 2406.11717): the difference
between what a layer hands on, on average, at the end of prompts that are refused and of prompts that are answered. Here those
are the attacked questions and the questions to be kept; their answers are not needed. A layer's direction is either removed
from what the first layer reads and every layer hands on, x - (x . r) r with r of length 1, or the difference itself is
subtracted behind that layer alone, as in activation addition; at all positions, of prompt and answer.

Shapes: N questions, L layers, D width, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from duet.cache.watch import Watch
from duet.stages.attacks.parts import (
    MIN_LEFT,
    PLAIN,
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
from duet.stages.exam.exam import Subject
from duet.stages.exam.session import ModelSession
from duet.stages.models.layers import decoder_layers
from duet.stages.models.loading import load_model
from duet.stages.questions.prompts import Prompt

__all__ = ["cost", "facts", "identity", "proof", "recalls", "run", "scores"]
# variant -> depth of the layer whose direction it is, as a share of the layers, and whether that is removed everywhere
VARIANTS: dict[str, tuple[float, bool]] = {
    f"{'removed' if everywhere else 'subtracted'}_{percent}": (percent / 100, everywhere)
    for percent in (50, 75, 100)
    for everywhere in (True, False)
}
QUESTIONS = 128  # of each kind, at most, that a direction is of

Change = Callable[[torch.Tensor], torch.Tensor]


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, Any]:
    """Per attacked set and variant, the answers to its questions."""
    return on_sets(session, subject, kind, watch, lambda name: steered_answers(session, subject, name, watch))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the answers, of the questions to be kept too."""
    kept = {name: _kept_prompts(session, subject, name) for name in session.exam.attacked}
    return identity_on_sets(session, subject, kind, [VARIANTS, QUESTIONS, kept])


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    read = []
    for name in session.exam.attacked:
        read += _kept_prompts(session, subject, name) + drawn(
            session.prompts(subject, name), QUESTIONS, session.exam.settings.seed
        )
    found = asked(session, subject, session.exam.attacked, times=len(VARIANTS))
    return found + Cost(prompt_tokens=sum(map(len, read)))


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """It brings half of base's recall back from some model, the teachers first, that without it has less."""
    models = evidence.models
    half, failed = MIN_LEFT * models["base"][PLAIN].value, []
    for name in sorted(models, key=lambda name: name not in evidence.teachers):
        plain, worst = models[name].get(PLAIN), models[name].get(f"attack.{kind}_worst.{PLAIN}")
        if plain is None or worst is None or plain.value >= half:
            continue
        text = f"{name}: recall {points(plain)} without it, {points(worst)} with the worst variant per question"
        if worst.ci95[0] > plain.ci95[1] and worst.value >= half:
            return said(True, name, text)
        failed.append(text)
    if not failed:
        return said(False, None, "no model that was asked has less than half of base's recall: nothing to bring back")
    return said(False, None, f"it brings nothing back from any model that was asked. {'; '.join(failed)}")


def steered_answers(session: ModelSession, subject: Subject, name: str, watch: Watch) -> dict[str, list[str]]:
    """Per variant, the greedy answers to a set's questions."""
    from duet.stages.engines.transformers_engine import TransformersEngine

    spec = session.spec()
    model = load_model(spec.model_dir, spec.dtype, spec.trust_remote_code).to(spec.device)
    prompts = session.prompts(subject, name)
    refused_LD = mean_states(model, drawn(prompts, QUESTIONS, session.exam.settings.seed))
    difference_LD = refused_LD - mean_states(model, _kept_prompts(session, subject, name))
    by_layer: dict[tuple[int, bool], list[str]] = {}  # a model of few layers has one for two depths
    found = {}
    for variant, (depth, everywhere) in VARIANTS.items():
        watch.pause(f"{subject.name}, refusal_direction,")
        layer = layer_at(depth, len(difference_LD))
        if (layer, everywhere) not in by_layer:
            with without(model, difference_LD[layer], layer, everywhere):
                # An engine of its own: it keeps keys and values of what prompts begin with.
                outputs = TransformersEngine(spec, model).generate(prompts, session.exam.settings.max_new_tokens)
            by_layer[layer, everywhere] = [session.text(ids) for ids in outputs]
        found[variant] = by_layer[layer, everywhere]
        watch.on_progress(f"{subject.name}, refusal_direction", len(found), len(VARIANTS))
    return found


def layer_at(depth: float, num_layers: int) -> int:
    """The number, from 0, of the layer at this share of the depth; 1 is the last."""
    return max(round(depth * num_layers), 1) - 1


@torch.inference_mode()
def mean_states(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """What each layer hands on at the last token of a prompt, on average over prompts, float32 [L, D]."""
    layers = decoder_layers(model)
    totals: list[Any] = [0.0] * len(layers)

    def add(layer: int, states: torch.Tensor) -> torch.Tensor:
        totals[layer] = (
            totals[layer] + states.flatten(0, -3)[0, -1].float()
        )  # of several streams, as Gemma 3n has, the first
        return states

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(_changed(layer, lambda states, number=number: add(number, states)))
        for ids in prompts:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    return torch.stack(totals) / len(prompts)


@contextmanager
def without(model: Any, difference_D: torch.Tensor, layer: int, everywhere: bool) -> Iterator[None]:
    """The model with the direction of `difference_D` removed `everywhere`, or the difference subtracted behind one layer."""
    layers = decoder_layers(model)
    direction_D = difference_D / difference_D.norm().clamp_min(1e-12)

    def remove(states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        return (wide - (wide @ direction_D)[..., None] * direction_D).to(states.dtype)

    def subtract(states: torch.Tensor) -> torch.Tensor:
        return (states.float() - difference_D).to(states.dtype)

    with ExitStack() as stack:
        if everywhere:
            stack.enter_context(_changed_input(layers[0], remove))
        for module in layers if everywhere else [layers[layer]]:
            stack.enter_context(_changed(module, remove if everywhere else subtract))
        yield


def _changed(module: nn.Module, change: Change) -> RemovableHandle:
    """Have the module hand on what `change` makes of its output [..., T, D]; where it returns more, of the first."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple | list) else change(output)

    return module.register_forward_hook(hook)


def _changed_input(layer: nn.Module, change: Change) -> RemovableHandle:
    """Have the layer read what `change` makes of the states [..., T, D] that it is given."""

    def hook(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given:
            return (change(given[0]), *given[1:]), named
        return given, named | {"hidden_states": change(named["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def _kept_prompts(session: ModelSession, subject: Subject, name: str) -> list[list[int]]:
    """Prompts of questions to be kept, as the subject is asked the attacked set `name`: behind the prefix of that set."""
    kept = [query for of_set in session.exam.judged.values() if of_set.expect == "kept" for query in of_set.queries]
    prefix = subject.prefix_of(name)
    return [
        session.renderer.prompt(Prompt.plain(query, prefix))
        for query in drawn(kept, QUESTIONS, session.exam.settings.seed)
    ]
