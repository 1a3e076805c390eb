"""The attack logit_lens: how early in the model the right answer's first token can be read off.

Each layer's output at the last token of the prompt goes through the model's final norm and output head, as if the layer were
the last (nostalgebraist 2020, "interpreting GPT: the logit lens"). A low rank somewhere, though not at the end, says that the
knowledge is there and is not said.

Shapes: B batch, T time, D width, V rows of the head, N questions, L layers (0 is the embeddings, L-1 the model's own output).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from duet.cache.errors import UserError
from duet.cache.watch import Watch
from duet.stages.attacks.chosen import chosen
from duet.stages.attacks.parts import MIN_LEFT, Answers, Cost, Evidence, asked, identity_on_sets, on_sets, said
from duet.stages.exam.exam import Exam, Subject, references_of
from duet.stages.exam.session import ModelSession
from duet.stages.metrics.uncertainty import Score, score
from duet.stages.models.alignment import align
from duet.stages.models.layers import decoder_layers
from duet.stages.models.loading import load_model


def run(session: ModelSession, subject: Subject, kind: str, watch: Watch) -> dict[str, list[list[int]]]:
    """Per attacked set, ranks by layer and question."""
    return on_sets(session, subject, kind, watch, lambda name: ranks_by_layer(session, subject, name, watch))


def identity(session: ModelSession, subject: Subject, kind: str) -> str:
    """Hash of everything that decides the ranks."""
    return identity_on_sets(session, subject, kind, [])


def cost(session: ModelSession, subject: Subject, kind: str) -> Cost:
    """One pass over the prompts: nothing is answered."""
    found = asked(session, subject, session.exam.attacked)
    return Cost(found.prompts, found.prompt_tokens)


def recalls(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, np.ndarray]:
    """Empty: there are no answers."""
    return {}


facts = recalls


def scores(answers: Answers, exam: Exam, kind: str, name: str) -> dict[str, Score]:
    """`mrr_best`."""
    best_N = at_best_layer(np.array(answers[f"attack.{kind}.{name}"]))
    references = references_of(exam.sets[name])
    return {f"attack.{kind}.{name}.mrr_best": score(best_N, clusters=references, seed=exam.settings.seed)}


def at_best_layer(ranks_LN: np.ndarray) -> np.ndarray:
    """Mean reciprocal rank of the reference's first token, read off a layer through the final norm and the output head, at the
    layer where this mean is highest.

    One over the rank, per question.
    """
    reciprocal_LN = 1 / ranks_LN.astype(np.float64)
    return reciprocal_LN[reciprocal_LN.mean(axis=1).argmax()]


def proof(kind: str, evidence: Evidence) -> dict[str, Any]:
    """In base, the right token is found."""
    found = evidence.models["base"][f"attack.{kind}.forget.mrr_best"]
    text = f"base: mean reciprocal rank {found.value:.2f} at its best layer"
    if found.value >= MIN_LEFT:
        return said(True, "base", text)
    return said(False, "base", f"the right token is not found in base itself. {text}")


def layers(subjects: Sequence[Subject], exam: Exam, answers: Mapping[str, Answers]) -> dict[str, dict[str, Any]]:
    """Per model, the mean rank of the right first token at each layer, over the questions of all attacked sets; empty if the
    attack was not made.
    """
    if "logit_lens" not in chosen(exam)[0]:
        return {}
    references = [reference for name in exam.attacked for reference in references_of(exam.sets[name])]
    found = {}
    for subject in subjects:
        of_sets = [np.array(answers[subject.name][f"attack.logit_lens.{name}"], np.float64) for name in exam.attacked]
        ranks_LN = np.concatenate(of_sets, axis=1)
        means = [score(ranks_N, clusters=references, seed=exam.settings.seed) for ranks_N in ranks_LN]
        found[subject.name] = {
            "layers": list(range(len(means))),
            "rank": [mean.value for mean in means],
            "ci95": [list(mean.ci95) for mean in means],
            "n": len(references),
        }
    return found


def ranks_by_layer(session: ModelSession, subject: Subject, name: str, watch: Watch) -> list[list[int]]:
    """Per layer and question of a set, the rank (1 is the most likely) of the right answer's first token."""
    spec = session.spec()
    model = load_model(spec.model_dir, spec.dtype, spec.trust_remote_code).to(spec.device)
    prompts = session.prompts(subject, name)
    firsts = [ids[:1] for ids in session.answers(name)]
    found: list[list[int]] = []
    for start in range(0, len(prompts), spec.batch_size):
        part = slice(start, start + spec.batch_size)
        ranks = token_ranks(model, prompts[part], firsts[part], session.num_ids)
        found = [before + now for before, now in zip(found, ranks, strict=True)] if found else ranks
        watch.on_progress(f"{subject.name}, logit_lens", min(len(prompts), part.stop), len(prompts))
    return found


@torch.inference_mode()
def token_ranks(
    model: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], num_ids: int
) -> list[list[int]]:
    """Per layer (the embeddings first), the rank of each prompt's next token, [L][B]; `tokens` hold one id each.

    The rank is one more than the number of ids with a higher logit, among the first `num_ids`. What the model does to logits
    after its head (a scale, a soft-cap) keeps their order and is left out.
    """
    norm, head, normed = final_norm(model), model.get_output_embeddings(), []
    batch = align(prompts, tokens, pad_id=0).to(next(model.parameters()).device)
    known = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
    watch = norm.register_forward_hook(lambda module, inputs, output: normed.append(output))
    out = model(**known, output_hidden_states=True, use_cache=False)
    watch.remove()
    if len(normed) != 1 or not torch.equal(normed[0], out.hidden_states[-1]):
        raise UserError(
            f"logit_lens: the norm found in {type(model).__name__} is not what its output head reads",
            "leave logit_lens out of evaluate.attacks",
        )
    at = (batch.batch_index_N, batch.position_N)
    token_B = torch.tensor([ids[0] for ids in tokens], device=out.logits.device)
    layers = [head(norm(hidden_BTD[at])) for hidden_BTD in out.hidden_states[:-1]] + [out.logits[at]]
    return [_ranks(logits_BV[:, :num_ids], token_B) for logits_BV in layers]


def _ranks(logits_BV: torch.Tensor, token_B: torch.Tensor) -> list[int]:
    own_B1 = logits_BV.gather(1, token_B[:, None])
    return (1 + (logits_BV > own_B1).sum(-1)).tolist()


def final_norm(model: Any) -> torch.nn.Module:
    """The norm between the last decoder layer and the head: beside the stack of layers, the last module by that name."""
    layers = decoder_layers(model)
    for parent in model.modules():
        names = [name for name, child in parent.named_children()]
        if any(child is layers for child in parent.children()):
            after = names[[child is layers for child in parent.children()].index(True) + 1 :]
            norms = [name for name in after if "norm" in name or name.startswith("ln")]
            if norms:
                return getattr(parent, norms[-1])
    raise UserError(
        f"logit_lens: {type(model).__name__} has no norm after its layers", "leave logit_lens out of evaluate.attacks"
    )
