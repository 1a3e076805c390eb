"""What models make of given texts, without generating: given answers, choices, membership inference, perplexity.

`Reader` opens one model directory with plain transformers; `read_all` opens each directory once, after the engines are closed,
for all that the settings ask for. `given_answers.py` and `given_texts.py` say which texts those are and turn the numbers into
scores. The numbers per item are kept on disk under the hash of all that decides them, so that an interrupted evaluation goes on
with the next model. A run that asks for nothing, or has everything on disk, loads no model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from duet.cache.errors import UserError
from duet.cache.files import sha256_json
from duet.cache.watch import Watch
from duet.stages.exam.exam import Exam, Subject, by_directory, references_of, stem_of
from duet.stages.exam.given_answers import Given, Pairs, given_of, pairs_of
from duet.stages.exam.given_texts import SIDES, Readings, Texts, texts_of
from duet.stages.exam.kept import recalled
from duet.stages.metrics import choices, membership, perplexity
from duet.stages.models.alignment import align
from duet.stages.models.directory import load_config, resolve_model
from duet.stages.models.identity import weights_sha256
from duet.stages.models.limits import check_length, context_length
from duet.stages.models.loading import load_model
from duet.stages.models.token_scores import token_logprobs, token_scores
from duet.stages.models.tokenizers import tokenizer_sha256
from duet.stages.questions.prompts import Prompt, Renderer
from duet.stages.settings.evaluate import MembershipSettings

# Most tokens of one forward pass, padding included: assumptions that fit 16 GB, not measured on a GPU. On a CPU the numbers are
# bit-equal with either limit; on a GPU the size of a pass may choose another kernel, and so last digits. Kept files do not
# record the limit, so each kind of text stays with the one that it has always been read with.
ANSWER_TOKENS = 8192
TEXT_TOKENS = 4096
PAD_ID = 0  # any id: padding on the right is never looked at

Pair = tuple[list[int], list[int]]  # prompt, answer
Losses = Mapping[str, list[float]]  # by side, mean log-probability of each answer


class Reader:
    """One model directory: its tokenizer, and its model loaded when first needed."""

    def __init__(self, model_dir: Path, exam: Exam) -> None:
        self.exam, self.model_dir = exam, model_dir
        self.renderer = exam.renderer(model_dir)

    @functools.cached_property
    def model(self) -> Any:
        exam = self.exam
        return load_model(self.model_dir, exam.settings.dtype, exam.trust_remote_code).to(exam.device)

    @functools.cached_property
    def hashes(self) -> list[str]:
        """Of the weights and of the tokenizer as it was opened; libraries that get the tokenizer may change it."""
        return [weights_sha256(self.model_dir), tokenizer_sha256(self.renderer.tokenizer)]

    @functools.cached_property
    def context(self) -> int:
        """Tokens that the model can read."""
        return context_length(load_config(self.model_dir, self.exam.trust_remote_code))

    def check(self, pairs: Sequence[Pair], where: str, subject: Subject) -> None:
        """Refuse pairs that do not fit the context."""
        for number, (prompt, answer) in enumerate(pairs):
            check_length(prompt, len(answer), self.context, f"{where}/{number}", subject.name)


def read_all(
    subjects: Sequence[Subject], exam: Exam, answers_dir: Path, texts_dir: Path, watch: Watch
) -> tuple[dict[str, dict[str, Given]], dict[str, Readings]]:
    """By subject, what it makes of given answers, by set, and of the other texts.

    The first is empty without `evaluate.likelihood`; the second of a subject is empty where no text is configured. What is on
    disk, in either folder, from the same weights, prompts, texts and settings is not read again. Raises Interrupted when
    `watch` stops the reading; what was read before is kept.
    """
    texts = texts_of(exam)
    reference = functools.cache(lambda: _reference(exam, texts.membership))
    given: dict[str, dict[str, Given]] = {}
    readings: dict[str, Readings] = {subject.name: {} for subject in subjects}
    if not (texts or exam.settings.likelihood):
        return given, readings
    for model_dir, of_directory in by_directory(subjects).items():
        reader = Reader(model_dir, exam)
        for subject in of_directory:
            if texts:
                readings[subject.name] = recalled(
                    texts_dir / f"{stem_of(subject.name)}.read.json",
                    texts_identity(reader, subject, texts),
                    functools.partial(_read_texts, reader, subject, texts, reference, watch),
                )
                done = sum(map(bool, readings.values()))
                watch.on_progress("read texts", done, len(subjects))
            if exam.settings.likelihood:
                pairs = pairs_of(reader.renderer, exam, subject)
                given[subject.name] = given_by(reader, subject, pairs, answers_dir, watch)
    return {subject.name: given[subject.name] for subject in subjects if subject.name in given}, readings


def read_given(subjects: Sequence[Subject], exam: Exam, folder: Path, watch: Watch) -> dict[str, dict[str, Given]]:
    """By subject, what it makes of given answers, by set, as `read_all`; empty without `evaluate.likelihood`."""
    found = {}
    for model_dir, of_directory in by_directory(subjects).items() if exam.settings.likelihood else ():
        reader = Reader(model_dir, exam)
        for subject in of_directory:
            found[subject.name] = given_by(reader, subject, pairs_of(reader.renderer, exam, subject), folder, watch)
    return found


def given_by(
    reader: Reader, subject: Subject, pairs: Mapping[str, Pairs], folder: Path, watch: Watch
) -> dict[str, Given]:
    """What a subject makes of these answers, by set; kept in `folder` under the subject's name."""
    for name, of_set in pairs.items():
        longest = [max(answers, key=len) for answers in of_set.answers]
        reader.check(list(zip(of_set.prompts, longest, strict=True)), name, subject)
    settings = [reader.exam.settings.dtype, reader.exam.device]
    kept = recalled(
        folder / f"{stem_of(subject.name)}.json",
        sha256_json([*reader.hashes, *settings, {name: of_set.ids for name, of_set in pairs.items()}]),
        functools.partial(_read_answers, reader, pairs, subject, watch),
    )
    return {name: Given.from_json(of_set) for name, of_set in kept.items()}


