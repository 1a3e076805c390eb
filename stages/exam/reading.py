"""What models make of given texts, without generating: choices, membership inference, perplexity.

Each model directory is loaded once, with plain transformers, after the engines are closed. The numbers per item are kept on
disk under the hash of all that decides them, so that an interrupted evaluation goes on with the next model; `scores_of` and
`floors_of` turn them into scores. What is not configured is not read, and a run without any of it loads nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from duet.cache.errors import UserError
from duet.cache.files import read_json, sha256_json
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject, references_of, stem_of
from duet.stages.exam.kept import recalled
from duet.stages.metrics import choices, membership, perplexity, uncertainty
from duet.stages.metrics.uncertainty import Score
from duet.stages.models.alignment import align
from duet.stages.models.directory import load_config, resolve_model
from duet.stages.models.identity import weights_sha256
from duet.stages.models.limits import check_length, context_length
from duet.stages.models.loading import load_model
from duet.stages.models.token_scores import token_logprobs, token_scores
from duet.stages.models.tokenizers import tokenizer_sha256
from duet.stages.questions.prompts import Prompt, Renderer, open_renderer
from duet.stages.settings.evaluate import MembershipSettings

MAX_TOKENS = 4096  # of one forward pass, padding included
PAD_ID = 0  # any id: padding on the right is never looked at
SIDES = ("members", "nonmembers")

Readings = Mapping[
    str, Any
]  # {"choices": {set: {metric: [0 or 1]}}, "membership": {side: {attack: [x]}}, "neutral": {...}}
Pair = tuple[list[int], list[int]]  # prompt, answer


@dataclass(frozen=True)
class Texts:
    """What is to be read, beside the exam's questions."""

    documents: list[str] = field(default_factory=list)
    with_choices: tuple[str, ...] = ()  # sets
    membership: MembershipSettings | None = None

    def __bool__(self) -> bool:
        return bool(self.documents or self.with_choices or self.membership)


def texts_of(exam: Exam) -> Texts:
    """What the settings ask for; names of sets that do not exist are UserErrors."""
    settings = exam.settings.membership
    for side in SIDES if settings else ():
        if (name := getattr(settings, side)) not in exam.sets:
            raise UserError(f"evaluate.membership.{side}: no set {name!r}", f"the sets are {', '.join(exam.sets)}")
    neutral = exam.settings.neutral_text
    return Texts(
        documents=perplexity.load_documents(neutral, "evaluate.neutral_text") if neutral else [],
        with_choices=tuple(name for name, query_set in exam.sets.items() if query_set.queries[0].choices),
        membership=settings,
    )


def read_all(
    subjects: Sequence[Subject],
    exam: Exam,
    answers_dir: Path,
    watch: Watch,
) -> dict[str, Readings]:
    """Readings per subject; subjects of one model directory share the loaded model."""
    texts = texts_of(exam)
    if not texts:
        return {subject.name: {} for subject in subjects}
    reference = functools.cache(lambda: _reference(exam, texts.membership))
    readings: dict[str, Readings] = {}
    for model_dir in dict.fromkeys(subject.model_dir for subject in subjects):
        reader = Reader(model_dir, exam, texts, reference)
        for subject in (subject for subject in subjects if subject.model_dir == model_dir):
            watch.pause(f"{subject.name}, read texts,")
            readings[subject.name] = recalled(
                answers_dir / f"{stem_of(subject.name)}.read.json",
                reader.identity(subject),
                functools.partial(reader.read, subject),
            )
            watch.on_progress("read texts", len(readings), len(subjects))
    return {subject.name: readings[subject.name] for subject in subjects}