def _read_answers(reader: Reader, pairs: Mapping[str, Pairs], subject: Subject, watch: Watch) -> dict[str, Any]:
    """What one subject makes of the given answers, by set, as JSON."""
    found, done = {}, 0
    total = sum(len(answers) for of_set in pairs.values() for answers in of_set.answers)
    for name, of_set in pairs.items():
        watch.pause(f"{subject.name}, given answers,")
        counts = [len(answers) for answers in of_set.answers]
        prompts = [prompt for prompt, count in zip(of_set.prompts, counts, strict=True) for _ in range(count)]
        flat = list(chain.from_iterable(of_set.answers))
        scores = iter(token_scores(reader.model, prompts, flat, PAD_ID, ANSWER_TOKENS))
        found[name] = given_of([[next(scores) for _ in range(count)] for count in counts], of_set).as_json()
        done += len(flat)
        watch.on_progress(f"{subject.name}: given answers", done, total)
    return found


def texts_identity(reader: Reader, subject: Subject, texts: Texts) -> str:
    """Hash of everything that decides what a subject makes of texts."""
    exam = reader.exam
    rules = [metric.version for metric in choices.METRICS] if texts.with_choices else []
    names = [*texts.with_choices, *(getattr(texts.membership, side) for side in SIDES if texts.membership)]
    asked = {
        name: [[q.asked, q.answer, q.choices, q.right] for q in exam.sets[name].queries] + [subject.prefix_of(name)]
        for name in names
    }
    reference = texts.membership and texts.membership.reference_model
    hashed = weights_sha256(resolve_model(reference, "evaluate.membership.reference_model")) if reference else None
    settings = [
        reader.renderer.provenance,
        exam.settings.dtype,
        exam.device,
        texts.membership and texts.membership.model_dump(),
    ]
    asked_for = [asked, texts.with_choices, settings, texts.documents, subject.prefix]
    return sha256_json([[*reader.hashes, hashed], *asked_for, *rules])