class Reader:
    """One model directory: its tokenizer, and its model loaded when first needed."""

    def __init__(
        self, model_dir: Path, exam: Exam, texts: Texts, reference: Callable[[], Mapping[str, list[float]]] = dict
    ) -> None:
        self._dir, self._exam, self._texts, self._reference = model_dir, exam, texts, reference
        self._renderer = open_renderer(model_dir, exam.prompt, exam.trust_remote_code)
        self._context = context_length(load_config(model_dir, exam.trust_remote_code))

    @functools.cached_property
    def _model(self) -> Any:
        exam = self._exam
        return load_model(self._dir, exam.settings.dtype, exam.trust_remote_code).to(exam.device)

    def identity(self, subject: Subject) -> str:
        """Hash of everything that decides the subject's readings."""
        exam, texts = self._exam, self._texts
        names = [*texts.with_choices, *(getattr(texts.membership, side) for side in SIDES if texts.membership)]
        asked = {
            name: [[q.question, q.answer, q.choices, q.right] for q in exam.sets[name].queries]
            + [subject.prefix_of(name)]
            for name in names
        }
        reference = texts.membership and texts.membership.reference_model
        hashed = weights_sha256(resolve_model(reference, "evaluate.membership.reference_model")) if reference else None
        settings = [
            self._renderer.provenance,
            exam.settings.dtype,
            exam.device,
            texts.membership and texts.membership.model_dump(),
        ]
        models = [weights_sha256(self._dir), tokenizer_sha256(self._renderer.tokenizer), hashed]
        return sha256_json([models, asked, texts.with_choices, settings, texts.documents, subject.prefix])

    def read(self, subject: Subject) -> Readings:
        """All that the settings ask for, as JSON."""
        texts, found = self._texts, {}
        if texts.with_choices:
            found["choices"] = {name: self._choices(subject, name) for name in texts.with_choices}
        if texts.membership:
            found["membership"] = {side: self._membership(subject, texts.membership, side) for side in SIDES}
        if texts.documents:
            found["neutral"] = self._neutral(subject)
        return found

    def _checked(self, pairs: Sequence[Pair], where: str, subject: Subject) -> None:
        for number, (prompt, answer) in enumerate(pairs):
            check_length(prompt, len(answer), self._context, f"{where}/{number}", subject.name)

    def _choices(self, subject: Subject, name: str) -> dict[str, list[float]]:
        queries, prefix = self._exam.sets[name].queries, subject.prefix_of(name)
        rights = [query.right or 0 for query in queries]
        found = {}
        for metric, pairs_of in ((choices.LETTER, choices.letter_pairs), (choices.CLOZE, choices.cloze_pairs)):
            pairs = [pairs_of(self._renderer, query, prefix) for query in queries]
            self._checked(
                [pair for of_query in pairs for pair in zip(*of_query, strict=True)], f"{name}.{metric}", subject
            )
            found[metric] = choices.chosen_right(self._model, pairs, rights, PAD_ID, MAX_TOKENS).tolist()
        return found

    def _membership(self, subject: Subject, settings: MembershipSettings, side: str) -> dict[str, list[float]]:
        """Per attack whose needs are met, a number per query."""
        name = getattr(settings, side)
        pairs = answered(self._renderer, self._exam, name, subject.prefix_of(name))
        self._checked(pairs, name, subject)
        prompts, answers = zip(*pairs, strict=True)
        scored = token_scores(self._model, prompts, answers, PAD_ID, MAX_TOKENS)
        texts = references_of(self._exam.sets[name])
        found = {
            "loss": [membership.loss(s.logprob) for s in scored],
            "zlib": [membership.zlib_ratio(s.logprob, text) for s, text in zip(scored, texts, strict=True)],
            "min_k": [membership.min_k(s.logprob, settings.min_k) for s in scored],
            "min_k_plus": [membership.min_k_plus(s, settings.min_k) for s in scored],
        }
        if settings.gradients:
            found["gradient"] = [membership.gradient(gradient_norm(self._model, *pair)) for pair in pairs]
        if settings.reference_model:
            losses = self._reference()[side]
            found["reference"] = [membership.reference(s.logprob, at) for s, at in zip(scored, losses, strict=True)]
        return found

    def _neutral(self, subject: Subject) -> dict[str, list[float]]:
        in_front = self._renderer.in_front_of_text(subject.prefix)
        tokenize = functools.partial(self._renderer.tokenizer, verbose=False)
        if len(in_front) + 2 > self._context:
            raise UserError(
                f"{subject.name}: its prefix leaves no room for neutral text", "leave evaluate.neutral_text out"
            )
        documents = [list(tokenize(text, add_special_tokens=False)["input_ids"]) for text in self._texts.documents]
        parts = [perplexity.windows(ids, in_front, self._context) for ids in documents]
        pairs = [pair for of_document in parts for pair in of_document]
        read, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        logprobs = iter(token_logprobs(self._model, read, predicted, PAD_ID, MAX_TOKENS))
        found: dict[str, list[float]] = {"losses": [], "tokens": []}
        for of_document in parts:
            columns = [next(logprobs) for _ in of_document]
            found["losses"].append(-float(sum(column.sum() for column in columns)))
            found["tokens"].append(sum(map(len, columns)))
        return found