def _read_texts(
    reader: Reader, subject: Subject, texts: Texts, reference: Callable[[], Losses], watch: Watch
) -> Readings:
    """What one subject makes of all texts, as JSON."""
    watch.pause(f"{subject.name}, read texts,")
    found: dict[str, Any] = {}
    if texts.with_choices:
        found["choices"] = {name: _choices(reader, subject, name) for name in texts.with_choices}
    if settings := texts.membership:
        losses = reference() if settings.reference_model else {}
        found["membership"] = {side: _membership(reader, subject, settings, side, losses.get(side)) for side in SIDES}
    if texts.documents:
        found["neutral"] = _neutral(reader, subject, texts.documents)
    return found


def _choices(reader: Reader, subject: Subject, name: str) -> dict[str, list[float]]:
    """By metric, 1 for each question of a set where the right choice is chosen, else 0."""
    queries, prefix = reader.exam.sets[name].queries, subject.prefix_of(name)
    rights = [query.right or 0 for query in queries]
    found = {}
    for metric, asked in ((choices.LETTER, choices.letter_pairs), (choices.CLOZE, choices.cloze_pairs)):
        pairs = [asked(reader.renderer, query, prefix) for query in queries]
        flat = [pair for of_query in pairs for pair in zip(*of_query, strict=True)]
        reader.check(flat, f"{name}.{metric}", subject)
        found[metric] = choices.chosen_right(reader.model, pairs, rights, PAD_ID, TEXT_TOKENS).tolist()
    return found


def _membership(
    reader: Reader, subject: Subject, settings: MembershipSettings, side: str, reference: list[float] | None = None
) -> dict[str, list[float]]:
    """Per attack whose needs are met, a number per query; `reference` are the reference model's losses."""
    name = getattr(settings, side)
    pairs = answered(reader.renderer, reader.exam, name, subject.prefix_of(name))
    reader.check(pairs, name, subject)
    prompts, answers = zip(*pairs, strict=True)
    scored = token_scores(reader.model, prompts, answers, PAD_ID, TEXT_TOKENS)
    texts = references_of(reader.exam.sets[name])
    found = {
        "loss": [membership.loss(s.logprob) for s in scored],
        "zlib": [membership.zlib_ratio(s.logprob, text) for s, text in zip(scored, texts, strict=True)],
        "min_k": [membership.min_k(s.logprob, settings.min_k) for s in scored],
        "min_k_plus": [membership.min_k_plus(s, settings.min_k) for s in scored],
    }
    if settings.gradients:
        found["gradient"] = [membership.gradient(gradient_norm(reader.model, *pair)) for pair in pairs]
    if reference is not None:
        found["reference"] = [membership.reference(s.logprob, at) for s, at in zip(scored, reference, strict=True)]
    return found


def _reference(exam: Exam, settings: MembershipSettings | None) -> Losses:
    """The reference model's mean log-probability of each answer, by side; read once for all subjects."""
    if settings is None or settings.reference_model is None:
        return {}
    model_dir = resolve_model(settings.reference_model, "evaluate.membership.reference_model")
    reader, subject = Reader(model_dir, exam), Subject("reference", model_dir, "", "reference")
    only_loss = settings.model_copy(update={"gradients": False})
    return {side: _membership(reader, subject, only_loss, side)["loss"] for side in SIDES}


def _neutral(reader: Reader, subject: Subject, documents: Sequence[str]) -> dict[str, list[float]]:
    """Of each document the summed negative log-likelihood, and the number of tokens that it is of."""
    in_front = reader.renderer.in_front_of_text(subject.prefix)
    tokenize = functools.partial(reader.renderer.tokenizer, verbose=False)
    if len(in_front) + 2 > reader.context:
        raise UserError(
            f"{subject.name}: its prefix leaves no room for neutral text", "leave evaluate.neutral_text out"
        )
    ids = [list(tokenize(text, add_special_tokens=False)["input_ids"]) for text in documents]
    parts = [perplexity.windows(of_document, in_front, reader.context) for of_document in ids]
    pairs = [pair for of_document in parts for pair in of_document]
    read, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    logprobs = iter(token_logprobs(reader.model, read, predicted, PAD_ID, TEXT_TOKENS))
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