def answered(renderer: Renderer, exam: Exam, name: str, prefix: str) -> list[Pair]:
    """(prompt, reference answer with its end of turn) of a set's queries: what training on them would read."""
    asked = [Prompt.plain(query, prefix) for query in exam.sets[name].queries]
    return [(renderer.prompt(prompt), renderer.answer(prompt, prompt.query.answer or "").ids) for prompt in asked]


def gradient_norm(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Euclidean norm of the gradient by all weights of the answer's mean negative log-likelihood."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    batch = align([prompt], [answer], PAD_ID).to(model.device)
    logits_TV = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits[0]
    target_N = torch.tensor(list(answer), device=model.device)
    loss = torch.nn.functional.cross_entropy(logits_TV[batch.position_N].float(), target_N)
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return float(sum(g.double().square().sum() for g in gradients if g is not None)) ** 0.5


def _reference(exam: Exam, settings: MembershipSettings | None) -> Mapping[str, list[float]]:
    """The reference model's mean log-probability of each answer, by side; read once for all subjects."""
    if settings is None or settings.reference_model is None:
        return {}
    model_dir = resolve_model(settings.reference_model, "evaluate.membership.reference_model")
    only_loss = settings.model_copy(update={"gradients": False, "reference_model": None})
    reader = Reader(model_dir, exam, Texts(membership=only_loss))
    subject = Subject("reference", model_dir, "", "reference")
    return {side: values["loss"] for side, values in reader.read(subject)["membership"].items()}


def scores_of(readings: Readings, exam: Exam) -> dict[str, Score]:
    """Scores of one model by metric id."""
    seed = exam.settings.seed
    scores = {
        f"{name}.{metric}": uncertainty.score(np.array(values), clusters=references_of(exam.sets[name]), seed=seed)
        for name, by_metric in readings.get("choices", {}).items()
        for metric, values in by_metric.items()
    }
    if "membership" in readings and (settings := exam.settings.membership):
        sets = [exam.sets[getattr(settings, side)] for side in SIDES]
        clusters = (references_of(sets[0]), references_of(sets[1]))
        members, nonmembers = (readings["membership"][side] for side in SIDES)
        for attack in members:
            values = (np.array(members[attack]), np.array(nonmembers[attack]))
            scores[f"mia.{attack}.{settings.members}"] = membership.auc_score(*values, clusters, seed)
        if settings.retrained:
            key = f"mia.min_k.{settings.members}"
            scores[f"mia.privleak.{settings.members}"] = membership.privleak(scores[key], _retrained_auc(settings, key))
    if "neutral" in readings:
        losses, tokens = (np.array(readings["neutral"][name], np.float64) for name in ("losses", "tokens"))
        scores[perplexity.METRIC] = perplexity.perplexity(losses, tokens, seed)
    return scores


def _retrained_auc(settings: MembershipSettings, key: str) -> float:
    path, where = Path(settings.retrained or ""), "evaluate.membership.retrained"
    if not path.is_file():
        raise UserError(
            f"{where}: no such file: {path}", "name the results.json of an evaluation of the retrained model"
        )
    models = read_json(path).get("models", {})
    score = models.get(settings.retrained_name, {}).get(key)
    if score is None:
        raise UserError(
            f"{where}: {path} has no {key} of {settings.retrained_name!r}",
            f"evaluate that model with the same evaluate.membership; its models are {', '.join(models) or 'none'}",
        )
    if score["value"] >= 1:
        raise UserError(
            f"{where}: the AUC {key} is 1, so the model knows the members", "name a model that never saw them"
        )
    return float(score["value"])


def floors_of(exam: Exam) -> dict[str, dict[str, float]]:
    """Chance on the sets with choices."""
    return {
        f"{name}.{metric}": {"chance": choices.chance(query_set.queries)}
        for name, query_set in exam.sets.items()
        if query_set.queries[0].choices
        for metric in (choices.LETTER, choices.CLOZE)
    }
